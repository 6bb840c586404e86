"""Wrong backends: one small correct implementation, and what can go wrong with it, one error at a time."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from attnreg import Backend, Capabilities
from attnreg.compat.alibi import slopes_of
from attnreg.masks import And, Blocks, Causal, Chunked, Documents, Not, Or, Prefix, Window, bidirectional, sdpa_mask

LOG2_E = 1.4426950408889634
EVERYTHING = Capabilities(
    value_head_dim=True,
    grouped_query=True,
    is_causal=True,
    sliding_window=True,
    softcap=True,
    sinks=True,
    position_bias=True,
    dropout=True,
    packing=True,
    lse=True,
    weights=True,
)


def attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any = None,
    *,
    scaling: float | None = None,
    dropout: float | None = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Any = None,
    position_bias: Any = None,
    cu_seq_lens_q: Any = None,
    return_lse: bool = False,
    output_attentions: bool = False,
    cap_last: bool = False,
    empty_rows: float | None = 0.0,
    late_zero: bool = False,
    overflow: float | None = None,
    **_: Any,
) -> Any:
    """Compute attention correctly; the last four keywords are errors of its insides, off by default."""
    wide = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(group, dim=1) for each in (key, value))
    scores = (query @ key.mT).to(wide) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap and not cap_last:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    mask = attention_mask
    if mask is None:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        mask = flags(query, key, is_causal, sliding_window, cu_seq_lens_q)
    allowed = mask
    if mask.dtype != torch.bool:
        allowed = mask > torch.finfo(mask.dtype).min
        scores = scores + mask.masked_fill(~allowed, 0.0)
    allowed = allowed.expand(scores.shape)
    empty = ~allowed.any(-1, keepdim=True)
    if late_zero:
        scores = scores + torch.zeros_like(scores).masked_fill(~allowed, float("-inf"))
    else:
        scores = scores.masked_fill(~allowed, torch.finfo(wide).min)
    if softcap and cap_last:
        scores = softcap * torch.tanh(scores / softcap)
    lse = torch.logsumexp(scores.float(), dim=-1).masked_fill(empty[..., 0], float("-inf"))
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.to(wide)[None, :, None, None].expand(*scores.shape[:-1], 1)], dim=-1)
    if overflow is not None:
        scores = scores.clamp(max=overflow)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[2]]
    weights = (
        weights.nan_to_num(0.0)
        if late_zero
        else weights.masked_fill(empty, 1 / key.shape[2] if empty_rows is None else empty_rows)
    )
    weights = functional.dropout(weights, p=dropout or 0.0).to(query.dtype)
    output = (weights @ value).transpose(1, 2).contiguous()
    returned = weights if output_attentions else None
    return (output, returned, lse) if return_lse else (output, returned)


def flags(query: Any, key: Any, is_causal: bool, window: int | None, starts: Any) -> Any:
    """Spell the flags out, with the last query at the last key's position."""
    keys = torch.arange(key.shape[2], device=key.device)
    distance = keys[key.shape[2] - query.shape[2] :, None] - keys if query.shape[2] <= key.shape[2] else None
    if distance is None:
        distance = (torch.arange(query.shape[2]) + key.shape[2] - query.shape[2])[:, None] - keys
    allowed = distance >= 0 if is_causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        allowed = allowed & (distance.abs() < window)
    if starts is not None:
        document = torch.searchsorted(starts.long(), keys, right=True)
        allowed = allowed & (document[:, None] == document)
    return allowed[None, None]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A wrong backend, and the laws that it breaks."""

    name: str
    backend: Backend
    broken: frozenset[str]


def mutant(name: str, *broken: str, **parts: Any) -> Mutant:
    """Make a mutant of the correct backend: *parts* of its record are replaced."""
    return Mutant(name, replace(CORRECT, **parts), frozenset(broken))


CORRECT = Backend(name="mutant", attention=attend, mask=sdpa_mask, supports=EVERYTHING)


def ignoring(*keywords: str) -> Any:
    """Drop keywords unread."""
    return lambda *args, **kw: attend(*args, **{name: each for name, each in kw.items() if name not in keywords})


def adding(**extra: Any) -> Any:
    """Switch errors on."""
    return lambda *args, **kw: attend(*args, **kw, **extra)


def after(change: Any) -> Any:
    """Change what is returned: `(query, output, weights, lse)` in, a tuple out."""

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any = None, **kw: Any) -> Any:
        output, weights, *lse = attend(module, query, key, value, mask, **kw)
        return change(query, output, weights, *lse)

    return attention


def before(change: Any) -> Any:
    """Change what comes in: `(query, key, value, mask, keywords)` in, and out."""

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any = None, **kw: Any) -> Any:
        query, key, value, mask, kw = change(query, key, value, mask, kw)
        return attend(module, query, key, value, mask, **kw)

    return attention


def formatting(change: Any) -> Any:
    """Change the formatter's keywords."""
    return lambda **kw: sdpa_mask(**change(kw))


