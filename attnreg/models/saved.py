"""Loading a saved model as what it was: from a directory, or by its name on the Hub."""

from __future__ import annotations

import json
import os
import re
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from attnreg.errors import BridgeError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from os import PathLike

_HUB_NAME: Final = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_WHERE: Final = ("subfolder", "revision", "cache_dir", "local_files_only", "trust_remote_code", "code_revision")
_SECRET: Final = ("token", "proxies")
"""What `from_pretrained` is told of where a model is, and whether its code may run; not all of it may be shown."""
_SAVED: Final = "the directory of a saved model"


def load_saved(place: str | PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """Load the model that is saved in the directory *place*, or that the Hub has under this name.

    Args:
        place: the directory, or the name.
        *args: for `from_pretrained`, behind the place.
        **kwargs: for `from_pretrained`. A `subfolder` is looked for in the directory.

    Raises:
        InvalidInputError: no directory and no name that the Hub could have, or a directory without a model.
        BridgeError: the library of that model is missing, or does not know the model, or there is none of that name.
    """
    name = fspath(place)
    if isinstance(place, str) and _HUB_NAME.fullmatch(name) and not Path(name).exists():
        return _by_architecture(name, kwargs)(name, *args, **kwargs)
    folder = _folder(name, kwargs.pop("subfolder", None) or "")
    return _by_files(folder, kwargs)(str(folder), *args, **kwargs)


def _folder(name: str, subfolder: str) -> Path:
    path, shown = Path(name, subfolder), os.path.join(name, subfolder) if subfolder else name  # noqa: PTH118 - as given
    if not name:
        raise InvalidInputError("the path of the model", "empty", f"{_SAVED}, or a name on the Hub")
    if path.is_file():
        raise InvalidInputError("the path of the model", f"the file {shown!r}", f"{_SAVED}, such as {path.parent}")
    if not path.is_dir():
        got = f"{shown!r}, where there is no directory, and which is no name on the Hub"
        raise InvalidInputError("the path of the model", got, f"{_SAVED}, or a string such as 'organisation/model'")
    return path


def _by_files(folder: Path, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """Return what loads the model in *folder*, by the files that are there."""
    if (folder / "model_index.json").is_file():
        return _diffusers("DiffusionPipeline")
    if not (folder / "config.json").is_file():
        got = "one without config.json and model_index.json"
        raise InvalidInputError(f"the directory {str(folder)!r}", got, _SAVED)
    class_name = _config(folder / "config.json").get("_class_name")
    return _diffusers(str(class_name)) if class_name else _by_architecture(str(folder), kwargs)


def _config(file: Path) -> dict[str, Any]:
    what, wanted = f"the file {str(file)!r}", "a model's configuration, which is one JSON object"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInputError(what, f"no JSON ({error})", wanted) from error
    if not isinstance(found, dict):
        raise InvalidInputError(what, f"a JSON {type(found).__name__}", wanted)
    return found


def _diffusers(class_name: str) -> Callable[..., Any]:
    try:
        import diffusers
    except ImportError as error:
        raise _missing("diffusers", error) from error
    return _loader(diffusers, class_name, "diffusers")


def _by_architecture(name: str, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """Return `from_pretrained` of the class that a transformers model was saved from."""
    try:
        import transformers
    except ImportError as error:
        raise _missing("transformers", error) from error
    where = {key: kwargs[key] for key in (*_WHERE, *_SECRET) if key in kwargs}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **where)
    except (OSError, ValueError) as error:
        shown = "".join(f", {key}={value!r}" for key, value in where.items() if key not in _SECRET)
        problem = f"AutoConfig.from_pretrained({name!r}{shown}) raised {type(error).__name__}: {_first_line(error)}"
        remedy = "Check the name or the path, or hand over what loads it: load_model(TheClass.from_pretrained, …)."
        raise BridgeError("transformers", problem, remedy) from error
    names = config.architectures or ["AutoModel"]
    return _loader(transformers, _remote(config, names[0]) or names[0], "transformers")


def _remote(config: Any, class_name: str) -> str:
    """Return the auto class by which code that comes with a model is loaded; empty if none does."""
    references = getattr(config, "auto_map", None) or {}
    return next((auto for auto, each in references.items() if str(each).rpartition(".")[2] == class_name), "")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(" .")


def _missing(library: str, error: ImportError) -> BridgeError:
    return BridgeError(library, f"it cannot be imported ({error})", f"pip install 'attnreg[{library}]'.")


def _loader(library: Any, class_name: str, host: str) -> Callable[..., Any]:
    found: Callable[..., Any] | None = getattr(getattr(library, class_name, None), "from_pretrained", None)
    if found is None:
        problem = f"it has no model class {class_name!r}, from which this model was saved"
        raise BridgeError(host, problem, "Hand over what loads it: load_model(TheClass.from_pretrained, path, …).")
    return found
