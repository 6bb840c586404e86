"""The conformance kit's laws about pages: who is asked what, in which words, and over which pages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mutants import CORRECT
from paged_mutants import PAGED, attend_paged, paged_mutant

from attnreg import Backend, Capabilities
from attnreg.cli import verification
from attnreg.testing import LAWS, Row, verify
from attnreg.testing.case import Case, Paging
from attnreg.testing.paging import LentCache, inputs_in_pages, sequences_of
from attnreg.testing.subject import Subject

OVER_PAGES = [law for law in LAWS if law.startswith("paged")]


def rows(backend: Backend | str, *laws: str) -> dict[str, Row]:
    """Judge some laws on the CPU in float32."""
    card = verify(backend, device="cpu", dtypes=["float32"], quick=True, laws=laws or OVER_PAGES)
    return {row.law: row for row in card.rows}


def test_a_backend_for_pages_alone_is_asked_about_pages_alone() -> None:
    """A law about dense keys and masks does not apply to `paged|X`, and is never said to hold."""
    found = rows("paged|sdpa", *(law for law in LAWS if LAWS[law].dense), "paged")
    assert found.pop("paged").verdict == "holds"
    assert {(row.verdict, row.detail) for row in found.values()} == {("not applicable", "it takes pages alone")}


def test_the_command_that_repeats_it_is_one_for_a_shell() -> None:
    """A bar in a name is quoted: without that, the shell would take what is behind it for a command."""
    card = verify("paged|sdpa", device="cpu", dtypes=["float32"], laws=["paged"], quick=True)
    assert card.command == "attnreg verify 'paged|sdpa' --device cpu --quick"
    command = verification._command("paged|sdpa", None, ["float32"], quick=False)
    assert command == "attnreg verify 'paged|sdpa' --dtype float32"


def test_who_declares_no_pages_refuses_them() -> None:
    """Without the declaration one refusal says it, in each law; with it, what is not declared besides is refused."""
    found = rows(CORRECT)
    assert {(row.verdict, row.declared, row.cases) for row in found.values()} == {("refused", "no", 1)}
    assert found["paged"].detail == "paged: wants a paged key/value cache; supported: not declared"
    modest = replace(PAGED, supports=Capabilities(paged=True, is_causal=True))
    found = rows(modest, "paged", "paged_packing", "paged_keywords")
    assert [row.verdict for row in found.values()] == ["holds", "refused", "holds"]
    assert found["paged_keywords"].detail.startswith("26 of 30 cases refused: ")


def test_sizes_of_pages_are_those_that_are_declared() -> None:
    """A backend is asked for pages of the size that it declares, and refuses others."""

    def coarse(*args, block_table=None, cache_seqlens=None, **kw):
        assert block_table is None or args[2].shape[2] % 32 == 0
        return attend_paged(*args, block_table=block_table, cache_seqlens=cache_seqlens, **kw)

    backend = replace(PAGED, attention=coarse, supports=replace(PAGED.supports, page_size_multiple=32))
    found = rows(backend)
    assert {law: row.verdict for law, row in found.items()} == {
        **dict.fromkeys(OVER_PAGES, "holds"),
        "paged_cache": "not applicable",
    }
    assert found["paged"].detail.endswith("refused: page_size: wants pages of 16 tokens; supported: multiples of 32")
    assert found["paged_cache"].detail == "its function takes pages by block_table, not by cache"


def test_a_failure_names_the_sequence() -> None:
    """The text says which sequence is wrong, how long all are, and how they lie in pages."""
    wrong = paged_mutant("one", pick=lambda table: torch.cat([table[:3], table[:1]]) if len(table) > 3 else table)
    row = rows(wrong.backend, "paged")["paged"]
    assert row.verdict == "fails"
    assert row.detail.startswith("the output of sequence 3 is off by ")
    assert row.detail.endswith(
        "with 1, 1, 1, 1 queries in rows, 35, 3, 16, 17 tokens in pages of 16, 4 heads on 4, head_dim 16, "
        "layout=transposed"
    )


def test_an_output_of_the_wrong_shape_fails() -> None:
    """The output over pages has the query's rows and length, and its dtype."""

    def flat(*args, **kw):
        output, *rest = attend_paged(*args, **kw)
        return (output.flatten(0, 1)[None] if kw.get("block_table") is not None else output, *rest)

    row = rows(replace(PAGED, attention=flat), "paged")["paged"]
    assert "the output is torch.float32 (1, 4, 4, 16) instead of torch.float32 (4, 1, 4, 16)" in row.detail


@pytest.mark.parametrize("form", ["rows", "packed", "cache"])
@pytest.mark.parametrize("window", [None, 3])
def test_pages_hold_the_sequences_and_traps(form, window) -> None:
    """What counts is where the table says; pages of nobody are NaN, and those behind the window hold leftovers."""
    paging = Paging(form=form, queries=(2, 2, 2), tokens=(9, 2, 4), page_size=4)
    case = Case(pattern=None, pages=paging, sliding_window=window, seed=3)
    subject = Subject(backend=PAGED, device=torch.device("cpu"), dtype=torch.float32)
    inputs = inputs_in_pages(case, subject)
    key, table = inputs.key.transpose(1, 2), inputs.table
    if isinstance(inputs.cache, LentCache):
        pages = inputs.cache.pages
        assert not pages.key[pages.block_table[:, 0].long()].isfinite().all()  # the new tokens are not there yet
        inputs.cache.update(0, inputs.key, inputs.value)
        key, table = pages.key, pages.block_table
    for row, (alone, sequence) in enumerate(sequences_of(case, subject)):
        first = 0 if window is None else max(0, alone.kv_length - 2 - window + 1) // 4 * 4
        assert table is not None
        found = key[table[row].long()].flatten(0, 1)
        assert torch.equal(found[first : alone.kv_length].transpose(0, 1), sequence.key[0, :, first:])
        assert found[: -(-alone.kv_length // 4) * 4].isfinite().all()
    assert key.isnan().flatten(1).all(1).sum() == 3
    assert (key.isnan().flatten(1).any(1) == key.isnan().flatten(1).all(1)).all()
