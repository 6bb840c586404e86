"""Decode attention over pages: microseconds, and the share of the device's copy bandwidth, beside the raw kernels.

One query for each sequence, heads 32/8 of 128, as in Llama-3-8B. Every backend is called as a model calls it, through
`backend.call` of `paged|X` with a cache that has the pages ready; beside it the raw call of the same kernel. All take
turns within one run, in a CUDA graph and without one, the L2 cache overwritten before each call; medians count. The
bandwidth is that of a copy between two tensors of 1 GiB, measured first: what decode attention has to read are all keys
and values once. On a GPU a native backend is to reach 80 % of it. Under three minutes on an H200.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from report import environment

import attnreg
from attnreg.bench.timing import interleaved
from attnreg.discovery import version
from attnreg.paged import Pages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Call = Callable[[], Any]

SHARE: Final = 0.8
COPIED: Final = 2**30
TOLERANCE: Final = 2e-2
"""Relative error, in bfloat16, against the first backend that has computed the shape."""
NATIVE: Final = ("flash_attention_2", "flash_attention_4", "varlen")
GATHERED: Final = ("sdpa", "eager")
PAGE_SIZES: Final = (256, 128, 64, 16)


class Shape(NamedTuple):
    """Sequences, and how many tokens each has."""

    what: str
    lengths: tuple[int, ...]


def shapes(*, tiny: bool) -> list[Shape]:
    """Return what is measured."""
    source = random.Random(0)  # noqa: S311 - lengths are no secrets
    if tiny:
        return [Shape("2 x 40", (40, 40)), Shape("3 x 5 to 33", (5, 33, 20))]
    mixed = tuple(source.randint(128, 4096) for _ in range(128))
    return [Shape("64 x 4096", (4096,) * 64), Shape("128 x 128 to 4096", mixed), Shape("1 x 32768", (32768,))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """The tensors of a shape: a query for each sequence, and pages in any order.

    Attributes:
        query: `(1, heads, sequences, head_dim)`.
        new: a key, or a value, of each: `(1, kv_heads, sequences, head_dim)`; the pages have it already.
        pages: the pages.
    """

    query: torch.Tensor
    new: torch.Tensor
    pages: Pages

    @property
    def read(self) -> int:
        """Bytes of keys and values that the sequences have."""
        _, _, heads, head_dim = self.pages.key.shape
        return 2 * sum(self.pages.lengths_k or ()) * heads * head_dim * self.pages.key.element_size()


class Ready:
    """A cache that has everything already."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def update(self, layer_idx: int, key: torch.Tensor, value: torch.Tensor) -> Pages:
        """Return the pages."""
        del layer_idx, key, value
        self._pages.shared.clear()  # each call is a first layer's
        return self._pages


class Layer(torch.nn.Module):
    """What an attention function reads of the module that calls it."""

    is_causal = True
    layer_idx = 0


