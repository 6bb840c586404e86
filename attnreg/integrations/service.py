"""A module whose attention a backend computes: the module itself, of a class that says so.

The class is derived from the module's own and redirects attention while the module is called. What is changed is one
module, wherever it goes: `copy.deepcopy` and `pickle` take the choice along, other modules of its class know nothing of
it, its parameters, hooks and `forward` are as they were, and giving its class back leaves no trace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from weakref import WeakValueDictionary

import torch

from attnreg.errors import BridgeError
from attnreg.integrations.redirection import Redirected

if TYPE_CHECKING:
    from collections.abc import Callable

    from attnreg.backend import Backend

_classes: Final[WeakValueDictionary[tuple[type, int, bool], Any]] = WeakValueDictionary()
"""One class for all modules of a class on a backend, so that torch.compile need not compile each by itself."""


def serve(
    module: torch.nn.Module, backend: Backend, stands_aside: Callable[[Any], bool], *, must_attend: bool = False
) -> None:
    """Have *backend* compute the module's attention from now on.

    Args:
        module: computes its attention with `scaled_dot_product_attention`.
        backend: who computes it instead.
        stands_aside: asked at each call whether the module goes its own way, without the backend; may raise.
        must_attend: a call in which the backend is never reached raises `BridgeError`. A library that leaves attention
            out on purpose, because it keeps what the last step computed, does not want that.
    """
    module.__class__ = _class_of(own_class(module), backend, stands_aside, must_attend=must_attend)


def release(module: torch.nn.Module) -> None:
    """Give the module's own class back, if it has another."""
    if backend_of(module) is not None:
        module.__class__ = own_class(module)


def backend_of(module: torch.nn.Module) -> Backend | None:
    """Return who computes the module's attention; None if it does so itself."""
    return getattr(type(module), "_attnreg_backend", None)


def own_class(module: torch.nn.Module) -> type:
    """Return the class that the module had before."""
    found: type = getattr(type(module), "_attnreg_own", type(module))
    return found


def _class_of(own: type, backend: Backend, stands_aside: Callable[[Any], bool], *, must_attend: bool) -> type:
    # The class keeps the backend alive, so as long as it is here its id is nobody else's.
    key = (own, id(backend), must_attend)
    found: type | None = _classes.get(key)
    return found or _classes.setdefault(key, _derived(own, backend, stands_aside, must_attend))


def _derived(own: Any, backend: Backend, stands_aside: Callable[[Any], bool], must_attend: bool) -> type:  # noqa: FBT001
    call = own.__call__  # looked up here, because torch.compile cannot for classes that it has been told to allow

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if stands_aside(self):
            return call(self, *args, **kwargs)
        redirected = Redirected(backend)
        with redirected:
            output = call(self, *args, **kwargs)
        if must_attend and not torch.compiler.is_compiling() and not redirected.answered:
            raise BridgeError(*_past_the_function(own, backend))
        return output

    def reduced(self: Any, protocol: Any) -> Any:
        """Pickle the module as one of its own class, and the backend by its name."""
        make, arguments, *rest = own.__reduce_ex__(self, protocol)
        given = tuple(own if each is type(self) else each for each in arguments)
        return _again, (make, given, backend, stands_aside, must_attend), *rest

    body = {
        "__call__": called,
        "__reduce_ex__": reduced,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
        "_attnreg_backend": backend,
        "_attnreg_own": own,
    }
    derived: type = type(own)(own.__name__, (own,), body)
    return derived


def _past_the_function(own: type, backend: Backend) -> tuple[str, str, str]:
    name = f"a module of the class {own.__name__} was given {backend.name!r}"
    problem = f"{name}, and was called without calling scaled_dot_product_attention: something else computed"
    remedy = "Have it call that function, or leave it out: attnreg.set_attn_implementation, with a dictionary."
    return own.__module__.partition(".")[0], problem, remedy


def _again(
    make: Callable[..., Any],
    arguments: Any,
    backend: Backend,
    stands_aside: Callable[[Any], bool],
    must_attend: bool,  # noqa: FBT001 - pickle gives it by position
) -> Any:
    module = make(*arguments)
    serve(module, backend, stands_aside, must_attend=must_attend)
    return module
