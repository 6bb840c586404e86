"""The command `attnreg bench` and what it stands on: what is counted, timed, compared, printed and drawn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnreg import NO_MASK, Backend, Capabilities, InvalidInputError, Kernel, default_registry, masks
from attnreg.bench import Report, Row, Workload, benchmark
from attnreg.bench.plotting import NothingToPlotError, _spread, _ticks, plot, styles
from attnreg.bench.timing import interleaved
from attnreg.cli import main

SMALL = {"heads": 4, "kv_heads": 2, "head_dim": 16}
OPTIONS = ("--device", "cpu", "--heads", "4/2", "--head-dim", "16", "--lengths", "24,8", "--repeats", "3")


def attnreg(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command in this process; return its exit code, what it printed, and its errors."""
    with pytest.raises(SystemExit) as caught:
        main(["bench", *arguments])
    output = capsys.readouterr()
    return int(caught.value.code or 0), output.out, output.err


def eager(module, query, key, value, attention_mask, **kwargs):
    """Compute it with attnreg's own eager function."""
    from attnreg.builtin.eager import eager_attention

    return eager_attention(module, query, key, value, attention_mask, **kwargs)


def add(name: str, function, **options) -> None:
    """Register *function* beside the formatter of `eager`."""
    options = {"supports": Capabilities(grouped_query=True), "mask": masks.eager_mask, **options}
    default_registry.add(Backend(name=name, attention=function, **options))


def one(report: Report, name: str, length: int | None = 8) -> Row:
    """Return the row of that backend at that length."""
    (row,) = [row for row in report.rows if (row.backend, row.length) == (name, length)]
    return row


@pytest.mark.parametrize(
    ("options", "flops"),
    [
        ({"is_causal": False}, 4 * 16 * 4 * 64),
        ({"is_causal": True}, 4 * 16 * 4 * 36),
        ({"is_causal": True, "batch": 3}, 3 * 4 * 16 * 4 * 36),
        ({"is_causal": False, "backward": True}, 3.5 * 4 * 16 * 4 * 64),
        ({"is_causal": False, "padding": 0.5}, 4 * 16 * 4 * 16),
        ({"is_causal": True, "padding": 0.25, "batch": 2}, 4 * 16 * 4 * (36 + 10)),
    ],
)
def test_operations(options, flops) -> None:
    """Counted is what the mask asks for: 4 per head, channel and visible pair, 3.5 times that with gradients."""
    assert Workload(**SMALL, **options).flops(8) == flops


@given(st.integers(1, 9), st.integers(1, 300), st.floats(0, 0.99))
def test_padding(batch, length, share) -> None:
    """Padding spreads evenly about its share, grows from row to row, and never fills a row."""
    pads = Workload(**SMALL, batch=batch, padding=share).pads(length)
    assert len(pads) == batch
    assert sorted(pads) == list(pads)
    assert all(0 <= each < length for each in pads)
    assert abs(sum(pads) / batch - min(share * length, length - 1)) <= 1


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("padding", [0.0, 0.4])
@pytest.mark.parametrize("is_causal", [False, True])
def test_measured(backward, padding, is_causal) -> None:
    """Rows hold what they say: the median between its percentiles, TFLOP/s, the ratio to sdpa, rounding as deviation."""
    workload = Workload(**SMALL, batch=2, backward=backward, padding=padding, is_causal=is_causal)
    report = benchmark(workload, [8, 24], ["sdpa", "eager"], rounds=5)
    assert [(row.backend, row.length) for row in report.rows] == [
        ("sdpa", 8),
        ("eager", 8),
        ("sdpa", 24),
        ("eager", 24),
    ]
    for row in report.rows:
        assert (row.status, row.rounds, row.origin) == ("works", 5, "attnreg itself")
        assert 0 < row.low <= row.milliseconds <= row.high
        assert row.teraflops == pytest.approx(workload.flops(row.length) / (row.milliseconds / 1000) / 1e12)
        assert row.ratio_to_sdpa == row.milliseconds / one(report, "sdpa", row.length).milliseconds
        assert 0 < row.deviation < 1e-5
        assert row.mask_milliseconds > 0
        assert row.peak_bytes is None
    assert Report.from_dict(json.loads(json.dumps(report.as_dict(), allow_nan=False))) == report


