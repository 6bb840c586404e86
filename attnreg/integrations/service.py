"""A module whose attention a backend computes: the module itself, of a class that says so.

The class is derived from the module's own and redirects attention while `forward` runs. What is changed is one module,
wherever it goes: `copy.deepcopy` and `pickle` take the choice along, other modules of its class know nothing of it, its
parameters and hooks are as they were, and giving its class back leaves no trace.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABCMeta
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakValueDictionary

import torch

from attnreg.default import default_registry
from attnreg.errors import AttnregError, BridgeError
from attnreg.integrations.callers import is_its_own, is_its_own_outside_of_traces
from attnreg.integrations.redirection import Redirected

if TYPE_CHECKING:
    from collections.abc import Callable

    from attnreg.backend import Backend

_classes: Final[WeakValueDictionary[tuple[Any, ...], Any]] = WeakValueDictionary()
"""One class for all modules of a class on a backend, so that torch.compile need not compile each by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """How a module is served.

    Attributes:
        backend: who computes its attention.
        stands_aside: asked at each call whether the module goes its own way, without the backend; may raise.
        speaks_for_itself: whether the attention of another module, which this one may hold, is none of its matter.
        must_attend: a call in which the backend is never reached raises `BridgeError`. A library that leaves attention
            out on purpose, because it keeps what the last step computed, does not want that.
        is_mixed: whether the module holds others that speak for themselves.
    """

    backend: Backend
    stands_aside: Callable[[Any], bool]
    speaks_for_itself: Callable[[torch.nn.Module], bool]
    must_attend: bool = False
    is_mixed: bool = False


def prepared(
    module: torch.nn.Module,
    backend: Backend,
    stands_aside: Callable[[Any], bool],
    speaks_for_itself: Callable[[torch.nn.Module], bool],
    *,
    must_attend: bool = False,
) -> type:
    """Return the class that has *backend* serve the module once it is assigned; see `Service`.

    Raises:
        BridgeError: something else has changed the module's class since it was served.
    """
    check_class(module)
    others = (each for each in module.modules() if each is not module)
    return _class_of(
        own_class(module),
        Service(
            backend=backend,
            stands_aside=stands_aside,
            speaks_for_itself=speaks_for_itself,
            must_attend=must_attend,
            is_mixed=any(map(speaks_for_itself, others)),
        ),
    )


def check_class(module: torch.nn.Module) -> None:
    """Raise `BridgeError` if a class was put on top of the one that serves the module, which would be lost with it."""
    kind: Any = type(module)
    if service_of(module) is None or "_attnreg_service" in vars(kind):
        return
    problem = f"a module of the class {kind.__name__} was served, and then its class was changed by something else"
    remedy = (
        "Undo that first (torch.nn.utils.parametrize.remove_parametrizations, say), or set backends before the modules "
        "are parametrised or sharded."
    )
    raise BridgeError(own_class(module).__module__.partition(".")[0], problem, remedy)


def release(module: torch.nn.Module) -> None:
    """Give the module's own class back, if it has another."""
    if service_of(module) is not None:
        module.__class__ = own_class(module)


def service_of(module: Any) -> Service | None:
    """Return how the module is served; None if it is not."""
    return getattr(type(module), "_attnreg_service", None)


def backend_of(module: torch.nn.Module) -> Backend | None:
    """Return who computes the module's attention; None if it does so itself."""
    service = service_of(module)
    return None if service is None else service.backend


def own_class(module: torch.nn.Module) -> type:
    """Return the class that the module had before."""
    found: type = getattr(type(module), "_attnreg_own", type(module))
    return found


def _class_of(own: type, service: Service) -> type:
    # The class keeps the backend alive, so as long as it is here its id is nobody else's.
    key = (own, id(service.backend), service.stands_aside, service.speaks_for_itself, service.is_mixed)
    found: type | None = _classes.get(key)
    return found or _classes.setdefault(key, _derived(own, service))


