"""Plugins: each loaded alone, when it is asked for, and whatever it does, everything else goes on working."""

from __future__ import annotations

import sys

import pytest
from doubles import BUILTIN, GOOD

import attnreg
from attnreg import (
    ApiMismatchError,
    DuplicateBackendError,
    NameTakenError,
    PluginContractError,
    PluginDependencyError,
    PluginImportError,
    UnknownBackendError,
)

BROKEN = [
    ("raise RuntimeError('no such driver')", PluginImportError, "it raised RuntimeError: no such driver"),
    ("import sys; sys.exit(3)", PluginImportError, "it raised SystemExit: 3"),
    ("import no_such_kernel", PluginDependencyError, "it imports 'no_such_kernel', which is not installed"),
    ("this is no python", PluginImportError, "it raised SyntaxError: invalid syntax"),
    ("from torch import no_such_name", PluginImportError, "it raised ImportError: cannot import name 'no_such_name'"),
    ("x = 1", PluginContractError, "it has no hook attnreg_register"),
    (
        "import attnreg\n@attnreg.hookimpl\ndef attnreg_register(registry, extra): pass",
        PluginContractError,
        "its hook must take one argument, registry",
    ),
    (
        "import attnreg\n@attnreg.hookimpl\ndef attnreg_register(registry): pass",
        PluginContractError,
        "its entry point promises 'mine', but it registers nothing",
    ),
    (
        GOOD.format(name="yours"),
        PluginContractError,
        "its entry point promises 'mine', but it registers yours",
    ),
    (
        GOOD.format(name="mine") + GOOD.format(name="extra").partition("attnreg_register(registry):")[2],
        PluginContractError,
        "it registers 'extra', but no entry point of its distribution has that name",
    ),
    (
        GOOD.format(name="mine").replace("def mask(**kwargs)", "def mask(only)"),
        PluginContractError,
        "its backend is refused: the mask formatter of 'mine' is mask(only); it must accept",
    ),
    (
        GOOD.format(name="mine") + "    raise ValueError('half way')",
        PluginImportError,
        "it raised ValueError: half way",
    ),
    (
        GOOD.format(name="mine").replace("registry.add(attnreg.Backend", "registry.add(dict"),
        PluginContractError,
        "its backend is refused: the record of 'attnreg-mine 1.0' is {'name': 'mine'",
    ),
    (
        GOOD.format(name="mine").replace("mask=mask)", "mask=mask, api=7)"),
        ApiMismatchError,
        "'mine' from attnreg-mine 1.0 is written for backend API 7; this attnreg speaks API 1. Upgrade attnreg (this",
    ),
    (
        GOOD.format(name="mine").replace("mask=mask)", "mask=mask, api=0)"),
        ApiMismatchError,
        "Upgrade attnreg-mine 1.0 (or its distribution).",
    ),
    (
        GOOD.format(name="mine").replace("mask=mask))", "mask=mask), replace=True)"),
        PluginContractError,
        "A plugin replaces nobody",
    ),
]


def test_listing_imports_nothing_and_resolving_imports_one(site, installed) -> None:
    """Names come from metadata; the first use of one imports that plugin alone."""
    site.plugin("mine", GOOD.format(name="mine"))
    site.plugin("yours", GOOD.format(name="yours"))
    registry = installed()
    assert registry.names() == sorted([*BUILTIN, "mine", "yours"])
    assert [row.status for row in registry.rows()] == ["installed"] * (len(BUILTIN) + 2)
    assert "mine" in registry
    assert not any(module.startswith("plugin_") for module in sys.modules)
    backend = registry.get("mine")
    assert str(backend.origin) == "attnreg-mine 1.0"
    assert [module for module in sys.modules if module.startswith("plugin_")] == ["plugin_mine_1_0"]
    assert {row.name: row.status for row in registry.rows()}["mine"] == "ready"


@pytest.mark.parametrize(("code", "error", "text"), BROKEN, ids=[text[:40] for *_, text in BROKEN])
def test_a_broken_plugin_is_a_row(site, installed, code: str, error: type[Exception], text: str) -> None:
    """Asked for by name it raises with its cause; it is a row with that text; everything else goes on working."""
    site.plugin("mine", code)
    site.plugin("yours", GOOD.format(name="yours"))
    registry = installed()
    with pytest.raises(error) as caught:
        registry.get("mine")
    assert text in str(caught.value)
    if error is not ApiMismatchError:
        assert "ATTNREG_DISABLE=attnreg-mine" in str(caught.value)
    rows = {row.name: row for row in registry.rows()}
    assert (rows["mine"].status, rows["mine"].problem) == ("broken", str(caught.value))
    assert registry.names() == sorted([*BUILTIN, "yours"])
    assert registry.get("yours").name == "yours"
    assert registry.get("sdpa").name == "sdpa"
    explanation = attnreg.explain(registry=registry)
    assert explanation.winner == "sdpa"
    assert next(each for each in explanation.candidates if each.name == "mine").reasons[0].code == "unavailable"