def rewriting(change: Any) -> Any:
    """Change the parts of the mask function; `change` returns a part as it is unless it is the one it is after."""

    def walk(function: Any) -> Any:
        match function:
            case And():
                return And(tuple(walk(each) for each in function.terms))
            case Or():
                return change(Or(tuple(walk(each) for each in function.terms)))
            case Not():
                return change(Not(walk(function.term)))
            case _:
                return change(function)

    return formatting(lambda kw: kw | {"mask_function": walk(kw["mask_function"])})


def unguarded() -> Backend:
    """Take the guard off a backend that declares next to nothing, and swallows every keyword."""
    modest = replace(CORRECT, attention=ignoring(*_SEMANTIC), supports=Capabilities(devices={"cpu"}, is_causal=True))
    object.__setattr__(modest, "call", modest.attention)
    return modest


_SEMANTIC = ("softcap", "s_aux", "position_bias", "dropout", "return_lse", "output_attentions", "cu_seq_lens_q")


class Locked:
    """A formatter that holds something that cannot be copied."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, **kw: Any) -> Any:
        with self.lock:
            return sdpa_mask(**kw)


def top_left(query: Any, key: Any, value: Any, mask: Any, kw: Any) -> Any:
    """Align the first query with the first key, as torch's flag does."""
    if mask is None and kw.get("is_causal") and query.shape[2] != key.shape[2]:
        mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool).tril()
    return query, key, value, mask, kw


def interleaved(query: Any, key: Any, value: Any, mask: Any, kw: Any) -> Any:
    """Let query head h read key/value head h % Hkv."""
    group = query.shape[1] // key.shape[1]
    return query, key.repeat(1, group, 1, 1), value.repeat(1, group, 1, 1), mask, kw


def tail_dropped(query: Any, key: Any, value: Any, mask: Any, kw: Any) -> Any:
    """Leave the last, incomplete block of 64 keys out."""
    whole = key.shape[2] // 64 * 64
    if mask is None and 0 < whole < key.shape[2]:
        key, value = key[:, :, :whole], value[:, :, :whole]
    return query, key, value, mask, kw


def truncated(query: Any, key: Any, value: Any, mask: Any, kw: Any) -> Any:
    """Read 128 elements of a head at most."""
    kw = {"scaling": query.shape[-1] ** -0.5} | {name: each for name, each in kw.items() if each is not None}
    return query[..., :128], key[..., :128], value, mask, kw


def narrow(query: Any, output: Any, *rest: Any) -> Any:
    """Return as many columns as the query has."""
    return functional.pad(output, (0, max(0, query.shape[-1] - output.shape[-1])))[..., : query.shape[-1]], *rest


def by_layer(query: Any, key: Any, value: Any, mask: Any, kw: Any) -> Any:
    """Scale by the layer's number, because some model does."""
    return query / (kw.get("layer_idx", 0) + 1), key, value, mask, kw


def bias_or_cap(query: Any, key: Any, value: Any, mask: Any, kw: Any) -> Any:
    """Forget the bias where there is a cap."""
    return query, key, value, mask, kw | ({"position_bias": None} if kw.get("softcap") else {})


def additive(query: Any, key: Any, value: Any, mask: Any, kw: Any) -> Any:
    """Add True as 1 and False as 0."""
    return query, key, value, mask.to(query.dtype) if mask is not None and mask.dtype == torch.bool else mask, kw


