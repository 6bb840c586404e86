"""Discovery: by names alone, one distribution at a time."""

from __future__ import annotations

import sys

import pytest

import attnreg
from attnreg.discovery import Candidate, normalized, scan, version

ENTRY = "[attnreg.backends]\nmine = plugin_mine\n"


def found(site) -> list[Candidate]:
    """Candidates from the test's own folder."""
    return [each for each in scan().candidates if each.target.startswith("plugin_")]


def test_finds_without_importing(site) -> None:
    """A name is known from the distribution's files; its module is not touched, nor does it have to exist."""
    site.install("attnreg-mine", "2.5", entry_points=ENTRY)
    assert found(site) == [Candidate("mine", "plugin_mine", "attnreg-mine", "2.5")]
    assert "plugin_mine" not in sys.modules


@pytest.mark.parametrize(
    ("corruption", "text"),
    [
        ({"entry_points": "[console_scripts]\nthis line has no equals sign\n"}, ""),
        ({"entry_points": b"\xff\xfe[console_scripts]\nx = y\n"}, "UnicodeDecodeError"),
        ({"entry_points": "[attnreg.backends]\nno equals sign\n"}, "broken 1.0"),
        (
            {"metadata": b"\xff\xfe\x00Name: broken", "entry_points": "[attnreg.backends]\nbad = plugin_bad\n"},
            "UnicodeDecodeError",
        ),
        ({"metadata": None, "entry_points": "[attnreg.backends]\nbad = plugin_bad\n"}, ""),
    ],
    ids=["malformed neighbour", "undecodable neighbour", "malformed own group", "undecodable METADATA", "no METADATA"],
)
def test_a_corrupt_distribution_costs_nothing_else(site, corruption: dict, text: str) -> None:
    """Whatever is wrong with one distribution, all others are found; at worst it is a fault with its error."""
    site.install("broken", **corruption)
    site.install("attnreg-mine", entry_points=ENTRY)
    assert [each.name for each in found(site) if each.name == "mine"] == ["mine"]
    faults = [fault for fault in scan().faults if "broken" in fault.distribution]
    assert bool(faults) == bool(text)
    assert all(text in f"{fault.distribution} {fault.problem}" for fault in faults)


def test_thorough_names_what_is_no_concern_of_ours(site) -> None:
    """For the doctor: entry points of others that break torch's own loading of plugins."""
    site.install("broken", entry_points="[torch.backends]\nthis line has no equals sign\n")
    assert [fault for fault in scan().faults if fault.distribution.startswith("broken")] == []
    faults = [fault for fault in scan(thorough=True).faults if fault.distribution.startswith("broken")]
    assert len(faults) == 1


def test_leftovers_are_no_conflict(site, tmp_path, monkeypatch) -> None:
    """A distribution is in no conflict with its own leftovers: pip's `~name` folders, or a second copy on the path."""
    site.install("attnreg-mine", "2.0", entry_points=ENTRY)
    leftover = site.path / "~ttnreg_mine-1.0.dist-info"
    leftover.mkdir()
    (leftover / "entry_points.txt").write_text(ENTRY)
    shadowed = type(site)(tmp_path / "later")
    shadowed.path.mkdir()
    shadowed.install("Attnreg_Mine", "1.0", entry_points=ENTRY)
    monkeypatch.setattr(sys, "path", [*sys.path, str(shadowed.path)])
    assert found(site) == [Candidate("mine", "plugin_mine", "attnreg-mine", "2.0")]


def test_the_shadowed_version_does_not_speak_for_the_active_one(site, tmp_path, monkeypatch) -> None:
    """If the first on the path offers nothing, what a shadowed copy offers could not be imported as it says."""
    site.install("attnreg-mine", "2.0")
    shadowed = type(site)(tmp_path / "later")
    shadowed.path.mkdir()
    shadowed.install("attnreg-mine", "1.0", entry_points=ENTRY)
    monkeypatch.setattr(sys, "path", [*sys.path, str(shadowed.path)])
    assert found(site) == []


def test_version(site) -> None:
    """The version of what is installed, None for what is not or cannot be read."""
    assert version("attnreg") == attnreg.__version__
    assert version("surely-not-installed") is None
    site.install("broken", metadata=b"\xff\xfe")
    assert version("broken") is None


def test_normalized() -> None:
    """Distribution names are compared as PEP 503 says."""
    assert normalized("Attnreg_Flash.2") == "attnreg-flash-2"


def test_odd_paths_and_finders(site, monkeypatch) -> None:
    """Entries of sys.path that are no strings, and somebody else's finder that fails, cost nothing."""

    class Finder:
        @staticmethod
        def find_spec(*_):
            return None

        @staticmethod
        def find_distributions(_context):
            raise RuntimeError("somebody else's finder")

    site.install("attnreg-mine", entry_points=ENTRY)
    monkeypatch.setattr(sys, "path", [None, 3, b"bytes", *sys.path])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    assert [each.name for each in found(site)] == ["mine"]
    assert any("somebody else's finder" in fault.problem for fault in scan().faults)


@pytest.mark.parametrize(
    "metadata",
    ["metadata-version: 2.1\nname: attnreg-mine\nversion: 1.0\n", "Name: another-name\nVersion: 1.0\n"],
    ids=["lower case", "another name than its folder"],
)
def test_unusual_metadata_is_read(site, metadata: str) -> None:
    """Header names in lower case, and a name that is not the folder's, hide no plugin."""
    site.install("attnreg-mine", entry_points=ENTRY, metadata=metadata)
    assert [each.name for each in found(site)] == ["mine"]


def test_extras_are_no_part_of_the_module(site) -> None:
    """The old form `module [extra]` names the module."""
    site.install("attnreg-mine", entry_points="[attnreg.backends]\nmine = plugin_mine [cuda]\n")
    assert [each.target for each in found(site)] == ["plugin_mine"]


def test_an_unreadable_group_of_ours_is_a_fault(site) -> None:
    """A plugin does not vanish without a word because of a byte order mark."""
    site.install("attnreg-mine", entry_points=b"\xef\xbb\xbf" + ENTRY.encode())
    assert any("attnreg-mine" in fault.distribution for fault in scan().faults)
