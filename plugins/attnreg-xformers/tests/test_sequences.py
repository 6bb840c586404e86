"""What xFormers reads of padded rows: where keys lie, what is copied out, and what is remembered of a mask."""

from typing import Any

import pytest
import torch
from xformers_inputs import CLOSE, backend, expected, fmha, inputs, padded

from attnreg import masks, reference

pytestmark = pytest.mark.usefixtures("kernels_on_cpu")


def test_memory() -> None:
    """Tensors that do not lie in pieces of 16 bytes are copied: their kernel would read past them."""
    query, key, value = inputs(heads=(2, 2))
    wide = torch.randn(2, 2, 9, 27, dtype=torch.bfloat16)
    key = wide[..., 3:19].copy_(key)
    storage = torch.empty(value.numel() + 1, dtype=torch.bfloat16)
    value = storage[1:].view_as(value).copy_(value)
    output, _ = backend().call(None, query, key, value, None)
    torch.testing.assert_close(output.double(), expected([query, key, value], masks.causal()).output, **CLOSE)


def test_lengths_are_read_once() -> None:
    """What is read of a mask serves all layers, until somebody writes to it."""
    from attnreg_xformers.packing import Sequences, packed

    mask = backend().format(batch_size=2, q_length=9, kv_length=9, attention_mask=padded(), allow_is_causal_skip=False)
    sequences = Sequences(mask.cu_seqlens_q, mask.cu_seqlens_k, mask.indices_q, mask.indices_k)
    first = packed(sequences, 0)
    assert packed(sequences, 0) is first
    assert first.lengths_q == [6, 7]
    mask.cu_seqlens_q.add_(0)
    assert packed(sequences, 0) is not first


def side_padded(batch: int, keys: int, side: str) -> torch.Tensor:
    """Return a mask that pads each row more than the one before, on one side; the first has no padding."""
    pads = torch.arange(batch)[:, None] * 5
    places = torch.arange(keys)
    return places >= pads if side == "left" else places < keys - pads


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("queries", [1, 4, 20])
@pytest.mark.parametrize("is_causal", [False, True])
def test_keys_are_read_where_they_are(
    side: str,
    queries: int,
    is_causal: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With padding on one side no key is copied, whatever is in the padding, and the result is the oracle's."""
    kernel = fmha()
    original, addresses = kernel.memory_efficient_attention, []

    def watched(**keywords: Any) -> Any:
        addresses.append((type(keywords["attn_bias"]).__name__, keywords["key"].data_ptr()))
        return original(**keywords)

    monkeypatch.setattr(kernel, "memory_efficient_attention", watched)
    real = side_padded(3, 20, side)
    query, key, value = (
        each.transpose(1, 2).contiguous().transpose(1, 2) for each in inputs(batch=3, queries=queries, keys=20)
    )
    function = masks.causal() if is_causal else masks.bidirectional()
    sizes = {"batch_size": 3, "q_length": queries, "kv_length": 20, "q_offset": 20 - queries}
    mask = backend().format(mask_function=function, attention_mask=real, **sizes)
    nan = ~real[:, None, :, None].expand_as(key)
    poisoned = query, key.clone().masked_fill_(nan, float("nan")), value.clone().masked_fill_(nan, float("nan"))
    output, _ = backend().call(None, *poisoned, mask, is_causal=is_causal)
    given = reference.attention(query, key, value, function, real, q_offset=20 - queries).output
    count = real[:, 20 - queries :]
    torch.testing.assert_close(output.double()[count], given[count], **CLOSE)
    kind = "BlockDiagonalCausalWithOffsetGappyKeysMask" if is_causal and queries > 1 else "BlockDiagonalGappyKeysMask"
    copied = is_causal and queries == 4 and side == "right"  # rows without any query that counts, and few queries
    assert copied or addresses[0] == (kind, poisoned[1].data_ptr())


def test_rows_without_any_key_are_left_out() -> None:
    """A row of padding alone gives 0, beside rows that are served where they are without it."""
    real = side_padded(2, 40, "left")
    real[1] = False
    tensors = inputs(queries=40, keys=40)
    mask = backend().format(batch_size=2, q_length=40, kv_length=40, attention_mask=real)
    output, _ = backend().call(None, *tensors, mask)
    torch.testing.assert_close(output.double()[0], expected(tensors, masks.causal(), real).output[0], **CLOSE)
    assert not output[1].any()


def test_flash_attention_3_reads_beside_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where xFormers may choose flash-attn 3, keys and values are copied: it would multiply padding by 0."""
    import importlib.util

    from attnreg_xformers import bias

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "flash_attn_3" or found(name))
    bias.keeps_to_sequences.cache_clear()
    try:
        assert not bias.keeps_to_sequences()
    finally:
        bias.keeps_to_sequences.cache_clear()


def test_gradients_of_what_is_copied_out() -> None:
    """Gradients of padded rows are the oracle's, and 0 for padding."""
    real = side_padded(2, 20, "left")
    tensors = inputs(queries=20, keys=20, learned=True)
    mask = backend().format(batch_size=2, q_length=20, kv_length=20, attention_mask=real)
    output, _ = backend().call(None, *tensors, mask)
    grads = torch.autograd.grad(output[real].float().sum(), tensors)
    doubles = [each.detach().double().requires_grad_() for each in tensors]
    right = reference.attention(doubles[0], doubles[1], doubles[2], masks.causal(), real).output
    wanted = torch.autograd.grad(right[real].sum(), doubles)
    for got, exact in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=0.05, atol=0.05)
    assert not grads[1].transpose(1, 2)[~real].any()
