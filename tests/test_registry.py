"""The registry: who may write what, and that a refused write changes nothing."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
from doubles import BUILTIN, attention, formatter
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import attnreg
from attnreg import (
    ApiMismatchError,
    Backend,
    Capabilities,
    IncompleteBackendError,
    InvalidBackendError,
    InvalidNameError,
    MissingAttentionError,
    MissingMaskFormatterError,
    NameTakenError,
    NothingToRemoveError,
    Registry,
    UnknownBackendError,
    UnknownWrapperError,
)
from attnreg.discovery import Discovery
from attnreg.plugins import PluginFinder


def other(module, query, key, value, attention_mask, **kwargs):
    """Stand in for somebody else's function."""


def other_mask(**kwargs):
    """Stand in for somebody else's formatter."""


@pytest.fixture
def registry() -> Registry:
    """A registry with the built-ins and no plugin."""
    return Registry(lambda: PluginFinder(lambda: Discovery((), ())))


def test_one_step(registry: Registry) -> None:
    """Registered with its formatter, a name is usable at once."""
    supports = Capabilities(softcap=True)
    registry.add_attention("mine", attention, mask=formatter, supports=supports)
    backend = registry.get("mine")
    assert (backend.name, backend.attention, backend.mask, backend.supports) == ("mine", attention, formatter, supports)
    assert str(backend.origin) == "user code (doubles:attention)"
    assert "mine" in registry


@pytest.mark.parametrize("attention_first", [True, False])
def test_two_steps(registry: Registry, attention_first: bool) -> None:
    """In either order, the name refuses to run until both halves are there, and is listed with the reason."""
    steps = [lambda: registry.add_attention("mine", attention), lambda: registry.add_mask("mine", formatter)]
    first, second = steps if attention_first else reversed(steps)
    error = MissingMaskFormatterError if attention_first else MissingAttentionError
    first()
    with pytest.raises(error):
        registry.get("mine")
    assert "mine" not in registry
    row = next(row for row in registry.rows() if row.name == "mine")
    assert (row.status, row.problem) == ("incomplete", str(error("mine")))
    second()
    assert registry.get("mine").mask is formatter
    assert next(row for row in registry.rows() if row.name == "mine").status == "ready"


def test_add_whole_record(registry: Registry) -> None:
    """`add` takes a record, and refuses anything else."""
    registry.add(Backend(name="mine", attention=attention, mask=formatter))
    assert registry.get("mine").attention is attention
    with pytest.raises(InvalidBackendError, match="it must be an attnreg.Backend"):
        registry.add(attention)  # type: ignore[arg-type]


@pytest.mark.parametrize(("api", "side"), [(2, r"Upgrade attnreg \(this is attnreg"), (0, "Upgrade doubles:attention")])
def test_api_number(registry: Registry, api: int, side: str) -> None:
    """A record of another API number is refused, and the error says which side to upgrade."""
    with pytest.raises(ApiMismatchError, match=side):
        registry.add(Backend(name="mine", attention=attention, mask=formatter, api=api))
    assert "mine" not in registry


def test_unknown_name(registry: Registry) -> None:
    """A typo is answered with the nearest name and all that are there."""
    with pytest.raises(UnknownBackendError) as caught:
        registry.get("spda")
    assert str(caught.value).splitlines()[:2] == [
        "no attention backend is named 'spda'; did you mean 'sdpa'?",
        f"  available:  {', '.join(BUILTIN)}",
    ]


def test_unknown_name_mentions_what_is_half_there(registry: Registry) -> None:
    """A name that is registered but unusable is named with the reason."""
    registry.add_attention("mine", attention)
    with pytest.raises(UnknownBackendError, match=r"not usable: mine \('mine' has an attention function but no mask"):
        registry.get("mime")


@pytest.mark.parametrize("name", ["", "a b", None, 3, ["sdpa"], "auto"])
def test_malformed_name(registry: Registry, name: object) -> None:
    """What can be no name is an InvalidNameError, in reading and in writing."""
    with pytest.raises(InvalidNameError):
        registry.get(name)  # type: ignore[arg-type]
    with pytest.raises(InvalidNameError):
        registry.add_attention(name, attention)  # type: ignore[arg-type]


def test_wrappers_are_never_ignored(registry: Registry) -> None:
    """A wrapper that nobody provides is an error; it does not fall off the name."""
    with pytest.raises(UnknownWrapperError) as caught:
        registry.get("pagd|sdpa")
    assert str(caught.value) == (
        "no wrapper is named 'pagd', which 'pagd|sdpa' asks for; did you mean 'paged'? (wrappers: paged). "
        "Ask for the backend without it: 'sdpa'."
    )