def test_by_default_all() -> None:
    """Without names every backend is measured or a row that says why not; there is no ratio where sdpa is not."""
    report = benchmark(Workload(**SMALL), [8], rounds=1)
    assert {row.backend for row in report.rows} == {row.name for row in default_registry.rows()}
    refused = one(report, "loopback", None)
    assert (refused.status, refused.milliseconds) == ("refused", None)
    assert refused.problem.startswith("grouped_query: wants 4 query heads on 2 key/value heads")
    assert one(benchmark(Workload(**SMALL), [8], ["eager"], rounds=1), "eager").ratio_to_sdpa is None


def test_a_backend_that_raises_is_a_row() -> None:
    """Whatever a backend raises, at the first call or in the middle of it all, the others go on."""
    calls = []

    def raises(*_, **__):
        raise OSError("out of everything\nand more")

    def tires(*args, **kwargs):
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError
        return eager(*args, **kwargs)

    add("raises", raises)
    add("tires", tires)
    report = benchmark(Workload(**SMALL), [8], ["raises", "tires", "eager"], rounds=5)
    assert (one(report, "raises").status, one(report, "raises").problem) == ("broken", "OSError: out of everything")
    assert (one(report, "tires").status, one(report, "tires").problem) == ("broken", "RuntimeError")
    assert one(report, "tires").milliseconds is None
    assert one(report, "eager").status == "works"


def test_a_wrong_backend_is_found_out() -> None:
    """A result that is not the oracle's has a time and no curve; so has a right output with a wrong gradient."""

    def forgetful(module, query, key, value, attention_mask, **kwargs):
        return eager(module, query, key, value, torch.zeros_like(attention_mask), **kwargs)

    def leaky(module, query, key, value, attention_mask, **kwargs):
        return eager(module, query, key.detach() + 0.5 * (key - key.detach()), value, attention_mask, **kwargs)

    def empty(module, query, key, value, attention_mask, **kwargs):
        return eager(module, query, key, value, attention_mask, **kwargs)[0] * float("nan"), None

    for function in (forgetful, leaky, empty):
        add(function.__name__, function)
    names = ["forgetful", "leaky", "empty", "eager"]
    report = benchmark(Workload(**SMALL, backward=True), [8], names, rounds=1)
    assert [one(report, name).status for name in names] == ["wrong", "wrong", "wrong", "works"]
    assert one(report, "leaky").problem.startswith("deviates from the oracle by 0.")
    assert (one(report, "empty").deviation, one(report, "empty").problem) == (None, "deviates from the oracle by nan")
    assert list(report.curves) == ["eager"]


def test_refusals() -> None:
    """A kernel that is not installed, padding without a formatter, and what a formatter or a call refuses are rows."""
    add("absent", eager, kernel=Kernel(distribution="no-such-kernel", module="no_such_kernel"))
    add("maskless", eager, mask=NO_MASK)
    sequences = Capabilities(structures={"causal", "padding"}, is_causal=True, grouped_query=True)
    add("sequences", eager, mask=masks.varlen_mask, supports=sequences)
    report = benchmark(Workload(**SMALL, padding=0.3), [8], ["absent", "maskless", "eager"], rounds=1)
    assert one(report, "absent", None).problem.startswith("kernel_missing: wants the package no-such-kernel")
    assert one(report, "maskless", None).problem.startswith("mask: wants padding; supported: flags alone")
    assert one(report, "eager").status == "works"
    report = benchmark(Workload(**SMALL, is_causal=False), [8], ["sequences"], rounds=1)
    assert one(report, "sequences", None).problem.startswith("mask: wants bidirectional")


def test_inputs_that_do_not_fit() -> None:
    """A length whose tensors find no memory is a row for each backend, and the other lengths are measured."""
    report = benchmark(Workload(**SMALL, batch=2), [2**50, 8], ["sdpa", "eager"], rounds=1)
    assert {row.status for row in report.rows if row.length == 2**50} == {"broken"}
    assert one(report, "sdpa").status == one(report, "eager").status == "works"


def test_turns() -> None:
    """Each call has as many turns as rounds, every other round goes backwards, and one that raised is left alone."""
    order = []

    def late() -> None:
        order.append("late")
        if order.count("late") > 5:
            raise ValueError

    times = interleaved({"one": lambda: order.append("one"), "late": late}, "cpu", rounds=4)
    assert order == [*["one", "late"] * 3, "one", "late", "late", "one", "one", "late", "one"]
    assert (len(times.milliseconds["one"]), list(times.errors)) == (4, ["late"])
    assert len(interleaved({"one": lambda: None}, "cpu", seconds=0.01).milliseconds["one"]) in range(5, 201)


