"""Which calls of torch's function a module that is served answers with its backend, and which it leaves alone."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as imported
from torch.utils.checkpoint import checkpoint

import attnreg
from attnreg import (
    AttentionInterface,
    BridgeError,
    InvalidInputError,
    InvalidMaskError,
    get_attn_implementation,
    set_attn_implementation,
)
from attnreg.integrations import torch_modules

HIDDEN = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))


class Plain(torch.nn.Module):
    """Self-attention without projections."""

    def forward(self, hidden):
        """Attend within each row."""
        heads = hidden.unflatten(-1, (4, -1)).transpose(1, 2)
        return self.attend(heads).transpose(1, 2).flatten(2)

    def attend(self, heads):
        """Attend to all heads."""
        return functional.scaled_dot_product_attention(heads, heads, heads)


class Outer(Plain):
    """Attends itself, and holds another module that does."""

    def __init__(self, inner) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        """Run both."""
        return super().forward(hidden) + self.inner(hidden)


def reaches(name):
    """Register a backend that writes its name down whenever it is called."""

    def attention(module, query, key, value, attention_mask, **kwargs):
        SEEN.append(name)
        return attnreg.reference.attention_function(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(name, attention, mask=attnreg.masks.sdpa_mask, replace=True)


SEEN: list[str] = []


@pytest.fixture(autouse=True)
def _two_backends():
    for name in ("one", "two"):
        reaches(name)
    SEEN.clear()
    yield
    for name in ("one", "two"):
        AttentionInterface.unregister(name)
    torch._dynamo.reset()


def run(module):
    """Return what a module computes, and which backends it reached."""
    SEEN.clear()
    with torch.no_grad():
        output = module(HIDDEN)
    return output, SEEN[:]


class Mha(torch.nn.MultiheadAttention):
    """torch's own, which goes past the function in some of its calls and not in others."""

    def __init__(self) -> None:
        super().__init__(32, 4, batch_first=True)

    def forward(self, hidden):
        """Attend to itself."""
        return super().forward(hidden, hidden, hidden, need_weights=False)[0]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("make", "inner", "seen"),
    [
        (Plain, "torch:sdpa", ["one"]),
        (Plain, "sdpa", ["one"]),
        (Plain, "two", ["one", "two"]),
        (functools.partial(attnreg.nn.SelfAttention, 32, 4), "sdpa", ["one"]),
        (Mha, None, ["one"]),
    ],
)
def test_modules_within_a_served_one_are_left_alone(make, inner, seen, compiled) -> None:
    """What the inner module is on is what computes it, whatever the outer one is on; attnreg's backends included."""
    module = Outer(make()).eval()
    expected, _ = run(module)
    set_attn_implementation(module, "one" if inner is None else {"": "one", "inner": inner})
    got, reached = run(torch.compile(module, backend="eager") if compiled else module)
    assert reached == seen
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_an_outer_module_leaves_its_backend_to_itself() -> None:
    """The other way round, with a backend that calls torch's function: nothing answers it."""
    module = Outer(Plain())
    set_attn_implementation(module, {"": "sdpa", "inner": "two"})
    assert run(module)[1] == ["two"]


def test_forward_that_is_called_directly_and_hooks_outside_of_it() -> None:
    """`module.forward(...)` reaches the backend as `module(...)` does, and a hook's own attention is not the module's."""
    module = Plain()
    set_attn_implementation(module, "one")
    assert run(module.forward)[1] == ["one"]
    module.register_forward_hook(lambda *_: imported(*[HIDDEN[:, None]] * 3))
    assert run(module)[1] == ["one"]


@pytest.mark.parametrize("first", ["wrapped", "served"])
def test_forward_replaced_in_the_object(first) -> None:
    """As libraries that offload do: before and after, the backend of now computes, and none does afterwards."""

    def wrap(module):
        module.forward = functools.partial(module.forward)

    module = Plain()
    for step in (
        (wrap, functools.partial(set_attn_implementation, attn_implementation="one"))
        if first == "wrapped"
        else (
            functools.partial(set_attn_implementation, attn_implementation="one"),
            wrap,
        )
    ):
        step(module)
    assert run(module)[1] == ["one"]
    set_attn_implementation(module, "two")
    assert run(module)[1] == ["two"]
    set_attn_implementation(module, "torch:sdpa")
    assert run(module)[1] == []


def compile_module(module) -> None:
    """Compile by torch's own method."""
    module.compile(backend="eager")


