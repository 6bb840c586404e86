"""What the host does to issue a forward pass of a whole model, on the CPU, beside transformers' SDPA.

Four layers of a Llama model with tiny tensors, so that Python is what takes the time, as it is on a GPU that waits for
it. The flash adapters run over kernels that return at once: the references of the tests stand in as their packages,
and an empty function in place of theirs. transformers' SDPA computes its tiny product.

The processor time of the thread counts, since the machine does other things too; all take turns, and the fastest of
all turns counts. About two minutes. The targets are those of a GPU, where kernels take host time as well.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from llama import Batch, model_of
from report import Figure, report

import attnreg

BATCHES: Final = (
    Batch(what="B1 S4", rows=1, length=4),
    Batch(what="B2 S8", rows=2, length=8),
    Batch(what="B2 S8 left-padded", rows=2, length=8, padded=True),
)
UNPADDED: Final = {"B2 S8 left-padded": "B2 S8"}
SHORT: Final = "B1 S4"
FLASH: Final = ("flash_attention_2", "flash_attention_4", "varlen")
ISSUE: Final = 1.2
CHUNKS: Final = 3
_tests = Path(__file__).parents[1] / "tests"


def main() -> int:
    """Run the benchmark and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--turns", type=int, default=300, help="forward passes of each variant on each batch")
    arguments = parser.parse_args()
    sys.path.insert(0, str(_tests))
    from cpu_kernels import on_cpu

    torch.set_num_threads(1)
    with on_cpu():
        names = _names()
        times = _times(names, arguments.turns)
    return report(
        "issuing a forward pass, over transformers' sdpa unpadded", list(_figures(times)), as_json=arguments.json
    )


def _names() -> dict[str, str]:
    """Return what is measured: how tables call it → the name that transformers takes."""
    from attnreg.integrations.transformers import alias, bind

    _empty_kernels()
    found = {"transformers sdpa": "sdpa", "transformers eager": "eager"}
    found |= {f"attnreg {name}": alias(name) for name in ("sdpa", "eager")}
    for name in FLASH:
        backend = attnreg.get(name)
        here = replace(backend.supports, devices=frozenset({"cpu"}), on=())
        found[f"attnreg {name}"] = bind(replace(backend, supports=here, origin=None))
    return found


def _empty_kernels() -> None:
    """Put a function that returns at once in the place of each kernel."""
    flash2, flash4 = (import_module(f"flash_attn.{name}") for name in ("flash_attn_interface", "cute.interface"))
    varlen = import_module("torch.nn.attention.varlen")

    def one(query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros_like(query)

    def two(query: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(query), None

    for module, function in ((flash2, one), (flash4, two)):
        for name in ("flash_attn_func", "flash_attn_varlen_func"):
            setattr(module, name, function)
    one.__dict__["__signature__"] = inspect.signature(varlen.varlen_attn)  # which the adapter looks at
    setattr(varlen, "varlen_attn", one)  # noqa: B010 - a module's attribute has a type


def _times(names: dict[str, str], turns: int) -> dict[str, dict[str, list[float]]]:
    """Return microseconds of each turn, by batch and variant."""
    model = model_of(torch.device("cpu"), tiny=True).model
    inputs = {batch.what: batch.inputs(model.config.vocab_size, torch.device("cpu")) for batch in BATCHES}
    found: dict[str, dict[str, list[float]]] = {what: {name: [] for name in names} for what in inputs}
    for turn in range(-10, turns):
        for what, tensors in inputs.items():
            for name, implementation in names.items():
                model.config._attn_implementation = implementation  # noqa: SLF001 - what transformers reads
                begin = time.thread_time()
                with torch.no_grad():
                    model(**tensors, use_cache=False)
                if turn >= 0:  # those before were for warming up
                    found[what][name].append((time.thread_time() - begin) * 1e6)
    return found


def _figures(times: dict[str, dict[str, list[float]]]) -> list[Figure]:
    figures = []
    for what, found in times.items():
        whole = times[UNPADDED.get(what, what)]["transformers sdpa"]
        for name, own in found.items():
            ratios = [min(own[chunk::CHUNKS]) / min(whole[chunk::CHUNKS]) for chunk in range(CHUNKS)]
            budget = None
            if name.removeprefix("attnreg ") in FLASH:
                budget = ISSUE
            elif name == "attnreg sdpa" and what == SHORT:
                budget = 1.0
            beside = {"fastest": f"{min(own):.0f} µs", "median": f"{median(own):.0f} µs"}
            told = f"{what}: {name}"
            figures.append(Figure(what=told, rounds=ratios, unit="x", budget=budget, target=True, beside=beside))
    return figures


if __name__ == "__main__":
    sys.exit(main())
