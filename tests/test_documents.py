"""The documents: what they show is what is there, and what they promise runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attnreg import errors
from attnreg.paged import errors as paged_errors
from attnreg.serving import errors as serving_errors

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("plugins/*/*.md")])


@pytest.mark.parametrize("file", ["pyproject.toml", "src/attnreg_loopback/__init__.py"])
def test_the_tutorial_shows_the_plugin_as_it_is(file: str) -> None:
    """The tutorial's finished product is the example plugin, character for character."""
    source = (ROOT / "plugins" / "attnreg-loopback" / file).read_text()
    assert source.strip() in (ROOT / "docs" / "write-a-plugin.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link and picture in a page points at a file that exists."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)", prose):
        assert (page.parent / target).exists(), target


def test_readme_has_the_two_commands() -> None:
    """The command that passes every check is the one that continuous integration runs."""
    commands = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("attnreg demo")
    assert commands[1] in (ROOT / ".ci" / "run").read_text()


def test_every_error_is_documented() -> None:
    """The page about errors names each class."""
    page = (ROOT / "docs" / "errors.md").read_text()
    for module in (errors, paged_errors, serving_errors):
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, errors.AttnregError):
                assert name in page, name
