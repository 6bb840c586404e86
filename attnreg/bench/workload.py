"""What is timed: one self-attention call of a given shape, its inputs, and the floating-point operations in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from attnreg.capabilities import Request
from attnreg.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPES: Final = ("float16", "bfloat16", "float32", "float64")
BACKWARD: Final = 3.5
"""Forward and backward pass together, in forward passes: two matrix products, and five (arXiv:2205.14135)."""
LARGEST: Final = 2**24
"""Length, heads and the like: a larger one is a slip of the finger, and torch says less well what is wrong."""
CHECKED: Final = 128
"""Queries that are compared with the oracle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One kind of call, of any length: as many queries as keys, in one batch.

    Attributes:
        device: torch device, such as `"cuda"`.
        dtype: one of `DTYPES`.
        batch: rows.
        heads: query heads.
        kv_heads: heads of key and value.
        head_dim: of query, key and value.
        is_causal: whether a query sees no key behind it.
        backward: also compute the gradients of query, key and value.
        padding: share of the batch that is padding, on the left; rows differ in length where there are several.

    Raises:
        InvalidInputError: a size, a share or a dtype that means nothing.
    """

    device: str = "cpu"
    dtype: str = "float32"
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    is_causal: bool = True
    backward: bool = False
    padding: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what means nothing, before anything is measured."""
        if self.dtype not in DTYPES:
            raise InvalidInputError("dtype", repr(self.dtype), f"one of {', '.join(DTYPES)}")
        if not 0 <= self.padding < 1:
            raise InvalidInputError("the share of padding", f"{self.padding:g}", "0 or more, and less than 1")
        if self.batch < 1:
            raise InvalidInputError("the batch", f"of {self.batch} rows", "1 row or more")
        for name in ("batch", "heads", "kv_heads", "head_dim"):
            if getattr(self, name) > LARGEST:
                raise InvalidInputError(name, str(getattr(self, name)), f"{LARGEST} or less")
        self.request()

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}" if self.heads != self.kv_heads else f"{self.heads}"
        words = [
            f"batch {self.batch}",
            f"{heads} heads of {self.head_dim}",
            "causal" if self.is_causal else "bidirectional",
            *([f"{self.padding:.0%} padding on the left"] if self.padding else []),
        ]
        return ", ".join(words)

    @property
    def direction(self) -> str:
        """What is timed, in words."""
        return "forward and backward pass" if self.backward else "forward pass"

    @property
    def structures(self) -> frozenset[str]:
        """The mask, in the words of `attnreg.STRUCTURES`."""
        return frozenset({"causal" if self.is_causal else "bidirectional", *(["padding"] if self.padding else [])})

    def request(self) -> Request:
        """Return what it needs of a backend; one that is quantised is measured like any other."""
        return Request(
            device=self.device.partition(":")[0],
            dtype=self.dtype,
            head_dim=self.head_dim,
            value_head_dim=self.head_dim,
            query_heads=self.heads,
            kv_heads=self.kv_heads,
            structures=self.structures,
            backward=self.backward,
            allow_lossy=True,
        )

    def pads(self, length: int) -> tuple[int, ...]:
        """Return how many tokens of each row are padding: spread evenly about the share, and never a whole row."""
        spread = min(self.padding, 1 - self.padding)
        steps = [2 * row / (self.batch - 1) - 1 if self.batch > 1 else 0.0 for row in range(self.batch)]
        return tuple(min(round(length * (self.padding + spread * step)), length - 1) for step in steps)

    def flops(self, length: int) -> float:
        """Return the floating-point operations of one call.

        Counted is what the mask asks for: `4 * head_dim` for each head and each pair of a real query and a real key
        that it sees; with the backward pass, 3.5 times that.
        """
        real = [length - pads for pads in self.pads(length)]
        pairs = sum(count * (count + 1) // 2 if self.is_causal else count * count for count in real)
        return 4.0 * self.head_dim * self.heads * pairs * (BACKWARD if self.backward else 1.0)


class Inputs(NamedTuple):
    """The tensors of one call.

    Attributes:
        query: `(batch, heads, length, head_dim)`, as models have it: a view of heads that are split from a projection.
        key: `(batch, kv_heads, length, head_dim)`, likewise.
        value: as key.
        gradient: of the output, `(batch, length, heads, head_dim)`; None without a backward pass.
        real: bool `(batch, length)`, True for a real token; None without padding.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    gradient: torch.Tensor | None
    real: torch.Tensor | None


class Sample(NamedTuple):
    """The part of a call that is compared with the oracle: one row, one head, some queries that are no padding.

    Attributes:
        row: the last of the batch, which has the most padding.
        head: the last, which reads the last head of the keys.
        queries: int64 `(checked,)`, positions spread over the row.
    """

    row: int
    head: int
    queries: torch.Tensor


def inputs_of(workload: Workload, length: int) -> Inputs:
    """Make the tensors; equal workloads give equal tensors, and no global seed is touched."""
    device, dtype = torch.device(workload.device), getattr(torch, workload.dtype)
    generator = torch.Generator(device).manual_seed(0)

    def split(heads: int) -> torch.Tensor:
        shape = workload.batch, length, heads, workload.head_dim
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    query, key, value = (
        split(heads).transpose(1, 2).requires_grad_(workload.backward)
        for heads in (workload.heads, workload.kv_heads, workload.kv_heads)
    )
    real = None
    if workload.padding:
        pads = torch.tensor(workload.pads(length), device=device)
        real = torch.arange(length, device=device) >= pads[:, None]
    return Inputs(query, key, value, split(workload.heads) if workload.backward else None, real)


def sample_of(workload: Workload, length: int) -> Sample:
    """Choose what is compared with the oracle."""
    pads = workload.pads(length)[-1]
    queries = torch.linspace(pads, length - 1, min(CHECKED, length - pads), dtype=torch.float64)
    return Sample(workload.batch - 1, workload.heads - 1, queries.round().long())


def oracle(workload: Workload, inputs: Inputs, sample: Sample) -> tuple[torch.Tensor, ...]:
    """Compute the sample in float64, on the CPU, whatever the device can.

    Returns:
        The output `(checked, head_dim)`; with a backward pass also the gradients of `sampled_gradient` with respect to
        the queries of the sample, and to all keys and values of its row and head.
    """
    from attnreg import reference

    row, head, queries = sample
    length = inputs.key.shape[2]
    keys = torch.arange(length)
    allowed = keys >= workload.pads(length)[row]
    if workload.is_causal:
        allowed = allowed & (keys <= queries[:, None])
    allowed = allowed.expand(len(queries), length)[None, None]
    parts = inputs.query[row, head, queries], inputs.key[row, -1], inputs.value[row, -1]
    with torch.enable_grad():
        query, key, value = (
            part.detach().cpu().double()[None, None].requires_grad_(workload.backward) for part in parts
        )
        output = reference.attention(query, key, value, attention_mask=allowed).output[0, :, 0]
        if inputs.gradient is None:
            return (output.detach(),)
        gradient = inputs.gradient[row, queries, head].cpu().double()
        return (output.detach(), *(each[0, 0] for each in torch.autograd.grad(output, (query, key, value), gradient)))


def sampled(
    inputs: Inputs, sample: Sample, call: Callable[[torch.Tensor | None], tuple[torch.Tensor, ...]]
) -> tuple[torch.Tensor, ...]:
    """Return what *call* computes of the sample, in the order of `oracle`.

    *call* is given the gradient of the output, which is 0 outside the sample, so that the gradients of keys and values
    are those of the sample alone; it returns the output and the gradients.
    """
    row, head, queries = sample
    gradient = None
    if inputs.gradient is not None:
        gradient = torch.zeros_like(inputs.gradient)
        gradient[row, queries, head] = inputs.gradient[row, queries, head]
    output, *gradients = call(gradient)
    parts = [output[row, queries, head]]
    if gradients:
        query, key, value = gradients
        parts += [query[row, head, queries], key[row, -1], value[row, -1]]
    return tuple(part.detach().cpu().double() for part in parts)