def test_built_ins_are_protected(registry: Registry) -> None:
    """Neither half of a built-in can be replaced by accident."""
    for write in (registry.add_attention, registry.add_mask):
        with pytest.raises(NameTakenError) as caught:
            write("sdpa", attention if write == registry.add_attention else formatter)
        assert caught.value.owner == "attnreg itself"
        assert str(caught.value).endswith("Choose another name, or pass replace=True.")
    assert registry.get("sdpa").attention is not attention


def test_replacing_a_built_in_on_purpose(registry: Registry) -> None:
    """With replace=True either half can be exchanged; the other stays, and removal brings the built-in back."""
    original = registry.get("sdpa")
    registry.add_attention("sdpa", attention, replace=True)
    assert (registry.get("sdpa").attention, registry.get("sdpa").mask) == (attention, original.mask)
    assert registry.get("sdpa").supports == Capabilities(), (
        "what the built-in declared is not proved for another function"
    )
    registry.remove("sdpa")
    registry.add_mask("sdpa", formatter, replace=True)
    assert (registry.get("sdpa").attention, registry.get("sdpa").mask) == (original.attention, formatter)
    assert registry.get("sdpa").supports == original.supports
    assert "sdpa" in registry.names()
    registry.remove("sdpa")
    assert registry.get("sdpa") is original


def test_somebody_elses_name(registry: Registry) -> None:
    """User code that is not the same function does not replace user code silently."""
    registry.add_attention("mine", attention, mask=formatter)
    with pytest.raises(NameTakenError) as caught:
        registry.add_attention("mine", other)
    assert str(caught.value) == (
        f"'mine' belongs to user code (doubles:attention); user code ({other.__module__}:other) may not take it. Choose "
        "another name, or pass replace=True."
    )
    with pytest.raises(NameTakenError):
        registry.add_mask("mine", other_mask)
    assert (registry.get("mine").attention, registry.get("mine").mask) == (attention, formatter)
    registry.add_attention("mine", other, replace=True)
    assert (registry.get("mine").attention, registry.get("mine").mask) == (other, formatter)


def test_a_notebook_cell_run_twice(registry: Registry) -> None:
    """The same function defined again replaces itself, without replace=True."""

    def cell():
        def mine(module, query, key, value, attention_mask, **kwargs):
            return None

        registry.add_attention("mine", mine, mask=formatter)
        return mine

    cell()
    again = cell()
    assert registry.get("mine").attention is again


@pytest.mark.parametrize(
    "write",
    [
        lambda registry: registry.add_attention("mine", lambda query: query, mask=formatter),
        lambda registry: registry.add_attention("mine", other, mask=lambda: None, replace=True),
        lambda registry: registry.add_attention("mine", other, mask=other_mask, supports="softcap", replace=True),
        lambda registry: registry.add_attention("mine", other, mask=other_mask),
        lambda registry: registry.add_mask("mine", "formatter", replace=True),
        lambda registry: registry.add_mask("mine", other_mask),
    ],
)
def test_refused_writes_change_nothing(registry: Registry, write) -> None:
    """Registration is atomic: all of it happens, or none."""
    registry.add_attention("mine", attention, mask=formatter)
    before = registry.get("mine"), registry.rows()
    with pytest.raises(attnreg.RegistrationError):
        write(registry)
    assert (registry.get("mine"), registry.rows()) == before


def test_remove(registry: Registry) -> None:
    """User code takes back its own, and nothing else."""
    registry.add_attention("mine", attention, mask=formatter)
    registry.remove("mine")
    assert "mine" not in registry
    for name in ("mine", "sdpa"):
        with pytest.raises(NothingToRemoveError, match=f"user code has nothing of its own under '{name}'"):
            registry.remove(name)


def test_listeners_hear_of_changes_and_are_not_kept_alive(registry: Registry) -> None:
    """Whoever keeps what it looked up is told; being told does not keep it alive."""

    class Listener:
        def __init__(self) -> None:
            self.heard: list[str] = []

        def forget(self, name: str) -> None:
            self.heard.append(name)

    listener = Listener()
    registry.subscribe(listener)
    registry.add_attention("mine", attention)
    registry.add_mask("mine", formatter)
    registry.remove("mine")
    assert listener.heard == ["mine"] * 3
    gone = weakref.ref(listener)
    del listener
    gc.collect()
    assert gone() is None


