"""The reason engine: what is asked against what is declared."""

from __future__ import annotations

from dataclasses import fields, replace

import doubles
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import attnreg
from attnreg import Capabilities, InvalidInputError, Request
from attnreg.capabilities import reasons, reluctance
from attnreg.vocabulary import FEATURES, STRUCTURES

EVERYTHING = Capabilities(
    value_head_dim=True,
    grouped_query=True,
    lossy=True,
    **dict.fromkeys(FEATURES, True),
)

TABLE = [
    (
        Capabilities(devices={"cuda"}),
        Request(device="cpu"),
        "device: wants cpu; supported: cuda. Move the tensors, or choose another backend.",
    ),
    (
        Capabilities(dtypes={"float16", "bfloat16"}),
        Request(dtype="float32"),
        "dtype: wants float32; supported: bfloat16, float16. Cast the inputs, or choose another backend.",
    ),
    (
        Capabilities(max_head_dim=128),
        Request(head_dim=256),
        "head_dim: wants 256; supported: up to 128. Choose another backend.",
    ),
    (
        Capabilities(head_dim_multiple=8),
        Request(head_dim=20),
        "head_dim: wants 20; supported: multiples of 8. Choose another backend.",
    ),
    (
        Capabilities(),
        Request(head_dim=16, value_head_dim=32),
        "value_head_dim: wants 32 for value beside 16 for query; supported: equal head dimensions. Choose a backend "
        "with value_head_dim, such as sdpa.",
    ),
    (
        Capabilities(),
        Request(query_heads=8, kv_heads=2),
        "grouped_query: wants 8 query heads on 2 key/value heads; supported: equal numbers of heads. Choose a backend "
        "with grouped_query, such as sdpa.",
    ),
    (
        Capabilities(structures={"causal", "padding"}),
        Request(structures={"causal", "blocks"}),
        "mask: wants blocks; supported: causal, padding. Choose another backend.",
    ),
    (
        Capabilities(),
        Request(softcap=True),
        "softcap: wants softcap; supported: not declared. Choose a backend with softcap, such as eager. A backend that "
        "can says so: Capabilities(softcap=True).",
    ),
    (
        Capabilities(),
        Request(alibi=True),
        "alibi: wants a position bias that is ALiBi; supported: not declared. Choose a backend with position_bias, such "
        "as eager. A backend that can says so: Capabilities(alibi=True).",
    ),
    (
        Capabilities(softcap=True, dropout=True, exclusive=[("softcap", "dropout")]),
        Request(softcap=True, dropout=True),
        "exclusive: wants dropout beside softcap; supported: each of them alone. Do without one of them, or choose "
        "another backend.",
    ),
    (
        Capabilities(backward=False),
        Request(backward=True),
        "backward: wants gradients; supported: not declared. Run it under torch.no_grad(), or choose a backend with a "
        "backward pass. A backend that can says so: Capabilities(backward=True).",
    ),
]


@pytest.mark.parametrize(("supports", "request_", "text"), TABLE, ids=[text.partition(":")[0] for *_, text in TABLE])
def test_reason(supports: Capabilities, request_: Request, text: str) -> None:
    """Each limit gives one reason, word for word."""
    assert [str(reason) for reason in reasons(supports, request_)] == [text]


@pytest.mark.parametrize("feature", sorted(FEATURES))
def test_each_feature_is_refused_unless_declared(feature: str) -> None:
    """Not declared is refused, declared is not: for every feature alike."""
    request = Request(**{feature: True})
    supports = Capabilities(backward=False)
    assert [reason.code for reason in reasons(supports, request)] == [feature]
    assert reasons(replace(supports, **{feature: True}), request) == []


def test_reasons_add_up() -> None:
    """Every obstacle is named, not only the first."""
    request = Request(device="cpu", dtype="float64", softcap=True, sinks=True)
    codes = [reason.code for reason in reasons(Capabilities(devices={"cuda"}, dtypes={"float16"}), request)]
    assert codes == ["device", "dtype", "softcap", "sinks"]


