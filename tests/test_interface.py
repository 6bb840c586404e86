"""The two mappings: over one registry, with overrides for one instance."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from doubles import FREE, attention, formatter

import attnreg
from attnreg import (
    AttentionInterface,
    AttentionMaskInterface,
    Backend,
    Capabilities,
    InvalidBackendError,
    MissingMaskFormatterError,
    NameTakenError,
    NothingToRemoveError,
    UnknownBackendError,
    UnsupportedError,
)


def test_the_users_two_steps() -> None:
    """`register` on both interfaces, in the form that transformers' users know."""
    AttentionInterface.register("mine", attention)
    with pytest.raises(MissingMaskFormatterError):
        AttentionInterface()["mine"]
    AttentionMaskInterface.register("mine", formatter)
    assert AttentionInterface()["mine"].__wrapped__ is attention
    assert AttentionMaskInterface()["mine"].__wrapped__ is formatter
    assert attnreg.get("mine").attention is attention


def test_seed_form_with_open_arguments() -> None:
    """A wrapper of `*args, **kwargs` around another function is as good as any."""
    calls = []

    def my_new_sdpa(*args, **kwargs):
        calls.append(len(args))
        return attention(*args, **kwargs)

    AttentionInterface.register("my_new_sdpa", my_new_sdpa)
    AttentionMaskInterface.register("my_new_sdpa", attnreg.masks.sdpa_mask)
    query = torch.zeros(1, 2, 3, 4)
    AttentionInterface()["my_new_sdpa"](FREE, query, query, query, None, scaling=1.0, a_new_kwargs="passes")
    assert calls == [5]


def test_is_a_mapping() -> None:
    """Length, iteration, membership and `valid_keys` agree, and loading nothing is enough for them."""
    interface = AttentionInterface()
    assert {"eager", "sdpa"} <= set(interface)
    assert list(interface) == interface.valid_keys() == sorted(interface.keys())
    assert len(interface) == len(interface.valid_keys())
    assert "sdpa" in interface
    assert "spda" not in interface
    assert repr(interface).startswith("<AttentionInterface: eager, ")
    assert interface["sdpa"] is interface.resolved["sdpa"]


def test_get_interface() -> None:
    """None is the default; a name that nobody provides is an error, where `get` gives its default."""
    interface = AttentionInterface()
    assert interface.get_interface(None, attention) is attention
    assert interface.get_interface("sdpa", attention) is interface["sdpa"]
    assert interface.get_interface("eager", attention) is interface["eager"], "eager is a backend, and not the default"
    assert interface.get("spda", attention) is attention
    with pytest.raises(UnknownBackendError, match="did you mean 'sdpa'"):
        interface.get_interface("spda", attention)
    with pytest.raises(UnknownBackendError):
        interface.get_interface("paged|typo", attention)


def test_half_registered_names_are_no_members() -> None:
    """A name that refuses to run is not offered: by neither mapping."""
    AttentionInterface.register("mine", attention)
    for interface in (AttentionInterface(), AttentionMaskInterface()):
        assert "mine" not in interface
        assert "mine" not in interface.valid_keys()
        with pytest.raises(MissingMaskFormatterError):
            interface["mine"]


def test_override_of_one_instance() -> None:
    """An override counts for its instance alone, and `del` takes back that and nothing else."""
    mine, yours = AttentionInterface(), AttentionInterface()
    builtin = yours["sdpa"]
    mine["sdpa"] = attention
    assert mine["sdpa"].__wrapped__ is attention
    assert yours["sdpa"] is builtin
    del mine["sdpa"]
    assert mine["sdpa"] is builtin
    with pytest.raises(NothingToRemoveError, match="this instance has nothing of its own under 'sdpa' to take back"):
        del mine["sdpa"]


def test_override_of_a_mask_counts() -> None:
    """An overridden formatter is what the instance returns, also for a name that has none in the registry."""
    masks = AttentionMaskInterface()
    masks["sdpa"] = formatter
    assert masks["sdpa"] is formatter
    assert AttentionMaskInterface()["sdpa"] is attnreg.masks.sdpa_mask
    functions = AttentionInterface(masks)
    functions["mine"] = attention
    with pytest.raises(MissingMaskFormatterError):
        functions["mine"]
    masks["mine"] = formatter
    assert functions["mine"].__wrapped__ is attention
    masks["mine"] = attnreg.masks.sdpa_mask
    assert masks["mine"](batch_size=1, q_length=3, kv_length=3) is not None, "nobody declares that it reads is_causal"
    masks["sdpa"] = attnreg.masks.sdpa_mask
    assert masks["sdpa"](batch_size=1, q_length=3, kv_length=3) is None


def test_overrides_declare_for_themselves() -> None:
    """What the registry's backend declares is not proved for the function that overrides it."""
    query = torch.zeros(1, 2, 3, 4)
    interface = AttentionInterface()
    interface["eager"] = attention
    with pytest.raises(UnsupportedError):
        interface["eager"](FREE, query, query, query, None, softcap=30.0)
    declared = Backend(name="eager", attention=attention, mask=formatter, supports=Capabilities(softcap=True))
    interface["eager"] = declared
    interface["eager"](FREE, query, query, query, None, softcap=30.0)


def test_overrides_are_validated() -> None:
    """A function that models could not call is refused, and the instance is unchanged."""
    functions, masks = AttentionInterface(), AttentionMaskInterface()
    with pytest.raises(InvalidBackendError):
        functions["mine"] = lambda query: query
    with pytest.raises(InvalidBackendError):
        masks["mine"] = lambda: None
    with pytest.raises(attnreg.InvalidNameError):
        masks["my own"] = formatter
    assert "mine" not in functions
    assert "mine" not in masks


