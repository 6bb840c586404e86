"""The command `attnreg verify`: what it prints and writes, and its exit codes."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser

import pytest
import torch
from doubles import GOOD

from attnreg import Backend, Capabilities, default_registry
from attnreg.cli import main
from attnreg.testing import LAWS

QUICK = ("--quick", "--dtype", "float32")


def attnreg(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command in this process; return its exit code, what it printed, and its errors."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    output = capsys.readouterr()
    return int(caught.value.code or 0), output.out, output.err


class Page(HTMLParser):
    """Collects the text of a page, tag by tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs) -> None:
        """Remember the tag."""
        self.tags.append(tag)
        assert not {"src", "href"} & dict(attrs).keys()

    def handle_data(self, data) -> None:
        """Remember the text."""
        self.texts.append(data)


def test_a_backend_that_keeps_every_law(capsys, tmp_path) -> None:
    """Exit code 0; the table, the page and the Markdown have a row for each law, and say what repeats them."""
    html, markdown = tmp_path / "card.html", tmp_path / "card.md"
    code, out, _ = attnreg(capsys, "verify", "sdpa", *QUICK, "--html", str(html), "--markdown", str(markdown))
    assert code == 0
    page = Page(html.read_text(encoding="utf-8"))
    assert page.tags.count("tr") == 1 + len(LAWS)
    for text in (out, markdown.read_text(encoding="utf-8"), "\n".join(page.texts)):
        assert "attnreg verify sdpa --dtype float32 --quick" in text
        assert all(law in text for law in LAWS)
    assert "prefers-color-scheme: dark" in html.read_text(encoding="utf-8")
    assert "softcap: refused: softcap: wants softcap; supported: not declared" in out


def test_json(capsys, site) -> None:
    """JSON has the card, and stdout nothing else, whatever a plugin prints."""
    site.plugin("echo", "print('hello')\n" + GOOD.format(name="echo"))
    code, out, _ = attnreg(capsys, "verify", "eager", *QUICK, "--json")
    card = json.loads(out)
    assert (code, card["backend"], card["holds"], card["dtypes"]) == (0, "eager", True, ["float32"])
    assert {row["law"] for row in card["rows"]} == LAWS.keys()
    softcap = next(row for row in card["rows"] if row["law"] == "softcap")
    assert (softcap["declared"], softcap["verdict"]) == ("yes", "holds")
    assert 0 < softcap["error"] <= softcap["allowed"]


def wrong(module, query, key, value, attention_mask=None, *, scaling=None, **_):
    """Forget the mask, and the name's <b>markup</b> is not read."""
    return (torch.softmax(query @ key.mT, -1) @ value).transpose(1, 2), None


def test_a_wrong_backend(capsys, tmp_path) -> None:
    """Exit code 1, with the smallest case, the law and the remedy; what is failing is escaped on the page."""
    from attnreg.masks import sdpa_mask

    default_registry.add(Backend(name="wrong", attention=wrong, mask=sdpa_mask, supports=Capabilities()))
    html = tmp_path / "card.html"
    code, out, _ = attnreg(capsys, "verify", "wrong", *QUICK, "--html", str(html))
    assert code == 1
    assert "plain (float32): fails: the output is off by" in out
    assert "with query (2, 4, 9, 16), key (2, 4, 9, 16), mask=bidirectional()" in out
    assert "The law: Without masks and keywords it is softmax(q kᵀ / sqrt(D)) v." in out
    assert "it rests on plain" in out
    assert 'class="fails"' in html.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("nobody",), "no attention backend is named 'nobody'"),
        (("eager", "--device", "mps"), "the device is mps, which is not here; wanted: one that torch sees."),
        (("eager", "--dtype", "int8"), "int8: choose from bfloat16, float16, float32, float64"),
        (("eager", "--html", "/no/such/folder/card.html"), "/no/such/folder is no folder"),
    ],
)
def test_wrong_questions(capsys, arguments, text) -> None:
    """Exit code 2 for a name, a device, a dtype or a file that means nothing, and the error says which."""
    code, out, err = attnreg(capsys, "verify", *arguments)
    assert code == 2
    assert out == ""
    assert text in " ".join(err.replace("│", " ").split())


def test_a_device_that_is_not_declared(capsys) -> None:
    """Exit code 2 if the backend does not run where it is to be examined."""
    from attnreg.masks import sdpa_mask

    supports = Capabilities(devices={"cuda"})
    default_registry.add(Backend(name="elsewhere", attention=wrong, mask=sdpa_mask, supports=supports))
    code, _, err = attnreg(capsys, "verify", "elsewhere", "--device", "cpu")
    assert code == 2
    assert "the device is cpu; wanted: one that elsewhere declares: cuda." in err


def test_without_hypothesis(capsys, monkeypatch) -> None:
    """Exit code 2, and what to install, where the kit's own needs are missing."""
    for module in [name for name in sys.modules if name.startswith("attnreg.testing")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    code, _, err = attnreg(capsys, "verify", "eager")
    assert code == 2
    assert "verify needs hypothesis, which is not installed: pip install 'attnreg[testing]'" in err
