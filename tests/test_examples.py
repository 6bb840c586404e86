"""The examples: each runs at small settings, and what it claims is so."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import attnreg
from attnreg.masks import sdpa_mask

OTHERS = ["eager", "sdpa_math", "flex_attention"]
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A function that runs an example as a script, with arguments, and returns what it prints."""

    def run_script(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run_script


def module(name: str):
    """Import an example under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def numbers(text: str, before: str) -> list[float]:
    """Every number that comes after *before*, a regular expression."""
    return [float(found) for found in re.findall(before + r"\s*(-?[\d.]+(?:e[+-]\d+)?)", text)]


def small(differences: list[float], within: float = 1e-4) -> bool:
    """Whether there are differences, and all of them are small."""
    return bool(differences) and max(differences) <= within


@pytest.fixture
def calls() -> list[str]:
    """A backend `counted`, registered, that computes as SDPA does and leaves a trace of each call."""
    made: list[str] = []
    sdpa = attnreg.get("sdpa")

    def counted(*tensors: object, **options: object) -> object:
        made.append("counted")
        return sdpa.attention(*tensors, **options)

    supports = attnreg.Capabilities(is_causal=True, grouped_query=True)
    attnreg.AttentionInterface.register("counted", counted, mask=sdpa_mask, supports=supports)
    return made


def refused(run, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What an example prints to the error stream when it exits with 2."""
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_each_example_has_a_test_and_a_place_on_the_page(example: Path) -> None:
    """No example is left out here, or of the page that lists them."""
    assert f"test_{example.stem}" in globals()
    assert f"](../examples/{example.name})" in (EXAMPLES.parent / "docs" / "examples.md").read_text()


def test_model_by_name(run) -> None:
    """The same weights give the same output on every backend, and padding changes nothing."""
    printed = run("model_by_name")
    assert len(printed.splitlines()) >= 3
    assert small(numbers(printed, "first by"))
    assert small(numbers(printed, "padding changes"))


def test_register_own(run) -> None:
    """The registered function generates what SDPA does, and refuses what it has not declared."""
    sdpa, blockwise, _, _, refused, *_ = run("register_own").splitlines()
    assert sdpa.split(maxsplit=1)[1] == blockwise.split(maxsplit=1)[1]
    assert "backend 'blockwise' cannot do what is asked" in refused


def test_switch_backend(run, calls: list[str]) -> None:
    """Each backend is what runs, a real model embeds the same on all, and its parameters stay where they were."""
    heading, *rows, last = run("switch_backend", "--repeats", 1).splitlines()
    assert heading.split()[0] == "backend"
    assert {"eager", "sdpa", "flex_attention", "counted"} <= {row.split()[0] for row in rows}
    assert all(row.split()[0] == row.split()[1] for row in rows)
    assert len(calls) == 2 * 6  # forward passes in its row alone, layers
    assert small([float(row.split()[-1]) for row in rows], 1e-5)
    assert last.endswith(": True")


def test_vision_language(run) -> None:
    """Each part runs on the backend that the dictionary gives it, as transformers computes it; a typo changes nothing."""
    printed = run("vision_language")
    differences = numbers(printed, "differs by")
    assert len(differences) == 3
    assert small(differences)
    assert "runs on             {'text_config': 'flex_attention', 'vision_config': 'sdpa'}" in printed
    assert "UnknownPartError: " in printed
    assert "UnknownBackendError: no attention backend is named 'sdap'; did you mean 'sdpa'?" in printed
    assert "UnsupportedPartError: " in printed
    assert re.search(r"^unchanged names +True\nunchanged scores +True$", printed, flags=re.MULTILINE)


def test_vision_language_says_why_a_backend_cannot_serve_a_part(run, capsys: pytest.CaptureFixture[str]) -> None:
    """A backend that cannot run a part ends the program with the error's text, not with a traceback."""
    said = refused(run, capsys, "vision_language", "--text", "loopback")
    assert "UnsupportedPartError: the model is unchanged" in said
    assert "'loopback': grouped_query: wants 4 query heads on 2 key/value heads" in said


def test_custom_kernel(run) -> None:
    """The kernel equals transformers' eager path with its keyword and without, and computes fewer tiles than all."""
    printed = run("custom_kernel", "--length", 100, "--window", 20)
    # of 7 x 7 tiles in each of 2 layers: its own and, where there are as many, two before it
    assert "tiles computed for that     36 of 98, in 2 layers" in printed
    assert small(numbers(printed, "differs from eager by"))
    assert small(numbers(printed, "differs from eager with it"))
    assert numbers(printed, "temperature=2 changes")[0] > 0.1
    assert re.search(r"generates as eager does +True", printed)
    assert "backend 'tiled' cannot do what is asked:\n  softcap" in printed


@pytest.mark.parametrize("lengths", [(1, 1), (5, 40), (33, 33), (16, 48)])
def test_custom_kernel_equals_the_oracle(lengths: tuple[int, int]) -> None:
    """Lengths that fill no tile, rows without any key and gradients are as the float64 oracle has them."""
    tiled = module("custom_kernel")
    queries, keys = lengths
    torch.manual_seed(0)
    shapes = (2, 4, queries, 8), (2, 2, keys, 8), (2, 2, keys, 8)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    real = torch.rand(2, keys) > 0.5
    real[0, -1], real[1] = True, False
    extent = {"batch_size": 2, "q_length": queries, "kv_length": keys, "q_offset": keys - queries}
    output, _ = tiled.tiled_attention(None, *tensors, tiled.tiled_mask(**extent, attention_mask=real), temperature=0.5)
    expected = attnreg.attention(*tensors, real, is_causal=True, scale=2 * 8**-0.5, impl="eager").transpose(1, 2)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    assert not output[1].any()
    grads = (torch.autograd.grad(each.square().sum(), tensors) for each in (output, expected))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_bidirectional_encoder(run, calls: list[str]) -> None:
    """On each backend, the first state depends on the last token only as an encoder; padding and order do not matter."""
    *_, blank, last = printed = run("bidirectional_encoder").splitlines()
    rows = [line.split() for line in printed[printed.index("") + 2 : -2]]
    assert {"eager", "sdpa", "flex_attention", "counted"} <= {row[0] for row in rows}
    assert len(calls) == (1 + 3 + 1 + 1 + 2 + 2) * 3  # forward passes in its row alone, layers
    for name, runs_on, causal, bidirectional, *moved in rows:
        assert name == runs_on
        assert float(causal) < 1e-6
        assert float(bidirectional) > 0.1
        assert len(moved) == 4
        assert small([float(each) for each in moved], 1e-5)
    assert not blank
    assert last.endswith(": True")


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_character_model(run, backend: str, tmp_path: Path) -> None:
    """Sixty steps of a tiny model beat the frequencies of characters, on any backend; the cache changes nothing."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "loss.png"
    sizes = ("--steps", 60, "--context", 32, "--width", 64, "--layers", 1, "--batch", 16, "--lr", 0.005)
    printed = run("character_model", *sizes, "--backend", backend, "--plot", picture)
    (unigram,), (bigram,) = numbers(printed, "unigram"), numbers(printed, "bigram")
    (model,) = numbers(printed, f"model on {backend}")
    assert model < unigram < 5
    assert bigram < unigram
    assert small(numbers(printed, "differ by"))
    assert printed.count("-" * 80) == 3
    assert picture.read_bytes().startswith(b"\x89PNG")


SCRIPTS = {"character_model": "--plot", "diffusion_transformer": "--picture"}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--steps", 0), "--steps must be at least 1"),
        (("--layers", -1), "--layers must be at least 1"),
        (("--batch", 0), "--batch must be at least 1"),
        (("--backend", "sdap"), "--backend: no attention backend is named 'sdap'; did you mean 'sdpa'?"),
        (("a picture", "no/such/folder.png"), "must be the name of a .png file in a folder that exists"),
        (("a picture", "picture.txt"), "must be the name of a .png file in a folder that exists"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_cannot_work_is_refused_before_the_training(
    run, capsys: pytest.CaptureFixture[str], name: str, arguments: tuple[str, object], problem: str
) -> None:
    """A script that trains for minutes looks at its arguments first."""
    option, value = arguments
    assert problem in refused(run, capsys, name, SCRIPTS[name] if option == "a picture" else option, value)


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("character_model", ("--width", 40), "--width must be a multiple of 32"),
        ("character_model", ("--lr", 0), "--lr must be more than 0"),
        ("character_model", ("--context", 10**6), "--context must be less than the "),
        ("diffusion_transformer", ("--images", 0), "--images must be at least 1"),
        ("diffusion_transformer", ("--picture", "x.png", "--images", 25), "--images must be a multiple of 10"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_setting_that_cannot_work_is_refused(
    run, capsys: pytest.CaptureFixture[str], name: str, arguments: tuple[object, ...], problem: str
) -> None:
    """A setting of one script that would fail in the middle, or at the end, is refused at once."""
    assert problem in refused(run, capsys, name, *arguments)


@pytest.mark.parametrize("steps", [2, 20])
def test_diffusion_transformer_trains_any_number_of_steps(steps: int) -> None:
    """No number of steps makes the learning rate's schedule divide by zero."""
    transformer = module("diffusion_transformer")
    assert len(transformer.train(transformer.DiffusionTransformer(1), steps, 2)) == steps


def test_character_model_holds_out_what_it_never_saw() -> None:
    """No paragraph of the held-out text is in the text to train on."""
    text, held_out = module("character_model").corpus()
    seen = set(text.split("\n\n"))
    assert len(held_out) > 10_000
    assert not [each for each in held_out.split("\n\n") if each in seen]


def test_diffusion_transformer(run, tmp_path: Path) -> None:
    """The loss falls, neither the backend nor a caption's padding changes an image, and the sheet is drawn."""
    pytest.importorskip("PIL")
    picture = tmp_path / "digits.png"
    sizes = ("--steps", 40, "--layers", 1, "--batch", 32, "--images", 20)
    printed = run("diffusion_transformer", *sizes, "--picture", picture)
    (first,), (last,) = numbers(printed, "loss"), numbers(printed, "at first,")
    assert last < 0.7 * first
    assert small(numbers(printed, "change pixels by"))
    assert re.findall(r"^(\S+) +changes pixels by", printed, flags=re.MULTILINE) == OTHERS
    assert small(numbers(printed, "changes pixels by"))
    assert numbers(printed, "of generated digits,")[0] > 80
    assert picture.read_bytes().startswith(b"\x89PNG")