def test_the_cause_is_kept_and_raised_again(site, installed) -> None:
    """The first failure is remembered: the module is not run again, and the cause is there each time."""
    site.plugin("mine", "import sys; sys.runs = getattr(sys, 'runs', 0) + 1\nraise RuntimeError('once')")
    registry = installed()
    for _ in range(3):
        with pytest.raises(PluginImportError) as caught:
            registry.get("mine")
        assert str(caught.value.__cause__) == "once"
    assert sys.runs == 1
    del sys.runs


def test_an_entry_point_names_a_module(site, installed) -> None:
    """An entry point of the form module:object is refused with what is wanted."""
    site.install("attnreg-mine", entry_points="[attnreg.backends]\nmine = plugin_mine:register\n")
    with pytest.raises(PluginContractError, match="its entry point names an object, and must name a module"):
        installed().get("mine")


def test_keyboard_interrupt_is_not_swallowed(site, installed) -> None:
    """The person at the keyboard is not a broken plugin, and may try again."""
    site.plugin("mine", "raise KeyboardInterrupt")
    registry = installed()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            registry.get("mine")


def test_two_distributions_with_one_name(site, installed, monkeypatch) -> None:
    """Neither is chosen; the error names both and the ways out, and hiding one is such a way."""
    site.plugin("mine", GOOD.format(name="mine"), version="1.0")
    site.plugin("mine", GOOD.format(name="mine"), version="2.0", distribution="other-mine")
    registry = installed()
    with pytest.raises(DuplicateBackendError) as caught:
        registry.get("mine")
    assert str(caught.value) == (
        "'mine' is provided by attnreg-mine 1.0 and by other-mine 2.0; neither is chosen. Uninstall one (pip uninstall "
        "attnreg-mine), or hide one (ATTNREG_DISABLE=attnreg-mine)."
    )
    assert next(row for row in registry.rows() if row.name == "mine").status == "duplicate"
    assert "mine" not in registry.names()
    assert not any(module.startswith("plugin_") for module in sys.modules)
    monkeypatch.setenv("ATTNREG_DISABLE", "other_mine")
    assert str(installed().get("mine").origin) == "attnreg-mine 1.0"


def test_a_built_in_cannot_be_shadowed(site, installed) -> None:
    """A plugin that calls itself sdpa is a row that says so; sdpa is sdpa."""
    site.plugin("sdpa", GOOD.format(name="sdpa"))
    registry = installed()
    assert str(registry.get("sdpa").origin) == "attnreg itself"
    rows = [(row.status, row.origin, row.problem) for row in registry.rows() if row.name == "sdpa"]
    assert rows == [
        ("broken", "attnreg-sdpa 1.0", "a plugin cannot bear the name of a built-in"),
        ("ready", "attnreg itself", ""),
    ]
    assert registry.names() == BUILTIN


def test_user_code_does_not_take_an_installed_name(site, installed) -> None:
    """A name that a plugin provides is taken, also before anybody has loaded it, and replace=True is the way."""
    from doubles import attention, formatter

    site.plugin("mine", GOOD.format(name="mine"))
    registry = installed()
    with pytest.raises(NameTakenError, match=r"'mine' belongs to attnreg-mine 1.0; user code"):
        registry.add_attention("mine", attention, mask=formatter)
    assert "plugin_mine_1_0" not in sys.modules
    registry.add_attention("mine", attention, mask=formatter, replace=True)
    assert registry.get("mine").attention is attention
    registry.remove("mine")
    assert str(registry.get("mine").origin) == "attnreg-mine 1.0"


@pytest.mark.parametrize("value", ["mine", "attnreg-mine", "Attnreg_Mine", " other , mine "])
def test_deny_list(site, installed, monkeypatch, value: str) -> None:
    """ATTNREG_DISABLE takes backend and distribution names, and acts before any import."""
    site.plugin("mine", "raise RuntimeError('must not be imported')")
    monkeypatch.setenv("ATTNREG_DISABLE", value)
    registry = installed()
    with pytest.raises(UnknownBackendError, match=r"not usable: mine \(hidden by ATTNREG_DISABLE\)"):
        registry.get("mine")
    row = next(row for row in registry.rows() if row.name == "mine")
    assert (row.status, row.problem) == ("disabled", "hidden by ATTNREG_DISABLE")


def test_allow_list(site, installed, monkeypatch) -> None:
    """ATTNREG_ONLY hides every plugin that it does not name, and no built-in."""
    site.plugin("mine", GOOD.format(name="mine"))
    site.plugin("yours", "raise RuntimeError('must not be imported')")
    monkeypatch.setenv("ATTNREG_ONLY", "attnreg-mine")
    registry = installed()
    assert registry.names() == sorted([*BUILTIN, "mine"])
    with pytest.raises(UnknownBackendError, match="hidden by ATTNREG_ONLY"):
        registry.get("yours")


