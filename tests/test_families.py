"""Families of names: a plugin that provides names too many for entry points, and every way in which one can be broken."""

from __future__ import annotations

import sys
import threading

import pytest
from doubles import BUILTIN, GOOD

import attnreg
from attnreg import (
    DuplicateBackendError,
    PluginContractError,
    PluginDependencyError,
    PluginImportError,
    UnknownBackendError,
    UnsupportedError,
)
from attnreg.discovery import Discovery, scan
from attnreg.plugins import PluginFinder

FAMILY = """
import attnreg

def attention(module, query, key, value, attention_mask, **kwargs):
    return query.transpose(1, 2), None

def mask(**kwargs):
    return kwargs.get("attention_mask")

@attnreg.hookimpl
def attnreg_provide(name):
    if name.startswith({prefix!r}):
        return attnreg.Backend(name=name, attention=attention, mask=mask)
    return None
"""


@pytest.fixture
def families(site):
    """A function that makes a registry over the families and plugins installed in `site` by then."""

    def discover() -> Discovery:
        found = scan()
        mine = [
            tuple(each for each in group if each.target.startswith("plugin_"))
            for group in (found.candidates, found.families)
        ]
        return Discovery(mine[0], found.faults, mine[1])

    return lambda: attnreg.Registry(lambda: PluginFinder(discover))


def install(site, family: str, code: str, *, distribution: str | None = None) -> None:
    """Install a distribution with the one family whose module has *code* as its source."""
    distribution = distribution or f"attnreg-{family}"
    module = f"plugin_{distribution.replace('-', '_')}"
    site.install(distribution, entry_points=f"[attnreg.families]\n{family} = {module}\n", modules={module: code})


def test_a_family_provides_names_that_nobody_listed(site, families) -> None:
    """Listing imports nothing and names nothing; asking imports the family, and the record is one like any other."""
    install(site, "acme", FAMILY.format(prefix="acme/"))
    registry = families()
    assert registry.names() == BUILTIN
    assert [row.name for row in registry.rows()] == BUILTIN
    assert not any(module.startswith("plugin_") for module in sys.modules)
    backend = registry.get("acme/attention@v1:fast")
    assert backend.name == "acme/attention@v1:fast"
    assert str(backend.origin) == "attnreg-acme 1.0"
    assert registry.get("acme/attention@v1:fast") is backend
    row = next(row for row in registry.rows() if row.name == backend.name)
    assert (row.status, row.origin, row.problem) == ("ready", "attnreg-acme 1.0", "")
    assert backend.name in attnreg.explain(registry=registry).__str__()


def test_a_family_is_asked_for_names_with_a_slash_only(site, families) -> None:
    """A simple name that is unknown imports no family: a typing error is none of its business."""
    install(site, "acme", "raise RuntimeError('must not be imported')")
    with pytest.raises(UnknownBackendError):
        families().get("sdpaa")
    assert families().get("sdpa").name == "sdpa"


def test_nobody_provides_it(site, families) -> None:
    """A Hub name that no family provides is unknown, and the error says what to install."""
    install(site, "acme", FAMILY.format(prefix="acme/"))
    with pytest.raises(UnknownBackendError) as caught:
        families().get("org/repo@v1")
    assert "pip install attnreg-kernels" in str(caught.value)
    assert "AttentionInterface.register('org/repo@v1', function, mask=formatter)" in str(caught.value)
    with pytest.raises(UnknownBackendError) as caught:
        families().get("nothing")
    assert "attnreg-kernels" not in str(caught.value)


BROKEN = [
    ("raise RuntimeError('no such driver')", PluginImportError, "it raised RuntimeError: no such driver"),
    ("import no_such_kernel", PluginDependencyError, "it imports 'no_such_kernel', which is not installed"),
    ("x = 1", PluginContractError, "it has no hook attnreg_provide"),
    (GOOD.format(name="acme"), PluginContractError, "it has no hook attnreg_provide"),
    (
        "import attnreg\n@attnreg.hookimpl\ndef attnreg_provide(name, extra): pass",
        PluginContractError,
        "its hook must take one argument, name",
    ),
]