def test_request_covers_what_can_be_declared() -> None:
    """A capability that no request can ask for would be decoration."""
    about = {"devices", "dtypes", "priority", "lossy", "lossy_error", "exclusive", "on"}
    declared = {field.name for field in fields(Capabilities)} - about
    asked = {field.name for field in fields(Request)} | {
        "min_head_dim",
        "max_head_dim",
        "head_dim_multiple",
        "page_size_multiple",
        "grouped_query",
    }
    assert declared - asked == set()


@given(st.fixed_dictionaries({feature: st.booleans() for feature in FEATURES}))
def test_who_can_do_everything_is_never_refused(needs: dict[str, bool]) -> None:
    """No request, however demanding, gives a reason against a backend that declares all of it."""
    assert reasons(EVERYTHING, Request(structures=STRUCTURES, query_heads=8, kv_heads=2, **needs)) == []


@example({"alibi", "dropout"}, [{"position_bias", "dropout"}])
@given(
    st.sets(st.sampled_from(sorted(FEATURES)), max_size=6),
    st.lists(st.sets(st.sampled_from(sorted(FEATURES)), min_size=2, max_size=3), max_size=3),
)
def test_what_excludes_each_other(wanted: set[str], groups: list[set[str]]) -> None:
    """A request is refused for each group that it asks for as a whole, ALiBi being a position bias too."""
    supports = replace(EVERYTHING, exclusive=groups)
    asked = wanted | ({"position_bias"} if "alibi" in wanted else set())
    found = reasons(supports, Request(**dict.fromkeys(wanted, True)))
    assert [reason.code for reason in found] == ["exclusive" for group in groups if group <= asked]
    assert supports == replace(EVERYTHING, exclusive=[sorted(group, reverse=True) for group in reversed(groups)])
    assert hash(supports) == hash(replace(supports))


def test_a_position_bias_includes_alibi_and_not_the_other_way_round() -> None:
    """Who adds any bias adds ALiBi; who knows slopes alone is refused another bias."""
    assert reasons(Capabilities(position_bias=True), Request(alibi=True)) == []
    assert [each.code for each in reasons(Capabilities(alibi=True), Request(position_bias=True))] == ["position_bias"]


def test_lossy_is_reluctance_and_no_reason() -> None:
    """A quantised backend runs when it is named; automatic choice leaves it out unless allowed."""
    assert reasons(EVERYTHING, Request()) == []
    assert [str(reason) for reason in reluctance(EVERYTHING, Request())] == [
        "lossy: wants the accuracy of the dtype; supported: a quantised kernel. Name it, or pass "
        "Request(allow_lossy=True)."
    ]
    assert reluctance(EVERYTHING, Request(allow_lossy=True)) == []


def test_request_of_tensors() -> None:
    """Tensors say what they need themselves."""
    query, key, value = torch.empty(1, 8, 3, 16), torch.empty(1, 2, 5, 16), torch.empty(1, 2, 5, 24)
    assert Request.of(query, key, value, softcap=True) == Request(
        device="cpu", dtype="float32", head_dim=16, value_head_dim=24, query_heads=8, kv_heads=2, softcap=True
    )


