"""The conformance kit as a library: cards, verdicts, tolerances, and the class for pytest."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from mutants import CORRECT, attend

from attnreg import NO_MASK, Backend, Capabilities, Reason, UnsupportedError, testing
from attnreg.masks import sdpa_mask
from attnreg.testing import LAWS, Card, Row, UnusableError, rendering, verify
from attnreg.testing.case import Case
from attnreg.testing.patterns import CAUSAL
from attnreg.testing.tolerance import measured, measured_lossy


def rows(backend: Backend, *laws: str, dtype: str = "float32") -> dict[str, Row]:
    """Judge some laws on the CPU."""
    card = verify(backend, device="cpu", dtypes=[dtype], quick=True, laws=laws)
    return {row.law: row for row in card.rows}


def judged(backend: Backend, law: str, dtype: str = "float32") -> Row:
    """Judge one law alone, whatever it rests on."""
    from attnreg.testing.engine import judge
    from attnreg.testing.subject import Subject

    dtype = getattr(torch, dtype)
    return judge(LAWS[law], Subject(backend=backend, device=torch.device("cpu"), dtype=dtype, quick=True))


def test_all_is_true() -> None:
    """What the package exports is there."""
    assert all(hasattr(testing, name) for name in testing.__all__)


def test_importing_the_kit_needs_no_pytest() -> None:
    """`attnreg verify` works for people without pytest."""
    code = "import sys; sys.modules['pytest'] = None; import attnreg.testing as kit; print(len(kit.LAWS))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(LAWS)


@pytest.mark.parametrize("law", LAWS.values(), ids=lambda law: law.name)
def test_laws_are_sentences(law) -> None:
    """Each law says what holds and what to do, and rests on laws that exist."""
    assert law.says.endswith(".")
    assert law.remedy.endswith(".")
    assert set(law.needs) <= LAWS.keys() - {law.name}


def test_a_case_in_words() -> None:
    """A case names shapes and keywords as the call has them, and leaves out what is not asked for."""
    assert str(Case()) == "query (2, 4, 9, 16), key (2, 4, 9, 16), mask=bidirectional()"
    case = Case(pattern=CAUSAL, padding="left", softcap=30.0, value_head_dim=24, sinks=True, q_length=5)
    assert str(case) == (
        "query (2, 4, 5, 16), key (2, 4, 9, 16), value (2, 4, 9, 24), "
        "padding=left, softcap=30.0, s_aux=True, mask=causal()"
    )
    assert str(Case(pattern=None, is_causal=True)) == (
        "query (2, 4, 9, 16), key (2, 4, 9, 16), no mask, is_causal=True"
    )


def test_tolerance_is_measured() -> None:
    """What is allowed is twice the low-precision reference's error, and two units of the largest magnitude."""
    right = torch.zeros(3, dtype=torch.float64)
    low = torch.tensor([0.0, 0.25, 0.0])
    found = measured(torch.tensor([0.5, 0.0, 0.0]), right, low, magnitude=4.0)
    assert found.error == 0.5
    assert found.allowed == 0.5 + 2 * torch.finfo(torch.float32).eps * 4.0
    assert found.holds
    assert not measured(torch.tensor([float("nan"), 0.0, 0.0]), right, low, magnitude=4.0).holds


def test_a_refusal_is_a_verdict() -> None:
    """What is not declared and is refused is shown so, with the reason, and is no failure."""
    modest = replace(CORRECT, supports=Capabilities(is_causal=True))
    row = rows(modest, "softcap")["softcap"]
    assert (row.verdict, row.declared, row.error) == ("refused", "no", None)
    assert row.detail == "softcap: wants softcap; supported: not declared"


