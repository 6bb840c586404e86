"""Every error attnreg raises. Catch `AttnregError` for all of them.

AttnregError
├── InvalidNameError (ValueError)             a name that the grammar does not allow
├── UnknownBackendError (KeyError)            nothing provides a backend of that name
│   └── UnknownWrapperError                   nothing provides what stands left of the bar
├── IncompleteBackendError (LookupError)      one half of the pair attention + mask is missing
│   ├── MissingMaskFormatterError             … the mask formatter
│   └── MissingAttentionError                 … the attention function
├── RegistrationError
│   ├── InvalidBackendError (TypeError)       an attention function, formatter or record of the wrong form
│   ├── NameTakenError                        the name belongs to someone else
│   ├── NothingToRemoveError (KeyError)       there is no registration or override to take back
│   └── ApiMismatchError                      the backend was written for another version of the contract
├── PluginError                               an installed plugin cannot be used; `__cause__` says why
│   ├── PluginDependencyError                 … because a package that it imports is missing
│   ├── PluginImportError                     … because it raised
│   └── PluginContractError                   … because it breaks the plugin contract
├── DuplicateBackendError                     two distributions provide one name: neither is chosen
├── UnsupportedError                          a backend cannot do what is asked; holds the reasons
│   ├── UnsupportedMaskError                  a mask format cannot express a mask; holds the reasons
│   ├── KernelError                           the package that a kernel is in cannot be used; holds the reasons
│   ├── UnsupportedPartError                  backends cannot serve parts of a model; holds both
│   └── NoBackendError                        `auto`: no backend can
├── ConfigurationError (ValueError)           an environment variable has a value that means nothing
├── InvalidInputError (ValueError)            tensors whose shapes or dtypes do not fit the contract
│   └── InvalidMaskError                      … the mask
├── UnknownPartError (KeyError)               a key that names no part of a model
└── BridgeError                               another library is missing, or cannot take a backend

Each class builds its own message from its culprits, keeps them as attributes, and says what to do next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnreg.wording import did_you_mean, listed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


class AttnregError(Exception):
    """Base class; `message` is the whole text, every culprit is an attribute."""

    def __init__(self, message: str, **culprits: object) -> None:
        super().__init__(message)
        self.message = message
        self.__dict__.update(culprits)

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle whole: data loaders and test runners carry errors between processes."""
        return _rebuild, (type(self), dict(self.__dict__))


def _rebuild(cls: type[AttnregError], state: dict[str, object]) -> AttnregError:
    error = cls.__new__(cls)
    AttnregError.__init__(error, **state)  # type: ignore[arg-type]
    return error


class InvalidNameError(AttnregError, ValueError):
    """A backend name that the grammar does not allow."""

    problem: str

    def __init__(self, name: object, problem: str) -> None:
        super().__init__(
            f"{name!r} is no backend name: {problem}. A name is [wrapper[(args)]|]*name, where name is made of "
            "letters, digits, '_', '.' and '-', or is a Hub name org/repo[@revision][:function].",
            name=name,
            problem=problem,
        )


class UnknownBackendError(AttnregError, KeyError):
    """Nothing provides a backend of that name."""

    name: str

    def __init__(self, name: str, available: Iterable[str], unusable: Mapping[str, str] | None = None) -> None:
        available, unusable = sorted(available), dict(unusable or {})
        lines = [f"no attention backend is named {name!r}{did_you_mean(name, [*available, *unusable])}"]
        lines.append(f"  available:  {listed(available)}")
        lines += [f"  not usable: {other} ({why})" for other, why in sorted(unusable.items())]
        install = "attnreg-kernels, which provides the Hub's names" if "/" in name else "a plugin that provides it"
        lines.append(
            f"  to add it:  pip install {install}, or AttentionInterface.register({name!r}, function, mask=formatter)"
        )
        super().__init__("\n".join(lines), name=name, available=available, unusable=unusable)


class UnknownWrapperError(UnknownBackendError):
    """Nothing provides the wrapper left of the bar."""

    def __init__(self, name: str, wrapper: str, wrappers: Iterable[str]) -> None:
        wrappers = sorted(wrappers)
        AttnregError.__init__(
            self,
            f"no wrapper is named {wrapper!r}, which {name!r} asks for{did_you_mean(wrapper, wrappers)} "
            f"(wrappers: {listed(wrappers)}). Ask for the backend without it: {name.rpartition('|')[2]!r}.",
            name=name,
            wrapper=wrapper,
            available=wrappers,
        )


class IncompleteBackendError(AttnregError, LookupError):
    """One half of the pair is missing, so the name refuses to run."""

    name: str