HEADER = """\
forward pass in bfloat16, batch 4, 32/8 heads of 128, causal, 30% padding on the left
NVIDIA H200; attnreg 0.1.0, torch 2.11.0; 2026-11-22
milliseconds of one call, interleaved (medians), the fastest first; mask: milliseconds to format it
512 tokens

 backend   ms       spread   TF/s   x sdpa   error     MiB    mask
 ───────────────────────────────────────────────────────────────────
 fast      0.0500   2%       650    0.500    2.0e-03   64.0   0.100
 sdpa      0.100    1%       325    1.00     2.1e-03   1024   0.0200

1024 tokens

 backend   ms      spread   TF/s   x sdpa   error     MiB   mask
 ─────────────────────────────────────────────────────────────────
 sdpa      0.400   1%       340    1.00     2.1e-03         0.0200

slow (refused)
  device: wants cuda
fast (broken at 1024 tokens)
  RuntimeError: out of memory
"""


def stored() -> Report:
    """Return a report as a GPU might have made it."""
    sdpa = Row(
        backend="sdpa",
        origin="attnreg itself",
        status="works",
        length=512,
        milliseconds=0.1,
        low=0.0995,
        high=0.1005,
        rounds=200,
        teraflops=325.0,
        ratio_to_sdpa=1.0,
        deviation=2.1e-3,
        peak_bytes=2**30,
        mask_milliseconds=0.02,
    )
    quick = {"backend": "fast", "milliseconds": 0.05, "low": 0.0495, "high": 0.0505, "teraflops": 650.0}
    rows = (
        Row(backend="slow", origin="attnreg itself", status="refused", problem="device: wants cuda"),
        sdpa,
        replace(sdpa, **quick, ratio_to_sdpa=0.5, deviation=2e-3, peak_bytes=2**26, mask_milliseconds=0.1),
        Row(backend="fast", origin="x", status="broken", length=1024, problem="RuntimeError: out of memory"),
        replace(sdpa, length=1024, milliseconds=0.4, low=0.398, high=0.402, teraflops=340.0, peak_bytes=None),
    )
    return Report(
        workload=Workload(device="cuda", dtype="bfloat16", batch=4, padding=0.3),
        hardware={"device": "NVIDIA H200", "cpu": "AMD EPYC", "cores": "16"},
        versions={"attnreg": "0.1.0", "torch": "2.11.0"},
        date="2026-11-22",
        command="attnreg bench",
        rows=rows,
    )