def compile_forward(module) -> None:
    """Put a compiled function in the place of `forward`."""
    module.forward = torch.compile(module.forward, backend="eager")


def compile_helper(module) -> None:
    """Compile what `forward` calls."""
    module.attend = torch.compile(module.attend, backend="eager")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("compiles", [compile_module, compile_forward, compile_helper])
def test_compilation_of_a_region(compiles, when) -> None:
    """Compiled by itself, or in part, before or after it is given a backend, a module reaches it, and no error comes."""
    module = Plain()
    expected, _ = run(module)
    if when == "before":
        compiles(module)
        run(module)
    set_attn_implementation(module, "one")
    if when == "after":
        compiles(module)
    got, reached = run(module)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert reached == ["one"]


class Checkpointed(Plain):
    """Attends in a checkpoint of its own."""

    reentrant = False

    def attend(self, heads):
        """Compute anew in the backward pass."""
        return checkpoint(super().attend, heads, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant) -> None:
    """Around a served module they compute on its backend again; within one they are refused where gradients count."""
    hidden = HIDDEN.clone().requires_grad_()
    module = Plain()
    set_attn_implementation(module, "one")
    checkpoint(module, hidden, use_reentrant=reentrant).sum().backward()
    assert SEEN == ["one", "one"]
    module = Checkpointed()
    module.reentrant = reentrant
    set_attn_implementation(module, "one")
    with pytest.raises(BridgeError, match="a Checkpointed attends in a checkpoint of its own") as caught:
        module(hidden)
    assert "Put torch.utils.checkpoint around the Checkpointed instead" in str(caught.value)
    SEEN.clear()
    with torch.no_grad():
        module(hidden)
    assert SEEN == ["one"]


part = functools.partial(imported, is_causal=False)


class Renamed(Plain):
    """Under the name of an import."""

    def attend(self, heads):
        """Attend."""
        return imported(heads, heads, heads)


class Default(Plain):
    """As a parameter's default."""

    def attend(self, heads, function=functional.scaled_dot_product_attention):
        """Attend."""
        return function(heads, heads, heads)


class Partial(Plain):
    """In a partial of the module, whose own are left alone."""

    def attend(self, heads):
        """Attend."""
        return part(heads, heads, heads)


class InTheClass(Plain):
    """As an attribute of the class."""

    function = staticmethod(functools.partial(imported))

    def attend(self, heads):
        """Attend."""
        return self.function(heads, heads, heads)


class ClassMethod(Plain):
    """In a method of the class."""

    @classmethod
    def attend(cls, heads):
        """Attend."""
        return functional.scaled_dot_product_attention(heads, heads, heads)


class ByText(Plain):
    """Looked up by its name."""

    def attend(self, heads):
        """Attend."""
        return getattr(functional, "scaled_dot_product_attention")(heads, heads, heads)  # noqa: B009 - what is tested


@pytest.mark.parametrize("kind", [Renamed, Default, Partial, InTheClass, ClassMethod, ByText])
def test_ways_of_calling_the_function(kind) -> None:
    """Whatever the function is called by, as long as the code tells, the module is a part and reaches the backend."""
    module = torch.nn.Sequential(kind(), Plain())
    set_attn_implementation(module, "one")
    assert run(module)[1] == ["one", "one"]


def attend(heads):
    """Attend, under a name that modules have for something else."""
    return functional.scaled_dot_product_attention(heads, heads, heads)


class Block(torch.nn.Module):
    """Has an attribute of a name that a function of its file has as well."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = Plain()

    def forward(self, hidden):
        """Attend in the inner module."""
        return self.attend(hidden)


class ByHand(Plain):
    """Overrides what calls the function."""

    def attend(self, heads):
        """Attend otherwise."""
        return (heads @ heads.transpose(-1, -2)).softmax(-1) @ heads


def test_what_is_no_part() -> None:
    """An attribute named as a function is none, and code that is overridden does not count."""
    module = torch.nn.Sequential(Block(), ByHand())
    set_attn_implementation(module, {"": "one"})
    assert get_attn_implementation(module) == "one"
    assert type(module[1]) is ByHand
    assert run(module)[1] == ["one"]


class Touchy:
    """Raises whatever it is asked for, as a library of classes of torch's does."""

    def __getattr__(self, name):
        raise RuntimeError(f"no class {name}")


TOUCHY = Touchy()


class Beside(Plain):
    """Has something in its code that must not be asked for anything."""

    def forward(self, hidden):
        """Attend, and use the other thing in no way."""
        return super().forward(hidden) if TOUCHY is not None else TOUCHY