def test_what_is_declared_and_always_refused_fails() -> None:
    """A function that declares a structure and refuses it in every case does not do what it declares."""

    def refusing(*args, attention_mask=None, **kw):
        raise UnsupportedError("shy", [])

    supports = Capabilities(is_causal=True, structures={"causal", "bidirectional", "documents"})
    always = Backend(name="shy", attention=refusing, mask=sdpa_mask, supports=supports)
    row = judged(always, "documents")
    assert row.verdict == "fails"
    assert row.detail.startswith("documents is declared, and always refused")


def test_a_refusal_of_what_is_declared_fails() -> None:
    """A function that refuses a keyword which it declares fails that law, though other cases are computed."""

    def shy(*args, softcap=None, **kw):
        if softcap == 0.5:
            raise UnsupportedError("shy", [Reason("softcap", "a small cap", "a large one", "Wait.")])
        return attend(*args, softcap=softcap, **kw)

    row = judged(replace(CORRECT, attention=shy), "softcap")
    assert row.verdict == "fails"
    assert row.detail.startswith(
        "it refused what it declares (softcap: wants a small cap; supported: a large one), with"
    )


def maskless(module, query, key, value, attention_mask=None, **kw):
    """Attend without a mask, or refuse it."""
    if attention_mask is not None:
        raise UnsupportedError("maskless", [Reason("mask", "a tensor", "flags", "Choose another backend.")])
    return attend(module, query, key, value, None, **kw)


def test_a_function_of_flags_may_refuse_a_tensor() -> None:
    """A mask that the flags could have said may be refused as a tensor; without a mask nothing may."""
    flagged = replace(CORRECT.supports, structures={"causal", "bidirectional"})
    card = verify(replace(CORRECT, attention=maskless, supports=flagged), device="cpu", dtypes=["float32"], quick=True)
    verdicts = {row.law: row.verdict for row in card.rows}
    assert card.failures == ()
    assert {verdicts[law] for law in ("plain", "causal", "flags", "alignment", "lse", "packing")} == {"holds"}
    assert judged(replace(CORRECT, attention=maskless), "plain").verdict == "fails"


@pytest.mark.parametrize("limits", [{"min_head_dim": 64, "max_head_dim": 32}, {"devices": {"cuda"}}])
def test_a_backend_that_can_do_nothing_fails(limits) -> None:
    """Limits that no call keeps to make the plainest law fail."""
    row = judged(replace(CORRECT, supports=Capabilities(**limits)), "plain")
    assert row.verdict == "fails"
    assert row.detail.startswith("even plain attention is refused in every case: ")


def test_without_masks_there_is_nothing_to_ask_about_masks() -> None:
    """A backend with NO_MASK is asked about flags, and not about structures that it is never told."""
    free = replace(CORRECT, mask=NO_MASK)
    found = rows(free, "flags", "sliding_window", "padding")
    assert {name: row.verdict for name, row in found.items()} == {
        "flags": "holds",
        "sliding_window": "not applicable",
        "padding": "not applicable",
    }


def test_a_lossy_backend_has_a_tolerance_of_its_own() -> None:
    """Five percent, root mean square, of a quantised kernel's result; without the declaration it fails."""

    def coarse(*args, **kw):
        output, *rest = attend(*args, **kw)
        return (output * 1.02, *rest)

    assert rows(replace(CORRECT, attention=coarse), "plain")["plain"].verdict == "fails"
    lossy = replace(CORRECT, attention=coarse, supports=replace(CORRECT.supports, lossy=True))
    row = rows(lossy, "plain")["plain"]
    assert (row.verdict, row.allowed) == ("holds", 0.05)
    assert row.error == pytest.approx(0.02, rel=1e-3)


def test_limits_of_the_head_dimension_are_kept_to() -> None:
    """Supported head dimensions are computed and the others refused; the basic cases keep to the limits too."""
    limited = replace(CORRECT, supports=replace(CORRECT.supports, max_head_dim=64, head_dim_multiple=32))
    found = rows(limited, "plain", "head_dims")
    assert {row.verdict for row in found.values()} == {"holds"}
    assert "head_dim: wants 8; supported: multiples of 32" in found["head_dims"].detail