def test_threads(registry: Registry) -> None:
    """Concurrent registration and lookup neither lose nor mix up anything."""
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(30):
                name = f"mine_{number}_{turn}"
                registry.add_attention(name, attention)
                registry.add_mask(name, formatter)
                assert registry.get(name).name == name
                assert registry.get("sdpa").name == "sdpa"
        except BaseException as error:  # noqa: BLE001 - reported below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(registry.names()) == len(BUILTIN) + 8 * 30


class Machine(RuleBasedStateMachine):
    """Any order of registrations and removals leaves each name complete, incomplete or unknown, as a model says."""

    names = st.sampled_from(["a", "b", "sdpa"])

    def __init__(self) -> None:
        super().__init__()
        self.registry = Registry(lambda: PluginFinder(lambda: Discovery((), ())))
        self.model: dict[str, tuple[bool, bool]] = {}

    @rule(name=names)
    def add_attention(self, name: str) -> None:
        """Register the function alone."""
        self.registry.add_attention(name, attention, replace=True)
        self.model[name] = (True, self.model.get(name, (False, False))[1])

    @rule(name=names)
    def add_mask(self, name: str) -> None:
        """Register the formatter alone."""
        self.registry.add_mask(name, formatter, replace=True)
        self.model[name] = (self.model.get(name, (False, False))[0], True)

    @rule(name=names)
    def remove(self, name: str) -> None:
        """Take a registration back."""
        try:
            self.registry.remove(name)
        except NothingToRemoveError:
            assert name not in self.model
        self.model.pop(name, None)

    @invariant()
    def agrees(self) -> None:
        """`get`, `names` and `rows` tell one story."""
        for name in ("a", "b", "sdpa"):
            has_attention, has_mask = self.model.get(name, (False, False))
            if name == "sdpa" or (has_attention and has_mask):
                backend = self.registry.get(name)
                assert (backend.attention is attention) == has_attention
                assert (backend.mask is formatter) == has_mask
                assert name in self.registry.names()
            else:
                with pytest.raises((IncompleteBackendError, UnknownBackendError)):
                    self.registry.get(name)
                assert name not in self.registry.names()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


@pytest.mark.parametrize("mask_first", [True, False])
def test_replacing_one_half_does_not_open_the_other(registry: Registry, mask_first: bool) -> None:
    """replace=True for one half of a built-in is no permission for the other."""
    first, second = (
        (
            lambda **kw: registry.add_mask("sdpa", formatter, **kw),
            lambda **kw: registry.add_attention("sdpa", other, **kw),
        )
    )[:: 1 if mask_first else -1]
    first(replace=True)
    with pytest.raises(NameTakenError, match="'sdpa' belongs to attnreg itself"):
        second()
    second(replace=True)


def test_reading_while_others_write(registry: Registry) -> None:
    """Listing, looking up and subscribing go on while another thread registers and removes."""
    import sys

    class Mine(attnreg.AttentionInterface):
        pass

    Mine.registry = registry
    registry.add_attention("shared", attention, mask=formatter)
    errors: list[BaseException] = []
    done = threading.Event()
    interface = Mine()

    def write() -> None:
        for turn in range(300):
            registry.add_attention(f"name_{turn % 7}", attention, mask=formatter, replace=True)
            registry.add_attention("shared", other if turn % 2 else attention, mask=formatter, replace=True)
            if turn % 3 == 0:
                registry.remove(f"name_{turn % 7}")
        done.set()

    def read() -> None:
        try:
            while not done.is_set():
                registry.names()
                registry.rows()
                Mine()
                assert interface["shared"].__wrapped__ in (attention, other)
        except BaseException as error:  # noqa: BLE001 - reported below
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for work in (write, read, read)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert errors == []
    assert interface["shared"].__wrapped__ is registry.get("shared").attention


def test_a_registered_record_keeps_its_kernel() -> None:
    """What says where the kernel is from goes with the attention function: a mask put over it changes nothing."""
    kernel = attnreg.Kernel(distribution="no-such-kernel", module="no_such_kernel")
    registry = attnreg.Registry()
    registry.add(attnreg.Backend(name="mine", attention=attention, mask=formatter, kernel=kernel))
    assert registry.get("mine").kernel is kernel
    assert [reason.code for reason in registry.get("mine").reasons(attnreg.Request())] == ["kernel_missing"]
    registry.add_mask("mine", lambda **kwargs: None, replace=True)
    assert registry.get("mine").kernel is kernel
    registry.add_attention("mine", lambda *args, **kwargs: None, replace=True)
    assert registry.get("mine").kernel is None
