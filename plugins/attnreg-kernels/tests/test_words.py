"""What has to be said about a kernel before it is used: names, permission, trust, declarations; and the error texts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import attnreg_kernels
import pytest
import torch
from attnreg_kernels import declarations, permission, sources
from attnreg_kernels.names import HubName, parse
from attnreg_kernels.provision import provide

import attnreg
from attnreg import Capabilities, ConfigurationError, InvalidInputError, InvalidNameError, KernelError
from attnreg.masks import sdpa_mask

COMMIT = "0123456789" * 4


def adapter(function, module, query, key, value, attention_mask, *, scaling=None, **_):  # noqa: ARG001
    """Hand everything that is declared on to the function."""
    return function(query, key, value, attention_mask, scaling).transpose(1, 2), None


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("org/repo", HubName("org/repo", "", None, "")),
        ("org/repo:fn", HubName("org/repo", "", None, "fn")),
        ("org/repo@main", HubName("org/repo", "main", None, "")),
        ("org/repo@v1", HubName("org/repo", "", 1, "")),
        ("org/repo@12:fn", HubName("org/repo", "", 12, "fn")),
        ("org/repo@v1.2", HubName("org/repo", "v1.2", None, "")),
        ("org/repo@a/b:fn", HubName("org/repo", "a/b", None, "fn")),
        (f"org/repo@{COMMIT}", HubName("org/repo", COMMIT, None, "")),
    ],
)
def test_names(name: str, parsed: HubName) -> None:
    """A version is a number with or without a v; all else is a revision, a commit of digits alone included."""
    assert parse(name) == parsed


@pytest.mark.parametrize(
    "revision", ["../../models--evil--m/snapshots/x/ref", "a/../b", "..", "./a", "/a", "a//b", "-h"]
)
def test_a_revision_stays_in_its_repository(revision: str) -> None:
    """A revision becomes a path in the cache: one that leads out of its folder is no name, here as in attnreg."""
    attnreg_kernels.allow("org/repo")
    attnreg_kernels.declare("org/repo", function="fn", convention="flash_attn_2")
    for call in (parse, provide, attnreg.get):
        with pytest.raises(InvalidNameError) as caught:
            call(f"org/repo@{revision}:fn")
        assert caught.value.problem == f"{revision!r} is no revision"


@pytest.mark.parametrize(
    ("revision", "why"),
    [
        *(
            (each, "a proposal, which anybody can make")
            for each in ("refs/pr/7", "refs/heads/main", "Refs/PR/7", "pr/7")
        ),
        ("v01", "a version with leading zeros, beside which there may be another one of the same number"),
        ("001", "a version with leading zeros, beside which there may be another one of the same number"),
    ],
)
def test_a_revision_is_the_publishers(revision: str, why: str) -> None:
    """Anybody can propose a change to a trusted repository, so that a proposal is refused; so is a doubtful version."""
    attnreg_kernels.allow("org/repo")
    attnreg_kernels.trust("org/repo")
    attnreg_kernels.declare("org/repo", function="fn", convention="flash_attn_2")
    with pytest.raises(KernelError) as caught:
        attnreg.get(f"org/repo@{revision}:fn")
    assert str(caught.value) == (
        f"the kernel of org/repo@{revision}:fn cannot be used:\n"
        f"  hub_revision: wants org/repo at {revision}, {why}; supported: commits, branches and tags of its publisher. "
        "Name a commit, which nobody can change: org/repo@<commit>:fn; or a version: org/repo@v1:fn."
    )


def test_a_name_without_a_revision() -> None:
    """It is refused with both remedies, and nothing else is looked at but permission."""
    attnreg_kernels.allow("org/repo")
    with pytest.raises(KernelError) as caught:
        provide("org/repo:fn")
    assert str(caught.value) == (
        "the kernel of org/repo:fn cannot be used:\n"
        "  hub_revision: wants org/repo without a revision; supported: names with a revision or version. Name a commit,"
        " which nobody can change: org/repo@<commit>:fn; or a version: org/repo@v1:fn."
    )


def test_nothing_is_allowed_until_it_is() -> None:
    """The error names the variable and the call; what is missing is said all at once."""
    with pytest.raises(KernelError) as caught:
        provide("kernels-community/flash-attn2@v4")
    assert str(caught.value) == (
        "the kernel of kernels-community/flash-attn2@v4 cannot be used:\n"
        "  hub_not_allowed: wants code of kernels-community/flash-attn2; supported: repositories that are allowed: "
        "none. If its code may run here, set ATTNREG_KERNELS_ALLOW=kernels-community/flash-attn2, or call "
        "attnreg_kernels.allow('kernels-community/flash-attn2')."
    )
    with pytest.raises(KernelError) as caught:
        provide("org/repo")
    assert [reason.code for reason in caught.value.reasons] == ["hub_revision", "hub_not_allowed"]


@pytest.mark.parametrize(
    ("patterns", "allowed"),
    [
        ("org/repo", True),
        (" other/x , org/* ,", True),
        ("*/repo", True),
        ("org/rep?", True),
        ("org/re", False),
        ("ORG/repo", False),
        ("org/repository", False),
        ("", False),
    ],
)
def test_patterns_of_permission(monkeypatch: pytest.MonkeyPatch, patterns: str, *, allowed: bool) -> None:
    """The variable holds repositories and patterns; whole repositories are matched, as they are written."""
    monkeypatch.setenv(permission.ALLOW, patterns)
    assert (permission.refusals("org/repo") == []) is allowed


@pytest.mark.parametrize(
    "value", ["*", "org", "org/*/x", "https://huggingface.co/org/repo", "org/repo@v1", "org repo/x"]
)
def test_permission_that_means_nothing(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """What is no repository is an error that names the variable, or the argument."""
    monkeypatch.setenv(permission.ALLOW, value)
    with pytest.raises(ConfigurationError, match=r"ATTNREG_KERNELS_ALLOW=.*Separate repositories, such as org/repo"):
        provide("org/repo@v1")
    with pytest.raises(InvalidInputError, match=r"a repository is .*; wanted: a repository or pattern"):
        attnreg_kernels.allow(value)


def test_there_are_no_patterns_of_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust is given to whole repositories, and does not allow them."""
    with pytest.raises(InvalidInputError, match="wanted: a whole repository"):
        attnreg_kernels.trust("org/*")
    attnreg_kernels.trust("org/repo")
    monkeypatch.setenv(permission.TRUST, "org/two")
    assert permission.trusted() == ("org/two", "org/repo")
    assert permission.refusals("org/repo")
    monkeypatch.setenv(permission.TRUST, "org/*")
    with pytest.raises(ConfigurationError, match="ATTNREG_KERNELS_TRUST"):
        permission.trusted()