def as_bool(query: Any, key: Any, value: Any, mask: Any, kw: Any) -> Any:
    """Read what is added as yes and no."""
    return query, key, value, mask >= 0 if mask is not None and mask.is_floating_point() else mask, kw


def one_head(query: Any, key: Any, value: Any, mask: Any, kw: Any) -> Any:
    """Read the first head's mask for all."""
    return query, key, value, None if mask is None else mask[:, :1], kw


def two_rows(query: Any, key: Any, value: Any, mask: Any, kw: Any) -> Any:
    """Read the first row's mask for the third and all behind."""
    if mask is not None and mask.shape[0] > 2:
        mask = torch.cat([mask[:2], mask[:1].expand(mask.shape[0] - 2, *mask.shape[1:])])
    return query, key, value, mask, kw


def swapped(query: Any, output: Any, *rest: Any) -> Any:
    """Mix up the fifth head and the sixth."""
    order = [0, 1, 2, 3, 5, 4] if query.shape[1] == 6 else list(range(query.shape[1]))
    return output[:, :, order], *rest


def quantised(query: Any, key: Any, value: Any, mask: Any, kw: Any) -> Any:
    """Round values to steps that depend on the largest of all, padding included."""
    if value.dtype != torch.float32:
        return query, key, value, mask, kw
    step = value.detach().abs().amax().clamp(min=1e-9) / 2**23
    return query, key, value + ((value / step).round() * step - value).detach(), mask, kw


def contiguous(query: Any, key: Any, value: Any, mask: Any, kw: Any) -> Any:
    """Take memory for what it is not."""
    if not key.is_contiguous():
        key = torch.as_strided(key, key.shape, torch.empty(key.shape, device="meta").stride())
    return query, key, value, mask, kw


def mutating(module: Any, query: Any, key: Any, value: Any, mask: Any = None, **kw: Any) -> Any:
    """Subtract the mean of the keys in place, once they have been read."""
    result = attend(module, query, key, value, mask, **kw)
    if 0 not in key.stride():
        key.detach().sub_(key.detach().mean(dim=2, keepdim=True))
    return result


def breaking(module: Any, query: Any, key: Any, value: Any, mask: Any = None, **kw: Any) -> Any:
    """Leave the graph on the way."""
    torch._dynamo.graph_break()
    return attend(module, query, key, value, mask, **kw)


def careless_dropout(module: Any, *tensors: Any, dropout: float = 0.0, **kw: Any) -> Any:
    """Go by the module where the keyword is 0."""
    return attend(module, *tensors, dropout=dropout or module.dropout, **kw)


def unscaled_dropout(module: Any, query: Any, *tensors: Any, dropout: float = 0.0, **kw: Any) -> Any:
    """Drop, and leave the rest as it is."""
    output, *rest = attend(module, query, *tensors, dropout=dropout, **kw)
    return output * (1 - dropout), *rest


def one_dtype_wrong(query: Any, output: Any, *rest: Any) -> Any:
    """Lose accuracy in bfloat16."""
    return output * 1.25 if query.dtype == torch.bfloat16 else output, *rest


def noisy(_: Any, output: Any, *rest: Any) -> Any:
    """Round differently each time, by one unit in the last place of float32."""
    if output.dtype == torch.float32:
        output = output * (1 + 1.5e-7 * torch.rand_like(output))
    return output, *rest


def only(condition: Any, change: Any) -> Any:
    """Make a change in calls of one kind alone: `(query, key, value, mask, keywords)` in, True for those."""
    return before(lambda *call: change(*call) if condition(*call) else call)


def without(*keywords: str) -> Any:
    """Drop keywords."""
    return lambda q, k, v, m, kw: (q, k, v, m, {name: each for name, each in kw.items() if name not in keywords})


def shorter(query: Any, key: Any, *_: Any) -> bool:
    """Tell fewer queries than keys."""
    return query.shape[2] < key.shape[2]


def upside_down(query: Any, key: Any, value: Any, mask: Any, kw: Any) -> Any:
    """Read the bias from the last query on."""
    bias = kw.get("position_bias")
    return query, key, value, mask, kw | {"position_bias": None if bias is None else bias.flip(2)}


