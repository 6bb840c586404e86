"""Building or loading a model, and choosing its backends in one line."""

from __future__ import annotations

import json
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnreg.default import default_registry
from attnreg.errors import BridgeError, InvalidInputError
from attnreg.models.choosing import flat
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
        **kwargs: likewise.

    Returns:
        The model.

    Raises:
        UnknownBackendError: nobody provides a name; see `attnreg.set_attn_implementation` for what else it raises.
        InvalidInputError: neither something that can be called nor a path, or a directory without a model.
        BridgeError: the library of that model is missing, or does not know the model.
    """
    if attn_implementation is not None:
        _look_up(attn_implementation)
    if isinstance(factory_or_id, str | PathLike):
        factory, args = _from_pretrained(fspath(factory_or_id)), (fspath(factory_or_id), *args)
    elif callable(factory_or_id):
        factory = factory_or_id
    else:
        wanted = "a class or function that makes the model, or a path"
        raise InvalidInputError("factory_or_id", f"of type {type(factory_or_id).__name__}", wanted)
    model = factory(*args, **kwargs)
    if attn_implementation is not None:
        set_attn_implementation(model, attn_implementation, check=check)
    return model


def _look_up(implementation: Any) -> None:
    """Make sure that backends of these names are there; a library's own names have a colon, and wait for their part."""
    for _, name in flat(implementation):
        if name != AUTO and (":" not in name or "/" in name):
            default_registry.get(name)


def _from_pretrained(path: str) -> Callable[..., Any]:
    """Return what loads the model that is saved at *path*, or is named so on the Hub."""
    folder = Path(path)
    if not folder.is_dir():
        return _by_architecture(path)
    if (folder / "model_index.json").is_file():
        return _diffusers("DiffusionPipeline")
    if not (folder / "config.json").is_file():
        raise InvalidInputError("the directory", "one without config.json and model_index.json", "a saved model's")
    class_name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    return _diffusers(class_name) if class_name else _by_architecture(path)


def _diffusers(class_name: str) -> Callable[..., Any]:
    try:
        import diffusers
    except ImportError as error:
        raise BridgeError(
            "diffusers", f"it cannot be imported ({error})", "pip install 'attnreg[diffusers]'."
        ) from error
    return _loader(diffusers, class_name, "diffusers")


def _by_architecture(path: str) -> Callable[..., Any]:
    """Return `from_pretrained` of the class that a transformers model was saved from."""
    try:
        import transformers
    except ImportError as error:
        raise BridgeError(
            "transformers", f"it cannot be imported ({error})", "pip install 'attnreg[transformers]'."
        ) from error
    names = transformers.AutoConfig.from_pretrained(path).architectures or ["AutoModel"]
    return _loader(transformers, names[0], "transformers")


def _loader(library: Any, class_name: str, host: str) -> Callable[..., Any]:
    found = getattr(library, class_name, None)
    if found is None:
        problem = f"it has no model class {class_name!r}, from which this model was saved"
        raise BridgeError(host, problem, "Hand over what loads it: load_model(TheClass.from_pretrained, path, …).")
    loader: Callable[..., Any] = found.from_pretrained
    return loader
