"""All laws, by subject, in the order in which a kernel's author wants to hear about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attnreg.testing.laws import form, masks, order, pages, process, results, scores

if TYPE_CHECKING:
    from attnreg.testing.law import Law

LAWS: Final[dict[str, Law]] = {
    law.name: law for laws in (form, scores, masks, results, order, pages, process) for law in laws.LAWS
}
"""Every law by its name."""