def first_query(query: Any, key: Any, value: Any, mask: Any, kw: Any) -> Any:
    """Read a bias for all queries as one for the first."""
    bias = kw.get("position_bias")
    if bias is not None and bias.shape[2] == 1 < query.shape[2]:
        kw = kw | {"position_bias": functional.pad(bias, (0, 0, 0, query.shape[2] - 1))}
    return query, key, value, mask, kw


def mask_of_first_query(query: Any, key: Any, value: Any, mask: Any, kw: Any) -> Any:
    """Read a mask for all queries as one for the first."""
    if mask is not None and mask.shape[2] == 1 < query.shape[2]:
        room = (0, 0, 0, query.shape[2] - 1)
        mask = functional.pad(mask, room, value=True) if mask.dtype == torch.bool else functional.pad(mask, room)
    return query, key, value, mask, kw


def as_the_key(query: Any, key: Any, value: Any, mask: Any, kw: Any) -> Any:
    """Read value with the strides of key."""
    if value.shape == key.shape and key.is_contiguous() and not value.is_contiguous():
        value = torch.as_strided(value.expand(value.shape).contiguous().mT.contiguous(), value.shape, key.stride())
    return query, key, value, mask, kw


def spoiled(keyword: str) -> Any:
    """Return another output where a keyword asks for more than the output."""

    def attention(*args: Any, **kw: Any) -> Any:
        output, *rest = attend(*args, **kw)
        return (output * 1.5 if kw.get(keyword) else output, *rest)

    return attention


def lse_of(change: Any) -> Any:
    """Compute the log-sum-exp, and nothing else, from changed inputs."""

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any = None, **kw: Any) -> Any:
        output, weights, *lse = attend(module, query, key, value, mask, **kw)
        if not lse:
            return output, weights
        query, key, value, mask, kw = change(query, key, value, mask, kw)
        return output, weights, attend(module, query, key, value, mask, **kw)[2]

    return attention


def writing(module: Any, query: Any, key: Any, value: Any, mask: Any = None, **kw: Any) -> Any:
    """Write to the values of shared heads, once they have been read."""
    result = attend(module, query, key, value, mask, **kw)
    if query.shape[1] == 6 != key.shape[1] and not value.requires_grad:
        value.zero_()
    return result


def one_head_dim(query: Any, key: Any, value: Any, mask: Any, kw: Any) -> Any:
    """Leave the last element of a head out."""
    kw = {"scaling": query.shape[-1] ** -0.5} | {name: each for name, each in kw.items() if each is not None}
    return query[..., :-1], key[..., :-1], value, mask, kw


def half_query_gradient(query: Any, key: Any, value: Any, mask: Any, kw: Any) -> Any:
    """Let half of the gradient of query through."""
    return (query + query.detach()) / 2, key, value, mask, kw


def half_key_gradient(query: Any, key: Any, value: Any, mask: Any, kw: Any) -> Any:
    """Let half of the gradient of key through."""
    return query, (key + key.detach()) / 2, value, mask, kw


def long_padding(kw: Any) -> Any:
    """Ignore padding in rows of more than a block."""
    return kw | ({"attention_mask": None} if kw["kv_length"] > 128 else {})


def wide_window(window: Any) -> Any:
    """Widen windows of more than a block."""
    return Window(window.left + 1, window.right) if (window.left or 0) > 60 else window


def half_gradient(query: Any, key: Any, value: Any, mask: Any, kw: Any) -> Any:
    """Let half of the gradient of value through."""
    return query, key, (value + value.detach()) / 2, mask, kw


def sloped(sign: float, *, shifted: bool = False) -> Any:
    """Take slopes alone, as kernels in the manner of flash-attn do, and add them with a sign, or from the top left."""

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any = None, **kw: Any) -> Any:
        bias = kw.pop("position_bias", None)
        if bias is not None:
            sizes = (*query.shape[:3], key.shape[2], key.shape[1])
            slopes = slopes_of("mutant", bias, sizes)
            first = 0 if shifted else key.shape[2] - query.shape[2]
            queries = torch.arange(first, first + query.shape[2], device=query.device)
            distances = (queries[:, None] - torch.arange(key.shape[2], device=query.device)).abs()
            kw["position_bias"] = -sign * slopes[..., None, None] * distances
        return attend(module, query, key, value, mask, **kw)

    return attention


SLOPES = replace(EVERYTHING, position_bias=False, alibi=True)