def in_a_process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run *code*, then the command, as a user does."""
    program = f"import sys; {code}; from attnreg.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "bench", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "140"}, check=False, timeout=300
    )


def test_what_is_printed(tmp_path) -> None:
    """A stored result is shown again, digit by digit; a backend that broke makes the exit code 1."""
    file = tmp_path / "result.json"
    file.write_text(json.dumps(stored().as_dict()))
    done = in_a_process("pass", "--read", str(file))
    assert "\n".join(line.rstrip() for line in done.stdout.rstrip().splitlines()) + "\n" == HEADER
    assert done.returncode == 1


def test_json(capsys) -> None:
    """The JSON has the workload, the hardware, the versions, the date, a command that repeats it, and every row."""
    code, out, _ = attnreg(capsys, "sdpa", "eager", *OPTIONS, "--backward", "--padding", "0.3", "--json")
    report = json.loads(out)
    assert code == 0
    assert list(report) == ["workload", "hardware", "versions", "date", "command", "rows"]
    assert report["workload"] == {
        "device": "cpu",
        "dtype": "float32",
        "batch": 1,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "is_causal": True,
        "backward": True,
        "padding": 0.3,
    }
    assert report["hardware"].keys() == {"device", "cpu", "cores"}
    assert report["versions"].keys() >= {"attnreg", "torch", "python"}
    assert report["command"] == (
        "attnreg bench sdpa eager --device cpu --dtype float32 --lengths 8,24 --batch 1 --heads 4/2 --head-dim 16 "
        "--causal --backward --padding 0.3 --repeats 3"
    )
    assert [(row["backend"], row["length"]) for row in report["rows"]] == [
        ("sdpa", 8),
        ("eager", 8),
        ("sdpa", 24),
        ("eager", 24),
    ]
    fields = {
        *("backend", "origin", "status", "length", "milliseconds", "low", "high", "spread", "rounds", "teraflops"),
        *("ratio_to_sdpa", "deviation", "peak_bytes", "mask_milliseconds", "problem"),
    }
    assert {frozenset(row) for row in report["rows"]} == {frozenset(fields)}
    assert all(row["rounds"] == 3 for row in report["rows"])


def test_exit_codes(capsys) -> None:
    """0 if others refuse, 1 if one that is named refuses, or one is wrong."""
    assert attnreg(capsys, *OPTIONS)[0] == 0
    code, out, _ = attnreg(capsys, "sdpa", "loopback", *OPTIONS)
    assert code == 1
    assert "grouped_query: wants 4 query heads on 2 key/value heads" in " ".join(out.split())
    add("wrong", lambda module, query, key, value, mask, **_: (query.transpose(1, 2), None))
    assert attnreg(capsys, "sdpa", "wrong", *OPTIONS)[0] == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("spda",), "attnreg: no attention backend is named 'spda'; did you mean 'sdpa'?"),
        (("--device", "nonsense"), "attnreg: the device is nonsense, which is not here; wanted: one that torch sees."),
        (("--device", "meta"), "attnreg: the device is meta, which is not here; wanted: one that torch sees."),
        (("--dtype", "int8"), "attnreg: dtype is 'int8'; wanted: one of float16, bfloat16, float32, float64."),
        (("--heads", "7/2"), "the number of heads is 7 query heads on 2 key/value heads"),
        (("--heads", "many"), "'many' is neither 32 nor 32/8"),
        (("--lengths", "short"), "'short' is no list of lengths such as 512,1024"),
        (("--lengths", "0,8"), "attnreg: a length is 0; wanted: from 1 to 16777216."),
        (("--lengths", "8,-1"), "attnreg: a length is -1; wanted: from 1 to 16777216."),
        (("--lengths", "16777217"), "attnreg: a length is 16777217; wanted: from 1 to 16777216."),
        (("--lengths", "9" * 23), f"attnreg: a length is {'9' * 23}; wanted: from 1 to 16777216."),
        (("--batch", "9" * 23), f"attnreg: batch is {'9' * 23}; wanted: 16777216 or less."),
        (("--heads", "9" * 23), f"attnreg: heads is {'9' * 23}; wanted: 16777216 or less."),
        (("--head-dim", "16777217"), "attnreg: head_dim is 16777217; wanted: 16777216 or less."),
        (("--padding", "1"), "attnreg: the share of padding is 1; wanted: 0 or more, and less than 1."),
        (("--plot", "figure.pdf"), "figure.pdf ends with neither .png nor .svg"),
        (("--plot", "/no/such/folder/figure.png"), "/no/such/folder is no folder"),
        (("--read", "/no/such/file.json"), "No such file or directory"),
    ],
)
def test_wrong_questions(capsys, arguments, text) -> None:
    """A question that makes no sense ends with exit code 2 and one message, before anything is measured."""
    code, out, err = attnreg(capsys, *arguments)
    assert (code, out) == (2, "")
    assert text in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


ROW = (
    "backend, origin, status, length, milliseconds, low, high, spread, rounds, teraflops, ratio_to_sdpa, deviation, "
    "peak_bytes, mask_milliseconds, problem"
)
TIME = "a number from 1e-09 to 1e+12, or null"


@pytest.mark.parametrize(
    ("part", "field", "value", "text"),
    [
        ("report", "hardware", {}, "hardware of the result is {}; wanted: an object of texts, with device, cpu, cores"),
        ("report", "hardware", [], "hardware of the result is []; wanted: an object of texts, with device, cpu, cores"),
        ("report", "versions", None, "versions of the result is null; wanted: an object of texts"),
        ("report", "versions", {"torch": 2}, "versions of the result is {'torch': 2}; wanted: an object of texts"),
        ("report", "date", 2026, "date of the result is 2026; wanted: a text"),
        ("report", "command", None, "command of the result is null; wanted: a text"),
        ("report", "rows", {}, "rows of the result is {}; wanted: a list"),
        ("report", "workload", "small", "workload of the result is 'small'; wanted: an object"),
        ("report", "extra", 1, "a field of the result is 'extra'; wanted: one of workload, hardware, versions, date, "
         "command, rows"),
        ("workload", "batch", "4", f"batch of the workload of the result is '4'; wanted: a whole number from 1 to "
         f"{2**63 - 1}"),
        ("workload", "heads", True, f"heads of the workload of the result is True; wanted: a whole number from 1 to "
         f"{2**63 - 1}"),
        ("workload", "heads", 2**30, "heads is 1073741824; wanted: 16777216 or less"),
        ("workload", "is_causal", "yes", "is_causal of the workload of the result is 'yes'; wanted: true or false"),
        ("workload", "dtype", ["int8"], "dtype of the workload of the result is ['int8']; wanted: one of float16, "
         "bfloat16, float32, float64"),
        ("workload", "padding", None, "padding of the workload of the result is null; wanted: a number of 0 or more"),
        ("workload", "padding", 1, "the share of padding is 1; wanted: 0 or more, and less than 1"),
        ("row", "backend", 1, "backend of row 2 of the result is 1; wanted: a text"),
        ("row", "problem", "\ud800", "problem of row 2 of the result is '\\ud800'; wanted: a text"),
        ("row", "status", "fine", "status of row 2 of the result is 'fine'; wanted: one of works, wrong, refused, "
         "broken"),
        ("row", "length", "512", f"length of row 2 of the result is '512'; wanted: a whole number from 1 to "
         f"{2**63 - 1}, or null"),
        ("row", "length", 10**30, f"length of row 2 of the result is {10**30}; wanted: a whole number from 1 to "
         f"{2**63 - 1}, or null"),
        ("row", "length", None, "length of row 2 of the result is missing; wanted: the length that its milliseconds "
         "belong to"),
        ("row", "milliseconds", "0.1", f"milliseconds of row 2 of the result is '0.1'; wanted: {TIME}"),
        ("row", "milliseconds", 0, f"milliseconds of row 2 of the result is 0; wanted: {TIME}"),
        ("row", "milliseconds", -1.0, f"milliseconds of row 2 of the result is -1.0; wanted: {TIME}"),
        ("row", "milliseconds", float("nan"), f"milliseconds of row 2 of the result is nan; wanted: {TIME}"),
        ("row", "low", float("inf"), f"low of row 2 of the result is inf; wanted: {TIME}"),
        ("row", "high", False, f"high of row 2 of the result is False; wanted: {TIME}"),
        ("row", "teraflops", -1, "teraflops of row 2 of the result is -1; wanted: a number of 0 or more, or null"),
        ("row", "deviation", 10**320, "deviation of row 2 of the result is 100000000000000000...0000000000000000000; "
         "wanted: a number of 0 or more, or null"),
        ("row", "rounds", 1.5, f"rounds of row 2 of the result is 1.5; wanted: a whole number from 0 to {2**63 - 1}"),
        ("row", "lenght", 1, f"a field of row 2 of the result is 'lenght'; wanted: one of {ROW}"),
    ],
)  # fmt: skip
def test_results_of_another_form(capsys, tmp_path, part, field, value, text) -> None:
    """A field of a stored result that holds something else ends with exit code 2, its name, and what is wanted."""
    report = stored().as_dict()
    {"report": report, "workload": report["workload"], "row": report["rows"][1]}[part][field] = value
    file = tmp_path / "result.json"
    file.write_text(json.dumps(report))
    assert attnreg(capsys, "--read", str(file)) == (2, "", f"attnreg: {text}.\n")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([], "the result is []; wanted: an object with the fields workload, hardware, versions, date, command, rows."),
        ({}, "workload of the result is missing; wanted: an object."),
        ({**stored().as_dict(), "workload": {}}, "device of the workload of the result is missing; wanted: a text."),
        ({**stored().as_dict(), "rows": [1]}, f"row 1 of the result is 1; wanted: an object with the fields {ROW}."),
        ({**stored().as_dict(), "rows": [{}]}, "backend of row 1 of the result is missing; wanted: a text."),
        ({1: 2}, "a field of the result is 1; wanted: one of workload, hardware, versions, date, command, rows."),
    ],
)
def test_no_results(data, text) -> None:
    """What is no result at all is refused, with the first thing that is missing."""
    with pytest.raises(InvalidInputError) as caught:
        Report.from_dict(data)
    assert str(caught.value) == text


def test_a_file_without_an_end(capsys, tmp_path) -> None:
    """A file of brackets, which Python's reader gives up on, is refused like any other that is no JSON."""
    file = tmp_path / "result.json"
    file.write_text("[" * 200_000)
    code, out, err = attnreg(capsys, "--read", str(file))
    assert (code, out) == (2, "")
    assert "Traceback" not in err