def test_undeclared() -> None:
    """A function that nobody has declared is refused, and the error shows how it is done."""
    attnreg_kernels.allow("org/repo")
    with pytest.raises(KernelError) as caught:
        provide("org/repo@v1:attend")
    assert str(caught.value) == (
        "the kernel of org/repo@v1:attend cannot be used:\n"
        "  hub_undeclared: wants the function attend of org/repo; supported: functions that are declared. Say what it "
        "does: attnreg_kernels.declare('org/repo', function='attend', convention='flash_attn_2'). Conventions: "
        "flash_attn_2, flash_attn_3, own if the kernel says it itself, or an adapter of yours."
    )
    for function in ("one", "two"):
        attnreg_kernels.declare("org/repo", function=function, convention="flash_attn_2")
    with pytest.raises(KernelError, match=r"functions of it that are declared: one, two\. Name one of those"):
        provide("org/repo@v1")
    assert provide("org/repo@v1:two").name == "org/repo@v1:two"


def test_shipped_declarations() -> None:
    """What this plugin declares itself needs permission and a revision, and no more."""
    attnreg_kernels.allow("kernels-community/*")
    for repository in ("flash-attn2", "flash-attn3"):
        backend = provide(f"kernels-community/{repository}@v1")
        assert backend.supports == attnreg_kernels.CAPABILITIES["flash_attn_2"]
        assert backend.mask.__name__ == "flash_attention_mask"
    with pytest.raises(KernelError, match="functions of it that are declared: flash_attn_func"):
        provide("kernels-community/flash-attn2@v1:flash_attn_varlen_func")