class MissingMaskFormatterError(IncompleteBackendError):
    """An attention function without its mask formatter."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name!r} has an attention function but no mask formatter, so padding and causality would be lost. "
            f"Pair it: AttentionMaskInterface.register({name!r}, formatter), for example attnreg.masks.sdpa_mask; or, "
            f"if the function handles every constraint itself, AttentionInterface.register({name!r}, function, "
            "mask=attnreg.NO_MASK).",
            name=name,
        )


class MissingAttentionError(IncompleteBackendError):
    """A mask formatter without its attention function."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name!r} has a mask formatter but no attention function. "
            f"Complete it: AttentionInterface.register({name!r}, function).",
            name=name,
        )


class RegistrationError(AttnregError):
    """A registration that was refused; the registry is unchanged."""


class InvalidBackendError(RegistrationError, TypeError):
    """An attention function, a mask formatter or a record of the wrong form."""

    def __init__(self, name: str, part: str, got: str, wanted: str) -> None:
        super().__init__(f"the {part} of {name!r} is {got}; {wanted}.", name=name, part=part, got=got, wanted=wanted)


class NameTakenError(RegistrationError):
    """The name belongs to someone else."""

    def __init__(self, name: str, owner: str, newcomer: str, *, may_replace: bool) -> None:
        way_out = (
            "Choose another name, or pass replace=True."
            if may_replace
            else "A plugin replaces nobody: give the backend a name of its own."
        )
        super().__init__(
            f"{name!r} belongs to {owner}; {newcomer} may not take it. {way_out}",
            name=name,
            owner=owner,
            newcomer=newcomer,
        )


class NothingToRemoveError(RegistrationError, KeyError):
    """There is no registration, or no override of this instance, to take back."""

    def __init__(self, name: str, place: str, owner: str = "") -> None:
        rest = f" It belongs to {owner}, which nobody can remove; uninstall or hide a plugin instead." if owner else ""
        super().__init__(f"{place} has nothing of its own under {name!r} to take back.{rest}", name=name, owner=owner)


class ApiMismatchError(RegistrationError):
    """The backend was written for another version of the contract."""

    def __init__(self, name: str, api: int, supported: int, provider: str, installed: str) -> None:
        side = (
            f"Upgrade attnreg (this is {installed})" if api > supported else f"Upgrade {provider} (or its distribution)"
        )
        super().__init__(
            f"{name!r} from {provider} is written for backend API {api}; this attnreg speaks API {supported}. {side}.",
            name=name,
            api=api,
            supported=supported,
            provider=provider,
        )


class PluginError(AttnregError):
    """An installed plugin cannot be used. `__cause__` is the plugin's own exception, where there is one."""

    name: str
    distribution: str
    target: str

    def __init__(self, name: str, distribution: str, target: str, problem: str, remedy: str) -> None:
        hide = f"To leave it out: ATTNREG_DISABLE={distribution.partition(' ')[0]}."
        if distribution == "attnreg":  # a built-in, whose trouble is torch's
            remedy, hide = "See whether `import torch` works; `attnreg doctor` names what breaks it.", ""
        super().__init__(
            f"backend {name!r} cannot be loaded from {distribution} ({target}): {problem}. {remedy} {hide}".rstrip(),
            name=name,
            distribution=distribution,
            target=target,
            problem=problem,
        )


class PluginDependencyError(PluginError):
    """The plugin imports a package that is not installed."""

    def __init__(self, name: str, distribution: str, target: str, missing: str) -> None:
        remedy = f"Install the package that provides {missing!r}."
        super().__init__(name, distribution, target, f"it imports {missing!r}, which is not installed", remedy)
        self.missing = missing


class PluginImportError(PluginError):
    """The plugin raised while it was imported or registered."""

    def __init__(self, name: str, distribution: str, target: str, cause: BaseException) -> None:
        remedy = "`attnreg doctor` shows every plugin's state; report this to the plugin's authors."
        super().__init__(name, distribution, target, f"it raised {type(cause).__name__}: {cause}", remedy)


class PluginContractError(PluginError):
    """The plugin breaks the plugin contract."""

    def __init__(self, name: str, distribution: str, target: str, problem: str) -> None:
        super().__init__(name, distribution, target, problem, "Report this to the plugin's authors.")


class DuplicateBackendError(AttnregError):
    """Two distributions provide one name; neither is chosen."""

    def __init__(self, name: str, distributions: Sequence[str]) -> None:
        first = distributions[0].partition(" ")[0]
        super().__init__(
            f"{name!r} is provided by {' and by '.join(distributions)}; neither is chosen. Uninstall one "
            f"(pip uninstall {first}), or hide one (ATTNREG_DISABLE={first}).",
            name=name,
            distributions=list(distributions),
        )


