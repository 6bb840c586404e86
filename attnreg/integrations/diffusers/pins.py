"""Keeping a module's dispatch on `native`, whatever diffusers' active backend is, and telling what the user wants.

diffusers reads the backend of a call off the module's processor, and where that says nothing, off one setting of the
whole process, which `set_attention_backend` of any model changes. So the processor of a module that is served says
`native`, in a way that can be told from the user's own `native`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

if TYPE_CHECKING:
    import torch

ATTRIBUTE: Final = "_attention_backend"
_KEPT: Final = "_attnreg_pinned"
"""Where a module that is served keeps the processors that were pinned for it."""


class Pinned(str):
    """diffusers reads it as `native`; *own* is what the processor said before, nothing if it said nothing itself."""

    __slots__ = ("own",)
    own: tuple[Any, ...]

    def __new__(cls, own: tuple[Any, ...] = ()) -> Self:
        """Make one."""
        pinned = super().__new__(cls, "native")
        pinned.own = own
        return pinned

    def __reduce__(self) -> tuple[Any, ...]:
        return Pinned, (self.own,)


def pin(module: torch.nn.Module) -> None:
    """Have the module's processor dispatch to `native`; those that never dispatch elsewhere are left alone."""
    processor = getattr(module, "processor", None)
    if not hasattr(processor, ATTRIBUTE):
        return
    if not isinstance(said(processor), Pinned):
        own = vars(processor)
        setattr(processor, ATTRIBUTE, Pinned((own[ATTRIBUTE],) if ATTRIBUTE in own else ()))
    # diffusers keeps processors aside and puts them back, as around fused projections.
    kept = vars(module).setdefault(_KEPT, [])
    if not any(each is processor for each in kept):
        kept.append(processor)


def unpin(module: torch.nn.Module) -> None:
    """Have the processor say again what it said before, and those that the module had since it was served."""
    for processor in (*vars(module).pop(_KEPT, ()), getattr(module, "processor", None)):
        if isinstance(pinned := said(processor), Pinned):
            if pinned.own:
                setattr(processor, ATTRIBUTE, pinned.own[0])
            else:
                delattr(processor, ATTRIBUTE)


def said(processor: Any) -> Any:
    """Return the backend that the processor asks for; None if it says nothing."""
    return getattr(processor, ATTRIBUTE, None)


def said_before(processor: Any) -> str | None:
    """Return the name of the backend that the processor asks for, or asked for before it was pinned."""
    found = said(processor)
    if isinstance(found, Pinned):
        found = found.own[0] if found.own else getattr(type(processor), ATTRIBUTE, None)
    return None if found is None else str(AttentionBackendName(found).value)


def chosen_by_user(processor: Any) -> bool:
    """Whether the processor asks for one of diffusers' own backends, by the user's word."""
    found = said(processor)
    return found is not None and not isinstance(found, Pinned)


def active() -> str:
    """Return the name of the backend that those processors use which say nothing."""
    # There is no public way to ask; a plain name stands there if the user has written one.
    found: Any = _AttentionBackendRegistry._active_backend  # noqa: SLF001
    return str(found.value) if isinstance(found, AttentionBackendName) else str(found)