MEANINGLESS = [
    ({"convention": ["x"]}, "convention is ['x']; wanted: flash_attn_2"),
    ({"convention": None}, "convention is None; wanted: flash_attn_2"),
    ({"convention": "flash_attn_2", "function": None}, "a function's name is None"),
    ({"convention": attnreg_kernels.OWN, "function": 3}, "a function's name is 3"),
    ({"convention": "flash_attn_2", "varlen": 3}, "a function's name is 3"),
    ({"convention": "flash_attn_2", "supports": {}}, "supports is {}; wanted: Capabilities"),
    ({"convention": "flash_attn_2", "mask": "m"}, "mask is 'm'; wanted: a formatter: a function"),
    ({"convention": max}, "the adapter of fn is <built-in function max>; wanted: one whose signature can be read"),
    ({"convention": lambda: None}, "with the kernel's function as its first argument"),
    ({"convention": lambda *, function: function}, "with the kernel's function as its first argument"),
    ({"convention": "flash_attn_9"}, "convention is 'flash_attn_9'; wanted: flash_attn_2, flash_attn_3, own, or an"),
    ({"convention": "flash_attn_2", "function": "a.b"}, "a function's name is 'a.b'"),
    ({"convention": "flash_attn_2", "varlen": "-"}, "a function's name is '-'"),
    ({"convention": adapter}, "the declaration of fn is an adapter without supports"),
    ({"convention": adapter, "supports": Capabilities()}, "the declaration of fn is an adapter without mask"),
    (
        {
            "convention": "flash_attn_2",
            "supports": Capabilities(sinks=True, dropout=True, structures=frozenset({"causal"})),
        },
        "supports is one with dropout, sinks; wanted: what flash_attn_2 without varlen can say; for more, give an",
    ),
    ({"convention": "flash_attn_2", "supports": Capabilities()}, "supports is one with structures"),
    (
        {"convention": "flash_attn_2", "supports": Capabilities(structures=frozenset({"padding"}))},
        "supports is one with structures; wanted: what flash_attn_2 without varlen can say",
    ),
    (
        {
            "convention": "flash_attn_2",
            "varlen": "v",
            "supports": Capabilities(structures=frozenset({"causal"}), on={"cpu": {"position_bias": True}}),
        },
        "supports is one with position_bias; wanted: what flash_attn_2 can say",
    ),
]


@pytest.mark.parametrize(("words", "text"), MEANINGLESS, ids=[text[:40] for _, text in MEANINGLESS])
def test_declarations_that_mean_nothing(words: dict, text: str) -> None:
    """A declaration promises what its convention hands on to the function, and no more."""
    with pytest.raises(InvalidInputError) as caught:
        attnreg_kernels.declare("org/repo", **{"function": "fn", **words})
    assert text in str(caught.value)
    with pytest.raises(KernelError):
        declarations.declared("org/repo@v1", parse("org/repo@v1"))


@pytest.mark.parametrize("repository", ["repo", "org/repo@v1", "org/repo:fn", "a/b/c", "org/..", "org/x\n", 3, None])
def test_a_declaration_is_of_a_repository(repository: Any) -> None:
    """Not of a revision, a function or a simple name."""
    with pytest.raises(InvalidInputError, match="'org/repo', without a revision or function"):
        attnreg_kernels.declare(repository, function="fn", convention="flash_attn_2")