@pytest.mark.parametrize(("code", "error", "text"), BROKEN, ids=[text[:40] for *_, text in BROKEN])
def test_a_broken_family_is_a_row(site, families, code: str, error: type[Exception], text: str) -> None:
    """A family that cannot be loaded raises with its cause, is a row afterwards, and harms nothing else."""
    install(site, "acme", code)
    site.plugin("mine", GOOD.format(name="mine"))
    registry = families()
    for _ in range(2):
        with pytest.raises(error) as caught:
            registry.get("acme/attention@v1")
        assert text in str(caught.value)
        assert "ATTNREG_DISABLE=attnreg-acme" in str(caught.value)
    row = next(row for row in registry.rows() if row.name == "family acme")
    assert (row.status, row.origin, row.problem) == ("broken", "attnreg-acme 1.0", str(caught.value))
    assert registry.names() == sorted([*BUILTIN, "mine"])
    assert registry.get("mine").name == "mine"
    assert attnreg.explain(registry=registry).winner == "sdpa"


ANSWERS = [
    ("raise ValueError('no ' + name)", PluginImportError, "it raised ValueError: no acme/x"),
    ("import sys; sys.exit(3)", PluginImportError, "it raised SystemExit: 3"),
    ("return {}", attnreg.InvalidBackendError, "it must be an attnreg.Backend"),
    (
        "return attnreg.Backend(name='acme/y', attention=attention, mask=mask)",
        PluginContractError,
        "it was asked for 'acme/x' and returned 'acme/y'",
    ),
    (
        "return attnreg.Backend(name=name, attention=attention, mask=mask, api=7)",
        attnreg.ApiMismatchError,
        "is written for backend API 7",
    ),
    ("import sys; return sys.asked.get(name)", PluginContractError, "it asks for this name while it is asked for it"),
]


@pytest.mark.parametrize(("answer", "error", "text"), ANSWERS, ids=[text[:40] for *_, text in ANSWERS])
def test_a_wrong_answer(site, families, monkeypatch, answer: str, error: type[Exception], text: str) -> None:
    """What a family answers is held against the contract; the family itself can still be asked for other names."""
    body = f"    if name == 'acme/x':\n        {answer}\n    if name.startswith"
    install(site, "acme", FAMILY.format(prefix="acme/").replace("    if name.startswith", body))
    registry = families()
    monkeypatch.setattr(sys, "asked", registry, raising=False)
    with pytest.raises(error) as caught:
        registry.get("acme/x")
    assert text in str(caught.value)
    assert registry.get("acme/z").name == "acme/z"
    assert not any(row.name.startswith("family") for row in registry.rows())


def test_a_refusal_passes_and_is_not_remembered(site, families, monkeypatch) -> None:
    """A family says no with an error of attnreg's own, which arrives as it is; the next question is asked anew."""
    code = FAMILY.format(prefix="acme/").replace(
        "    if name.startswith",
        "    import os\n    if not os.environ.get('ACME_ALLOWED'):\n"
        "        reason = attnreg.Reason('not_allowed', name, 'nothing', 'Set ACME_ALLOWED.')\n"
        "        raise attnreg.UnsupportedError(name, [reason])\n    if name.startswith",
    )
    install(site, "acme", code)
    registry = families()
    with pytest.raises(UnsupportedError) as caught:
        registry.get("acme/x")
    assert [reason.code for reason in caught.value.reasons] == ["not_allowed"]
    monkeypatch.setenv("ACME_ALLOWED", "1")
    assert registry.get("acme/x").name == "acme/x"


def test_keyboard_interrupt_is_not_swallowed(site, families) -> None:
    """The person at the keyboard is no broken family."""
    install(site, "acme", FAMILY.format(prefix="").replace("    if name", "    raise KeyboardInterrupt\n    if name"))
    with pytest.raises(KeyboardInterrupt):
        families().get("acme/x")


def test_two_families_side_by_side(site, families) -> None:
    """Each serves its own names; a broken one keeps the other from nothing; one name from both is nobody's."""
    install(site, "acme", FAMILY.format(prefix="acme/"))
    install(site, "broken", "raise RuntimeError('no')")
    install(site, "every", FAMILY.format(prefix="every/"))
    registry = families()
    assert str(registry.get("acme/x").origin) == "attnreg-acme 1.0"
    assert str(registry.get("every/x").origin) == "attnreg-every 1.0"
    with pytest.raises(PluginImportError, match="it raised RuntimeError: no"):
        registry.get("other/x")
    install(site, "more", FAMILY.format(prefix="acme/"))
    with pytest.raises(
        DuplicateBackendError, match=r"'acme/x' is provided by attnreg-acme 1.0 and by attnreg-more 1.0"
    ):
        families().get("acme/x")


