"""Built-in backends under torch's transformations: compile, export, autocast, meta, vmap."""

from __future__ import annotations

import pytest
import torch
from doubles import CAUSAL
from torch._dynamo.testing import CompileCounterWithBackend

import attnreg
from attnreg import UnsupportedError, reference
from attnreg.masks import causal, padding, sliding_window

CUDA = torch.cuda.is_available()
DEVICE, DTYPE, TOLERANCE = ("cuda", torch.bfloat16, 5e-2) if CUDA else ("cpu", torch.float32, 2e-5)
HERE = [name for name in attnreg.names() if name != "loopback"]
ON_CPU = ["eager", "sdpa", "sdpa_flash", "sdpa_math", "flex_attention"]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(name, length=24, *, keys=None, batch=2, seed=0):
    """Make what the backend can take where the tests run; skip if that is nothing."""
    supports = attnreg.get(name).supports
    if DEVICE not in (supports.devices or {DEVICE}):
        pytest.skip(f"{name} does not declare {DEVICE}")
    generator = torch.Generator().manual_seed(seed)
    kv_heads = 2 if supports.grouped_query else 4
    shapes = [(4, length), (kv_heads, keys or length), (kv_heads, keys or length)]
    return [torch.randn(batch, *shape, 16, generator=generator).to(DEVICE, DTYPE) for shape in shapes]