class _Latest:
    """The backend that is registered under a name: at each call, the one of now; a record of nobody's stays.

    Attributes:
        backend: the one of the last call.
    """

    __slots__ = ("_generation", "backend")

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._generation = default_registry.generation if _is_registered(backend) else None

    def __call__(self) -> Backend:
        """Return it. What torch.compile has traced stays with the one that it was traced with."""
        if torch.compiler.is_compiling() or self._generation is None:
            return self.backend
        generation = default_registry.generation
        if generation != self._generation:
            self.backend, self._generation = default_registry.get(self.backend.name), generation
        return self.backend


def _is_registered(backend: Backend) -> bool:
    try:
        return default_registry.get(backend.name) is backend
    except AttnregError:
        return False


class _Quiet:
    """In front of a module's own class: what that does with classes derived from it is not done with this one."""

    # Without __slots__, since with them the class of an object could not be replaced by one derived from this.

    def __init_subclass__(cls, **_: Any) -> None:
        pass


def _derived(own: Any, service: Service) -> type:
    call = own.__call__  # looked up here, because torch.compile cannot for classes that it has been told to allow
    attends_in_call = own.__call__ is not torch.nn.Module.__call__

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        # What stands in the place of `forward` in the object itself may call the class's, or what it was before.
        if not (attends_in_call or "forward" in self.__dict__) or service.stands_aside(self):
            return call(self, *args, **kwargs)
        with _redirected(self, service):
            return call(self, *args, **kwargs)

    if attends_in_call:  # libraries read off its signature which arguments it takes
        called.__signature__ = inspect.signature(call)  # type: ignore[attr-defined]
    body = {
        "__call__": called,
        "forward": _forward(own, must_attend=service.must_attend and not attends_in_call),
        "__reduce_ex__": _reduction(own, service),
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
        "_attnreg_service": service,
        "_attnreg_latest": _Latest(service.backend),
        "_attnreg_is_its_own": staticmethod(is_its_own_outside_of_traces() if service.is_mixed else is_its_own),
        "_attnreg_own": own,
    }
    kind = type(own)
    make: Any = kind if kind in {type, ABCMeta} else functools.partial(type.__new__, kind)
    derived: type = make(own.__name__, (_Quiet, own), body)
    return derived


def _forward(own: Any, *, must_attend: bool) -> Callable[..., Any]:
    forward = own.forward

    @functools.wraps(forward)
    def forwarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A wrapper of `forward` may have kept this function while the module was released, or served otherwise.
        service = getattr(type(self), "_attnreg_service", None)
        if service is None or service.stands_aside(self):
            return forward(self, *args, **kwargs)
        redirected = _redirected(self, service)
        with redirected:
            output = forward(self, *args, **kwargs)
        if must_attend and not torch.compiler.is_compiling() and not redirected.answered and not _empty(args, kwargs):
            raise BridgeError(*_past_the_function(own, service.backend))
        return output

    return forwarded


def _redirected(module: Any, service: Service) -> Redirected:
    kind = type(module)
    return Redirected(kind._attnreg_latest(), module, service.speaks_for_itself, kind._attnreg_is_its_own)  # noqa: SLF001


def _reduction(own: Any, service: Service) -> Callable[..., Any]:
    def reduced(self: Any, protocol: Any) -> Any:
        """Pickle the module as one of its own class, and the backend by its name."""
        make, arguments, *rest = own.__reduce_ex__(self, protocol)
        if "_attnreg_service" not in vars(type(self)):  # a class on top has its own ways, or none
            return make, arguments, *rest
        given = tuple(own if each is type(self) else each for each in arguments)
        return _again, (make, given, service), *rest

    return reduced


def _again(make: Callable[..., Any], arguments: Any, service: Service) -> Any:
    module = make(*arguments)
    module.__class__ = _class_of(type(module), service)
    return module


def _empty(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether there is nothing to attend to: a tensor that is handed over has no elements."""
    return any(isinstance(each, torch.Tensor) and each.numel() == 0 for each in (*args, *kwargs.values()))


def _past_the_function(own: type, backend: Backend) -> tuple[str, str, str]:
    name = f"a module of the class {own.__name__} was given {backend.name!r}"
    problem = f"{name}, and was called without calling scaled_dot_product_attention: something else computed"
    remedy = "Have it call that function, or leave it out: attnreg.set_attn_implementation, with a dictionary."
    return own.__module__.partition(".")[0], problem, remedy