def test_rows_without_times(tmp_path) -> None:
    """The fields of a row that say nothing may be left out, and a time without percentiles is drawn."""
    rows = [{"backend": "sdpa", "origin": "x", "status": "works", "length": 8, "milliseconds": 1}]
    report = Report.from_dict({**stored().as_dict(), "rows": rows})
    assert report.rows == (Row(backend="sdpa", origin="x", status="works", length=8, milliseconds=1),)
    plot(report, [tmp_path / "a.svg"])


def test_colours() -> None:
    """A known backend has a colour of its own, the same beside whatever others; these come after, by name."""
    known = styles([])
    assert len({style.colour for style in known.values()}) == len(known)
    every = styles(["x/b", "sdpa", "x/a"])
    assert [*every] == [*known, "x/a", "x/b"]
    assert every | known == every
    assert len(set(every.values())) == len(every)
    names = {row.name for row in default_registry.rows() if row.origin.startswith(("attnreg itself", "attnreg-"))}
    assert names - {"loopback"} <= known.keys()


@given(st.sets(st.text(max_size=4), max_size=24))
def test_lines_differ(names) -> None:
    """No two lines of a picture look the same."""
    drawn = styles(names)
    assert drawn.keys() >= names
    assert len(set(drawn.values())) == len(drawn)


