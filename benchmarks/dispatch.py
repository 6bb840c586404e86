"""What a call through attnreg adds to the kernel call that it makes: tiny tensors on the CPU, one thread, no gradients.

Raw is `scaled_dot_product_attention` and the transpose into the output layout, with only the keywords that the case
needs. The peers are transformers' `sdpa_attention_forward` and diffusers' `dispatch_attention_fn`, which takes and
returns `(batch, length, heads, head_dim)` and gets tensors that lie so. All are bound before the loop, as a model does.

Budgets: attnreg adds less than either does in the same run. 1 µs at the most is a target, which fails nothing:
"transformers" and "diffusers" are what those add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from report import Figure, report, wants_json
from timing import interleaved
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import attnreg

TARGET = 1.0
MICROSECONDS = 1e6
HEAD_DIM = 16
CALL = "(module, query, key, value, mask, scaling=scaling, dropout=0.0)"
OURS, PEER = f"call{CALL}", f"peer{CALL}"
DIFFUSERS = "dispatch(bshd_query, bshd_key, bshd_value, attn_mask=mask, scale=scaling"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One shape of call; `raw` are the keywords that the raw call needs."""

    what: str
    heads: int = 4
    kv_heads: int = 4
    q_length: int
    kv_length: int
    masked: bool = False
    raw: str = ""


CASES = (
    Case(what="decode", q_length=1, kv_length=8),
    Case(what="prefill, is_causal", q_length=16, kv_length=16, raw=", is_causal=True"),
    Case(what="prefill, bool mask", q_length=16, kv_length=16, masked=True, raw=", attn_mask=mask"),
    Case(what="decode, GQA", heads=8, kv_heads=2, q_length=1, kv_length=8, raw=", enable_gqa=True"),
    Case(
        what="prefill, bool mask, GQA",
        heads=8,
        kv_heads=2,
        q_length=16,
        kv_length=16,
        masked=True,
        raw=", attn_mask=mask, enable_gqa=True",
    ),
)


class Layer(torch.nn.Module):
    """What an attention function reads of the module that calls it."""

    def __init__(self, num_key_value_groups: int) -> None:
        super().__init__()
        self.is_causal = True
        self.num_key_value_groups = num_key_value_groups


def main() -> int:
    """Run the benchmark and return its exit code."""
    as_json = wants_json(__doc__)
    torch.set_num_threads(1)
    with torch.no_grad():
        figures = [figure for case in CASES for figure in _measure(case)]
    return report("What a call adds to the kernel call", figures, as_json=as_json)


def _measure(case: Case) -> list[Figure]:
    raw = f"sdpa(query, key, value, scale=scaling{case.raw}).transpose(1, 2).contiguous()"
    values = _values(case)
    _check(values)
    keywords = "".join(f", {each}" for each in case.raw.split(", ") if each and "attn_mask" not in each)
    dispatch = f"{DIFFUSERS}{keywords})"
    seconds = interleaved((raw, OURS, PEER, dispatch), values, number=200, turns=300)
    added = [(seconds[statement] - seconds[raw]) * MICROSECONDS for statement in (OURS, PEER, dispatch)]
    ours, *theirs = added
    beside = {
        "raw": f"{seconds[raw] * MICROSECONDS:.2f} µs",
        "transformers": f"{theirs[0]:.2f} µs",
        "diffusers": f"{theirs[1]:.2f} µs",
    }
    return [
        Figure(what=f"{case.what}: added", rounds=[ours], unit="µs", budget=TARGET, target=True, beside=beside),
        Figure(what=f"{case.what}: attnreg - the lesser", rounds=[ours - min(theirs)], unit="µs", budget=0),
    ]


def _values(case: Case) -> dict[str, Any]:
    torch.manual_seed(0)
    kv_shape = (1, case.kv_heads, case.kv_length, HEAD_DIM)
    mask = torch.ones(case.q_length, case.kv_length, dtype=torch.bool).tril()[None, None]
    tensors = torch.randn(1, case.heads, case.q_length, HEAD_DIM), torch.randn(kv_shape), torch.randn(kv_shape)
    query, key, value = tensors
    bshd = [each.transpose(1, 2).contiguous() for each in tensors]
    return {
        "bshd_query": bshd[0],
        "bshd_key": bshd[1],
        "bshd_value": bshd[2],
        "sdpa": scaled_dot_product_attention,
        "call": attnreg.get("sdpa").call,
        "peer": sdpa_attention_forward,
        "dispatch": dispatch_attention_fn,
        "module": Layer(case.heads // case.kv_heads),
        "query": query,
        "key": key,
        "value": value,
        "mask": mask if case.masked else None,
        "scaling": HEAD_DIM**-0.5,
    }


def _check(values: dict[str, Any]) -> None:
    """Only calls that compute the same thing may be compared."""
    outputs = [eval(statement, {}, values)[0] for statement in (OURS, PEER)]  # noqa: S307 - those above
    torch.testing.assert_close(*outputs)


if __name__ == "__main__":
    raise SystemExit(main())