def test_one_distribution_with_two_backends(site, installed) -> None:
    """A module may provide several backends; each has its entry point, and loading one loads both."""
    code = GOOD.format(name="one") + "    registry.add(attnreg.Backend(name='two', attention=attention, mask=mask))"
    site.install(
        "attnreg-both",
        entry_points="[attnreg.backends]\none = plugin_both\ntwo = plugin_both\n",
        modules={"plugin_both": code},
    )
    registry = installed()
    assert registry.names() == sorted([*BUILTIN, "one", "two"])
    assert [registry.get(name).name for name in ("two", "one")] == ["two", "one"]


def test_names_that_are_not_the_plugins_to_serve(site, installed, monkeypatch) -> None:
    """Loading one name of a module opens no back door: built-ins, hidden names and duplicates stay what they are."""
    code = GOOD.format(name="one") + "".join(
        f"    registry.add(attnreg.Backend(name={name!r}, attention=attention, mask=mask))\n"
        for name in ("sdpa", "shared", "secret")
    )
    names = "\n".join(f"{name} = plugin_many" for name in ("one", "sdpa", "shared", "secret"))
    site.install("attnreg-many", entry_points=f"[attnreg.backends]\n{names}\n", modules={"plugin_many": code})
    site.plugin("shared", GOOD.format(name="shared"), distribution="other-shared")
    monkeypatch.setenv("ATTNREG_DISABLE", "secret")
    registry = installed()
    assert str(registry.get("one").origin) == "attnreg-many 1.0"
    assert str(registry.get("sdpa").origin) == "attnreg itself"
    with pytest.raises(DuplicateBackendError):
        registry.get("shared")
    with pytest.raises(UnknownBackendError, match="hidden by ATTNREG_DISABLE"):
        registry.get("secret")


NASTY = [
    (
        "    registry.add(attnreg.Backend(name='mine', attention=attention, mask=mask))",
        "it registers a name twice: mine",
    ),
    (
        "    attnreg.default_registry\n    import sys\n    sys.asked.get('mine')",
        "it asks for its own backend while it is",
    ),
]


@pytest.mark.parametrize(("more", "text"), NASTY, ids=["twice", "itself"])
def test_nasty_hooks(site, installed, monkeypatch, more: str, text: str) -> None:
    """A hook that registers a name twice, or asks for itself, is refused with what it did."""
    import sys

    site.plugin("mine", GOOD.format(name="mine") + more)
    registry = installed()
    monkeypatch.setattr(sys, "asked", registry, raising=False)
    with pytest.raises(PluginContractError, match=text):
        registry.get("mine")


def test_a_registrar_is_for_its_hook(site, installed, monkeypatch) -> None:
    """A registrar that a plugin kept takes nothing once the hook has returned: nothing would come of it."""
    import sys

    site.plugin("mine", GOOD.format(name="mine") + "    import sys\n    sys.kept = registry")
    monkeypatch.setattr(sys, "kept", None, raising=False)
    backend = installed().get("mine")
    with pytest.raises(attnreg.RegistrationError, match=r"registry.add is for the hook alone; later, use Attention"):
        sys.kept.add(backend)


def test_names_outside_the_grammar_are_rows(site, installed) -> None:
    """An entry point that no name can reach is a broken row, and is not offered."""
    site.install("attnreg-odd", entry_points="[attnreg.backends]\npaged|x = plugin_odd\n")
    registry = installed()
    assert registry.names() == BUILTIN
    row = next(row for row in registry.rows() if row.name == "paged|x")
    assert row.status == "broken"
    assert row.problem.startswith("'paged|x' is no backend name")


def test_no_deadlock_between_an_import_and_a_load(site, installed) -> None:
    """One thread imports a module that registers a backend, while another loads a plugin that imports that module."""
    import sys
    import threading

    shared = "import sys, time\ntime.sleep(0.3)\nsys.asked.add_attention('theirs', lambda *a, **k: None)\n"
    site.plugin("mine", "import plugin_shared\n" + GOOD.format(name="mine"))
    (site.path / "plugin_shared.py").write_text(shared)
    registry = installed()
    sys.asked = registry
    registry.names()
    threads = [
        threading.Thread(target=__import__, args=("plugin_shared",), daemon=True),
        threading.Thread(target=registry.get, args=("mine",), daemon=True),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    del sys.asked
    assert not any(thread.is_alive() for thread in threads)
    assert registry.get("mine").name == "mine"


def test_two_threads_load_one_plugin_once(site, installed) -> None:
    """Both get the one record, and the module runs once."""
    import sys
    import threading

    site.plugin("mine", "import sys, time\ntime.sleep(0.2)\nsys.runs.append(1)\n" + GOOD.format(name="mine"))
    registry = installed()
    sys.runs = []
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(registry.get("mine"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 4
    assert all(each is found[0] for each in found)
    assert sys.runs == [1]
    del sys.runs
