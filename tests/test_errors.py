"""The texts of all errors, word for word: they are part of the interface."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from attnreg import errors
from attnreg.capabilities import Reason

REASON = Reason("dtype", "float32", "float16", "Cast the inputs.")

TEXTS = [
    (
        errors.InvalidNameError("a b", "it has a space"),
        "'a b' is no backend name: it has a space. A name is [wrapper[(args)]|]*name, where name is made of letters, "
        "digits, '_', '.' and '-', or is a Hub name org/repo[@revision][:function].",
    ),
    (
        errors.UnknownBackendError("flash-2", ["sdpa", "flash_attention_2"], {"sage": "it raised OSError: no CUDA"}),
        "no attention backend is named 'flash-2'; did you mean 'flash_attention_2'?\n"
        "  available:  flash_attention_2, sdpa\n"
        "  not usable: sage (it raised OSError: no CUDA)\n"
        "  to add it:  pip install a plugin that provides it, or AttentionInterface.register('flash-2', function, "
        "mask=formatter)",
    ),
    (
        errors.UnknownBackendError("zzz", []),
        "no attention backend is named 'zzz'\n  available:  none\n  to add it:  pip install a plugin that provides it, "
        "or AttentionInterface.register('zzz', function, mask=formatter)",
    ),
    (
        errors.UnknownWrapperError("pagd|sdpa", "pagd", ["paged"]),
        "no wrapper is named 'pagd', which 'pagd|sdpa' asks for; did you mean 'paged'? (wrappers: paged). "
        "Ask for the backend without it: 'sdpa'.",
    ),
    (
        errors.MissingMaskFormatterError("mine"),
        "'mine' has an attention function but no mask formatter, so padding and causality would be lost. Pair it: "
        "AttentionMaskInterface.register('mine', formatter), for example attnreg.masks.sdpa_mask; or, if the function "
        "handles every constraint itself, AttentionInterface.register('mine', function, mask=attnreg.NO_MASK).",
    ),
    (
        errors.MissingAttentionError("mine"),
        "'mine' has a mask formatter but no attention function. Complete it: AttentionInterface.register('mine', "
        "function).",
    ),
    (
        errors.InvalidBackendError("mine", "mask formatter", "f(x)", "it must accept keywords"),
        "the mask formatter of 'mine' is f(x); it must accept keywords.",
    ),
    (
        errors.NameTakenError("sdpa", "attnreg itself", "user code (m:f)", may_replace=True),
        "'sdpa' belongs to attnreg itself; user code (m:f) may not take it. Choose another name, or pass replace=True.",
    ),
    (
        errors.NameTakenError("sdpa", "attnreg itself", "attnreg-x 1.0", may_replace=False),
        "'sdpa' belongs to attnreg itself; attnreg-x 1.0 may not take it. A plugin replaces nobody: give the backend a "
        "name of its own.",
    ),
    (
        errors.NothingToRemoveError("sdpa", "user code", "attnreg itself"),
        "user code has nothing of its own under 'sdpa' to take back. It belongs to attnreg itself, which nobody can "
        "remove; uninstall or hide a plugin instead.",
    ),
    (
        errors.NothingToRemoveError("mine", "this instance"),
        "this instance has nothing of its own under 'mine' to take back.",
    ),
    (
        errors.ApiMismatchError("x", 2, 1, "attnreg-x 3.0", "attnreg 0.1.0"),
        "'x' from attnreg-x 3.0 is written for backend API 2; this attnreg speaks API 1. Upgrade attnreg (this is "
        "attnreg 0.1.0).",
    ),
    (
        errors.ApiMismatchError("x", 0, 1, "attnreg-x 3.0", "attnreg 0.1.0"),
        "'x' from attnreg-x 3.0 is written for backend API 0; this attnreg speaks API 1. Upgrade attnreg-x 3.0 (or its "
        "distribution).",
    ),
    (
        errors.PluginDependencyError("x", "attnreg-x 1.0", "attnreg_x", "flash_attn"),
        "backend 'x' cannot be loaded from attnreg-x 1.0 (attnreg_x): it imports 'flash_attn', which is not installed. "
        "Install the package that provides 'flash_attn'. To leave it out: ATTNREG_DISABLE=attnreg-x.",
    ),
    (
        errors.PluginImportError("x", "attnreg-x 1.0", "attnreg_x", OSError("bad ABI")),
        "backend 'x' cannot be loaded from attnreg-x 1.0 (attnreg_x): it raised OSError: bad ABI. `attnreg doctor` "
        "shows every plugin's state; report this to the plugin's authors. To leave it out: ATTNREG_DISABLE=attnreg-x.",
    ),
    (
        errors.PluginImportError("sdpa", "attnreg", "attnreg.builtin.sdpa", TypeError("bad entry point")),
        "backend 'sdpa' cannot be loaded from attnreg (attnreg.builtin.sdpa): it raised TypeError: bad entry point. See "
        "whether `import torch` works; `attnreg doctor` names what breaks it.",
    ),
    (
        errors.PluginContractError("x", "attnreg-x 1.0", "attnreg_x", "it has no hook"),
        "backend 'x' cannot be loaded from attnreg-x 1.0 (attnreg_x): it has no hook. Report this to the plugin's "
        "authors. To leave it out: ATTNREG_DISABLE=attnreg-x.",
    ),
    (
        errors.DuplicateBackendError("x", ["attnreg-x 1.0", "other-x 2.0"]),
        "'x' is provided by attnreg-x 1.0 and by other-x 2.0; neither is chosen. Uninstall one (pip uninstall "
        "attnreg-x), or hide one (ATTNREG_DISABLE=attnreg-x).",
    ),
    (
        errors.UnsupportedError("x", [REASON]),
        "backend 'x' cannot do what is asked:\n  dtype: wants float32; supported: float16. Cast the inputs.",
    ),
    (
        errors.UnsupportedMaskError("x_mask", [REASON]),
        "x_mask cannot express this mask:\n  dtype: wants float32; supported: float16. Cast the inputs.",
    ),
    (
        errors.KernelError("x-kernel", [REASON]),
        "the kernel of x-kernel cannot be used:\n  dtype: wants float32; supported: float16. Cast the inputs.",
    ),
    (
        errors.NoBackendError({"x": [REASON], "y": [REASON]}),
        "no backend can do what is asked:\n  x: dtype: wants float32; supported: float16. Cast the inputs.\n"
        "  y: dtype: wants float32; supported: float16. Cast the inputs.",
    ),
    (
        errors.ConfigurationError("ATTNREG_ONLY", "a b", "'a b' is no name", "Separate names by commas."),
        "ATTNREG_ONLY='a b': 'a b' is no name. Separate names by commas.",
    ),
    (errors.InvalidInputError("softcap", "-1", "a positive number"), "softcap is -1; wanted: a positive number."),
    (errors.InvalidMaskError("the mask", "a list", "a tensor"), "the mask is a list; wanted: a tensor."),
    (
        errors.UnknownPartError("txt_config", "names no part of the model", ["text_config", "vision_config"]),
        "'txt_config' names no part of the model; did you mean 'text_config'?\n"
        "  keys of this model: text_config, vision_config\n"
        "  also: patterns over module paths, such as '*.self_attn', and '' for what is not named",
    ),
    (
        errors.UnknownPartError("zzz", "names no part of the model", [f"layers.{n}" for n in range(13)]),
        "'zzz' names no part of the model\n"
        "  keys of this model: layers.0, layers.1, layers.2, layers.3, layers.4, layers.5, layers.6, layers.7, "
        "layers.8, layers.9, layers.10, layers.11, … (13 in all)\n"
        "  also: patterns over module paths, such as '*.self_attn', and '' for what is not named",
    ),
    (
        errors.UnsupportedPartError(
            {"head": ("loopback", ["sinks: no"])} | {f"layers.{n}": ("loopback", ["softcap: no"]) for n in range(10)}
        ),
        "the model is unchanged, because it has parts that these backends cannot serve:\n"
        "  head, 'loopback': sinks: no\n  layers.0 and 9 more, 'loopback': softcap: no\n"
        "To set them nevertheless: check=False.",
    ),
    (
        errors.BridgeError("transformers", "it is too old", "Upgrade it."),
        "transformers: it is too old. Upgrade it.",
    ),
]

CLASSES = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, errors.AttnregError)]


@pytest.mark.parametrize(("error", "text"), TEXTS, ids=lambda value: type(value).__name__)
def test_text(error, text) -> None:
    """Each error says what was asked, what is possible and what to do next."""
    assert str(error) == error.message == text


@pytest.mark.parametrize(("error", "text"), TEXTS, ids=lambda value: type(value).__name__)
def test_pickles_whole(error, text) -> None:
    """An error that crosses a process keeps its class, its text and its culprits."""
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert type(copy) is type(error)
    assert str(copy) == text
    assert set(vars(copy)) == set(vars(error))


def test_every_class_is_covered() -> None:
    """No error class is without a text above, but for those that only group others."""
    groups = {errors.AttnregError, errors.IncompleteBackendError, errors.RegistrationError, errors.PluginError}
    assert {type(error) for error, _ in TEXTS} == set(CLASSES) - groups


def test_docstring_is_the_tree() -> None:
    """The tree in the module's docstring is the tree of the classes."""
    drawn: dict[str, str] = {}
    stack: list[tuple[int, str]] = []
    for line in inspect.getdoc(errors).splitlines():
        match = re.match(r"([│├└─ ]*)([A-Z]\w+Error)\b", line)
        if not match:
            continue
        depth = len(match[1])
        stack = [entry for entry in stack if entry[0] < depth]
        drawn[match[2]] = stack[-1][1] if stack else "Exception"
        stack.append((depth, match[2]))
    assert drawn == {each.__name__: each.__bases__[0].__name__ for each in CLASSES}


def test_standard_bases() -> None:
    """Who only knows Python's own exceptions catches the right ones."""
    assert issubclass(errors.UnknownBackendError, KeyError)
    assert issubclass(errors.InvalidNameError, ValueError)
    assert issubclass(errors.InvalidBackendError, TypeError)
    assert issubclass(errors.IncompleteBackendError, LookupError)
    assert issubclass(errors.ConfigurationError, ValueError)
    assert issubclass(errors.InvalidMaskError, ValueError)


def test_suggestion_ignores_case() -> None:
    """A name in the wrong case is recognised."""
    assert errors.did_you_mean("SDPA", ["sdpa", "eager"]) == "; did you mean 'sdpa'?"