def tensors(shape: Shape, page_size: int, device: torch.device, *, tiny: bool) -> Tensors:
    """Return equal tensors for equal shapes."""
    heads, kv_heads, head_dim = (4, 2, 16) if tiny else (32, 8, 128)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    count, counts = len(shape.lengths), [-(-length // page_size) for length in shape.lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).int()
    table = torch.zeros(count, max(counts), dtype=torch.int32)
    for row, part in enumerate(torch.split(order, counts)):
        table[row, : len(part)] = part
    made = [
        torch.randn(sum(counts), page_size, kv_heads, head_dim, generator=generator, device=device, dtype=dtype)
        for _ in range(2)
    ]
    pages = Pages(
        key=made[0],
        value=made[1],
        block_table=table.to(device),
        cache_seqlens=torch.tensor(shape.lengths, dtype=torch.int32, device=device),
        cu_seq_lens_q=torch.arange(count + 1, dtype=torch.int32, device=device),
        max_length_q=1,
        max_length_k=max(shape.lengths),
        singles=count,
        lengths_q=(1,) * count,
        lengths_k=shape.lengths,
    )
    query = torch.randn(1, heads, count, head_dim, generator=generator, device=device, dtype=dtype)
    return Tensors(query=query, new=query[:, :kv_heads], pages=pages)


def calls(given: Tensors, names: list[str], notes: list[str]) -> Iterator[tuple[str, Call]]:
    """Yield what runs here: attnreg's backends, and the raw calls of their kernels."""
    for name in names:
        try:
            backend = attnreg.get(f"paged|{name}")
            call = _through(backend, given)
            call()
        except (attnreg.AttnregError, RuntimeError, NotImplementedError) as error:
            notes.append(f"paged|{name}, pages of {given.pages.page_size}: {_said(error)}")
            continue
        yield f"paged|{name}", call
    if given.query.is_cuda:
        for name, raw in (("flash_attn_with_kvcache", _flash2), ("flash_attn.cute varlen", _flash4)):
            try:
                call = raw(given)
                call()
            except Exception as error:  # noqa: BLE001 - a kernel that is not here, or takes no such pages
                notes.append(f"{name}, pages of {given.pages.page_size}: {_said(error)}")
                continue
            yield f"raw {name}", call


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _native(name: str, given: Tensors) -> bool:
    """Whether the kernel itself reads the pages."""
    if not name.startswith("paged|"):
        return True
    supports = attnreg.get(name.removeprefix("paged|")).supports.at(given.query.device.type)
    return supports.paged and given.pages.page_size % supports.page_size_multiple == 0


def _through(backend: Any, given: Tensors) -> Call:
    module, cache = Layer(), Ready(given.pages)
    return lambda: backend.call(module, given.query, given.new, given.new, None, cache=cache)[0][0]


def _flash2(given: Tensors) -> Call:
    from flash_attn.flash_attn_interface import (  # type: ignore[import-not-found,unused-ignore]
        flash_attn_with_kvcache,
    )

    pages, query = given.pages, given.query[0].transpose(0, 1)[:, None].contiguous()
    table = {"cache_seqlens": pages.cache_seqlens, "block_table": pages.block_table}
    return lambda: flash_attn_with_kvcache(query, pages.key, pages.value, causal=True, **table)[:, 0]


def _flash4(given: Tensors) -> Call:
    from flash_attn.cute import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]

    pages, query = given.pages, given.query[0].transpose(0, 1)[:, None].contiguous()
    options = {"seqused_k": pages.cache_seqlens, "page_table": pages.block_table, "max_seqlen_k": pages.max_length_k}

    def call() -> Any:
        made = flash_attn_varlen_func(query, pages.key, pages.value, causal=True, **options)
        return (made[0] if isinstance(made, tuple) else made)[:, 0]

    return call


def captured(call: Call) -> Call:
    """Return the replay of a graph of the call."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copied(device: torch.device, *, tiny: bool) -> float:
    """Return the bytes that a copy reads and writes in a second."""
    size = 2**20 if tiny else COPIED
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    found = interleaved({"copy": lambda: target.copy_(source)}, device, rounds=20)
    return 2 * size / (median(found.milliseconds["copy"]) / 1e3)


class Row(NamedTuple):
    """What was measured of one call: microseconds, and the share of the copy's bandwidth."""

    shape: str
    page_size: int
    name: str
    native: bool
    graph: bool
    microseconds: float
    share: float
    error: float


def measure(
    shape: Shape, page_size: int, names: list[str], bandwidth: float, device: torch.device, *, tiny: bool
) -> tuple[list[Row], list[str]]:
    """Measure all on one shape, with pages of one size."""
    notes: list[str] = []
    given = tensors(shape, page_size, device, tiny=tiny)
    plain = dict(calls(given, names, notes))
    errors = _errors(plain)
    timed: dict[tuple[str, bool], Call] = {(name, False): call for name, call in plain.items()}
    if device.type == "cuda":
        # What gathers reads lengths on the host, which a graph cannot.
        timed |= {(name, True): captured(plain[name]) for name in plain if _native(name, given)}
    labels = {f"{name}, {graph}": (name, graph) for name, graph in timed}
    found = interleaved({label: timed[key] for label, key in labels.items()}, device, rounds=3 if tiny else None)
    rows = []
    for label, times in found.milliseconds.items():
        seconds = median(times) / 1e3
        name, graph = labels[label]
        share = given.read / seconds / bandwidth
        rows.append(Row(shape.what, page_size, name, _native(name, given), graph, seconds * 1e6, share, errors[name]))
    return rows, notes + [f"{label}: {error}" for label, error in found.errors.items()]


def _errors(plain: dict[str, Call]) -> dict[str, float]:
    """Return the distance of each result from the first one, over that one's norm."""
    results = {name: call().float() for name, call in plain.items()}
    if not results:
        return {}
    right = next(iter(results.values()))
    return {name: float((found - right).norm() / right.norm()) for name, found in results.items()}


def main() -> int:
    """Run the benchmark and return its exit code: 1 if results differ; the share is a target, and fails nothing."""
    asked = _arguments()
    device = torch.device(asked.device)
    where = _where(device)
    bandwidth = copied(device, tiny=asked.tiny)
    print(f"{where}\n\na copy: {bandwidth / 1e12:.3f} TB/s\n", flush=True)
    print("| shape | page | call | graph | µs | of the copy | verdict |\n|---|---|---|---|---|---|---|", flush=True)
    rows, notes = [], []
    with torch.inference_mode():
        for shape in shapes(tiny=asked.tiny):
            for page_size in (16, 4) if asked.tiny else PAGE_SIZES:
                names = [*GATHERED[:1], *NATIVE, *GATHERED[1:]] if asked.backends is None else asked.backends.split(",")
                found, said = measure(shape, page_size, names, bandwidth, device, tiny=asked.tiny)
                for row in found:
                    _print_row(row, judges=device.type == "cuda" and not asked.tiny)
                rows += found
                notes += said
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    wrong = [row for row in rows if not row.error <= TOLERANCE]
    notes += [f"{row.name} differs on {row.shape}, pages of {row.page_size}: {row.error:.2g}" for row in wrong]
    print("\n" + "\n".join(f"- {note}" for note in dict.fromkeys(notes)))
    if asked.json is not None:
        record = {"environment": where, "bytes_per_second": bandwidth, "rows": [row._asdict() for row in rows]}
        asked.json.write_text(json.dumps(record | {"notes": notes}, indent=1), encoding="utf-8")
    return int(bool(wrong) or not rows)


def _print_row(row: Row, *, judges: bool) -> None:
    judged = judges and row.native and row.graph and row.name.startswith("paged|")
    verdict = ("holds" if row.share >= SHARE else "**missed**") if judged else ""
    name = row.name.replace("|", r"\|") + ("" if row.native else ", gathered")
    graph = "yes" if row.graph else "no"
    cells = f"{row.shape} | {row.page_size} | {name} | {graph} | {row.microseconds:.1f} | {row.share:.0%} | {verdict}"
    print(f"| {cells} |", flush=True)


def _where(device: torch.device) -> str:
    kernels = {name: found for name in ("triton", "flash-attn", "flash-attn-4") if (found := version(name)) is not None}
    name = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return ", ".join(f"{what} {value}" for what, value in {**name, **environment(), **kernels}.items())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--backends", help="X of paged|X, separated by commas")
    parser.add_argument("--json", type=Path, help="write everything there, too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
