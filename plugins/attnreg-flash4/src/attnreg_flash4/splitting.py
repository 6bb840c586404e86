"""Decoding on Hopper: the keys in parts, because one query for each row leaves most of the GPU idle.

The kernel itself splits keys on later GPUs only. Here the parts are sequences: each row's keys are cut where they lie,
without copying, the query is handed to each part, and the results are put together by their log-sum-exp. Keys lie in
memory row by row or, in a cache, head by head; heads that lie so are rows of one head.

Source: split keys, https://pytorch.org/blog/flash-decoding/.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from attnreg import compat

if TYPE_CHECKING:
    from attnreg.compat import flash

SMALLEST: Final = 512
"""Keys of a part, at least: shorter ones are not worth the way."""
LONG: Final = 65536
"""Keys from which it is worth the time that Python takes for it: on an H200 half a millisecond in all."""
LONG_IN_A_GRAPH: Final = 4096
"""The same in a CUDA graph or a compiled one, where Python takes no time."""


class Parts(NamedTuple):
    """A call in parts.

    Attributes:
        query: `(rows * parts, heads, head_dim)`.
        key: `(tokens, kv_heads, head_dim)`.
        value: `(tokens, kv_heads, value_head_dim)`.
        ends_q: int32 `(rows * parts + 1,)`, where each part's query begins and ends.
        ends_k: the same for its keys.
        longest: keys of the longest part.
        rows: of one query each; rows of the batch, or their heads of keys.
        number: parts of each row.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    ends_q: torch.Tensor
    ends_k: torch.Tensor
    longest: int
    rows: int
    number: int

    def together(
        self, output: torch.Tensor, lse: torch.Tensor, sizes: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the parts' results together.

        Args:
            output: `(rows * parts, heads, value_head_dim)`.
            lse: float32 `(heads, rows * parts)`.
            sizes: the call's, whose first is the batch and whose second is the query heads.

        Returns:
            The output `(batch, 1, heads, value_head_dim)`, and the log-sum-exp `(batch, heads, 1)`.
        """
        batch, query_heads = sizes[:2]
        heads, value_head_dim = output.shape[1], output.shape[2]
        each = lse.reshape(heads, self.rows, self.number).transpose(0, 1)
        shares = torch.softmax(each, dim=-1)[:, :, None]
        parts = output.reshape(self.rows, self.number, heads, value_head_dim).transpose(1, 2)
        summed = torch.matmul(shares, parts.float()).to(output.dtype)
        total = torch.logsumexp(each, dim=-1)
        return summed.reshape(batch, 1, query_heads, value_head_dim), total.reshape(batch, query_heads, 1)


def in_parts(call: flash.Call, asked: int | None) -> Parts | None:
    """Cut a call into parts; None if that is not worth it, or would take copies.

    Args:
        call: of rows, with one query each and no limit on the left.
        asked: how many parts; None for as many as keep the GPU's processors busy.
    """
    batch, query_heads, _, kv_length, kv_heads = call.sizes
    worth = asked is not None or kv_length >= (LONG if compat.readable(call.key) else LONG_IN_A_GRAPH)
    count = _count(batch * kv_heads, kv_length, call.key.device) if worth and asked is None else asked or 1
    if count < 2:  # noqa: PLR2004 - the kernel by itself
        return None
    key, value = call.key, call.value
    by_heads = key.transpose(1, 2).is_contiguous() and value.transpose(1, 2).is_contiguous()
    if by_heads:
        rows, heads, kept = batch * kv_heads, query_heads // kv_heads, 1
        key, value = key.transpose(1, 2), value.transpose(1, 2)
    elif key.is_contiguous() and value.is_contiguous():
        rows, heads, kept = batch, query_heads, kv_heads
    else:
        return None
    query = call.query.reshape(rows, 1, heads, call.query.shape[3]).expand(rows, count, heads, call.query.shape[3])
    ends_q, ends_k = _ends(rows, count, kv_length, key)
    return Parts(
        query=query.reshape(rows * count, heads, call.query.shape[3]),
        key=key.reshape(rows * kv_length, kept, key.shape[3]),
        value=value.reshape(rows * kv_length, kept, value.shape[3]),
        ends_q=ends_q,
        ends_k=ends_k,
        longest=-(-kv_length // count),
        rows=rows,
        number=count,
    )


def _count(tiles: int, kv_length: int, device: torch.device) -> int:
    """Return how many parts there should be, where each row and head of keys keeps one processor busy."""
    return min(_processors(device) // tiles, kv_length // SMALLEST) if tiles else 1


@functools.cache
def _processors_of(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.get_device_properties(index).multi_processor_count if compat.tracing() else _processors_of(index)


def _ends(rows: int, count: int, length: int, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not compat.readable(key):
        return _made(rows, count, length, key.device)
    # Another stream would have to wait for the one that makes them.
    stream = 0 if key.is_cpu else torch.accelerator.current_stream(key.device).stream_id
    return _kept(rows, count, length, key.device, stream)


def _made(rows: int, count: int, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the parts' queries and keys begin and end: the parts of a row differ by one key at most."""
    numbers = torch.arange(rows * count + 1, device=device)
    row, part = numbers.div(count, rounding_mode="floor"), numbers % count
    ends = row * length + (part * length).div(count, rounding_mode="floor")
    return numbers.to(torch.int32), ends.to(torch.int32)


@functools.lru_cache(maxsize=64)
def _kept(
    rows: int,
    count: int,
    length: int,
    device: torch.device,
    stream: int,  # noqa: ARG001
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep them for all layers of a model, which decode the same length."""
    with torch.inference_mode(mode=False):
        return _made(rows, count, length, device)