class UnsupportedError(AttnregError):
    """A backend cannot do what is asked: `reasons`, one `Reason` for each thing in the way; `able`, some that can."""

    name: str
    reasons: list[Any]
    able: list[str]

    def __init__(self, name: str, reasons: Sequence[object], able: Sequence[str] = ()) -> None:
        lines = [f"backend {name!r} cannot do what is asked:", *(f"  {reason}" for reason in reasons)]
        lines += [f"  these can: {', '.join(able)}"] if able else []
        super().__init__("\n".join(lines), name=name, reasons=list(reasons), able=list(able))


class UnsupportedMaskError(UnsupportedError):
    """A mask format cannot express a mask; `name` is the formatter's."""

    def __init__(self, name: str, reasons: Sequence[object]) -> None:
        lines = [f"{name} cannot express this mask:", *(f"  {reason}" for reason in reasons)]
        AttnregError.__init__(self, "\n".join(lines), name=name, reasons=list(reasons), able=[])


class KernelError(UnsupportedError):
    """A kernel's package cannot be used; `name` is the package's, and `reasons` say why and what to do."""

    def __init__(self, name: str, reasons: Sequence[object]) -> None:
        text = "\n".join([f"the kernel of {name} cannot be used:", *(f"  {reason}" for reason in reasons)])
        AttnregError.__init__(self, text, name=name, reasons=list(reasons), able=[])


class UnsupportedPartError(UnsupportedError):
    """Backends cannot serve parts of a model: `parts` maps each part's path to its backend and the reasons."""

    parts: dict[str, tuple[str, list[Any]]]

    def __init__(self, parts: Mapping[str, tuple[str, Sequence[object]]]) -> None:
        alike: dict[tuple[str, str], list[str]] = {}  # a model has many layers, and most have the same trouble
        for path, (name, reasons) in parts.items():
            for reason in reasons:
                alike.setdefault((name, str(reason)), []).append(path)
        rest = {key: f" and {len(paths) - 1} more" if len(paths) > 1 else "" for key, paths in alike.items()}
        lines = [f"  {alike[key][0]}{rest[key]}, {key[0]!r}: {key[1]}" for key in alike]
        head = "the model is unchanged, because it has parts that these backends cannot serve:"
        text = "\n".join([head, *lines, "To set them nevertheless: check=False."])
        found = {path: (name, list(reasons)) for path, (name, reasons) in parts.items()}
        names, reasons = {name for name, _ in found.values()}, [each for _, all_ in found.values() for each in all_]
        AttnregError.__init__(self, text, name=", ".join(sorted(names)), reasons=reasons, able=[], parts=found)


class NoBackendError(UnsupportedError):
    """No backend can serve the request; `candidates` maps each name to its reasons."""

    candidates: dict[str, list[Any]]

    def __init__(self, candidates: Mapping[str, Sequence[object]]) -> None:
        found = [f"  {name}: {reason}" for name, reasons in candidates.items() for reason in reasons]
        AttnregError.__init__(
            self,
            "\n".join(["no backend can do what is asked:", *found]),
            name="auto",
            able=[],
            candidates={name: list(reasons) for name, reasons in candidates.items()},
            reasons=[reason for reasons in candidates.values() for reason in reasons],
        )


class ConfigurationError(AttnregError, ValueError):
    """An environment variable has a value that means nothing."""

    def __init__(self, variable: str, value: str, problem: str, remedy: str) -> None:
        super().__init__(f"{variable}={value!r}: {problem}. {remedy}", variable=variable, value=value)


class InvalidInputError(AttnregError, ValueError):
    """Tensors whose shapes or dtypes do not fit the contract."""

    def __init__(self, what: str, got: str, wanted: str) -> None:
        super().__init__(f"{what} is {got}; wanted: {wanted}.", what=what, got=got, wanted=wanted)


class InvalidMaskError(InvalidInputError):
    """A mask of the wrong shape, dtype or format."""


class UnknownPartError(AttnregError, KeyError):
    """A key names no part of the model in which attention happens; `available` are the keys that do."""

    def __init__(self, key: str, problem: str, available: Iterable[str]) -> None:
        known, shown = list(available), 12
        rest = f", … ({len(known)} in all)" if len(known) > shown else ""
        lines = [f"{key!r} {problem}{did_you_mean(key, known)}"]
        lines.append(f"  keys of this model: {', '.join(known[:shown]) or 'none'}{rest}")
        lines.append("  also: patterns over module paths, such as '*.self_attn', and '' for what is not named")
        super().__init__("\n".join(lines), key=key, available=known)


class BridgeError(AttnregError):
    """A host library cannot take an attnreg backend."""

    def __init__(self, host: str, problem: str, remedy: str) -> None:
        super().__init__(f"{host}: {problem}. {remedy}", host=host, problem=problem)
