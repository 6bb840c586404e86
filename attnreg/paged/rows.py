"""Sequences of different lengths on a backend that computes rows: those of one query in batches, each other alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from attnreg import compat, masks
from attnreg.backend import NO_MASK
from attnreg.paged.runs import runs_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attnreg.backend import Backend
    from attnreg.paged.gathering import Tokens

    Result = tuple[torch.Tensor, None] | tuple[torch.Tensor, None, torch.Tensor]


class Call(NamedTuple):
    """A call that is made in parts."""

    backend: Backend
    module: Any
    query: torch.Tensor
    tokens: Tokens
    is_causal: bool
    window: int | None
    keywords: dict[str, Any]

    @property
    def singles(self) -> int:
        """How many sequences, from the first on, have one query, and so can be computed as rows of one batch."""
        structures = self.backend.supports.at(self.query.device.type).structures
        if self.backend.mask is NO_MASK or "padding" not in (structures or {"padding"}):
            return 0  # it has no words for rows of different lengths
        lengths = self.tokens.lengths_q
        return next((place for place, length in enumerate(lengths) if length != 1), len(lengths))


def one_by_one(call: Call) -> Result:
    """Call a backend for rows: once for all sequences of one query, and once for each of the others."""
    singles = call.singles
    parts = [*_singles(call, singles), *_others(call, singles)]
    if not parts:
        key, value = (each.transpose(0, 1)[None] for each in (call.tokens.key, call.tokens.value))
        return compat.nothing(call.query, key, value, return_lse=bool(call.keywords.get("return_lse")))
    return joined(parts, call.query.shape[2])


def _singles(call: Call, singles: int) -> Iterator[Any]:
    found = runs_of(call.tokens, singles, call.window)
    rows, begin = found.sorted(call.query[0, :, :singles], 1).transpose(0, 1)[:, :, None], 0
    parts: list[Any] = []
    for which in found.parts:
        key, value, lengths = call.tokens.in_rows(which, call.window)
        parts.append(as_one_row(_computed(call, rows[begin : begin + len(which)], key, value, lengths)))
        begin += len(which)
    if parts and found.order is None:
        yield from parts
    elif parts:
        output, _, *lse = joined(parts, singles)
        yield found.restored(output, 1), None, *(found.restored(each, 2) for each in lse)


def _others(call: Call, singles: int) -> Iterator[Any]:
    lengths_q = call.tokens.lengths_q
    if singles == len(lengths_q):
        return
    which = range(singles, len(lengths_q))
    key, value, lengths = call.tokens.together(which, call.window)
    begin_q, begin_k = singles, 0
    for each, length in zip(which, lengths, strict=True):
        end_q, end_k = begin_q + lengths_q[each], begin_k + length
        if end_q > begin_q:
            parts = call.query[:, :, begin_q:end_q], key[:, :, begin_k:end_k], value[:, :, begin_k:end_k]
            yield _computed(call, *parts, [length])
        begin_q, begin_k = end_q, end_k


def _computed(
    call: Call, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]
) -> tuple[Any, ...]:
    """Call the backend with rows whose last query is at their last key; what is too much stands at their beginnings."""
    mask = _mask(call, query, key, lengths)
    result: tuple[Any, ...] = call.backend.call(
        call.module,
        query,
        key,
        value,
        mask,
        is_causal=call.is_causal,
        sliding_window=call.window,
        **call.keywords,
    )
    return result


def _mask(call: Call, query: torch.Tensor, key: torch.Tensor, lengths: list[int]) -> Any:
    rows, q_length, kv_length = query.shape[0], query.shape[2], key.shape[2]
    what = "mask", call.backend.name, q_length, tuple(lengths), call.is_causal, call.window, query.dtype
    if what not in call.tokens.shared:
        padding = None
        if any(length != kv_length for length in lengths):
            numbers = torch.tensor(lengths, device=query.device)[:, None]
            padding = torch.arange(kv_length, device=query.device) >= kv_length - numbers
        call.tokens.shared[what] = call.backend.format(
            batch_size=rows,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=kv_length - q_length,
            mask_function=_predicate(call),
            attention_mask=padding,
            allow_is_bidirectional_skip=True,
            dtype=query.dtype,
            device=query.device,
        )
    return call.tokens.shared[what]


def _predicate(call: Call) -> Any:
    if call.is_causal:
        return masks.causal() if call.window is None else masks.causal() & masks.sliding_window(call.window)
    return masks.bidirectional() if call.window is None else masks.window(call.window - 1, call.window - 1)


def as_one_row(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lay rows of one query each one after the other."""
    output, *rest = result
    output = output.transpose(0, 1)
    return (output, None, rest[1].permute(2, 1, 0)) if len(rest) > 1 else (output, None)


def joined(parts: list[Any], length: int) -> Result:
    """Lay the parts one after the other, and fill the row up with 0 and a log-sum-exp of -inf."""
    output = torch.cat([part[0] for part in parts], 1) if len(parts) > 1 else parts[0][0]
    missing = length - output.shape[1]
    if missing:
        output = torch.nn.functional.pad(output, (0, 0, 0, 0, 0, missing))
    if len(parts[0]) == 2:  # noqa: PLR2004 - output and weights
        return output, None
    lse = torch.cat([part[2] for part in parts], 2)
    return output, None, torch.nn.functional.pad(lse, (0, missing), value=float("-inf")) if missing else lse