def test_the_smallest_head_dimension_is_kept_to() -> None:
    """The basic cases begin at min_head_dim, rounded up to the multiple; smaller ones are refused, value's too."""
    limited = replace(CORRECT.supports, min_head_dim=40, head_dim_multiple=16)
    found = rows(replace(CORRECT, supports=limited), "plain", "head_dims", "value_head_dim", "together", "declaration")
    assert {row.verdict for row in found.values()} == {"holds"}
    assert "head_dim: wants 8; supported: 40 or more" in found["head_dims"].detail


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("halved", [False, True])
def test_rounding_is_no_overflow(dtype, halved) -> None:
    """Large scores are exact, so whoever rounds them is right, wherever the factor is multiplied in."""

    def attention(module, query, key, value, *rest, scaling=None, **kw):
        root = (query.shape[-1] ** -0.5 if scaling is None else scaling) ** 0.5
        return attend(module, query * root, key * root, value, *rest, scaling=1.0, **kw)

    backend = replace(CORRECT, attention=attention) if halved else CORRECT
    row = judged(backend, "large_scores", dtype)
    assert row.verdict == "holds"
    assert row.cases > 1


def test_devices_and_dtypes() -> None:
    """The dtypes examined are those declared; a missing device and a backend without any of them are errors."""
    half = replace(CORRECT, supports=replace(CORRECT.supports, dtypes={"bfloat16"}))
    assert verify(half, quick=True, laws=["shape"]).dtypes == ("bfloat16",)
    with pytest.raises(UnusableError, match="one that torch sees"):
        verify(CORRECT, device="mps")
    tiny = replace(CORRECT, supports=replace(CORRECT.supports, dtypes={"float8_e4m3fn"}))
    with pytest.raises(UnsupportedError, match="dtype: wants float32; supported: float8_e4m3fn"):
        verify(tiny)


def test_float64_alone_is_examined() -> None:
    """A backend of float64 alone is judged in that."""
    double = replace(CORRECT, supports=replace(CORRECT.supports, dtypes={"float64"}))
    card = verify(double, quick=True, laws=["plain", "lse", "gradients", "large_scores"])
    assert card.dtypes == ("float64",)
    assert {row.verdict for row in card.rows} == {"holds"}


def test_packing_may_be_refused_without_masks() -> None:
    """NO_MASK leaves cu_seq_lens to the function; one that refuses them, and declares none, breaks nothing."""

    def whole(*args, cu_seq_lens_q=None, **kw):
        if cu_seq_lens_q is not None:
            raise UnsupportedError("whole", [Reason("packing", "packed rows", "whole ones", "Unpack them.")])
        return attend(*args, **kw)

    row = judged(replace(CORRECT, attention=whole, mask=NO_MASK, supports=Capabilities()), "packing")
    assert (row.verdict, row.declared) == ("refused", "no")


def test_a_lossy_backend_is_judged_so_by_every_law() -> None:
    """The log-sum-exp, weights and gradients of a quantised kernel have its tolerance, also where the gradient is 0."""

    def rounded(module, query, key, *rest, **kw):
        coarse = ((key * 32).round() / 32 - key).detach()
        return attend(module, query, key + coarse, *rest, **kw)

    lossy = replace(CORRECT, attention=rounded, supports=replace(CORRECT.supports, lossy=True))
    found = rows(lossy, "lse", "weights", "gradients", "large_scores")
    assert {name: row.detail for name, row in found.items() if row.verdict != "holds"} == {}
    nothing = torch.zeros(3, dtype=torch.float64)
    assert measured_lossy(nothing + 1e-6, nothing, magnitude=1.0, allowed=0.05).holds
    assert not measured_lossy(nothing + 1, nothing, magnitude=1.0, allowed=0.05).holds