def test_one_declaration_before_the_first_use() -> None:
    """It can be said again, and changed until it is used: a backend does not turn into another one."""
    attnreg_kernels.allow("org/repo")
    attnreg_kernels.declare("org/repo", function="fn", convention="flash_attn_3")
    attnreg_kernels.declare("org/repo", function="fn", convention="flash_attn_2", varlen="more")
    backend = provide("org/repo@v1:fn")
    assert "padding" in (backend.supports.structures or ())
    attnreg_kernels.declare("org/repo", function="fn", convention="flash_attn_2", varlen="more")
    with pytest.raises(InvalidInputError, match="while another declaration is in use; wanted: one declaration, before"):
        attnreg_kernels.declare("org/repo", function="fn", convention="flash_attn_2")
    assert provide("org/repo@v1:fn") is backend


def test_an_explicit_declaration_goes_before_the_kernels_own_word() -> None:
    """A kernel that may speak for itself is not asked, nor loaded, where the user has said what its function does."""
    hub = parse("org/repo@v1")
    attnreg_kernels.declare("org/repo", convention=attnreg_kernels.OWN)
    assert declarations.declared("org/repo@v1", hub).convention == attnreg_kernels.OWN
    attnreg_kernels.declare("org/repo", function="fn", convention="flash_attn_2")
    assert declarations.declared("org/repo@v1", hub).function == "fn"
    named = {function: declarations.declared("x", hub._replace(function=function)) for function in ("fn", "other")}
    assert [each.convention for each in named.values()] == ["flash_attn_2", attnreg_kernels.OWN]


def test_a_users_word_goes_before_ours() -> None:
    """What this plugin declares can be declared otherwise, before it is used."""
    attnreg_kernels.allow("kernels-community/*")
    supports = replace(
        attnreg_kernels.CAPABILITIES["flash_attn_2"],
        dtypes={"bfloat16"},
        structures=frozenset({"causal"}),
        packing=False,
    )
    attnreg_kernels.declare(
        "kernels-community/flash-attn2", function="flash_attn_func", convention="flash_attn_2", supports=supports
    )
    assert provide("kernels-community/flash-attn2@v4").supports.dtypes == {"bfloat16"}


@pytest.mark.parametrize(
    ("distribution", "versions", "code"),
    [("no-such-kernels", ">=0.17.2", "kernel_missing"), ("kernels", ">=99", "kernel_version")],
)
def test_the_package_kernels(monkeypatch: pytest.MonkeyPatch, distribution: str, versions: str, code: str) -> None:
    """Without the package, or with another version of it, the record is there and says so, with the remedy."""
    package = attnreg.Kernel(
        distribution=distribution, module="kernels", versions=versions, install=sources.KERNELS.install
    )
    monkeypatch.setattr(sources, "KERNELS", package)
    attnreg_kernels.allow("kernels-community/*")
    backend = provide("kernels-community/flash-attn2@v4")
    assert [reason.code for reason in backend.reasons(attnreg.Request())] == [code]
    assert backend.kernel is not None
    with pytest.raises(KernelError, match=r"pip install 'attnreg-kernels\[kernel\]'"):
        backend.kernel.load()


def test_an_adapter_looks_like_its_function() -> None:
    """What the guard reads off a signature is there: the adapter's, without the kernel's function in front."""
    attnreg_kernels.allow("org/repo")
    supports = Capabilities(devices=frozenset({"cpu"}))
    attnreg_kernels.declare("org/repo", function="attend", convention=adapter, supports=supports, mask=sdpa_mask)
    backend = provide("org/repo@v1")
    assert backend.supports is supports
    assert backend.mask is sdpa_mask
    query, mask = torch.zeros(1, 1, 2, 8), torch.ones(1, 1, 2, 2, dtype=torch.bool)
    with pytest.raises(InvalidInputError, match="the keyword 'softmax_scale' is not one of attnreg's"):
        backend.call(None, query, query, query, mask, softmax_scale=0.5)