def close(output, expected) -> None:
    """Compare with the oracle."""
    torch.testing.assert_close(output.double().cpu(), expected.cpu(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("form", ["flags", "more keys", "mask", "mask made inside", "sinks", "lse"])
@pytest.mark.parametrize("name", HERE)
def test_one_graph_for_all_lengths(name, form) -> None:
    """`fullgraph` holds with and without a mask, and lengths that differ are at most one more compilation."""
    backend = attnreg.get(name)
    supports = backend.supports.at(DEVICE)
    if (form == "sinks" and not supports.sinks) or (form == "lse" and not supports.lse):
        pytest.skip(f"{name} does not declare {form}")
    if form.startswith("mask") and not (supports.structures is None or "padding" in supports.structures):
        pytest.skip(f"{name} does not declare padding")
    options = {"sinks": {"s_aux": torch.ones(4, device=DEVICE)}, "lse": {"return_lse": True}}.get(form, {})

    def attend(query, key, value, mask, real):
        if form == "mask made inside":
            mask = backend.format(
                batch_size=query.shape[0], q_length=query.shape[2], kv_length=key.shape[2], attention_mask=real
            )
        return backend.call(CAUSAL, query, key, value, mask, **options)[0]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter, dynamic=None)
    for length in (300, 301, 315, 330):
        keys = length + 50 if form == "more keys" else length
        query, key, value = inputs(name, length, keys=keys)
        real = torch.ones(2, length, dtype=torch.bool, device=DEVICE)
        real[0, -5:] = False
        mask = None
        if form == "mask":
            mask = backend.format(batch_size=2, q_length=length, kv_length=length, attention_mask=real)
        padded = real if form.startswith("mask") else None
        output = compiled(query, key, value, mask, padded)
        sinks = {"s_aux": options["s_aux"]} if form == "sinks" else {}
        expected = reference.attention(query, key, value, causal(), padded, **sinks).output
        rows = slice(None) if padded is None else slice(0, length - 5)
        close(output[:, rows], expected[:, rows])
    assert counter.frame_count <= 2


@pytest.mark.parametrize("masked", [False, True], ids=["flags", "mask"])
@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_export(name, masked) -> None:
    """A module that calls them exports with lengths left open, and the program agrees with the oracle."""

    class Layer(torch.nn.Module):
        is_causal = True

        def forward(self, query, key, value, mask=None):
            return attnreg.get(name).call(self, query, key, value, mask)[0]

    def case(length):
        generator = torch.Generator().manual_seed(length)
        query, key, value = (torch.randn(2, heads, length, 16, generator=generator) for heads in (4, 2, 2))
        real = torch.ones(2, length, dtype=torch.bool)
        real[0, :3] = False
        predicate = causal() & padding(real)
        mask = attnreg.get(name).format(batch_size=2, q_length=length, kv_length=length, mask_function=predicate)
        return (query, key, value, mask if masked else None), predicate if masked else causal()

    length = torch.export.Dim("length", min=4, max=512)
    shapes = ({2: length}, {2: length}, {2: length}, {2: length, 3: length} if masked else None)
    program = torch.export.export(Layer(), case(24)[0], dynamic_shapes=shapes, strict=False)
    for size in (24, 37):
        arguments, predicate = case(size)
        expected = reference.attention(*arguments[:3], predicate).output
        torch.testing.assert_close(program.module()(*arguments).double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", HERE)
def test_autocast(name) -> None:
    """float32 tensors under autocast give the oracle's result, in float32 or in autocast's dtype."""
    query, key, value = (each.float() for each in inputs(name))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        output = attnreg.get(name).call(CAUSAL, query, key, value, None)[0]
    assert output.dtype in {torch.float32, torch.bfloat16}
    expected = reference.attention(query, key, value, is_causal=True).output
    torch.testing.assert_close(output.double().cpu(), expected.cpu(), rtol=0, atol=5e-2)


def test_autocast_reaches_a_backend_that_declares_its_dtype_alone() -> None:
    """float32 is handed on in autocast's dtype, where it would be refused otherwise; compiled as well."""
    seen = []

    def halves(module, query, key, value, attention_mask, **kwargs):
        seen.append((query.dtype, key.dtype, value.dtype))
        return attnreg.get("eager").attention(module, query, key, value, attention_mask, **kwargs)

    supports = attnreg.Capabilities(dtypes={"bfloat16"}, is_causal=True)
    attnreg.AttentionInterface.register("halves", halves, mask=attnreg.masks.eager_mask, supports=supports)
    query = torch.randn(1, 2, 4, 8)
    call = attnreg.get("halves").call
    with pytest.raises(UnsupportedError, match="dtype: wants float32; supported: bfloat16"):
        call(CAUSAL, query, query, query, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = call(CAUSAL, query, query, query, None)[0]
        compiled = torch.compile(lambda q: call(CAUSAL, q, q, q, None)[0], fullgraph=True, backend="eager")(query)
    assert set(seen) == {(torch.bfloat16,) * 3}
    torch.testing.assert_close(output, compiled)
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(UnsupportedError, match="dtype: wants float32"):
        call(CAUSAL, query, query, query, None)


@pytest.mark.parametrize("name", ["eager", "sdpa", "sdpa_math"])
def test_meta(name) -> None:
    """Shapes can be found out without computing, with a mask made on meta as well."""
    query, key = torch.empty(2, 4, 6, 8, device="meta"), torch.empty(2, 2, 6, 8, device="meta")
    backend = attnreg.get(name)
    real = torch.ones(2, 6, dtype=torch.bool, device="meta")
    predicate = causal() & sliding_window(3)
    mask = backend.format(batch_size=2, q_length=6, kv_length=6, mask_function=predicate, attention_mask=real)
    for given in (None, mask):
        output = backend.call(CAUSAL, query, key, key, given)[0]
        assert output.shape == (2, 6, 4, 8)
        assert output.is_meta


@pytest.mark.parametrize("name", ["sdpa_flash", "flex_attention", "varlen"])
def test_kernels_are_not_on_meta(name) -> None:
    """A kernel that has no meta device says so."""
    query = torch.empty(2, 4, 6, 16, device="meta")
    with pytest.raises(UnsupportedError, match="device: wants meta"):
        attnreg.get(name).call(CAUSAL, query, query, query, None)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "options", [{}, {"return_lse": True}, {"s_aux": torch.zeros(4)}], ids=["plain", "lse", "sinks"]
)
@pytest.mark.parametrize("name", ON_CPU)
def test_vmap_is_right_or_refused(name, options) -> None:
    """Inside of `torch.vmap` a backend gives the oracle's result, or a reason and the way out."""
    query, key, value = (torch.randn(3, 2, 4, 6, 8) for _ in range(3))
    call = attnreg.get(name).call

    def attend(*tensors):
        return call(CAUSAL, *tensors, None, **options)[0]

    if name in {"eager", "sdpa_math"} or (name == "sdpa" and not options):
        sinks = {name: value for name, value in options.items() if name == "s_aux"}
        each = [
            reference.attention(*one, is_causal=True, **sinks).output for one in zip(query, key, value, strict=True)
        ]
        found = torch.vmap(attend)(query, key, value)
        torch.testing.assert_close(found.double(), torch.stack(each), rtol=0, atol=2e-5)
        return
    with pytest.raises(UnsupportedError) as caught:
        torch.vmap(attend)(query, key, value)
    assert [str(reason) for reason in caught.value.reasons] == [
        "vmap: wants a call inside torch.vmap; supported: calls outside of it. Give the tensors a batch axis, which "
        "attention has anyway, or choose eager."
    ]