def test_what_raises_when_it_is_looked_at_is_not_looked_at() -> None:
    """What a module's code mentions may be anything: finding its attention asks only functions."""
    module = Beside()
    set_attn_implementation(module, "one")
    assert run(module)[1] == ["one"]


class Registered(Plain):
    """Notes every class derived from it, and wants a keyword."""

    kinds = SimpleNamespace(seen=[])

    def __init_subclass__(cls, *, key, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        cls.kinds.seen.append((key, cls))


class Keyed(Registered, key="k"):
    """One of them."""


def test_classes_that_watch_what_is_derived_from_them() -> None:
    """`__init_subclass__` sees nothing of the class that serves."""
    module = torch.nn.Sequential(Plain(), Keyed())
    set_attn_implementation(module, "one")
    assert Registered.kinds.seen == [("k", Keyed)]
    assert run(module)[1] == ["one", "one"]


class Weighted(Plain):
    """Has a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(32))

    def forward(self, hidden):
        """Project and attend."""
        return super().forward(hidden @ self.weight)


class Double(torch.nn.Module):
    """A parametrisation."""

    def forward(self, weight):
        """Return twice the weight."""
        return 2 * weight


def test_classes_on_top_of_the_one_that_serves() -> None:
    """A parametrisation made since would be lost with the class, so it has to go first; nothing has changed."""
    parametrize = torch.nn.utils.parametrize
    module = torch.nn.Sequential(Plain(), Weighted())
    set_attn_implementation(module, "one")
    parametrize.register_parametrization(module[1], "weight", Double())
    expected, reached = run(module)
    assert reached == ["one", "one"]
    for name in ("two", "torch:sdpa"):
        with pytest.raises(
            BridgeError, match="was served, and then its class was changed by something else. Undo that"
        ):
            set_attn_implementation(module, name)
        assert get_attn_implementation(module) == "one"
        assert torch.equal(run(module)[0], expected)
    parametrize.remove_parametrizations(module[1], "weight")
    set_attn_implementation(module, "torch:sdpa")
    assert type(module[1]) is Weighted


def test_a_name_that_is_registered_anew() -> None:
    """The backend of now computes, as `get_attn_implementation` says."""
    module = Plain()
    set_attn_implementation(module, "one")
    AttentionInterface.register("one", attnreg.get("two").attention, mask=attnreg.masks.sdpa_mask, replace=True)
    assert run(module)[1] == ["two"]
    AttentionInterface.unregister("one")
    with pytest.raises(attnreg.UnknownBackendError, match="no attention backend is named 'one'"):
        module(HIDDEN)
    reaches("one")
    assert run(module)[1] == ["one"]


class Direct(torch.nn.Module):
    """Hands everything to torch's function."""

    def forward(self, *args, **kwargs):
        """Attend."""
        return functional.scaled_dot_product_attention(*args, **kwargs)


def tensors(*shapes):
    """Make one tensor for each shape."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def dense(*shape):
    """Make a mask in which each query has a key."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(4)) > 0.4
    mask[..., 0] = True
    return mask


SHAPES = {
    "matrices": (tensors((5, 8), (7, 8), (7, 6)), {}),
    "matrices, masked": (tensors((5, 8), (7, 8), (7, 6)), {"attn_mask": dense(5, 7)}),
    "rows": (tensors((3, 5, 8), (3, 7, 8), (3, 7, 6)), {"attn_mask": dense(3, 5, 7)}),
    "rows, keys of one": (tensors((3, 5, 8), (1, 7, 8), (1, 7, 6)), {"attn_mask": dense(3, 1, 7)}),
    "shared heads": (tensors((4, 5, 8), (2, 7, 8), (2, 7, 6)), {"enable_gqa": True, "attn_mask": dense(4, 5, 7)}),
    "keys of one row": (tensors((2, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 6)), {"attn_mask": dense(2, 1, 5, 7)}),
    "five axes": (tensors((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6)), {"is_causal": True}),
    "five axes, masked": (tensors((2, 3, 4, 5, 8), (2, 1, 4, 7, 8), (1, 3, 4, 7, 6)), {"attn_mask": dense(3, 1, 5, 7)}),
    "five axes, one mask": (
        tensors((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6)),
        {"attn_mask": dense(1, 1, 1, 5, 7)},
    ),
    "no rows": (tensors((0, 4, 5, 8), (0, 4, 7, 8), (0, 4, 7, 6)), {}),
    "no queries": (tensors((2, 4, 0, 8), (2, 4, 7, 8), (2, 4, 7, 6)), {}),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes(case) -> None:
    """What torch takes, backends take: any number of axes, keys shared by rows, and nothing at all."""
    inputs, options = SHAPES[case]
    module = Direct()
    expected = module(*inputs, **options)
    for name in ("eager", "sdpa"):
        set_attn_implementation(module, name)
        torch.testing.assert_close(module(*inputs, **options), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (3, 5), (1, 5), (5, 3)])
@pytest.mark.parametrize("name", ["eager", "sdpa", "loopback", "flex_attention"])
def test_causal_biases(name, queries, keys) -> None:
    """Torch's two kinds of causal bias mean what they mean to torch: aligned at the first key, or at the last."""
    query, key = tensors((2, 4, queries, 16), (2, 4, keys, 16))
    for made in (causal_upper_left, causal_lower_right)[: 2 if queries <= keys else 1]:
        module, mask = Direct(), made(queries, keys)
        expected = module(query, key, key, attn_mask=mask)
        set_attn_implementation(module, name)
        torch.testing.assert_close(module(query, key, key, attn_mask=mask), expected, rtol=0, atol=1e-5)


class Odd(torch.Tensor):
    """A mask that says something else than it holds."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Answer by itself."""
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.filterwarnings("ignore:Lower right causal bias")
def test_masks_and_inputs_that_are_refused() -> None:
    """Biases of other lengths or beside the flag, queries before all keys, masks of other classes, nested tensors."""
    query, key = tensors((2, 4, 3, 8), (2, 4, 5, 8))
    module = Direct()
    set_attn_implementation(module, "eager")
    for mask, options, text in (
        (causal_upper_left(3, 4), {}, r"a CausalBias for lengths \(3, 4\), in a call with lengths \(3, 5\)"),
        (causal_upper_left(3, 5), {"is_causal": True}, "and is_causal=True; wanted: one for the call's own lengths"),
        (torch.ones(3, 5).as_subclass(Odd), {}, "the mask is a Odd; wanted: a torch.Tensor, or a CausalBias"),
    ):
        with pytest.raises(InvalidMaskError, match=text):
            module(query, key, key, mask, **options)
    with pytest.raises(InvalidMaskError, match="of 5 queries, the first of which see none of the 3 keys"):
        module(key, query, query, causal_lower_right(5, 3))
    nested = torch.nested.nested_tensor([torch.randn(3, 2, 8), torch.randn(5, 2, 8)], layout=torch.jagged).transpose(
        1, 2
    )
    with pytest.raises(InvalidInputError, match="a nested tensor, which no backend computes"):
        module(nested, nested, nested)


class Short(Plain):
    """Returns early where there is nothing to do."""

    def forward(self, hidden):
        """Attend, if there are places."""
        return super().forward(hidden) if hidden.shape[1] else hidden


def test_a_call_with_nothing_to_attend_to() -> None:
    """A module that returns early for empty input is not told that it went past the backend."""
    module = Short()
    set_attn_implementation(module, "one")
    assert module(HIDDEN[:, :0]).shape == (2, 0, 32)


def test_needs_are_read_off_weights() -> None:
    """A norm in float32 in front of half-precision weights does not tell the dtype of calls, nor a property that raises."""

    class Normed(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(8)
            self.project = torch.nn.Linear(8, 8, dtype=torch.bfloat16)

        @property
        def num_heads(self):
            raise RuntimeError

    module = Normed()
    supports = attnreg.Capabilities(dtypes=frozenset({"bfloat16"}))
    AttentionInterface.register(
        "one", attnreg.get("two").attention, mask=attnreg.masks.sdpa_mask, supports=supports, replace=True
    )
    set_attn_implementation(module, "one")
    assert get_attn_implementation(module) == "one"


def test_classes_derived_from_those_of_transformers() -> None:
    """One host serves a module: that of transformers if its code still looks functions up, else this one."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    class Both(LlamaAttention):
        def forward(self, *args, **kwargs):
            heads = super().forward(*args, **kwargs)[0]
            return functional.scaled_dot_product_attention(heads, heads, heads), None

    class Own(LlamaAttention):
        def forward(self, heads):
            return functional.scaled_dot_product_attention(heads, heads, heads), None

    assert [torch_modules._attends(kind) for kind in (LlamaAttention, Both, Own)] == [False, False, True]
