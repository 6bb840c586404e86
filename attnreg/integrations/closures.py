"""Reading transformers' mask functions.

transformers builds a mask function out of closures, which say nothing about themselves: a formatter could only call
them. Their names and what they enclose do tell what they are, so those that are known become attnreg's predicates,
which a formatter can read. What is not known, or looks different than expected, stays a function to be called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import masking_utils

from attnreg.errors import InvalidInputError
from attnreg.integrations.recording import recorded
from attnreg.masks import (
    And,
    Bidirectional,
    Causal,
    MaskFunction,
    Predicate,
    Window,
    and_masks,
    bidirectional,
    blocks,
    causal,
    chunked,
    documents,
    or_masks,
    padding,
    window,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_FUNCTIONS: Final[dict[Any, Predicate]] = {
    masking_utils.causal_mask_function: causal(),
    masking_utils.bidirectional_mask_function: bidirectional(),
}

_CLOSURES: Final[dict[str, Callable[[dict[str, Any]], MaskFunction]]] = {
    "sliding_window_overlay": lambda held: window(held["sliding_window"] - 1, None),
    "sliding_window_bidirectional_overlay": lambda held: window(held["sliding_window"], held["sliding_window"]),
    "chunked_overlay": lambda held: chunked(held["chunk_size"], held["left_padding"]),
    "blockwise_overlay": lambda held: blocks(held["block_sequence_ids"]),
    "padding_mask_function": lambda held: padding(held["padding_mask"]),
    "packed_sequence_mask_function": lambda held: documents(held["packed_sequence_mask"]),
    "and_masks": lambda held: and_masks(*_conjunction(held["mask_functions"])),
    "or_masks": lambda held: or_masks(*(read(each) for each in held["mask_functions"])),
}
"""What made a closure → how to make the predicate of what it holds."""


def read(function: MaskFunction, *, own: bool = False) -> MaskFunction:
    """Return the predicate that *function* is, or *function* itself if it is none that is known.

    Args:
        function: a mask function.
        own: nobody but transformers has had a hand in it. In a trace, where closures cannot be looked into, such a
            function is read by what it computes; others stay functions.
    """
    if isinstance(function, Predicate):
        return function
    if (known := _FUNCTIONS.get(function)) is not None:
        return known
    if torch.compiler.is_compiling():
        return (recorded(function) or function) if own else function
    maker, held = _held(function)
    if maker not in _CLOSURES:
        return function
    try:
        return _CLOSURES[maker](held)
    except (KeyError, TypeError, InvalidInputError):  # another version's closure of the same name
        return function


def _conjunction(functions: tuple[Any, ...]) -> list[MaskFunction]:
    """Read the terms of a conjunction.

    In a packed row transformers counts positions from the start of each document. Beside the documents themselves that
    makes no difference to what depends on distance alone.
    """
    packed = any(_held(each)[0] == "packed_sequence_mask_function" for each in functions)
    terms = []
    for each in functions:
        maker, held = _held(each)
        if packed and maker == "remap_positions_for_packed_sequence" and _is_band(inner := read(held["mask_function"])):
            terms.append(inner)
        else:
            terms.append(read(each))
    return terms


def _is_band(function: MaskFunction) -> bool:
    if isinstance(function, And):
        return all(_is_band(term) for term in function.terms)
    return isinstance(function, Causal | Bidirectional | Window)


def _held(function: Any) -> tuple[str, dict[str, Any]]:
    """Return the name of what made a closure of transformers' `masking_utils`, and what it holds by name."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or not cells or getattr(function, "__module__", None) != masking_utils.__name__:
        return "", {}
    maker = function.__qualname__.partition(".")[0]
    return maker, {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}
