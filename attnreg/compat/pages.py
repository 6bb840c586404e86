"""Calls over pages, for kernels that read block tables: checked by `prepared`, ended by `Pages.finished`."""

from __future__ import annotations

from attnreg.builtin.pages import Pages, prepared

__all__ = ["Pages", "prepared"]
