"""Queries without any key: which they are, and what becomes of them."""

from __future__ import annotations

import torch

from attnreg.masks.extent import readable

_REMEMBERED = "_attnreg_empty_rows"


def empty_rows(mask: torch.Tensor) -> torch.Tensor:
    """Return which rows of a mask in SDPA's terms hide every key: bool, the mask's axes but the last.

    All layers of a model are handed one mask, so the answer stays with it, until it is written to.
    """
    if not readable(mask) or mask.is_inference():
        return _searched(mask)
    known = getattr(mask, _REMEMBERED, None)
    if known is None or known[0] != mask._version:  # noqa: SLF001 - counts what writes to a tensor
        known = mask._version, _searched(mask)  # noqa: SLF001
        setattr(mask, _REMEMBERED, known)
    found: torch.Tensor = known[1]
    return found


def rows_before(q_length: int, kv_length: int, device: torch.device) -> torch.Tensor | None:
    """Return which queries are before the first key when the last ones meet: bool `(1, 1, q_length)`, or None."""
    if q_length <= kv_length:
        return None
    return (torch.arange(q_length, device=device) < q_length - kv_length)[None, None]


def _searched(mask: torch.Tensor) -> torch.Tensor:
    allowed = mask if mask.dtype is torch.bool else mask != float("-inf")
    return ~allowed.any(dim=-1)