def test_instances_follow_the_registry() -> None:
    """What an instance has looked up is forgotten when somebody registers anew."""
    functions, masks = AttentionInterface(), AttentionMaskInterface()
    AttentionInterface.register("mine", attention, mask=formatter)
    first = functions["mine"], masks["mine"]

    def newer(module, query, key, value, attention_mask, **kwargs):
        return None

    AttentionInterface.register("mine", newer, mask=attnreg.NO_MASK, replace=True)
    assert functions["mine"].__wrapped__ is newer
    assert masks["mine"] is attnreg.NO_MASK
    assert first[0].__wrapped__ is attention
    AttentionInterface.unregister("mine")
    assert "mine" not in functions
    with pytest.raises(UnknownBackendError):
        functions["mine"]


def test_built_ins_are_protected() -> None:
    """Neither mapping replaces a built-in without being told to."""
    with pytest.raises(NameTakenError):
        AttentionInterface.register("sdpa", attention)
    with pytest.raises(NameTakenError):
        AttentionMaskInterface.register("sdpa", formatter)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda each: pickle.loads(pickle.dumps(each))])  # noqa: S301
def test_copies(duplicate) -> None:
    """An interface in a model survives copying and pickling, with its overrides, independent of the original."""
    original = AttentionInterface()
    original.masks["mine"] = formatter
    original["mine"] = attention
    twin = duplicate(original)
    assert twin["mine"].__wrapped__ is attention
    assert twin.masks["mine"].__wrapped__ is formatter
    del twin["mine"]
    assert "mine" in original
    AttentionInterface.register("later", attention, mask=formatter)
    assert "later" in twin


def test_a_subclass_over_another_registry() -> None:
    """Tests and applications that want a world of their own name their registry in a subclass."""

    class Mine(AttentionInterface):
        registry = attnreg.Registry()

    Mine.register("mine", attention, mask=formatter)
    assert list(Mine()) == ["mine"]
    assert "mine" not in AttentionInterface()


def test_what_is_bound_to_a_module_is_pickled_by_name() -> None:
    """A module that keeps its attention function, as it should, can be copied, saved and sent to another process."""
    functions, masks = AttentionInterface(), AttentionMaskInterface()
    AttentionInterface.register("mine", attention, mask=formatter)
    for name in ("sdpa", "eager", "mine"):
        bound = {"attention": functions[name], "mask": masks[name]}
        again = pickle.loads(pickle.dumps(bound))  # noqa: S301 - our own
        twin = copy.deepcopy(bound)
        for half, function in bound.items():
            assert again[half] is function
            assert twin[half] is function
    functions["own"] = attention
    functions.masks["own"] = formatter
    with pytest.raises(attnreg.AttnregError, match="backend 'own' is not what the default registry holds"):
        pickle.dumps(functions["own"])


def test_an_override_and_its_formatter_are_one_pair() -> None:
    """Whatever is overridden, function or record or formatter, what the two views return fits together."""
    sizes = {"batch_size": 1, "q_length": 3, "kv_length": 3}
    functions = AttentionInterface()
    functions["sdpa"] = attention
    assert functions.masks["sdpa"](**sizes) is not None, "the overriding function does not declare is_causal"
    functions["sdpa"](None, *[torch.zeros(1, 1, 3, 4)] * 3, functions.masks["sdpa"](**sizes))
    record = Backend(
        name="eager", attention=attention, mask=attnreg.masks.sdpa_mask, supports=Capabilities(is_causal=True)
    )
    functions["eager"] = record
    assert functions.masks["eager"] is attnreg.masks.sdpa_mask
    del functions["eager"]
    del functions["sdpa"]
    assert functions.masks["eager"] is attnreg.masks.eager_mask
    assert functions.masks["sdpa"](**sizes) is None
    with pytest.raises(
        InvalidBackendError, match="the record of 'mine' is named 'eager'; its name must be that of the"
    ):
        functions["mine"] = record


def test_half_an_override_is_no_member() -> None:
    """An overriding function without any formatter refuses to run, also when it loses the one it had."""
    functions = AttentionInterface()
    functions["mine"] = attention
    assert "mine" not in functions
    assert "mine" not in functions.valid_keys()
    functions.masks["mine"] = formatter
    assert "mine" in functions
    assert functions["mine"].__wrapped__ is attention
    del functions.masks["mine"]
    with pytest.raises(MissingMaskFormatterError):
        functions["mine"]


def test_an_override_made_during_a_slow_lookup_wins() -> None:
    """What was looked up before a change is not published after it."""

    class Slow(attnreg.Registry):
        def get(self, name):
            found = super().get(name)
            if hook := hooks.pop() if hooks else None:
                hook()
            return found

    class Mine(AttentionInterface):
        registry = Slow()

    Mine.register("mine", attention, mask=formatter)
    interface = Mine()

    def other(module, query, key, value, attention_mask, **kwargs):
        return None

    interface.masks["mine"] = formatter
    hooks = [lambda: interface.__setitem__("mine", other)]
    assert interface["mine"].__wrapped__ is other
    hooks = [lambda: Mine.register("mine", other, replace=True)]
    del interface["mine"]
    assert interface["mine"].__wrapped__ is other


def test_a_typo_is_one_error() -> None:
    """The error for an unknown name is not chained to lookups that are nobody's concern."""
    with pytest.raises(UnknownBackendError) as caught:
        AttentionInterface()["spda"]
    assert caught.value.__context__ is None
