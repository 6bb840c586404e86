"""The layout router: attention for tensors in any order of axes, with the heads split or merged.

Its keywords are those of `diffsynth.core.attention.attention_forward`, whose models can call it as it is. A pattern is
four letters in any order, `b` for the batch, `n` for the heads, `s` for the length and `d` for the head dimension;
neighbours in parentheses are merged. Rearranging is a view wherever the tensor's strides allow one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import torch
from einops import EinopsError, rearrange

from attnreg.default import default_registry
from attnreg.errors import ConfigurationError, InvalidInputError, InvalidMaskError, UnknownBackendError
from attnreg.functional import attention, standing
from attnreg.functional.checking import check_tensor
from attnreg.naming import AUTO
from attnreg.settings import DIFFSYNTH, DIFFSYNTH_NAMES, diffsynth_implementation

_AXES: Final = frozenset("bnsd")
_GROUP: Final = re.compile(r"([a-z])(?![a-z])|\(([a-z ]+)\)")
_RANK: Final = 4
_PATTERN: Final = "b n s d"
_WANTED: Final = "the axes b, n, s and d, each once and in any order, neighbours merged by parentheses: 'b s (n d)'"


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_pattern: str = _PATTERN,
    k_pattern: str = _PATTERN,
    v_pattern: str = _PATTERN,
    out_pattern: str = _PATTERN,
    dims: Mapping[str, int] | None = None,
    attn_mask: Any = None,
    scale: float | torch.Tensor | None = None,
    *,
    is_causal: bool | None = False,
    window_size: int | None = None,
    compatibility_mode: bool = False,
    impl: str | None = None,
) -> torch.Tensor:
    """Compute attention for tensors whose axes are in any order, split or merged.

    Args:
        q: query, with the axes of *q_pattern*.
        k: key, with those of *k_pattern*; it may have fewer heads than query, by which query's are a multiple.
        v: value, with those of *v_pattern*; its head dimension may differ.
        q_pattern: `b`, `n`, `s` and `d` in any order, such as `"b s n d"`, or with neighbours merged: `"b s (n d)"`.
        k_pattern: the same. Where heads are merged, their number follows from query's head dimension.
        v_pattern: the same. Where heads are merged, there are as many as key has.
        out_pattern: the same, for the result.
        dims: sizes of query's axes, as far as its pattern merges them: `{"n": 16}` for `"b s (n d)"`.
        attn_mask: as torch's own attention takes it, two to four axes that broadcast to `(b, n, queries, keys)`: two
            axes are `(queries, keys)`, and no padding. Bool, True = attend, or floating, added to the scores. Or a mask
            function, or what the backend's formatter has returned.
        scale: factor of the scores, a number or a tensor with one; `1 / sqrt(d)` by default.
        is_causal: hide the keys behind the query; the last query is at the last key's position.
        window_size: W ≥ 0 hides the keys more than W away on either side.
        compatibility_mode: run on `sdpa`, whatever else is chosen.
        impl: a backend's name or `"auto"`; None is `attnreg.use(...)`, else `ATTNREG_IMPLEMENTATION`, else DiffSynth's
            `DIFFSYNTH_ATTENTION_IMPLEMENTATION`, else `auto`. All are read when it is called.

    Returns:
        The output with the axes of *out_pattern*, in query's dtype; `d` is value's.

    Raises:
        InvalidInputError: a pattern that is none, or that a tensor does not fit; sizes that mean nothing.
        ConfigurationError: an environment variable names no backend.
        InvalidMaskError: a mask that does not fit; see `attnreg.attention` for this and what else it raises.

    Source: https://github.com/modelscope/DiffSynth-Studio, diffsynth/core/attention.
    """
    sizes = _sizes_of_query(dims)
    query = _arranged("q", q, q_pattern, sizes)
    sizes = {"b": query.shape[0], "d": query.shape[3]}
    if _entangled(_axes(k_pattern)):
        wanted = "the two apart: of neither is the size known, as key may have fewer heads than query"
        raise InvalidInputError("k_pattern", f"{k_pattern!r}, which merges heads and length", wanted)
    key = _arranged("k", k, k_pattern, sizes)
    value = _arranged("v", v, v_pattern, {"b": key.shape[0], "n": key.shape[1], "s": key.shape[2]})
    output = attention(
        query,
        key,
        value,
        _four_axes(attn_mask),
        impl=_named(impl, compatibility_mode=compatibility_mode),
        scale=scale,
        is_causal=is_causal,
        sliding_window=None if window_size is None else _window(window_size) + 1,
    )
    axes = _axes(out_pattern)
    if axes != _PATTERN:
        output = rearrange(output, f"{_PATTERN} -> {axes}")
    return output


def _arranged(name: str, tensor: torch.Tensor, pattern: str, sizes: Mapping[str, int]) -> torch.Tensor:
    """View *tensor* as `b n s d`, or raise `InvalidInputError` if it does not fit its pattern and the known sizes."""
    axes = _axes(pattern)
    check_tensor(name, tensor)
    if axes == _PATTERN and tensor.dim() == _RANK:
        if all(tensor.shape["bnsd".index(axis)] == size for axis, size in sizes.items()):
            return tensor
    else:
        try:
            return rearrange(tensor, f"{axes} -> {_PATTERN}", **sizes)
        except EinopsError:
            pass  # and not from here: what is raised below says more
    known = ", ".join(f"{axis}={size}" for axis, size in sizes.items()) or "no dims"
    raise InvalidInputError(name, f"of shape {tuple(tensor.shape)}", f"{name}_pattern={axes!r} with {known}")


def _sizes_of_query(dims: Mapping[str, int] | None) -> dict[str, int]:
    if dims is None:
        return {}
    wanted = "sizes of some of the axes b, n, s and d"
    if not isinstance(dims, Mapping):
        raise InvalidInputError("dims", f"a {type(dims).__name__}", wanted)
    if not _AXES.issuperset(dims):
        raise InvalidInputError("dims", f"for {', '.join(map(str, dims))}", wanted)
    for axis, size in dims.items():
        if isinstance(size, bool) or not isinstance(size, int | torch.SymInt) or size < 1:
            raise InvalidInputError(f"dims[{axis!r}]", repr(size), "an integer, 1 or more")
    return dict(dims)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _axes(pattern: str) -> str:
    """Return *pattern* with single blanks, or raise `InvalidInputError` if it is none."""
    if not isinstance(pattern, str):
        raise InvalidInputError("a pattern", repr(pattern), _WANTED)
    return _parsed(pattern)[0]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _entangled(pattern: str) -> bool:
    """Whether heads and length are merged with each other, so that neither number follows from the head dimension."""
    return any({"n", "s"} <= set(group) for group in _parsed(pattern)[1])


@lru_cache
def _parsed(pattern: str) -> tuple[str, tuple[str, ...]]:
    """Return a pattern with single blanks, and its groups of letters."""
    groups = tuple(one or many for one, many in _GROUP.findall(pattern))
    letters = [letter for group in groups for letter in group.split()]
    if _GROUP.sub("", pattern).strip() or sorted(letters) != sorted(_AXES):
        raise InvalidInputError("a pattern", repr(pattern), _WANTED)
    spelled = (f"({' '.join(group.split())})" if len(group.split()) > 1 else group.strip() for group in groups)
    return " ".join(spelled), groups


def _four_axes(mask: Any) -> Any:
    """Put axes in front of a mask, as broadcasting does, so that two axes are not taken for padding."""
    if not isinstance(mask, torch.Tensor) or mask.dim() == _RANK:
        return mask
    if mask.dim() not in (2, 3):
        wanted = "two to four axes that broadcast to (b, n, queries, keys)"
        raise InvalidMaskError("attn_mask", f"of shape {tuple(mask.shape)}", wanted)
    return mask[(None,) * (_RANK - mask.dim())]


def _window(size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise InvalidInputError("window_size", repr(size), "None, or the number of keys on either side, 0 or more")
    return size


def _named(impl: str | None, *, compatibility_mode: bool) -> str:
    """Return the name that counts."""
    if compatibility_mode:
        if impl not in (None, "sdpa"):
            wanted = "one of the two; compatibility_mode is sdpa"
            raise InvalidInputError("compatibility_mode", f"True beside impl={impl!r}", wanted)
        return "sdpa"
    if impl is not None:
        return impl
    return standing(None, otherwise="") or _of_diffsynth()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _of_diffsynth() -> str:
    """Return what DiffSynth's variable asks for, else `auto`."""
    name = diffsynth_implementation()
    if name is None:
        return AUTO
    try:
        return default_registry.get(name).name
    except UnknownBackendError as error:
        usable = ", ".join(theirs for theirs, ours in DIFFSYNTH_NAMES.items() if ours in default_registry)
        remedy = f"Install a plugin that provides it, or set it to one of: {usable}."
        raise ConfigurationError(DIFFSYNTH, name, error.message.splitlines()[0].rstrip("?"), remedy) from None
