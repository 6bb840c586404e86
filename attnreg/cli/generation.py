"""`attnreg demo --generate`: continuous batching over real prompts, watched while it runs."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, Final

from rich import box
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from attnreg.cli.output import console, print_json, print_table, progress_console
from attnreg.cli.watching import Display, ending, printable
from attnreg.errors import BridgeError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from attnreg.cli.characters import Training
    from attnreg.serving import ContinuousBatcher, Report, Request

    Decode = Callable[[Sequence[int]], str]

COUNT: Final = 24
_PROMPTS: Final = (24, 90, 16, 160, 48)
"""Characters of the prompts, about: they end with a word."""
_NEW: Final = (48, 16, 160, 32, 96, 128)
_AT_ONCE: Final = 8
_ON_CPU, _ELSEWHERE = 640, 4096
"""Tokens that the cache holds: too few for eight of the longest requests. Elsewhere blocks may be of 256."""
_TEMPERATURE: Final = 0.7


def run(*, model: str | None, implementation: str, device: str, dtype: str, seconds: float, as_json: bool) -> bool:
    """Run the demonstration and print it; return whether every request got its answer."""
    import attnreg.serving  # noqa: F401 - says what to install where transformers is missing
    from attnreg.integrations.transformers import disable

    try:
        return _run(model, implementation, device, dtype, seconds, as_json=as_json)
    finally:
        disable()


def _run(model: str | None, implementation: str, device: str, dtype: str, seconds: float, *, as_json: bool) -> bool:
    from attnreg.cli.characters import documentation

    text = documentation()
    told: Training | None = None
    if model is None:
        if dtype != "float32":
            raise InvalidInputError("dtype", repr(dtype), "float32 for the model that is trained here, or --model")
        network, tokenizer, told = _trained(text, seconds, device, quiet=as_json)
    else:
        network, tokenizer = _loaded(model, device, dtype)
    decode: Decode = lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True))  # noqa: E731
    about = {"model": model or "trained here", "class": type(network).__name__, "device": device, "dtype": dtype}
    if not as_json:
        _print_model(about, told)
    with _batcher(network, implementation) as batcher:
        about["implementation"] = batcher.attn_implementation
        requests = _submitted(batcher, [tokenizer.encode(prompt) for prompt in prompts(text.held_out)])
        with Display(batcher, requests, decode, console=progress_console, quiet=as_json) as display:
            while batcher.busy:
                batcher.step()
                display.update()
        report = batcher.report
    if as_json:
        training = None if told is None else asdict(told)
        print_json({**about, "training": training, "report": _numbers(report), "requests": _records(requests, decode)})
    else:
        _print_report(about, report)
        _print_requests(requests, decode)
    return all(request.error is None for request in requests)


def prompts(paragraphs: Sequence[str]) -> list[str]:
    """Return the beginnings of paragraphs, of different lengths, each up to the end of a word."""
    lengths = cycle(_PROMPTS)
    usable = [each for each in paragraphs if len(each) > max(_PROMPTS) and each[0].isupper()]
    if not usable:
        raise InvalidInputError("the documentation of this Python", "too short", "one with its help topics")
    return [each[: next(lengths)].rsplit(" ", 1)[0] + " " for each in islice(cycle(usable), COUNT)]


def _batcher(network: Any, implementation: str) -> ContinuousBatcher:
    from attnreg.serving import ContinuousBatcher

    tokens = _ON_CPU if network.device.type == "cpu" else _ELSEWHERE
    return ContinuousBatcher(
        network, implementation, max_tokens=tokens, max_requests=_AT_ONCE, max_batch_tokens=_AT_ONCE * 16
    )


def _submitted(batcher: ContinuousBatcher, encoded: list[list[int]]) -> list[Request]:
    from attnreg.serving import Sampling

    pairs = zip(encoded, cycle(_NEW), strict=False)
    return [
        batcher.submit(tokens, max_new_tokens=new, sampling=Sampling(temperature=_TEMPERATURE, seed=seed))
        for seed, (tokens, new) in enumerate(pairs)
    ]


def _trained(text: Any, seconds: float, device: str, *, quiet: bool) -> tuple[Any, Any, Training]:
    """Train the small model, and show how it learns."""
    from attnreg.cli.characters import trained

    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn()
    with Progress(*columns, console=progress_console, transient=True, disable=quiet) as progress:
        task = progress.add_task("training a small model", total=1.0)

        def show(share: float, steps: int, loss: float) -> None:
            progress.update(task, completed=share, description=f"training: step {steps}, {loss:.2f} bits/character")

        try:
            return trained(text, seconds=seconds, device=device, progress=show)
        except (RuntimeError, AssertionError) as error:  # torch asserts that it has CUDA
            raise _refused("train a model", device, error) from error


def _loaded(path: str, device: str, dtype: str) -> tuple[Any, Any]:
    """Load a causal model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from attnreg.cli.embedding import DTYPES

    if dtype not in DTYPES:
        raise InvalidInputError("dtype", repr(dtype), f"one of {', '.join(DTYPES)}")
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = AutoTokenizer.from_pretrained(path)
            network: Any = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype])
            network = network.to(device).eval()
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        raise _refused(f"load {path!r}", device, error) from error
    return network, tokenizer


