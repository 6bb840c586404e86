"""Selection: explicit names never fall back, auto explains itself, use() is scoped."""

from __future__ import annotations

import contextvars
import threading

import pytest
from doubles import BUILTIN, attention, formatter

import attnreg
from attnreg import (
    AttentionInterface,
    Capabilities,
    ConfigurationError,
    NoBackendError,
    Registry,
    Request,
    UnknownBackendError,
    UnsupportedError,
    explain,
    resolve,
    use,
)
from attnreg.discovery import Discovery
from attnreg.plugins import PluginFinder


@pytest.fixture
def registry() -> Registry:
    """The built-ins, `fast` that needs CUDA, and `coarse` that is quantised."""
    registry = Registry(lambda: PluginFinder(lambda: Discovery((), ())))
    fast = Capabilities(devices={"cuda"}, priority=90, softcap=True)
    registry.add_attention("fast", attention, mask=formatter, supports=fast)
    coarse = Capabilities(priority=95, lossy=True)
    registry.add_attention("coarse", attention, mask=formatter, supports=coarse)
    return registry


@pytest.mark.parametrize(
    ("request_", "winner"),
    [
        (None, "fast"),
        (Request(device="cuda"), "fast"),
        (Request(device="cpu"), "sdpa"),
        (Request(device="cpu", softcap=True), "eager"),
        (Request(device="cuda", softcap=True, sinks=True), "flex_attention"),
        (Request(device="cuda", softcap=True, dropout=True), "eager"),
        (Request(device="cuda", allow_lossy=True), "coarse"),
        (Request(device="cpu", paged=True), None),
    ],
)
def test_auto_picks_the_best_that_can_serve(registry, request_, winner) -> None:
    """The highest priority among those without a reason against them; lossy ones only when allowed."""
    assert explain(request_, registry=registry).winner == winner
    if winner is not None:
        assert resolve("auto", request_, registry=registry).name == winner


def test_explanation_gives_every_candidate_with_all_reasons(registry) -> None:
    """Who can serve comes first, in the order of preference; who cannot says everything that is in the way."""
    explanation = explain(Request(device="cpu", softcap=True, dropout=True), registry=registry)
    found = [(each.name, [reason.code for reason in each.reasons]) for each in explanation.candidates]
    assert [each for each in found if each[0] in {"coarse", "eager", "fast", "sdpa"}] == [
        ("eager", []),
        ("coarse", ["softcap", "dropout", "lossy"]),
        ("fast", ["device", "dropout"]),
        ("sdpa", ["softcap"]),
    ]
    assert [name for name, why in found if not why] == ["eager"]
    assert str(explanation).splitlines()[0] == "eager (attnreg itself): can serve"
    assert str(explanation).splitlines()[-1] == "winner: eager"


def test_an_explicit_name_never_falls_back(registry) -> None:
    """A named backend that cannot serve is an error with its reasons; a lossy one runs because it is named."""
    with pytest.raises(UnsupportedError) as caught:
        resolve("fast", Request(device="cpu"), registry=registry)
    assert [reason.code for reason in caught.value.reasons] == ["device"]
    with pytest.raises(UnknownBackendError):
        resolve("fsat", registry=registry)
    assert resolve("coarse", Request(device="cpu"), registry=registry).name == "coarse"


def test_nobody_can(registry) -> None:
    """Automatic choice that finds nobody gives all reasons of all candidates."""
    with pytest.raises(NoBackendError) as caught:
        resolve("auto", Request(device="cpu", paged=True), registry=registry)
    assert set(caught.value.candidates) == {"coarse", "fast", *BUILTIN}
    assert "  sdpa: paged: wants a paged key/value cache; supported: not declared." in str(caught.value)


def test_undeclared_user_code_is_never_chosen_by_itself() -> None:
    """A function registered without a declaration has the lowest priority: eager serves all that it could."""
    AttentionInterface.register("aaa", attention, mask=formatter)
    assert explain().winner != "aaa"


