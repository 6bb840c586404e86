"""Attention over a cache in pages: the cache itself, and `paged|X` for every backend X."""

from __future__ import annotations

from attnreg.paged.pages import Cache, Pages

__all__ = ["Cache", "Pages"]