def _refused(what: str, device: str, error: BaseException) -> BridgeError:
    problem = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    remedy = "Name another model (--model), a causal one with its tokenizer, or another device (--device)."
    return BridgeError("transformers", f"it cannot {what} on {device}: {problem}", remedy)


def _records(requests: list[Request], decode: Decode) -> list[dict[str, Any]]:
    return [
        {
            "prompt": decode(request.prompt),
            "text": decode(request.tokens),
            "prompt_tokens": len(request.prompt),
            "tokens": len(request.tokens),
            "finish_reason": request.finish_reason,
            "error": None if request.error is None else str(request.error),
        }
        for request in requests
    ]


def _numbers(report: Report) -> dict[str, float]:
    speeds = {
        "prefill_tokens_per_second": report.prefill_tokens_per_second,
        "decode_tokens_per_second": report.decode_tokens_per_second,
    }
    return {**asdict(report), **speeds}


def _print_model(about: dict[str, Any], told: Training | None) -> None:
    if told is None:
        line = f"{about['class']} from {about['model']} on {about['device']} in {about['dtype']}"
    else:
        line = (
            "No model was named, and there are no weights here, so a small one was trained: what it says looks like "
            f"English from afar, and means nothing. {about['class']} of characters, {told.parameters:,} parameters, "
            f"{told.steps} steps in {told.seconds:.0f} s on {told.characters:,} characters of Python's documentation, "
            f"{told.loss:.2f} bits per character."
        )
    console.print(line, markup=False, highlight=False)


def _print_report(about: dict[str, Any], report: Report) -> None:
    failed = f", {report.failed} failed" if report.failed else ""
    rows = [
        ("implementation", about["implementation"]),
        (
            "requests",
            f"{report.finished} finished{failed}; {_AT_ONCE} at once at most, {report.mean_sequences:.1f} on average",
        ),
        ("steps", f"{report.steps} in {report.seconds:.1f} s; {report.mean_tokens:.1f} tokens each, on average"),
        ("time of a step", f"{report.step_p50 * 1e3:.1f} ms, the slowest tenth from {report.step_p90 * 1e3:.1f} ms on"),
        ("generated", f"{report.decode_tokens} tokens, {report.decode_tokens_per_second:.0f} in a second"),
        ("prompts", f"{report.prefill_tokens} tokens computed, {report.prefix_hits} found in the cache"),
        ("blocks", f"{report.peak_blocks} of {report.num_blocks} in use at most, {report.blocks_in_use} at the end"),
        ("preemptions", str(report.preemptions)),
    ]
    print_table("continuous batching", ("what", "value"), rows)


def _print_requests(requests: list[Request], decode: Decode) -> None:
    table = Table(
        title="prompts (dim) and what was generated", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("text", overflow="fold")
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("end", no_wrap=True)
    for number, request in enumerate(requests, 1):
        prompt, text = (_encodable(printable(decode(part))) for part in (request.prompt, request.tokens))
        line = Text(prompt, style="dim").append(f"{text}", style="not dim")
        if request.error is not None:
            line.append(f"\n{request.error}", style="not dim")
        table.add_row(str(number), line, f"{len(request.prompt)}+{len(request.tokens)}", ending(request))
    console.print(table)


def _encodable(text: str) -> str:
    """Return what the terminal can show; a model may say anything."""
    return text.encode(console.encoding, "replace").decode(console.encoding)
