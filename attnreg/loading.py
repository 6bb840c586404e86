"""Importing one plugin's module for its hook, so that whatever goes wrong there is an error that names the plugin.

pluggy is a contract tool here: it validates the hook's signature. Each load has a plugin manager of its own, which
leaves nothing behind, whatever the hook does; pluggy is never on the call path.
"""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Literal

import pluggy

from attnreg.backend import Origin
from attnreg.errors import (
    ApiMismatchError,
    AttnregError,
    PluginContractError,
    PluginDependencyError,
    PluginError,
    PluginImportError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attnreg.discovery import Candidate

hookspec: Final = pluggy.HookspecMarker("attnreg")
hookimpl: Final = pluggy.HookimplMarker("attnreg")


def manager(spec: type) -> pluggy.PluginManager:
    """Return a plugin manager that knows the hooks of *spec* and nothing else."""
    hooks = pluggy.PluginManager("attnreg")
    hooks.add_hookspecs(spec)
    return hooks


def register(candidate: Candidate, hooks: pluggy.PluginManager, hook: str) -> bool:
    """Import the module of *candidate* and register it with *hooks*; return whether it has the *hook*."""
    if ":" in candidate.target:
        raise PluginContractError(*culprit(candidate), "its entry point names an object, and must name a module")
    module = importlib.import_module(candidate.target)
    hooks.register(module, name=candidate.target)
    return any(implementation.plugin is module for implementation in getattr(hooks.hook, hook).get_hookimpls())


@contextmanager
def blaming(candidate: Candidate, argument: str) -> Iterator[None]:
    """Turn what is raised inside into a `PluginError` that names *candidate*, its cause kept.

    Args:
        candidate: whose module is imported inside.
        argument: the one argument that its hook must take.
    """
    try:
        yield
    except (PluginError, ApiMismatchError):
        raise
    except AttnregError as error:
        raise PluginContractError(*culprit(candidate), f"its backend is refused: {error}") from error
    except ModuleNotFoundError as error:
        if error.name is None or candidate.target.split(".")[0] == error.name.split(".")[0]:
            raise PluginImportError(*culprit(candidate), error) from error
        raise PluginDependencyError(*culprit(candidate), error.name) from error
    except pluggy.PluginValidationError as error:
        raise PluginContractError(*culprit(candidate), f"its hook must take one argument, {argument}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a plugin that quits at import must not end its host
        raise PluginImportError(*culprit(candidate), error) from error


def origin(candidate: Candidate) -> Origin:
    """Say where the backends of *candidate* come from; what has no distribution is attnreg's own."""
    kind: Literal["builtin", "plugin"] = "plugin" if candidate.distribution else "builtin"
    return Origin(kind, candidate.target, candidate.distribution, candidate.version)


def culprit(candidate: Candidate) -> tuple[str, str, str]:
    """Return what every `PluginError` begins with: the name, the distribution and the module."""
    return candidate.name, candidate.provider.strip() or "attnreg", candidate.target
