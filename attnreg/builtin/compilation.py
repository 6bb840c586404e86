"""Flex attention, compiled once for each structure, with a bound that torch.compile cannot run past unnoticed.

torch.compile keeps at most eight variants of one piece of code, and flex attention has one variant for each mask
function, dtype and head dimension that it meets. Past the eighth it runs unfused, and holds all scores: ten times
slower, with a warning that is easily missed. So each structure has a piece of code of its own here, whose eight
variants are left for what torch.compile finds out by itself, such as lengths.

Source: https://docs.pytorch.org/docs/stable/generated/torch.compiler.config.html (recompile_limit).
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import flex_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

_BLOCK: Final = 128
LARGEST: Final = 128
"""Structures that are kept compiled at once."""

_kept: Final[OrderedDict[tuple[Hashable, bool], Callable[..., Any]]] = OrderedDict()
_lock: Final = threading.Lock()


class RecompilationWarning(UserWarning):
    """Flex attention is compiled more often than it should be."""


def compiled(structure: Hashable, /, *tensors: torch.Tensor, **keywords: Any) -> Any:
    """Call flex attention as it was compiled for *structure*, compiling it if it was not.

    The first lengths get a kernel made for them, and as soon as others come, one for all lengths, which is a tenth
    slower and more (and without which single queries would miss their own kernel). Lengths that are whole blocks are
    told apart: a kernel that need not look where a block ends is faster, too.

    Args:
        structure: what the mask function and the score function are like, but for the contents of their tensors.
        tensors: query, key and value.
        keywords: of `flex_attention`.
    """
    structure = structure, not any(tensor.shape[2] % _BLOCK for tensor in tensors)
    call = _call_for(structure)
    try:
        return call(*tensors, **keywords)
    except FailOnRecompileLimitHit:
        _warn(
            f"flex attention was compiled {torch._dynamo.config.recompile_limit} times for one structure, and is "  # noqa: SLF001
            "compiled anew. Something changes from call to call that torch.compile takes for a constant: most likely "
            "numbers in a mask function of your own. Keep them in tensors, or use the mask functions of attnreg.masks."
        )
        with _lock:
            _kept.pop(structure, None)
        return _call_for(structure)(*tensors, **keywords)


def _call_for(structure: tuple[Hashable, bool]) -> Callable[..., Any]:
    with _lock:
        call = _kept.get(structure)
        if call is None:
            call = _kept[structure] = _new(whole_blocks=structure[1])
            if len(_kept) > LARGEST:
                _kept.popitem(last=False)
                _warn(
                    f"more than {LARGEST} structures were compiled for flex attention; the one used longest ago is "
                    "dropped, and compiled anew when it comes back. Mask functions that are made anew for each call "
                    "count each: make them once, or use those of attnreg.masks."
                )
        else:
            _kept.move_to_end(structure)
        return call


def _new(*, whole_blocks: bool) -> Callable[..., Any]:
    function: Callable[..., Any] = flex_attention

    def call(*tensors: torch.Tensor, **keywords: Any) -> Any:
        if whole_blocks:
            for tensor in tensors:
                torch._check(tensor.shape[2] % _BLOCK == 0)  # type: ignore[no-untyped-call]  # noqa: SLF001
        return function(*tensors, **keywords)

    # A copy of the code is another piece of code to torch.compile, with eight variants of its own.
    call.__code__ = call.__code__.replace(co_name="attnreg_flex_attention")
    return torch.compile(call, fullgraph=True)


def signature(function: Any) -> Hashable:
    """Return what torch.compile would compile anew for, of a mask function or a score function.

    Of tensors that is how many axes they have and which of these broadcast; of functions, their code.
    """
    match function:
        case functools.partial():
            return signature(function.func), tuple(map(signature, function.args))
        case torch.Tensor():
            return function.dtype, tuple(size == 1 for size in function.shape), function.requires_grad
        case tuple():
            return type(function), tuple(map(signature, function))
        case None | bool() | int() | float() | str():
            return function
        case _:
            code: Hashable = getattr(function, "__code__", None)
            return f"{type(function)}" if code is None else code


def _warn(message: str) -> None:
    warnings.warn(message, RecompilationWarning, stacklevel=5)