def test_torch_spellings() -> None:
    """Torch's own devices and dtypes are taken beside their names."""
    assert Request(device=torch.device("cuda:1"), dtype=torch.float16) == Request(device="cuda", dtype="float16")
    assert Capabilities(dtypes=[torch.float16]) == Capabilities(dtypes={"float16"})


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: Capabilities(devices="cuda"),
            "devices is the string 'cuda'; wanted: a set of names, such as {'cuda'}.",
        ),
        (
            lambda: Request(structures={"casual"}),
            f"structures is casual; wanted: some of {', '.join(sorted(STRUCTURES))}.",
        ),
    ],
)
def test_bad_declarations(make, text: str) -> None:
    """A string in place of a set, or a structure that does not exist, is an error and not an odd result."""
    with pytest.raises(InvalidInputError) as caught:
        make()
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Capabilities(priority="high"), "priority is 'high'; wanted: an integer."),
        (lambda: Capabilities(priority=None), "priority is None; wanted: an integer."),
        (lambda: Capabilities(priority=float("nan")), "priority is nan; wanted: an integer."),
        (lambda: Capabilities(head_dim_multiple=0), "head_dim_multiple is 0; wanted: an integer, 1 or more."),
        (lambda: Capabilities(max_head_dim="128"), "max_head_dim is '128'; wanted: an integer, 1 or more."),
        (lambda: Capabilities(softcap="no"), "softcap is 'no'; wanted: True or False."),
        (lambda: Capabilities(lossy=1), "lossy is 1; wanted: True or False."),
        (lambda: Capabilities(alibi=None), "alibi is None; wanted: True or False."),
        (
            lambda: Capabilities(exclusive=[("softcap", "droput")]),
            f"exclusive is droput; wanted: groups of {', '.join(sorted(FEATURES))}.",
        ),
        *(
            (
                lambda error=error: Capabilities(lossy_error=error),
                f"lossy_error is {error!r}; wanted: a share between 0 and 1, such as 0.05.",
            )
            for error in (0.0, 1.0, -0.1, 5, "0.05", float("nan"), None)
        ),
        (lambda: Capabilities(devices={"cuda:0"}), "a device is 'cuda:0'; wanted: a device type, such as cpu or cuda."),
        (
            lambda: Capabilities(dtypes={"half"}),
            "a dtype is 'half'; wanted: a torch dtype, such as float32 or bfloat16.",
        ),
        (lambda: Request(dtype="flaot32"), "dtype is 'flaot32'; wanted: a torch dtype, such as float32 or bfloat16."),
        (lambda: Request(device="CPU"), "device is 'CPU'; wanted: a device type, such as cpu or cuda."),
        (lambda: Request(head_dim=-1), "head_dim is -1; wanted: an integer, 1 or more."),
        (lambda: Request(head_dim="64"), "head_dim is '64'; wanted: an integer, 1 or more."),
        (
            lambda: Request(query_heads=7, kv_heads=2),
            "the number of heads is 7 query heads on 2 key/value heads; wanted: query heads that are a multiple of the "
            "others.",
        ),
    ],
)
def test_values_that_mean_nothing(make, text: str) -> None:
    """A declaration or a request with a value of the wrong kind is refused where it is made, not where it is read."""
    with pytest.raises(InvalidInputError) as caught:
        make()
    assert str(caught.value) == text


def test_integers_are_no_attention() -> None:
    """Only floating dtypes can be asked for, whatever a backend declares."""
    assert [str(reason) for reason in reasons(EVERYTHING, Request(dtype=torch.int64))] == [
        "dtype: wants int64; supported: floating dtypes. Cast the inputs."
    ]


def test_capabilities_may_depend_on_the_device() -> None:
    """What `on` says of a device holds there, for the reasons and for the guard; elsewhere it does not."""
    supports = Capabilities(dropout=True, devices={"cpu", "cuda"}, on={"cpu": {"dropout": False}})
    assert not reasons(supports, Request(dropout=True))
    assert not reasons(supports, Request(dropout=True, device="cuda:1"))
    assert [reason.code for reason in reasons(supports, Request(dropout=True, device="cpu"))] == ["dropout"]
    assert hash(supports) == hash(replace(supports))
    assert supports.at("cuda") is supports
    query = torch.randn(1, 2, 3, 8)
    call = attnreg.Backend(name="mine", attention=doubles.attention, mask=doubles.formatter, supports=supports).call
    with pytest.raises(attnreg.UnsupportedError, match="dropout: wants dropout"):
        call(doubles.FREE, query, query, query, query, dropout=0.5)


@pytest.mark.parametrize("on", [{"cpu": {"dropouts": True}}, {"cpu": {"devices": {"cpu"}}}, {"CPU!": {}}], ids=str)
def test_what_a_device_overrides_is_checked(on) -> None:
    """A misspelt attribute, one that cannot depend on the device, and a device that is none are refused."""
    with pytest.raises(attnreg.InvalidInputError, match="some of|a device type"):
        Capabilities(on=on)