def test_a_lossy_backend_is_held_to_what_it_declares() -> None:
    """One that promises less error than it has fails, and one that declares what it has holds."""

    def rounded(module, query, key, value, *rest, **kw):
        return attend(module, query, key, (value * 4).round() / 4, *rest, **kw)

    for declared, verdict in ((0.3, "holds"), (0.05, "fails"), (0.001, "fails")):
        supports = replace(CORRECT.supports, lossy=True, lossy_error=declared)
        row = rows(replace(CORRECT, attention=rounded, supports=supports), "plain")["plain"]
        assert (declared, row.verdict) == (declared, verdict)
        assert row.allowed in (None, declared)


def test_rendering_escapes() -> None:
    """What a kernel says about itself is text on the page and in the table, never markup."""
    row = Row(law="plain", says="<i>", dtype="float32", declared="", verdict="fails", detail="a|b <script>", remedy="x")
    about = {"origin": "me", "device": "cpu", "versions": {}, "date": "2026-01-01", "command": "c", "lossy": False}
    card = Card(backend="<b>", dtypes=("float32",), rows=(row,), **about)
    page = rendering.html(card)
    assert "<script>" not in page
    assert "<b>" not in page
    assert "a\\|b" in rendering.markdown(card)
    assert card.as_dict()["summary"] == "1 fails"


def test_an_infinite_error_is_no_number_in_json() -> None:
    """A result that is not finite has no error that JSON could hold."""

    def broken(*args, **kw):
        output, *rest = attend(*args, **kw)
        return (output * float("nan"), *rest)

    card = verify(replace(CORRECT, attention=broken), device="cpu", dtypes=["float32"], laws=["plain"], quick=True)
    [row] = card.as_dict()["rows"]
    assert (row["verdict"], row["error"]) == ("fails", None)
    assert "the output is not finite" in row["detail"]


def test_a_failing_random_case_is_made_small() -> None:
    """Hypothesis shrinks what the table does not catch: an error from 11 tokens on is shown with 11."""

    def long(module, query, *rest, **kw):
        output, *others = attend(module, query, *rest, **kw)
        return (output + (10 < query.shape[2] < 20), *others)

    row = judged(replace(CORRECT, attention=long), "grouped_query")
    assert row.verdict == "fails"
    assert "query (2, 4, 11, 16)" in row.detail


CONTRACT = """
from attnreg import Backend, Capabilities
from attnreg.masks import sdpa_mask
from attnreg.testing import BackendContract
from mutants import CORRECT, ignoring
from dataclasses import replace

class TestRight(BackendContract):
    backend, dtypes, quick = CORRECT, ["float32", "bfloat16"], True

class TestWrong(BackendContract):
    backend, dtypes, quick = replace(CORRECT, attention=ignoring("softcap")), ["float32"], True

class TestElsewhere(BackendContract):
    backend = replace(CORRECT, supports=replace(CORRECT.supports, devices={"mps"}))

class TestNobody(BackendContract):
    name = "nobody"
"""


def test_the_contract_in_pytest(tmp_path) -> None:
    """Each law is a test for each dtype; a failure says case, law and remedy; a missing device skips."""
    file = tmp_path / "test_contract.py"
    file.write_text(CONTRACT)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    paths = [entry for entry in sys.path if entry]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(file), "-k", SOME],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join([*paths, str(__file__).rpartition("/")[0]]), "PATH": "", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert "softcap (float32): fails: the output is off by" in done.stdout
    assert "What to do: Declare softcap=False or honour it" in done.stdout
    assert "the device is mps, which is not here" in done.stdout
    assert "no attention backend is named 'nobody'" in done.stdout
    # Right: plain and softcap in two dtypes, copies once. Wrong: softcap. Elsewhere: skipped. Nobody: fails.
    assert done.stdout.splitlines()[-1].startswith("4 failed, 7 passed, 3 skipped")


SOME = "plain or softcap or copies"