def test_texts_are_drawn_as_they_are(tmp_path) -> None:
    """A dollar in a name is a dollar, and begins no formula."""
    report = replace(stored(), hardware={"device": "$x^$ and $", "cpu": "", "cores": ""})
    plot(report, [tmp_path / "a.svg"])
    assert "$x^$ and $, bfloat16" in (tmp_path / "a.svg").read_text()


def test_plot(capsys, tmp_path) -> None:
    """The picture is drawn of what was measured, as PNG and as SVG, and equal results give equal pictures."""
    code, *_ = attnreg(
        capsys, "sdpa", "eager", *OPTIONS, "--plot", str(tmp_path / "a.png"), "--plot", str(tmp_path / "a.svg")
    )
    assert code == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    for name in ("b.svg", "c.svg"):
        plot(stored(), [tmp_path / name])
    drawn = (tmp_path / "b.svg").read_text()
    assert drawn == (tmp_path / "c.svg").read_text()
    for text in (
        *("sdpa", "fast", "sequence length (tokens)", "time of one forward pass (ms), median"),
        *("Attention, forward pass: NVIDIA H200, bfloat16", "2026-11-22", "batch 4, 32/8 heads of 128, causal"),
    ):
        assert text in drawn, "each text is a comment beside its glyphs"
    with pytest.raises(NothingToPlotError, match="there is nothing to plot: no backend was measured"):
        plot(replace(stored(), rows=()), [tmp_path / "d.svg"])


def test_plot_without_matplotlib(tmp_path) -> None:
    """Exit code 2 and what to install, before anything is measured; without --plot nobody asks for it."""
    blocked = "sys.modules['matplotlib'] = None"
    done = in_a_process(blocked, "sdpa", *OPTIONS, "--plot", str(tmp_path / "a.png"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "attnreg: plots need matplotlib, which is not installed: pip install 'attnreg[plot]'\n"
    assert in_a_process(blocked, "sdpa", *OPTIONS).returncode == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_labels_do_not_overlap(heights) -> None:
    """Labels keep their order, their distance and the bounds, and one that has room stays beside its line."""
    placed = _spread(sorted(heights), 0.04)
    assert all(after - before >= 0.04 - 1e-9 for before, after in pairwise(placed))
    assert all(-1e-9 <= each <= 1 + 1e-9 for each in placed)
    assert _spread([0.2, 0.5, 0.9], 0.04) == pytest.approx([0.2, 0.5, 0.9])
    assert _spread([0.5, 0.5], 0.04) == pytest.approx([0.48, 0.52])


@pytest.mark.parametrize(
    ("values", "ticks"),
    [([0.3, 7], [0.2, 0.5, 1, 2, 5, 10]), ([1, 1], [1, 2]), ([0.021, 0.049], [0.02, 0.05]), ([90], [50, 100])],
)
def test_ticks(values, ticks) -> None:
    """The axis of time has 1, 2 and 5 of each power of ten, as many as hold all of it."""
    assert _ticks(values) == ticks


def test_docs_have_the_options() -> None:
    """The page about the command line names every option of the command."""
    from typer.main import get_command

    from attnreg.cli import app

    command: object = get_command(app).commands["bench"]
    page = (Path(__file__).parents[1] / "docs" / "command-line.md").read_text(encoding="utf-8")
    options = {option for each in command.params if each.param_type_name == "option" for option in each.opts}
    assert {option for option in options if f"`{option}" not in page} == set()