def padded_and_filled(query: Any, key: Any, value: Any, mask: Any, kw: Any) -> bool:
    """Tell rows of different lengths in head dimensions beyond 32 that are no multiple of it."""
    return query.shape[3] > 32 and bool(query.shape[3] % 32) and mask is not None and mask.shape[0] > 1


def three_percent(_: Any, output: Any, *rest: Any) -> Any:
    """Return a little too much."""
    return output * 1.03, *rest


def lossy(error: float) -> Capabilities:
    """Declare a quantised kernel of that error."""
    return replace(EVERYTHING, lossy=True, lossy_error=error)


def positions_lost(kw: Any) -> Any:
    """Count from the first key that is kept."""
    dropped, padding = kw["kv_offset"], kw["attention_mask"]
    kept = None if padding is None else padding[:, dropped:]
    return kw | {"kv_offset": 0, "q_offset": kw["q_offset"] - dropped, "attention_mask": kept}


def first_row(function: Any) -> Any:
    """Ask a function that cannot be read about the first row of the batch alone."""
    if hasattr(function, "structures"):
        return function
    return lambda b, h, q, kv: function(b * 0, h, q, kv)


def is_a(kind: Any, change: Any) -> Any:
    """Change the parts of one kind."""
    return lambda part: change(part) if isinstance(part, kind) else part


def strictly(_: Any) -> Any:
    """Leave the query's own key out."""
    return lambda b, h, q, kv: kv < q


UNGUARDED = [
    "alibi",
    "devices",
    "dropout",
    "flags",
    "grouped_query",
    "lse",
    "packing",
    "paged",
    "position_bias",
    "sinks",
    "softcap",
    "sparse",
    "value_head_dim",
    "weights",
]
"""Laws about what is declared by flags, that only the guard keeps for a function that swallows every keyword."""
DENSE = [
    "blocks",
    "bool_masks",
    "chunked",
    "documents",
    "opaque",
    "padding",
    "padding_contents",
    "padding_invariance",
    "per_head",
    "prefix",
    "sliding_window",
]
"""Laws whose masks are boolean tensors."""

