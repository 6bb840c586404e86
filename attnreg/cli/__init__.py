"""The command `attnreg`: what is here, does it work, why is it refused, how fast is it, and a demonstration.

Exit codes: 0 all is well; 1 the answer is no (a backend is broken, nothing can serve the request); 2 the question was
wrong (an unknown name, a bad option, a missing package).

Nothing here imports torch before a command needs it, so that `doctor` can also say why torch cannot be imported.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated, Any

import typer

from attnreg.errors import AttnregError

NO, WRONG = 1, 2

app = typer.Typer(
    name="attnreg",
    help="The attention-backend registry for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]


@app.command("list")
def list_backends(*, as_json: Json = False) -> None:
    """List every backend, who provides it, and why it cannot be used, if it cannot. Imports no plugin."""
    from attnreg.cli import listing

    listing.run(as_json=as_json)


@app.command()
def doctor(
    *,
    timeout: Annotated[float, typer.Option(help="Seconds for one backend's probe.", min=0.1, max=86400)] = 60.0,
    as_json: Json = False,
) -> None:
    """Probe every backend in a process of its own, so that one that crashes, quits or hangs is a row."""
    from attnreg.cli import diagnosis

    raise typer.Exit(NO if diagnosis.run(timeout=timeout, as_json=as_json) else 0)


@app.command()
def explain(
    name: Annotated[str, typer.Argument(help="A backend's name, 'auto' or 'paged|auto'.")] = "auto",
    *,
    device: Annotated[str | None, typer.Option(help="Device type, such as cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Such as float32 or bfloat16.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Head dimension of query and key.", min=1)] = None,
    value_head_dim: Annotated[int | None, typer.Option(help="Head dimension of value.", min=1)] = None,
    heads: Annotated[str | None, typer.Option(help="Query heads, or query/key-value heads such as 32/8.")] = None,
    mask: Annotated[list[str] | None, typer.Option(help="A mask structure, such as causal; repeatable.")] = None,
    need: Annotated[list[str] | None, typer.Option(help="A feature, such as softcap; repeatable.")] = None,
    page_size: Annotated[int | None, typer.Option(help="Tokens of a page of the cache.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Say which backends can serve a request, why the others cannot, and which one would be chosen."""
    from attnreg.cli import explanation

    request = explanation.request_of(
        device=device,
        dtype=dtype,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        heads=heads,
        mask=mask,
        need=need,
        page_size=page_size,
    )
    raise typer.Exit(0 if explanation.run(name, request, as_json=as_json) else NO)


@app.command()
def verify(
    name: Annotated[str, typer.Argument(help="A backend's name.")],
    *,
    device: Annotated[str | None, typer.Option(help="Where to run it; by default the first that it declares.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Such as bfloat16; repeatable. By default all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer random cases.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write the card to this file, as a web page.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the card to this file, as Markdown.")] = None,
    as_json: Json = False,
) -> None:
    """Hold a backend to every law of the contract, and print its capability card."""
    from attnreg.cli import verification

    held = verification.run(
        name, device=device, dtypes=dtype, quick=quick, as_json=as_json, html=html, markdown=markdown
    )
    raise typer.Exit(0 if held else NO)


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Backends; by default all that can serve the call.")] = None,
    *,
    device: Annotated[str | None, typer.Option(help="Such as cuda; by default the accelerator, else the CPU.")] = None,
    dtype: Annotated[str | None, typer.Option(help="By default bfloat16, and float32 on the CPU.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Sequence lengths, such as 512,1024,2048.")] = None,
    batch: Annotated[int, typer.Option(help="Rows of the batch.", min=1)] = 1,
    heads: Annotated[str, typer.Option(help="Query heads, or query/key-value heads.")] = "32/8",
    head_dim: Annotated[int, typer.Option(help="Head dimension.", min=1)] = 128,
    causal: Annotated[
        bool, typer.Option("--causal/--no-causal", help="Whether keys behind a query are hidden.")
    ] = True,
    backward: Annotated[bool, typer.Option("--backward", help="Time forward and backward pass together.")] = False,
    padding: Annotated[float, typer.Option(help="Share of the batch that is padding, such as 0.3.")] = 0.0,
    repeats: Annotated[int | None, typer.Option(help="Timed rounds; by default as many as fit.", min=1)] = None,
    plot: Annotated[list[Path] | None, typer.Option(help="Draw a .png or .svg of it too; repeatable.")] = None,
    read: Annotated[Path | None, typer.Option(help="Measure nothing: show what --json has printed before.")] = None,
    as_json: Json = False,
) -> None:
    """Time backends against each other, at several lengths, in one interleaved run."""
    from attnreg.cli import measurement

    if read is not None:
        raise typer.Exit(0 if measurement.reread(read, plot or [], as_json=as_json) else NO)
    agreed = measurement.run(
        names or [],
        device=device,
        dtype=dtype,
        lengths=lengths,
        batch=batch,
        heads=heads,
        head_dim=head_dim,
        is_causal=causal,
        backward=backward,
        padding=padding,
        repeats=repeats,
        plots=plot or [],
        as_json=as_json,
    )
    raise typer.Exit(0 if agreed else NO)


