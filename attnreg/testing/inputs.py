"""From a case to tensors, and to the request that the reason engine judges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from attnreg import Request, masks
from attnreg.testing.patterns import Rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from attnreg.paged import Cache
    from attnreg.testing.case import Case
    from attnreg.testing.subject import Subject

_FORBIDDEN = 0.3
"""Share of keys that a random ready-made mask hides."""


class Inputs(NamedTuple):
    """The tensors of a case; what it does not ask for is None. With a table, key and value are pages."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    function: Any
    real: torch.Tensor | None
    ready: torch.Tensor | None
    bias: torch.Tensor | None
    sinks: torch.Tensor | None
    starts: torch.Tensor | None
    table: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    cache: Cache | None = None

    @property
    def heads(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value

    def copied(self) -> Inputs:
        """Return equal tensors that nobody else holds."""
        copies: dict[str, Any] = {
            name: each.detach().clone() for name, each in self._asdict().items() if isinstance(each, torch.Tensor)
        }
        return self._replace(**copies)


def inputs_of(case: Case, subject: Subject) -> Inputs:
    """Make the tensors; equal cases give equal tensors."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(subject.device, subject.dtype)

    query = normal(case.batch, case.heads, case.q_length, case.head_dim)
    key = normal(case.batch, case.kv_heads, case.kv_length, case.head_dim)
    value = normal(case.batch, case.kv_heads, case.kv_length, case.value_head_dim or case.head_dim)
    function, real = mask_of(case, subject.device)
    query, key, value = (
        laid_out(tensor, layout).requires_grad_(case.backward)
        for tensor, layout in zip((query, key, value), _layouts(case.layout), strict=True)
    )
    return Inputs(
        query=query,
        key=key,
        value=value,
        function=function,
        real=real,
        ready=_ready(case, generator, subject),
        bias=_bias(case, normal, subject) if case.bias else None,
        sinks=normal(case.heads) if case.sinks else None,
        starts=starts_of(case, subject.device),
    )


def mask_of(case: Case, device: torch.device) -> tuple[Any, torch.Tensor | None]:
    """Return the predicate and the 2D padding mask."""
    length = case.kv_offset + case.kv_length
    real = _padding(case, length, device)
    if case.packed:
        return masks.documents(cu_seqlens=starts_of(case, device)), real
    if case.pattern is None:
        return None, real
    left = torch.zeros(case.batch, dtype=torch.long, device=device)
    if real is not None and case.padding in ("left", "both"):
        left = real.long().argmax(dim=1)
    return case.pattern.build(Rows(case.batch, max(length, case.q_offset + case.q_length), left, device)), real


def starts_of(case: Case, device: torch.device) -> torch.Tensor | None:
    """Return where the two sequences of a packed row begin and end, int32 `(3,)`."""
    if not case.packed:
        return None
    return torch.tensor([0, case.kv_length // 2, case.kv_length], dtype=torch.int32, device=device)


def request_of(case: Case, inputs: Inputs) -> Request:
    """Say what the case needs, as the guard and the formatters see it."""
    structures: set[str] = set()
    if case.pattern is not None:
        structures |= set(getattr(inputs.function, "structures", {"opaque"}))
        structures |= {"per_head"} if case.pattern.per_head else set()
        structures |= {"padding"} if inputs.real is not None else set()
    unmasked = case.pattern is None and not case.ready
    window = case.sliding_window
    return Request.of(
        *inputs.heads,
        structures=frozenset(structures),
        is_causal=unmasked and flagged_causal(case) and inputs.query.shape[2] > 1,
        sliding_window=unmasked and window is not None and _longest(case) > window,
        softcap=case.softcap is not None,
        sinks=case.sinks,
        position_bias=bool(case.bias) and case.bias != "alibi",
        alibi=case.bias == "alibi",
        lse=case.lse,
        weights=case.weights,
        backward=case.backward,
        dropout=case.dropout > 0,
        packing=inputs.starts is not None,
        paged=case.pages is not None,
        page_size=None if inputs.table is None else inputs.key.shape[2],
        sparse=case.sparse,
    )


def _longest(case: Case) -> int:
    return case.kv_length if case.pages is None else max(case.pages.tokens)


def flagged_causal(case: Case) -> bool:
    """Whether a call without a mask is causal: the keyword, else the module, else yes."""
    module = True if case.module_is_causal is None else case.module_is_causal
    return module if case.is_causal is None else case.is_causal


def _padding(case: Case, length: int, device: torch.device) -> torch.Tensor | None:
    if not case.padding:
        return None
    real = torch.ones(case.batch, length, dtype=torch.bool, device=device)
    third = max(1, length // 3)
    begin, end = case.kv_offset, length
    hidden = {
        "left": [slice(begin, begin + third)],
        "right": [slice(end - third, end)],
        "both": [slice(begin, begin + third), slice(end - 1, end)],
        "inside": [slice(begin + third, begin + 2 * third)],
        "row": [slice(begin, end)],
        "none": [],
    }[case.padding]
    for part in hidden:
        real[-1, part] = False
    return real


def _ready(case: Case, generator: torch.Generator, subject: Subject) -> torch.Tensor | None:
    if not case.ready:
        return None
    shape = _score_shape(case, case.ready_shape)
    allowed = torch.rand(shape, generator=generator) > _FORBIDDEN
    allowed[..., -1] = True
    if case.ready == "bool":
        return allowed.to(subject.device)
    lowest = float("-inf") if case.ready == "-inf" else torch.finfo(subject.dtype).min
    added = torch.randn(shape, generator=generator).to(subject.dtype)
    return added.masked_fill(~allowed, lowest).to(subject.device)


def _bias(case: Case, normal: Callable[..., torch.Tensor], subject: Subject) -> torch.Tensor:
    if case.bias != "alibi":
        return normal(*_score_shape(case, case.bias))
    slopes = 2.0 ** -torch.arange(1, case.heads + 1, device=subject.device)
    queries = torch.arange(case.kv_length - case.q_length, case.kv_length, device=subject.device)
    distances = (queries[:, None] - torch.arange(case.kv_length, device=subject.device)).abs()
    return (-slopes[:, None, None] * distances)[None].to(subject.dtype)


def _score_shape(case: Case, kind: str) -> tuple[int, int, int, int]:
    rows, heads, queries = {
        "full": (case.batch, case.heads, case.q_length),
        "per head": (1, case.heads, case.q_length),
        "per row": (case.batch, 1, case.q_length),
        "shared": (1, 1, case.q_length),
        "one query": (1, case.heads, 1),
    }[kind]
    return rows, heads, queries, case.kv_length


def _layouts(layout: str) -> list[str]:
    """Return the layouts of query, key and value, of which one may be named."""
    how, _, only = layout.partition(" ")
    return [how if only in ("", name) else "" for name in ("query", "key", "value")]


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the same values as a view of something else."""
    if layout == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        room = torch.full((*tensor.shape[:2], tensor.shape[2] + 3, 2 * tensor.shape[3]), 7.0).to(tensor)
        part = room[:, :, 2:-1, : tensor.shape[3]]
        return part.copy_(tensor)
    if layout == "strided":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    return tensor
