"""The kit is tested by wrong backends: each is caught, by exactly the laws that it breaks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from doubles import GOOD
from mutants import CORRECT, MUTANTS, SLOPES, Mutant, after, lossy, sloped, three_percent
from paged_mutants import PAGED, PAGED_MUTANTS

from attnreg.testing import LAWS, verify


@pytest.fixture(autouse=True)
def _one_thread():
    """Small inputs are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def failing(backend, laws=None) -> set[str]:
    """Name the laws that a backend breaks in float32 on the CPU."""
    card = verify(backend, device="cpu", dtypes=["float32"], quick=True, laws=laws)
    return {row.law for row in card.failures}


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"attention": sloped(1.0), "supports": SLOPES},
        {"attention": after(three_percent), "supports": lossy(0.04)},
    ],
    ids=["everything", "slopes", "lossy"],
)
def test_what_the_mutants_derive_from_is_right(parts) -> None:
    """The correct implementation breaks no law, so what a mutant breaks is the mutant's doing."""
    assert failing(replace(CORRECT, **parts)) == set()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_mutant_is_killed_by_the_laws_that_it_breaks(mutant: Mutant) -> None:
    """A wrong backend fails the laws about its error, and no other."""
    assert failing(mutant.backend) == mutant.broken


OVER_PAGES = [law for law in LAWS if law.startswith("paged")]


def test_what_the_mutants_over_pages_derive_from_is_right() -> None:
    """The correct implementation keeps every law that it keeps without pages, and those about pages, by each form."""
    card = verify(PAGED, device="cpu", dtypes=["float32"], quick=True)
    assert card.holds
    assert {row.verdict for row in card.rows if row.law in OVER_PAGES} == {"holds"}


@pytest.mark.parametrize("mutant", PAGED_MUTANTS, ids=lambda mutant: mutant.name)
def test_each_mutant_over_pages_is_killed_by_the_laws_that_it_breaks(mutant: Mutant) -> None:
    """A function that errs over pages alone fails the laws about pages, those that its error is about."""
    assert failing(mutant.backend, [*OVER_PAGES, "inputs_untouched"]) == mutant.broken


def test_every_law_can_be_broken() -> None:
    """A law that no mutant breaks would be a check that cannot fail."""
    assert frozenset().union(*(mutant.broken for mutant in (*MUTANTS, *PAGED_MUTANTS))) == LAWS.keys() - {"laziness"}
    assert len(MUTANTS) >= 20


EAGERLY = "import wheel_of_a_kernel\n" + GOOD.format(name="hasty")


def test_a_plugin_that_imports_its_kernel_is_caught(site, installed, monkeypatch) -> None:
    """The law of laziness fails for a module that imports its kernel's package, and names the package."""
    site.plugin("hasty", EAGERLY)
    (site.path / "wheel_of_a_kernel.py").write_text("")
    registry = installed()
    monkeypatch.setattr("attnreg.testing.laws.process.default_registry", registry)
    card = verify(registry.get("hasty"), laws=["laziness"])
    assert [row.detail for row in card.failures] == ["resolving the name imports wheel_of_a_kernel"]
