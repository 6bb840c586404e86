"""A reference on the CPU for torch's varlen kernel: its signature, and its conventions, the awkward ones included.

It is no kernel, and never ships. What it reproduces: tokens of all sequences one after the other; causality is the
window (-1, 0), exactly; queries and keys of a sequence meet at their ends; shared heads need the flag; the log-sum-exp
is `(heads, tokens)`, and +inf for a query without any key; nothing is written behind the last sequence. With a block
table, keys and values are pages, of which `seqused_k` says how much each sequence has.
"""

from __future__ import annotations

import torch


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """Compute attention over sequences, one by one."""
    if block_table is not None:
        key, value, cu_seq_k = _in_sequences(key, value, block_table, seqused_k, cu_seq_k)
    assert all(each.dim() == 3 and each.stride(-1) == 1 for each in (query, key, value))
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert type(max_q) is type(max_k) is int
    assert num_splits is None
    assert len(cu_seq_q) == len(cu_seq_k)
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError("Expect query and key/value to have the same number of heads")
    group = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    left, right = window_size
    output = torch.full_like(query, float("nan"))
    lse = torch.full((query.shape[1], query.shape[0]), float("nan"))
    bounds = zip(cu_seq_q.unfold(0, 2, 1).tolist(), cu_seq_k.unfold(0, 2, 1).tolist(), strict=True)
    for (q_begin, q_end), (k_begin, k_end) in bounds:
        assert q_end - q_begin <= max_q
        assert k_end - k_begin <= max_k
        q, k, v = query[q_begin:q_end], key[k_begin:k_end], value[k_begin:k_end]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
        ahead = torch.arange(len(k))[None] - torch.arange(len(q))[:, None] - (len(k) - len(q))
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if left >= 0:
            seen &= ahead >= -left
        if right >= 0:
            seen &= ahead <= right
        scores = scores.masked_fill(~seen, float("-inf"))
        sums = torch.logsumexp(scores, -1)
        empty = sums == float("-inf")
        weights = torch.exp(scores - sums.masked_fill(empty, 0.0)[..., None])
        output[q_begin:q_end] = torch.einsum("hqk,khd->qhd", weights, v.float()).to(query.dtype)
        lse[:, q_begin:q_end] = sums.masked_fill(empty, float("inf"))
    return (output, lse) if return_aux is not None and return_aux.lse else output


def _in_sequences(key, value, block_table, seqused_k, cu_seq_k):
    """Lay the pages' tokens one sequence after the other."""
    assert cu_seq_k.diff().tolist() == seqused_k.tolist()
    assert block_table.dtype == seqused_k.dtype == torch.int32
    assert key.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
    tokens = [[], []]
    for pages, length in zip(block_table.long(), seqused_k.tolist(), strict=True):
        at = torch.arange(length)
        for found, each in zip(tokens, (key, value), strict=True):
            found.append(each[pages[at // key.shape[1]], at % key.shape[1]])
    ends = torch.tensor([0, *seqused_k.tolist()]).cumsum(0).int()
    return torch.cat(tokens[0]), torch.cat(tokens[1]), ends