def test_order_of_defaults(registry, monkeypatch) -> None:
    """A name, else use(), else ATTNREG_IMPLEMENTATION, else auto."""
    assert resolve(registry=registry).name == "fast"
    monkeypatch.setenv("ATTNREG_IMPLEMENTATION", "eager")
    assert resolve(registry=registry).name == "eager"
    with use("sdpa", registry=registry):
        assert resolve(registry=registry).name == "sdpa"
        assert resolve("eager", registry=registry).name == "eager"
        with use("auto", registry=registry):
            assert resolve(registry=registry).name == "fast"
        assert resolve(registry=registry).name == "sdpa"
    assert resolve(registry=registry).name == "eager"
    monkeypatch.setenv("ATTNREG_IMPLEMENTATION", "auto")
    assert resolve(registry=registry).name == "fast"


def test_use_is_undone_by_an_exception_and_checks_its_name(registry) -> None:
    """Whatever happens inside, the scope ends; a typo raises on entry."""
    with pytest.raises(ZeroDivisionError), use("sdpa", registry=registry):
        raise ZeroDivisionError
    assert resolve(registry=registry).name == "fast"
    with pytest.raises(UnknownBackendError), use("spda", registry=registry):
        pytest.fail("the block must not run")


def test_use_is_of_one_thread(registry) -> None:
    """Two threads inside two scopes do not see each other's, nor does one outside."""
    seen: dict[str, str] = {}
    barrier = threading.Barrier(3)

    def work(name: str | None) -> None:
        def resolved() -> str:
            barrier.wait(10)
            found = resolve(registry=registry).name
            barrier.wait(10)
            return found

        if name is None:
            seen["none"] = resolved()
        else:
            with use(name, registry=registry):
                seen[name] = resolved()

    threads = [
        threading.Thread(target=contextvars.Context().run, args=(work, name)) for name in ("eager", "sdpa", None)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == {"eager": "eager", "sdpa": "sdpa", "none": "fast"}


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        (
            "ATTNREG_IMPLEMENTATION",
            "spda",
            "ATTNREG_IMPLEMENTATION='spda': no attention backend is named 'spda', perhaps 'sdpa'. Set it to one of: "
            + ", ".join(sorted(["coarse", "fast", *BUILTIN]))
            + ".",
        ),
        (
            "ATTNREG_IMPLEMENTATION",
            "a b",
            "ATTNREG_IMPLEMENTATION='a b': it has a part that the grammar does not allow. Set it to a backend's name.",
        ),
        (
            "ATTNREG_DISABLE",
            "sdpa;eager",
            "ATTNREG_DISABLE='sdpa;eager': 'sdpa;eager' is no backend or distribution name. Separate names by commas.",
        ),
        ("ATTNREG_ONLY", " , ", "ATTNREG_ONLY=' , ': it holds no name. Separate names by commas, or unset it."),
    ],
)
def test_bad_values_name_the_variable(registry, monkeypatch, variable: str, value: str, text: str) -> None:
    """A variable that means nothing raises, and the error says which one it is."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError) as caught:
        resolve(registry=registry)
    assert str(caught.value).startswith(text)
    assert caught.value.variable == variable


def test_top_level_names() -> None:
    """`attnreg.names` and `attnreg.get` read the default registry."""
    assert {"eager", "sdpa"} <= set(attnreg.names())
    assert attnreg.get("sdpa") is attnreg.default_registry.get("sdpa")


def test_an_empty_name_is_no_name(registry) -> None:
    """An empty string is not "no name given"."""
    with pytest.raises(attnreg.InvalidNameError, match="it is empty"):
        resolve("", registry=registry)


def test_use_is_of_one_registry(registry) -> None:
    """What is used in one registry says nothing about another."""
    with use("coarse", registry=registry), use("sdpa"):
        assert resolve(registry=registry).name == "coarse"
        assert resolve().name == "sdpa"


def test_use_in_tasks() -> None:
    """Two asyncio tasks inside two scopes do not see each other's."""
    import asyncio

    async def work(name: str) -> str:
        with use(name):
            await asyncio.sleep(0.01)
            return resolve().name

    async def both() -> list[str]:
        return await asyncio.gather(work("eager"), work("sdpa"))

    assert asyncio.run(both()) == ["eager", "sdpa"]


def test_one_candidate_alone(registry) -> None:
    """With `only`, nobody else is judged."""
    explanation = explain(only="sdpa", registry=registry)
    assert [each.name for each in explanation.candidates] == ["sdpa"]
