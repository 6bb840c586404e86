"""The grammar of names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnreg.errors import InvalidNameError
from attnreg.naming import Wrapper, check_base, parse


@pytest.mark.parametrize(
    "name",
    ["sdpa", "flash_attention_2", "My.own-kernel_2", "org/repo", "org/repo@v1.2:fn", "org/repo@a/b-c", "eager"],
)
def test_good_names(name: str) -> None:
    """Simple names and Hub names may be borne."""
    assert check_base(name) == name
    assert parse(name) == ((), name)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "it is empty"),
        ("a b", "it has a part that the grammar does not allow"),
        ("a/b/c", "it has a part that the grammar does not allow"),
        ("../x", "it has a part that the grammar does not allow"),
        ("org/repo:", "it has a part that the grammar does not allow"),
        ("sdpa\n", "it has a part that the grammar does not allow"),
        ("org/repo@../../x--y/z/ref", "'../../x--y/z/ref' is no revision"),
        ("org/repo@a/../b:fn", "'a/../b' is no revision"),
        ("org/repo@..", "'..' is no revision"),
        ("org/repo@a/./b", "'a/./b' is no revision"),
        ("org/repo@a//b", "'a//b' is no revision"),
        ("org/repo@/a", "'/a' is no revision"),
        ("org/repo@a/", "'a/' is no revision"),
        ("org/repo@-h", "'-h' is no revision"),
        ("auto", "'auto' asks for automatic choice"),
        (3, "it is of type int, not str"),
        (None, "it is of type NoneType, not str"),
    ],
)
def test_bad_names(name: object, problem: str) -> None:
    """Everything else is refused, with the problem."""
    with pytest.raises(InvalidNameError) as caught:
        check_base(name)
    assert caught.value.problem == problem
    with pytest.raises(InvalidNameError):
        parse(name)


def test_wrappers() -> None:
    """What stands left of the bars is taken apart from the outside inwards."""
    assert parse("paged|ulysses(2)|flash_attention_2") == (
        (Wrapper("paged", ""), Wrapper("ulysses", "2")),
        "flash_attention_2",
    )


@pytest.mark.parametrize("name", ["|sdpa", "a b|sdpa", "paged(|sdpa", "paged)|sdpa", "paged||sdpa", "1x|sdpa"])
def test_bad_wrappers(name: str) -> None:
    """A wrapper that the grammar does not allow is refused; nothing is skipped."""
    with pytest.raises(InvalidNameError, match="is no wrapper"):
        parse(name)


@given(st.text(max_size=12))
def test_parse_raises_nothing_else(name: str) -> None:
    """Whatever the text, it is a name or an InvalidNameError."""
    try:
        wrappers, base = parse(name)
    except InvalidNameError:
        return
    rebuilt = [f"{each.name}({each.args})" if f"{each.name}({each.args})|" in name else each.name for each in wrappers]
    assert "|".join([*rebuilt, base]) == name
