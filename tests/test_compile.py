"""`torch.compile(fullgraph=True)`: a lookup by name breaks no graph, and registering another recompiles nothing."""

from __future__ import annotations

import pytest
import torch
from doubles import attention, formatter
from torch._dynamo.testing import CompileCounter

from attnreg import NO_MASK, AttentionInterface, reference
from attnreg.masks import causal, sdpa_mask


class Layer(torch.nn.Module):
    """A layer that looks its backend up by name in every forward."""

    is_causal = True

    def __init__(self, interface: AttentionInterface, name: str, *, method: bool) -> None:
        super().__init__()
        self.interface, self.name, self.method = interface, name, method

    def forward(self, query, key, value, mask=None):
        """Attend."""
        call = self.interface.get_interface(self.name, None) if self.method else self.interface[self.name]
        output, _ = call(self, query, key, value, mask, scaling=None, dropout=0.0, use_cache=False)
        return output


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("looked_up_before", [False, True], ids=["first use", "used before"])
@pytest.mark.parametrize("masked", [False, True], ids=["flags", "mask"])
@pytest.mark.parametrize("method", [False, True], ids=["[]", "get_interface"])
@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_one_graph_and_no_recompilation(name, method, masked, looked_up_before) -> None:
    """One graph for the lookup and the call together; a backend registered later is none of its business."""
    interface = AttentionInterface()
    counter = CompileCounter()
    layer = Layer(interface, name, method=method)
    if looked_up_before:
        interface[name]
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6], dtype=torch.bool)
    mask = sdpa_mask(2, 6, 6, attention_mask=real) if masked else None
    output = compiled(query, key, value, mask)
    expected = reference.attention(query, key, value, causal(), real if masked else None).output
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-5)
    assert counter.frame_count == 1
    AttentionInterface.register("later", attention, mask=formatter)
    interface["later"], interface["eager"], interface["sdpa"]
    compiled(query, key, value, mask)
    assert counter.frame_count == 1


def test_replacing_the_backend_in_use_is_noticed() -> None:
    """Registering the very name that is compiled in does recompile: a stale function would be a silent error."""
    interface = AttentionInterface()
    AttentionInterface.register("mine", lambda m, q, k, v, a, **kw: (q + 1, None), mask=NO_MASK)
    counter = CompileCounter()
    compiled = torch.compile(Layer(interface, "mine", method=False), backend=counter, fullgraph=True)
    zero = torch.zeros(1, 1, 2, 2)
    assert compiled(zero, zero, zero).max() == 1
    AttentionInterface.register("mine", lambda m, q, k, v, a, **kw: (q + 2, None), mask=NO_MASK, replace=True)
    assert compiled(zero, zero, zero).max() == 2
    AttentionInterface.unregister("mine")
    with pytest.raises(Exception, match="no attention backend is named 'mine'"):
        compiled(zero, zero, zero)


def test_refusal_inside_a_graph() -> None:
    """What is refused is refused under compilation too, with the reason."""
    interface = AttentionInterface()

    def capped(query, key, value):
        return interface["sdpa"](None, query, key, value, None, softcap=30.0)[0]

    query = torch.randn(1, 1, 2, 8)
    with pytest.raises(Exception, match="softcap"):
        torch.compile(capped, backend="eager", fullgraph=True)(query, query, query)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("masked", [False, True], ids=["flags", "mask"])
@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_lengths_may_vary(name, masked, dynamic) -> None:
    """One graph serves further lengths, and is right for each."""
    interface = AttentionInterface()

    def attend(query, key, value, mask):
        return interface[name](None, query, key, value, mask, is_causal=True)[0]

    compiled = torch.compile(attend, fullgraph=True, backend="eager", dynamic=dynamic)
    for length in (5, 6, 7, 9):
        query, key, value = torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 8)
        mask = sdpa_mask(2, length, length, allow_is_causal_skip=False) if masked else None
        expected = reference.attention(query, key, value, is_causal=True).output
        torch.testing.assert_close(compiled(query, key, value, mask).double(), expected, rtol=0, atol=2e-5)
