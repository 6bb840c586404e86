"""Kernels of the Hugging Face Hub as backends: the names `org/repo@revision[:function]`.

A Hub kernel is somebody else's code, so nothing of it runs unless three things have been said:

- that the repository may be used: `allow`, or `ATTNREG_KERNELS_ALLOW`;
- which of its states: the name has a revision or a version;
- what its function does: `declare`. The mask format is never guessed.

Asking for a name downloads nothing; the first call of the backend does. Where the Hub cannot say whether it trusts the
publisher, the kernel is refused unless `trust`, or `ATTNREG_KERNELS_TRUST`, names it.

Importing this package imports neither torch nor `kernels`.
"""

from __future__ import annotations

import attnreg
from attnreg_kernels.declarations import CAPABILITIES, OWN, declare
from attnreg_kernels.local_kernels import local
from attnreg_kernels.permission import allow, trust

__all__ = ["CAPABILITIES", "OWN", "allow", "declare", "local", "trust"]


@attnreg.hookimpl
def attnreg_provide(name: str) -> attnreg.Backend | None:
    """Provide the backend called *name*; what is heavy is imported here, not above."""
    from attnreg_kernels.provision import provide

    return provide(name)
