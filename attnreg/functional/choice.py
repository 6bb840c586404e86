"""Choosing the backend of a call: a name is one dictionary access, and what `auto` chose is remembered.

In a compiled graph all of this is decided once, when the graph is traced: a context variable or the environment would
break it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from attnreg.capabilities import Request
from attnreg.default import default_registry
from attnreg.errors import NoBackendError
from attnreg.naming import AUTO
from attnreg.selection import Explanation, explain
from attnreg.selection import standing as asked_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from attnreg.backend import Backend
    from attnreg.capabilities import Reason

_REMEMBERED: Final = 512
_FEATURES: Final = {
    "softcap": "softcap",
    "s_aux": "sinks",
    "position_bias": "position_bias",
    "dropout": "dropout",
    "return_lse": "lse",
}
"""Keyword of an attention function → the feature of a `Request`."""


class Needs(NamedTuple):
    """What a call asks of a backend, as plain values: a `Request` takes too long to make for each call.

    Attributes:
        device: type of the tensors' device.
        dtype: name of the query's dtype.
        head_dim: of query and key.
        value_head_dim: of value.
        query_heads: number of query heads.
        kv_heads: number of key/value heads.
        structures: mask structures, separated by blanks.
        features: features of `Request`, separated by blanks.
    """

    device: str
    dtype: str
    head_dim: int
    value_head_dim: int
    query_heads: int
    kv_heads: int
    structures: str
    features: str

    @classmethod
    def of(
        cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, words: Iterable[str], features: Iterable[str]
    ) -> Needs:
        """Read them off `(batch, heads, length, head_dim)`."""
        sizes = query.shape[3], value.shape[3], query.shape[1], key.shape[1]
        return cls(query.device.type, str(query.dtype), *sizes, " ".join(sorted(words)), " ".join(sorted(features)))

    @classmethod
    def of_call(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        words: Iterable[str],
        options: Mapping[str, Any],
        *others: Any,
    ) -> Needs:
        """Read them off a call with these keywords; *others* may be tensors that want gradients as well."""
        features = [_FEATURES[keyword] for keyword in options if keyword in _FEATURES]
        if torch.is_grad_enabled():
            tensors = (query, key, value, *others, *options.values())
            if any(isinstance(each, torch.Tensor) and each.requires_grad for each in tensors):
                features.append("backward")
        return cls.of(query, key, value, words, features)

    def request(self) -> Request:
        """Return the request that they stand for."""
        asked: dict[str, Any] = dict.fromkeys(self.features.split(), True)
        asked |= zip(self._fields[:6], self[:6], strict=True)
        return Request(structures=frozenset(self.structures.split()), **asked)


def standing(name: str | None, otherwise: str = AUTO) -> str:
    """Return *name*, or what stands where none is given: `use(...)`, else `ATTNREG_IMPLEMENTATION`, else *otherwise*.

    Raises:
        ConfigurationError: the environment names what is no backend.
    """
    if name is not None:
        return name
    return (_default_for_graph() if torch.compiler.is_compiling() else _default()) or otherwise


def backend_of(name: str) -> Backend:
    """Return the default registry's backend of that name; see `Registry.get` for what it raises."""
    if torch.compiler.is_compiling():
        _load(name)
    return default_registry.get(name)


def loaded(backend: Backend) -> Backend:
    """Return *backend*, whose kernel is imported.

    Raises:
        KernelError: it cannot be.
    """
    if backend.kernel is not None:
        if torch.compiler.is_compiling():
            _load_kernel(backend.name)
        else:
            backend.kernel.load()
    return backend


def candidates(needs: Needs) -> tuple[str, ...]:
    """Return the backends that can serve a call, the best first.

    Raises:
        NoBackendError: there is none; holds every candidate's reasons.
    """
    if torch.compiler.is_compiling():
        sizes = " ".join([f"{size}" for size in needs[2:6]])  # as words, so that a size that may vary is fixed
        return tuple(_able_for_graph(*needs[:2], sizes, *needs[6:]).split())
    able, refused = _judged(needs, default_registry.generation)
    if not able:
        raise NoBackendError(refused)
    return able


def refusals(needs: Needs) -> dict[str, list[Reason]]:
    """Return why the others cannot."""
    return {name: list(reasons) for name, reasons in _judged(needs, default_registry.generation)[1].items()}


@lru_cache(maxsize=_REMEMBERED)
def _judged(needs: Needs, generation: int) -> tuple[tuple[str, ...], dict[str, list[Reason]]]:
    """Judge every backend, once for each *generation* of the registry."""
    del generation
    explanation: Explanation = explain(needs.request())
    refused: dict[str, list[Reason]] = {}
    for each in explanation.candidates:
        if each.reasons:
            refused.setdefault(each.name, []).extend(each.reasons)
    return tuple(each.name for each in explanation.candidates if not each.reasons), refused


def _default() -> str:
    return asked_for() or ""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _default_for_graph() -> str:
    return _default()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _load(name: str) -> str:
    """Look *name* up, so that the trace only reads a dictionary: imports and locks are not traced."""
    return default_registry.get(name).name


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _load_kernel(name: str) -> str:
    """Import the kernel before the trace goes on, which must not see an import."""
    kernel = default_registry.get(name).kernel
    if kernel is not None:
        kernel.load()
    return name


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _able_for_graph(device: str, dtype: str, sizes: str, structures: str, features: str) -> str:
    head_dim, value_head_dim, query_heads, kv_heads = map(int, sizes.split())
    needs = Needs(device, dtype, head_dim, value_head_dim, query_heads, kv_heads, structures, features)
    able, refused = _judged(needs, default_registry.generation)
    if not able:
        raise NoBackendError(refused)
    return " ".join(able)