def test_two_distributions_with_one_family(site, families, monkeypatch) -> None:
    """Neither is asked; the error names both, and hiding one is a way out."""
    install(site, "acme", FAMILY.format(prefix="acme/"))
    install(site, "acme", FAMILY.format(prefix="acme/"), distribution="other-acme")
    registry = families()
    with pytest.raises(DuplicateBackendError, match=r"'acme' is provided by attnreg-acme 1.0 and by other-acme 1.0"):
        registry.get("acme/x")
    assert next(row for row in registry.rows() if row.name == "family acme").status == "duplicate"
    assert not any(module.startswith("plugin_") for module in sys.modules)
    monkeypatch.setenv("ATTNREG_DISABLE", "other-acme")
    assert str(registry.get("acme/x").origin) == "attnreg-acme 1.0"


@pytest.mark.parametrize("value", ["acme", "attnreg-acme", "Attnreg_Acme", "acme/x@v1"])
def test_deny_list(site, families, monkeypatch, value: str) -> None:
    """ATTNREG_DISABLE takes the family, its distribution and a single name, and acts before any import."""
    install(site, "acme", "raise RuntimeError('must not be imported')")
    monkeypatch.setenv("ATTNREG_DISABLE", value)
    registry = families()
    with pytest.raises(UnknownBackendError) as caught:
        registry.get("acme/x@v1")
    if value != "acme/x@v1":
        assert "not usable: family acme (hidden by ATTNREG_DISABLE)" in str(caught.value)


@pytest.mark.parametrize("value", ["acme", "attnreg-acme", "acme/x@v1"])
def test_allow_list(site, families, monkeypatch, value: str) -> None:
    """ATTNREG_ONLY hides every family that it does not name, by family, distribution or a single name."""
    install(site, "acme", FAMILY.format(prefix="acme/"))
    install(site, "other", "raise RuntimeError('must not be imported')")
    monkeypatch.setenv("ATTNREG_ONLY", value)
    registry = families()
    assert registry.get("acme/x@v1").name == "acme/x@v1"
    assert {row.name: row.problem for row in registry.rows()}["family other"] == "hidden by ATTNREG_ONLY"


def test_a_plugin_may_list_one_name_of_a_family(site, families) -> None:
    """An entry point of its own wins over a family: whoever lists a name, provides it."""
    install(site, "acme", FAMILY.format(prefix="acme/"))
    site.install(
        "attnreg-x",
        entry_points="[attnreg.backends]\nacme/x@v1 = plugin_x\n",
        modules={"plugin_x": GOOD.format(name="acme/x@v1")},
    )
    registry = families()
    assert "acme/x@v1" in registry.names()
    assert str(registry.get("acme/x@v1").origin) == "attnreg-x 1.0"
    assert str(registry.get("acme/y@v1").origin) == "attnreg-acme 1.0"


def test_one_distribution_with_both_groups(site, families) -> None:
    """A module may provide a backend and a family; each hook answers for its own group."""
    code = GOOD.format(name="acme") + FAMILY.format(prefix="acme/").partition("\n@")[2].join(["@", ""])
    entry_points = "[attnreg.backends]\nacme = plugin_acme\n\n[attnreg.families]\nacme = plugin_acme\n"
    site.install("attnreg-acme", entry_points=entry_points, modules={"plugin_acme": code})
    registry = families()
    assert registry.get("acme").name == "acme"
    assert registry.get("acme/x").name == "acme/x"


def test_unreadable_families_are_a_fault(site) -> None:
    """An entry_points.txt that mentions the group, and in which none can be read, is named."""
    site.install("attnreg-odd", entry_points="[attnreg.families]\n")
    faults = [fault for fault in scan().faults if fault.distribution.startswith("attnreg-odd")]
    assert [fault.problem for fault in faults] == [
        "ValueError: its entry_points.txt mentions [attnreg.families], but no entry point can be read there"
    ]


def test_two_threads_import_a_family_once(site, families) -> None:
    """Both get the one record, and the module runs once."""
    runs = "import sys, time\ntime.sleep(0.2)\nsys.runs.append(1)\n"
    install(site, "acme", runs + FAMILY.format(prefix="acme/"))
    registry = families()
    sys.runs = []
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(registry.get("acme/x"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 4
    assert all(each is found[0] for each in found)
    assert sys.runs == [1]
    del sys.runs
