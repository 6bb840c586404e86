"""The record: validated, frozen, and its name when it is copied or pickled."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
from doubles import attention, formatter

import attnreg
from attnreg import Backend, InvalidBackendError, InvalidNameError


def test_is_frozen() -> None:
    """Nobody exchanges half of a pair behind the registry's back."""
    backend = Backend(name="mine", attention=attention, mask=formatter)
    with pytest.raises(dataclasses.FrozenInstanceError):
        backend.mask = None  # type: ignore[misc]


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (
            lambda query, key, value: None,
            "the attention function of 'mine' is <lambda>(query, key, value); it must accept (module, query, key, value,"
            " attention_mask, **kwargs), because models pass keywords of theirs.",
        ),
        (
            lambda module, query, key, value, attention_mask, scaling=None: None,
            "the attention function of 'mine' is <lambda>(module, query, key, value, attention_mask, scaling=None); it must "
            "accept (module, query, key, value, attention_mask, **kwargs), because models pass keywords of theirs.",
        ),
        (
            "sdpa",
            "the attention function of 'mine' is 'sdpa'; it must accept (module, query, key, value, attention_mask, "
            "**kwargs), because models pass keywords of theirs.",
        ),
    ],
    ids=["too few", "no **kwargs", "not callable"],
)
def test_wrong_attention(function, text: str) -> None:
    """A function that models could not call is refused when it is registered, not when it runs."""
    with pytest.raises(InvalidBackendError) as caught:
        Backend(name="mine", attention=function, mask=formatter)
    assert str(caught.value).replace("test_wrong_attention.<locals>.", "") == text


def test_wrong_mask() -> None:
    """A formatter that could not be called is refused, with what it must accept."""
    with pytest.raises(InvalidBackendError) as caught:
        Backend(name="mine", attention=attention, mask=lambda attention_mask: attention_mask)
    assert str(caught.value) == (
        "the mask formatter of 'mine' is <lambda>(attention_mask); it must accept the keywords batch_size, q_length, "
        "kv_length, q_offset, kv_offset, mask_function, attention_mask and **kwargs (or be attnreg.NO_MASK)."
    ).replace("<lambda>", "test_wrong_mask.<locals>.<lambda>")


def test_wrong_supports_and_name() -> None:
    """Capabilities are a record, and names follow the grammar."""
    with pytest.raises(InvalidBackendError, match="the supports of 'mine' is {'softcap'}; it must be an attnreg.Capa"):
        Backend(name="mine", attention=attention, mask=formatter, supports={"softcap"})  # type: ignore[arg-type]
    with pytest.raises(InvalidNameError):
        Backend(name="my own", attention=attention, mask=formatter)


def test_open_signatures_are_taken() -> None:
    """`*args, **kwargs` and extra keywords are fine, as is a function of an extension module without a signature."""

    def more(module, query, key, value, attention_mask, extra=None, **kwargs):
        return None

    for function in (lambda *args, **kwargs: None, more, min):
        Backend(name="mine", attention=function, mask=attnreg.NO_MASK)


def test_copies_are_the_record_itself() -> None:
    """Models deep-copy; a backend in one stays the same backend."""
    backend = attnreg.get("sdpa")
    assert copy.copy(backend) is backend
    assert copy.deepcopy({"backend": backend})["backend"] is backend


def test_pickles_by_name() -> None:
    """A pickle holds the name alone, and reading it looks the name up."""
    backend = attnreg.get("sdpa")
    data = pickle.dumps(backend)
    assert pickle.loads(data) is backend  # noqa: S301 - our own
    assert b"sdpa_attention" not in data


def test_pickling_a_stranger_is_an_error() -> None:
    """What the default registry does not hold under that name could not be found again."""
    for name in ("sdpa", "nowhere"):
        with pytest.raises(attnreg.AttnregError) as caught:
            pickle.dumps(Backend(name=name, attention=attention, mask=formatter))
        assert str(caught.value) == (
            f"backend {name!r} is not what the default registry holds under that name, and a backend is pickled by its "
            "name. Register it (attnreg.default_registry.add) here and in the process that reads the pickle."
        )


def test_no_mask_is_one_object() -> None:
    """NO_MASK formats nothing, says so, and is itself after pickling."""
    assert attnreg.NO_MASK(batch_size=1, attention_mask="anything") is None
    assert repr(attnreg.NO_MASK) == "attnreg.NO_MASK"
    assert pickle.loads(pickle.dumps(attnreg.NO_MASK)) is attnreg.NO_MASK  # noqa: S301 - our own
    assert copy.deepcopy(attnreg.NO_MASK) is attnreg.NO_MASK