@app.command()
def demo(
    *,
    generate: Annotated[
        bool, typer.Option("--generate", help="Generate for many prompts at once, and watch it, instead.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="A transformers model: a folder, or an id on the Hub.")] = None,
    device: Annotated[str, typer.Option(help="Where to run it, such as cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    repeats: Annotated[
        int | None, typer.Option(help="Timed runs for each backend, by default 10; the median counts.", min=1)
    ] = None,
    implementation: Annotated[
        str | None, typer.Option(help="With --generate: a backend over pages; by default paged|auto.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="With --generate, without --model: training time; by default 20.", min=0.1)
    ] = None,
    as_json: Json = False,
) -> None:
    """Embed sentences on every backend, beside the float64 oracle; with --generate: continuous batching, live."""
    _check_demo(generate=generate, model=model, repeats=repeats, implementation=implementation, seconds=seconds)
    if generate:
        from attnreg.cli import generation

        served = generation.run(
            model=model,
            implementation=implementation or "paged|auto",
            device=device,
            dtype=dtype,
            seconds=seconds or 20.0,
            as_json=as_json,
        )
        raise typer.Exit(0 if served else NO)
    from attnreg.cli import demonstration

    agreed = demonstration.run(model=model, device=device, dtype=dtype, repeats=repeats or 10, as_json=as_json)
    raise typer.Exit(0 if agreed else NO)


def _check_demo(
    *, generate: bool, model: str | None, repeats: int | None, implementation: str | None, seconds: float | None
) -> None:
    """Refuse options that would mean nothing."""
    if generate and repeats is not None:
        raise typer.BadParameter(
            "times backends, and --generate runs one: leave one of the two out", param_hint="--repeats"
        )
    for name, value in (("--implementation", implementation), ("--seconds", seconds)):
        if value is not None and not generate:
            raise typer.BadParameter("belongs to --generate, which is not given", param_hint=name)
    if seconds is not None and model is not None:
        raise typer.BadParameter("is for training, and the model of --model is trained already", param_hint="--seconds")


def _version(*, wanted: bool) -> None:
    if wanted:
        from attnreg import __version__

        typer.echo(f"attnreg {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=lambda value: _version(wanted=value))
    ] = False,
) -> None:
    """Take the options that stand before a command."""


def main(arguments: list[str] | None = None) -> Any:
    """Run the command; an attnreg error is a message, not a traceback."""
    warnings.filterwarnings(
        "ignore", message="Failed to initialize NumPy"
    )  # torch gets by without it, and so does attnreg
    try:
        app(arguments)
    except AttnregError as error:
        typer.echo(f"attnreg: {error}", err=True)
        sys.exit(WRONG)
