"""Where attention happens in a model, and who knows how to change it there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from attnreg.capabilities import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """One module in which attention happens.

    Attributes:
        path: where it is in the model, as `named_modules` says.
        module: the module itself.
        host: whose it is.
        config: what else it can be named by: the sub-configuration that it is built from, such as `"vision_config"`,
            dotted where it lies in another one; empty for the model's own.
        needs: what its calls need, as far as the module tells before it is called.
    """

    path: str
    module: torch.nn.Module
    host: Host
    config: str = ""
    needs: Request = field(default_factory=Request)


class Host(Protocol):
    """The library that a part was written for: attnreg itself, transformers, diffusers.

    Attributes:
        name: how the library is called.
    """

    name: str

    def parts(self, model: torch.nn.Module) -> list[Part]:
        """Return all of the host's parts in *model*, in the order of its modules; an empty list if there are none."""
        ...

    def unreached(self, model: torch.nn.Module) -> str:
        """Return what a name for all of *model* would leave out, and why; empty if nothing."""
        ...

    def implementation(self, part: Part) -> str:
        """Return the backend's name; `transformers:sdpa`, say, for an implementation of the host's own."""
        ...

    def plan(self, model: torch.nn.Module, wanted: Mapping[Part, str]) -> Callable[[], None]:
        """Make sure that the *wanted* names can be given to these parts, and return what gives it to them.

        Names are a backend's, which the caller has looked up, or one of the host's own as `implementation` returns it.
        Nothing may have changed when this raises, and what it returns must not raise.

        Raises:
            BridgeError: the host cannot have it; says why and what to do.
        """
        ...
