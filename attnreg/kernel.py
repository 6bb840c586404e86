"""Where a backend's kernel comes from, and whether it can be used here: package, version, function, GPU.

A plugin is installed without the package that its kernel is in, so a backend can be there without its kernel. What is
"importable" is no measure: flash-attn-4 alone makes a namespace package `flash_attn`. So it is the distribution's name
and version that decide, then a real attribute of the module, and any exception counts.

The kernel's package is imported at first use of the kernel, or when `auto` is about to choose it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from attnreg.capabilities import Reason
from attnreg.errors import InvalidInputError, KernelError

if TYPE_CHECKING:
    from types import ModuleType


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """The package that a backend's kernel is in.

    Attributes:
        distribution: its name on the package index, such as `"flash-attn"`.
        module: what is imported, such as `"flash_attn.flash_attn_interface"`.
        functions: attributes of the module that the adapter calls; `"cute.flash_attn_func"` reads one of a submodule.
        versions: which versions the adapter is made for, as PEP 440 writes it: `">=2.6,<3"`; empty for any.
        min_gpu: smallest compute capability of an NVIDIA GPU, such as `"8.0"`; empty for any.
        max_gpu: the largest; empty for any.
        install: how to get it, a command or a sentence.
        note: what users should know, such as that nobody has run it yet; `attnreg doctor` shows it.

    Raises:
        InvalidInputError: a version or a compute capability that means nothing.
    """

    distribution: str
    module: str
    functions: tuple[str, ...] = ()
    versions: str = ""
    min_gpu: str = ""
    max_gpu: str = ""
    install: str = ""
    note: str = ""
    _module: ModuleType | None = field(default=None, init=False, repr=False, compare=False)
    _failure: Reason | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse what would only be noticed where nobody reads it."""
        _specifier(self.versions)
        for field_, text in (("min_gpu", self.min_gpu), ("max_gpu", self.max_gpu)):
            if text and _capability(text) is None:
                raise InvalidInputError(f"Kernel({field_}=...)", repr(text), "a compute capability, such as '9.0'")

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the module out, which another process imports itself."""
        return _made, tuple(getattr(self, name) for name in _FIELDS)

    def version(self) -> str | None:
        """Return the installed version of the distribution, or None; nothing of it is imported."""
        from attnreg.discovery import version

        return version(self.distribution)

    def reasons(self, device: str | None = None) -> list[Reason]:
        """Return what keeps the kernel from being used, without importing it; empty if nothing is known.

        Args:
            device: the torch device type that it is to run on. With `"cuda"`, the current GPU is looked at, if there
                is one.

        Returns:
            Reasons with the codes `kernel_missing`, `kernel_version` and `gpu`; and after a `load` that failed,
            `kernel_import` or `kernel_attribute`.
        """
        found = [*self._package(), *([self._failure] if self._failure is not None else [])]
        return [*found, *(self._gpu() if device == "cuda" else [])]

    def load(self) -> Any:
        """Return the module, importing it at the first call.

        Raises:
            KernelError: the package is missing, of another version, cannot be imported, lacks a function, or does not
                run on the current GPU.
        """
        return self._module if self._module is not None else self._load()

    def _load(self) -> Any:
        if found := [*self._package(), *self._gpu()]:
            raise KernelError(self.distribution, found)
        try:
            module = importlib.import_module(self.module)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: a package that quits at import must not end its host
            raise self._failed("kernel_import", error, f"{self.module} cannot be imported") from error
        for function in self.functions:
            try:
                _attribute(module, function)
            except Exception as error:
                raise self._failed("kernel_attribute", error, f"{self.module} has no {function}") from error
        object.__setattr__(self, "_failure", None)
        object.__setattr__(self, "_module", module)
        return module

    def _failed(self, code: str, error: BaseException, problem: str) -> KernelError:
        said = (str(error).strip().splitlines() or [""])[0]
        wanted = f"{self.distribution} {self.version()}"
        why = f"{problem} ({type(error).__name__}{f': {said}' if said else ''})"
        fix = "Reinstall it for this torch and CUDA, and look at what it says: " + f'python -c "import {self.module}".'
        reason = Reason(code, wanted, why, fix)
        object.__setattr__(self, "_failure", reason)
        return KernelError(self.distribution, [reason])

    def _package(self) -> list[Reason]:
        if (installed := self.version()) is None:
            fix = f"Install it: {self.install or f'pip install {self.distribution}'}."
            return [Reason("kernel_missing", self._wanted(), "no such package is installed here", fix)]
        if self.versions and not _specifier(self.versions).contains(installed, prereleases=True):
            fix = f"Install one of those: {self.install or f'pip install {self.distribution}'}."
            return [Reason("kernel_version", self._wanted(), f"{self.distribution} {installed} is installed here", fix)]
        return []

    def _wanted(self) -> str:
        return f"the package {self.distribution}{f' ({self.versions})' if self.versions else ''}"

    def _gpu(self) -> list[Reason]:
        if not (self.min_gpu or self.max_gpu):
            return []
        import torch

        if not torch.cuda.is_available():
            return []
        major, minor = torch.cuda.get_device_capability()
        smallest, largest = _capability(self.min_gpu), _capability(self.max_gpu)
        if (smallest is None or smallest <= (major, minor)) and (largest is None or (major, minor) <= largest):
            return []
        limits = [f"{word} {text}" for word, text in (("from", self.min_gpu), ("up to", self.max_gpu)) if text]
        wanted = f"{torch.cuda.get_device_name()}, of compute capability {major}.{minor}"
        return [Reason("gpu", wanted, f"compute capabilities {' '.join(limits)}", "Choose another backend or GPU.")]


_FIELDS = ("distribution", "module", "functions", "versions", "min_gpu", "max_gpu", "install", "note")


def _made(*values: Any) -> Kernel:
    return Kernel(**dict(zip(_FIELDS, values, strict=True)))


def _attribute(module: Any, path: str) -> Any:
    found = module
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _capability(text: str) -> tuple[int, int] | None:
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def _specifier(versions: str) -> Any:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        return SpecifierSet(versions)
    except InvalidSpecifier:
        wanted = "a version specifier, such as '>=2.6,<3'"
        raise InvalidInputError("Kernel(versions=...)", repr(versions), wanted) from None
