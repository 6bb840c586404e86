"""Building or loading a model, and choosing its backends in one line."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from attnreg.default import default_registry
from attnreg.errors import InvalidInputError
from attnreg.models.choosing import flat
from attnreg.models.saved import load_saved
from attnreg.models.setting import set_attn_implementation
from attnreg.naming import AUTO

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def load_model(
    factory_or_id: Callable[..., Any] | str | PathLike[str],
    *args: Any,
    attn_implementation: str | Mapping[str, Any] | None = None,
    check: bool = True,
    **kwargs: Any,
) -> Any:
    """Build or load a model and choose its backends.

    Names are looked up first, so that a typo costs no loading.

    Args:
        factory_or_id: what makes the model, such as a class, `AutoModel.from_pretrained` or a function of one's own;
            or the path of a model saved by transformers or diffusers, or its name on the Hub for one of transformers'.
        *args: for the factory, or for `from_pretrained` behind the path.
        attn_implementation: see `attnreg.set_attn_implementation`; None leaves every part its default.
        check: see `attnreg.set_attn_implementation`.
        **kwargs: likewise; beside a path or a name, `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`
            and `trust_remote_code` also tell where the configuration is, by which the class is found.

    Returns:
        The model.

    Raises:
        UnknownBackendError: nobody provides a name; see `attnreg.set_attn_implementation` for what else it raises.
        InvalidInputError: neither something that makes a model nor a path or a name, or a directory without a model.
        BridgeError: the library of that model is missing, or does not know the model, or there is none of that name.
    """
    if attn_implementation is not None:
        _look_up(attn_implementation)
    if isinstance(factory_or_id, str | PathLike):
        model = load_saved(factory_or_id, *args, **kwargs)
    elif isinstance(factory_or_id, torch.nn.Module):
        got = f"a {type(factory_or_id).__name__}, which is a model already"
        wanted = "what makes one, or a path; to change a model, attnreg.set_attn_implementation"
        raise InvalidInputError("factory_or_id", got, wanted)
    elif callable(factory_or_id):
        model = factory_or_id(*args, **kwargs)
    else:
        wanted = "a class or function that makes the model, or a path"
        raise InvalidInputError("factory_or_id", f"of type {type(factory_or_id).__name__}", wanted)
    if attn_implementation is not None:
        set_attn_implementation(model, attn_implementation, check=check)
    return model


def _look_up(implementation: Any) -> None:
    """Make sure that backends of these names are there; a library's own names have a colon, and wait for their part."""
    for name in flat(implementation).values():
        if name != AUTO and (":" not in name or "/" in name):
            default_registry.get(name)
