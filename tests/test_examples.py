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


def test_switch_backend(run) -> None:
    """A real model gives the same embeddings on every backend, and its parameters stay where they were."""
    heading, *rows, last = run("switch_backend", "--repeats", 1).splitlines()
    assert heading.split()[0] == "backend"
    assert {"eager", "sdpa", "flex_attention"} <= {row.split()[0] for row in rows}
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
    assert re.search(r"^unchanged +True$", printed, flags=re.MULTILINE)


def test_custom_kernel(run) -> None:
    """The kernel equals transformers' eager path with its keyword and without, and computes fewer tiles than all."""
    printed = run("custom_kernel", "--length", 100, "--window", 20)
    computed, of = re.search(r"tiles computed +(\d+) of (\d+)", printed).groups()
    assert 0 < int(computed) < int(of) / 2
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


def test_bidirectional_encoder(run) -> None:
    """The first state depends on the last token only as an encoder; padding, order and spelling of the flag do not matter."""
    *_, blank, last = printed = run("bidirectional_encoder").splitlines()
    rows = [line.split() for line in printed[printed.index("") + 2 : -2]]
    assert {"eager", "sdpa", "flex_attention"} <= {row[0] for row in rows}
    for _, causal, bidirectional, *moved in rows:
        assert float(causal) == 0
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
    assert len(numbers(printed, "changes pixels by")) == 2
    assert small(numbers(printed, "changes pixels by"))
    assert numbers(printed, "of generated digits,")[0] > 80
    assert picture.read_bytes().startswith(b"\x89PNG")