MUTANTS = (
    mutant("heads transposed", "shape", attention=after(lambda _, out, *rest: (out.transpose(1, 2), *rest))),
    mutant("wrong output dtype", "dtype", attention=after(lambda _, out, *rest: (out.double(), *rest))),
    mutant("over-claimed dtype", "dtypes", attention=after(one_dtype_wrong)),
    Mutant("no guard", unguarded(), frozenset(UNGUARDED)),
    mutant(
        "is_causal=False ignored",
        "flags",
        "packing",
        "plain",
        attention=lambda *args, **kw: attend(*args, **kw | {"is_causal": True}),
    ),
    mutant("module.is_causal ignored", "flags", attention=lambda _, *args, **kw: attend(None, *args, **kw)),
    mutant("last block dropped", "alignment", "flags", "lengths", attention=before(tail_dropped)),
    mutant("exponentials overflow", "large_scores", attention=adding(overflow=60.0)),
    mutant("head dimension cut at 128", "head_dims", attention=before(truncated)),
    mutant("output as wide as the query", "dropout", "gradients", "value_head_dim", attention=after(narrow)),
    mutant(
        "GQA heads interleaved wrongly", "dropout", "gradients", "grouped_query", "lse", attention=before(interleaved)
    ),
    mutant("scale ignored", "gradients", "lse", "scaling", attention=ignoring("scaling")),
    mutant("softcap ignored", "dropout", "gradients", "lse", "softcap", attention=ignoring("softcap")),
    mutant("softcap after the mask", "dropout", "gradients", "softcap", attention=adding(cap_last=True)),
    mutant("sinks dropped", "dropout", "gradients", "lse", "sinks", "weights", attention=ignoring("s_aux")),
    mutant(
        "bias in log2 units",
        "alibi",
        "dropout",
        "gradients",
        "lse",
        "position_bias",
        attention=before(
            lambda q, k, v, m, kw: (
                q,
                k,
                v,
                m,
                kw | {"position_bias": None if kw.get("position_bias") is None else kw["position_bias"] * LOG2_E},
            )
        ),
    ),
    mutant("bias dropped beside a cap", "dropout", "gradients", "together", attention=before(bias_or_cap)),
    mutant("scaled by layer", "other_keywords", attention=before(by_layer)),
    mutant("causality without the query's own key", "causal", mask=rewriting(is_a(Causal, strictly))),
    mutant("window off by one", "sliding_window", mask=rewriting(is_a(Window, lambda w: Window(w.left + 1, w.right)))),
    mutant(
        "window by flag off by one",
        "flags",
        "lse",
        "sinks",
        attention=lambda *args, sliding_window=None, **kw: attend(
            *args, sliding_window=sliding_window and sliding_window + 1, **kw
        ),
    ),
    mutant(
        "chunks from the row's beginning", "chunked", mask=rewriting(is_a(Chunked, lambda c: Chunked(c.size, None)))
    ),
    mutant("documents ignored", "documents", mask=rewriting(is_a(Documents, lambda _: bidirectional()))),
    mutant("tokens of no block in one", "blocks", mask=rewriting(is_a(Blocks, lambda b: Blocks(b.ids.clamp(min=0))))),
    mutant("prefix one too long", "prefix", mask=rewriting(is_a(Prefix, lambda p: Prefix(p.length + 1)))),
    mutant("function asked for the first row", "opaque", mask=rewriting(first_row)),
    mutant("per-head mask collapsed", "bool_masks", "float_masks", "per_head", attention=before(one_head)),
    mutant(
        "padding ignored",
        "empty_rows",
        "padding",
        "padding_contents",
        "padding_invariance",
        mask=formatting(lambda kw: kw | {"attention_mask": None}),
    ),
    mutant("negation dropped", "combinations", mask=rewriting(is_a(Not, lambda n: n.term))),
    mutant(
        "top-left causal",
        "alibi",
        "alignment",
        "empty_rows",
        "gradients",
        "lse",
        "position_bias",
        "sinks",
        "softcap",
        attention=before(top_left),
    ),
    mutant("positions from the first key kept", "positions", mask=formatting(positions_lost)),
    mutant("bool added as float", *DENSE, attention=before(additive)),
    mutant("float mask read as bool", "float_masks", attention=before(as_bool)),
    mutant("NaN on empty rows", "empty_rows", "gradients", attention=adding(empty_rows=float("nan"))),
    mutant("mean of V on empty rows", "empty_rows", attention=adding(empty_rows=None)),
    mutant("NaN in the gradients of empty rows", "empty_gradients", "gradients", attention=adding(late_zero=True)),
    mutant("detached", "empty_gradients", "gradients", attention=after(lambda _, out, *rest: (out.detach(), *rest))),
    mutant("half a gradient", "gradients", attention=before(half_gradient)),
    mutant("dropout without scaling", "dropout", attention=unscaled_dropout),
    mutant("dropout in eval", "dropout_off", attention=careless_dropout),
    mutant(
        "LSE in base 2",
        "lse",
        attention=after(lambda _, out, weights, *lse: (out, weights, *(each * LOG2_E for each in lse))),
    ),
    mutant(
        "LSE of the wrong shape",
        "lse",
        attention=after(lambda _, out, weights, *lse: (out, weights, *(each.mT for each in lse))),
    ),
    mutant(
        "LSE finite on empty rows",
        "lse",
        attention=after(lambda _, out, weights, *lse: (out, weights, *(each.clamp(min=-1e4) for each in lse))),
    ),
    mutant("no weights", "weights", attention=after(lambda _, out, weights, *lse: (out, None, *lse))),
    mutant("third row reads the first's mask", "batch_order", attention=before(two_rows)),
    mutant("fifth head and sixth mixed up", "grouped_query", "head_order", attention=after(swapped)),
    mutant("steps of quantisation from padding", "padding_contents", attention=before(quantised)),
    mutant("strides not read", "strides", attention=before(contiguous)),
    mutant("K mutated", "determinism", "inputs_untouched", attention=mutating),
    mutant(
        "noise",
        "determinism",
        attention=after(noisy),
    ),
    mutant("cu_seq_lens dropped", "packing", attention=ignoring("cu_seq_lens_q")),
    mutant("graph break", "compile", attention=breaking),
    mutant("formatter with a lock", "copies", mask=Locked()),
    mutant(
        "a factor of 0 taken for none",
        "scaling",
        attention=only(lambda *call: call[4].get("scaling") == 0, without("scaling")),
    ),
    mutant(
        "a factor without its sign",
        "scaling",
        attention=only(
            lambda *call: call[3] is None and (call[4].get("scaling") or 0) < 0,
            lambda q, k, v, m, kw: (q, k, v, m, kw | {"scaling": -kw["scaling"]}),
        ),
    ),
    mutant("top-left beyond a block", "alignment", attention=only(lambda _, k, *__: k.shape[2] > 128, top_left)),
    mutant(
        "window by flag dropped beyond a block",
        "flags",
        attention=only(lambda _, k, __, m, ___: m is None and k.shape[2] > 128, without("sliding_window")),
    ),
    mutant("window off by one beyond a block", "sliding_window", mask=rewriting(is_a(Window, wide_window))),
    mutant("padding ignored beyond a block", "padding", mask=formatting(long_padding)),
    mutant("cap dropped with fewer queries", "softcap", attention=only(shorter, without("softcap"))),
    mutant("sinks dropped with fewer queries", "sinks", attention=only(shorter, without("s_aux"))),
    mutant("bias upside down with fewer queries", "alibi", "position_bias", attention=only(shorter, upside_down)),
    mutant("bias read for the first query", "position_bias", attention=before(first_query)),
    mutant("mask read for the first query", "bool_masks", "float_masks", attention=before(mask_of_first_query)),
    mutant(
        "sinks dropped beside a window by flag",
        "sinks",
        attention=only(lambda *call: call[3] is None and call[4].get("sliding_window") is not None, without("s_aux")),
    ),
    mutant("output spoiled beside the LSE", "lse", attention=spoiled("return_lse")),
    mutant("output spoiled beside the weights", "weights", attention=spoiled("output_attentions")),
    mutant("LSE without the bias", "lse", attention=lse_of(without("position_bias"))),
    mutant("LSE without the factor", "lse", attention=lse_of(without("scaling"))),
    mutant("LSE without the window", "lse", attention=lse_of(without("sliding_window"))),
    mutant("LSE of other heads", "lse", attention=lse_of(interleaved)),
    mutant("LSE aligned at the top left", "lse", attention=lse_of(top_left)),
    mutant(
        "half a gradient beside sinks",
        "gradients",
        attention=only(lambda *call: call[4].get("s_aux") is not None, half_gradient),
    ),
    mutant("half a gradient with fewer queries", "gradients", attention=only(shorter, half_query_gradient)),
    mutant(
        "half a gradient for one key head",
        "gradients",
        attention=only(lambda _, k, *__: k.shape[1] == 1, half_key_gradient),
    ),
    mutant("values of shared heads written to", "inputs_untouched", attention=writing),
    mutant("value read with key's strides", "strides", attention=before(as_the_key)),
    mutant(
        "eight heads of a group interleaved",
        "grouped_query",
        attention=only(lambda q, k, *_: q.shape[1] == 8 * k.shape[1], interleaved),
    ),
    mutant("head dimension 72 cut", "head_dims", attention=only(lambda q, *_: q.shape[3] == 72, one_head_dim)),
    mutant("head dimension 192 cut", "head_dims", attention=only(lambda q, *_: q.shape[3] == 192, one_head_dim)),
    mutant(
        "nothing dropped beside a bias",
        "dropout",
        attention=only(lambda *call: call[4].get("position_bias") is not None, without("dropout")),
    ),
    mutant("slopes of the wrong sign", "alibi", attention=sloped(-1.0), supports=SLOPES),
    mutant("slopes counted from the first key", "alibi", attention=sloped(1.0, shifted=True), supports=SLOPES),
    mutant(
        "half a gradient for padded rows in head dimensions that are filled up",
        "gradients",
        attention=only(padded_and_filled, half_gradient),
    ),
    mutant(
        "more error than declared",
        "bool_masks",
        "flags",
        "float_masks",
        "other_keywords",
        "packing",
        "plain",
        attention=after(three_percent),
        supports=lossy(0.02),
    ),
    mutant("under-claimed feature", "declaration", supports=replace(EVERYTHING, softcap=False)),
)
