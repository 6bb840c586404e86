"""attnreg's backends in unmodified diffusers models: diffusers' native backend, with the same weights, is right."""

from __future__ import annotations

import copy
import pickle
import threading

import diffusers
import pytest
import tiny_diffusers as tiny
import torch
from cpu_kernels import on_the_cpu
from diffusers.models import attention_dispatch, attention_processor
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from tiny_diffusers import made, run

import attnreg
from attnreg import BridgeError, UnsupportedError, get_attn_implementation, set_attn_implementation
from attnreg.integrations import diffusers as bridge
from attnreg.integrations.diffusers import host

pytestmark = pytest.mark.usefixtures("kernels_on_cpu")

MODELS = [
    *(tiny.flux, tiny.wan, tiny.qwen_image, tiny.unet, tiny.masked_unet, tiny.added_kv_unet),
    *(tiny.vae, tiny.cosmos_vae, tiny.sd3, tiny.ltx, tiny.hunyuan_video),
]
FOREIGN = ["flash_attention_2", "flash_attention_4", "sage_attention", "xformers"]
FLOATING = {tiny.masked_unet, tiny.ltx}
"""Models whose masks are added to the scores."""
TRANSFORMERS = [tiny.flux, tiny.wan, tiny.qwen_image]


@pytest.fixture(autouse=True)
def _diffusers_is_left_alone():
    registry = attention_dispatch._AttentionBackendRegistry
    classes = (FluxAttention, FluxAttnProcessor, attention_processor.Attention, attention_processor.AttnProcessor2_0)

    def state():
        tables = [dict(each) for each in (registry._backends, registry._constraints, registry._supported_arg_names)]
        members = list(AttentionBackendName.__members__.items())
        # Python itself notes the slots of a class when it copies an object of it.
        attributes = [{name: vars(each)[name] for name in vars(each) if name != "__slotnames__"} for each in classes]
        return tables, members, registry._active_backend, attributes

    diffusers.utils.logging.set_verbosity_error()
    before, sdpa = state(), torch.nn.functional.scaled_dot_product_attention
    yield
    assert state() == before
    assert torch.nn.functional.scaled_dot_product_attention is sdpa


@pytest.fixture
def flash():
    """flash_attention_2 as it is where its kernel runs on the CPU, in the registry."""
    attnreg.default_registry.add(on_the_cpu("flash_attention_2"), replace=True)
    return "flash_attention_2"


def give(model, backend) -> None:
    """Give all parts a backend that may be in no registry."""
    parts = bridge.HOST.parts(model)
    host._commit(host._classes({part.module: backend for part in parts}))
    assert {bridge.HOST.implementation(part) for part in parts} == {backend.name}


@pytest.mark.parametrize("name", ["eager", "sdpa", "loopback"])
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_outputs_are_those_of_native(make, name) -> None:
    """On each model, with its masks: diffusers' native output; and after going back, bitwise what it was."""
    model, inputs = made(make)
    expected = run(model, inputs)
    assert get_attn_implementation(model) == "diffusers:native"
    set_attn_implementation(model, name)
    assert get_attn_implementation(model) == name
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-5, atol=1e-5)
    set_attn_implementation(model, "diffusers:native")
    assert get_attn_implementation(model) == "diffusers:native"
    assert torch.equal(run(model, inputs), expected)


def test_flex_attention() -> None:
    """A backend of block masks and score functions: padding becomes blocks."""
    model, inputs = made(tiny.qwen_image)
    expected = run(model, inputs)
    set_attn_implementation(model, "flex_attention")
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_kernels_that_are_references_here(make, name) -> None:
    """In half precision, as close to native in float32 as native in half is, or quantised; or refused by its mask."""
    exact = run(*made(make))
    model, inputs = made(make, torch.bfloat16)
    native = (run(model, inputs) - exact).pow(2).mean().sqrt()
    backend = on_the_cpu(name)
    give(model, backend)
    if name != "xformers" and make in {*FLOATING, tiny.hunyuan_video, tiny.cosmos_vae}:
        with pytest.raises(UnsupportedError) as caught:
            run(model, inputs)
        codes = ["mask", "position_bias"] if make in FLOATING else ["mask"]
        assert [reason.code for reason in caught.value.reasons] == codes
        return
    error = (run(model, inputs) - exact).pow(2).mean().sqrt()
    allowed = backend.supports.lossy_error * exact.pow(2).mean().sqrt() if backend.supports.lossy else 0
    assert error <= 2 * native + allowed


@pytest.mark.parametrize("make", TRANSFORMERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_gradients_are_those_of_native(make, name) -> None:
    """Training: every parameter's gradient, with and without checkpointing."""
    gradients = []
    for implementation, checkpointing in (("diffusers:native", False), (name, False), (name, True)):
        model, inputs = made(make)
        set_attn_implementation(model, implementation)
        if checkpointing:
            model.train().enable_gradient_checkpointing()
        model(**inputs, return_dict=False)[0].pow(2).sum().backward()
        gradients.append({path: each.grad for path, each in model.named_parameters()})
    expected, *others = gradients
    for path, gradient in expected.items():
        for other in others:
            torch.testing.assert_close(other[path], gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("make", "names"), [(tiny.flux, ["sdpa", "eager"]), (tiny.qwen_image, ["sdpa"])])
def test_compiled_whole(make, names) -> None:
    """torch.compile takes the model in one graph, also when it is given another backend afterwards."""
    model, inputs = made(make)
    expected = run(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for name in names:
        set_attn_implementation(model, name)
        torch.testing.assert_close(run(compiled, inputs), expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_blocks_on_one_backend_are_of_one_class() -> None:
    """torch.compile, which looks at classes, sees blocks alike, and diffusers sees the class that it knows."""
    model, _ = made(tiny.sd3)
    set_attn_implementation(model, "sdpa")
    assert type(model.transformer_blocks[0].attn) is type(model.transformer_blocks[1].attn)
    assert type(model.transformer_blocks[0].attn).__name__ == "Attention"
    assert isinstance(model.transformer_blocks[0].attn, attention_processor.Attention)


def test_two_models_in_two_threads() -> None:
    """Two models on different backends at once, each of which counts the calls that it gets."""
    counted = {"one": [], "two": []}

    def counting(name):
        def attention(module, query, key, value, attention_mask=None, **kwargs):
            counted[name].append(threading.get_ident())
            return attnreg.get("sdpa").call(module, query, key, value, attention_mask, **kwargs)

        attnreg.AttentionInterface.register(
            name, attention, mask=attnreg.masks.sdpa_mask, supports=attnreg.get("sdpa").supports
        )

    def work(name):
        model, inputs = prepared[name]
        barrier.wait()
        outputs[name] = [run(model, inputs) for _ in range(20)]

    prepared, outputs, barrier = {}, {}, threading.Barrier(2)
    for name in counted:
        counting(name)
        prepared[name] = made(tiny.flux)
        set_attn_implementation(prepared[name][0], name)
    expected = run(*made(tiny.flux))
    threads = [threading.Thread(target=work, args=(name,)) for name in counted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for thread, name in zip(threads, counted, strict=True):
        assert counted[name] == [thread.ident] * 40
        assert all(torch.equal(each, expected) for each in outputs[name])


def test_some_parts_only(flash) -> None:
    """A pattern names the blocks; the refiner, whose mask flash cannot express, keeps diffusers' own."""
    model, inputs = made(tiny.hunyuan_video, torch.bfloat16)
    expected = run(model, inputs)
    set_attn_implementation(model, {"*transformer_blocks.*": flash})
    found = get_attn_implementation(model)
    assert {path for path, name in found.items() if name == "diffusers:native"} == {
        "context_embedder.token_refiner.refiner_blocks.0.attn"
    }
    assert (run(model, inputs) - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_mask_of_all_layers_is_formatted_once() -> None:
    """Layers that share a mask share its sequences, until it is written to; another forward has its own."""
    calls = []
    backend = on_the_cpu("flash_attention_2")

    def mask(*args, **kwargs):
        calls.append(args)
        return backend.mask(*args, **kwargs)

    for said in ("native", "lowered", "takes"):
        setattr(mask, said, getattr(backend.mask, said))
    counting = attnreg.Backend(name="counting", attention=backend.attention, mask=mask, supports=backend.supports)
    attnreg.default_registry.add(counting)
    model, inputs = made(tiny.hunyuan_video, torch.bfloat16)
    set_attn_implementation(model, {"*transformer_blocks.*": "counting"})
    run(model, inputs)
    assert len(calls) == 1  # for three blocks
    run(model, inputs)
    assert len(calls) == 2


def test_the_choice_is_copied_and_pickled() -> None:
    """A copy, and a model that comes back from pickle, run on the backend, and go back alike; the state is the same."""
    model, inputs = made(tiny.flux)
    expected, keys = run(model, inputs), list(model.state_dict())
    set_attn_implementation(model, "eager")
    assert list(model.state_dict()) == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own bytes
        assert get_attn_implementation(other) == "eager"
        assert torch.equal(run(other, inputs), run(model, inputs))
        bridge.reset(other)
        assert get_attn_implementation(other) == "diffusers:native"
        assert type(other.transformer_blocks[0].attn) is FluxAttention
        assert torch.equal(run(other, inputs), expected)
    assert get_attn_implementation(model) == "eager"


def test_reset_leaves_no_trace() -> None:
    """Classes and what processors say are as they were; a pipeline's models are reset one by one."""
    model, _ = made(tiny.flux)
    attn = model.transformer_blocks[0].attn
    processor, attributes = attn.processor, dict(vars(attn))
    set_attn_implementation(model, "eager")
    bridge.reset(model)
    assert type(attn) is FluxAttention
    assert attn.processor is processor
    assert vars(processor) == {}
    assert dict(vars(attn)) == attributes
    with pytest.raises(BridgeError, match="a str is no model and no pipeline"):
        bridge.reset("model")


def test_fused_projections() -> None:
    """Fusing the projections keeps the backend, with processors that diffusers puts in and takes out."""
    for make in (tiny.flux, tiny.sd3):
        model, inputs = made(make)
        expected = run(model, inputs)
        set_attn_implementation(model, "eager")
        model.fuse_qkv_projections()
        assert get_attn_implementation(model) == "eager"
        torch.testing.assert_close(run(model, inputs), expected, rtol=1e-5, atol=1e-5)
        model.unfuse_qkv_projections()
        bridge.reset(model)
        assert torch.equal(run(model, inputs), expected)


def test_diffusers_own_call_takes_over() -> None:
    """What is called last counts: set_attention_backend puts a module on diffusers' own, and says so."""
    model, inputs = made(tiny.flux)
    expected = run(model, inputs)
    set_attn_implementation(model, "eager")
    model.set_attention_backend("native")
    assert get_attn_implementation(model) == "diffusers:native"
    assert torch.equal(run(model, inputs), expected)
    model.set_attention_backend("_native_math")
    assert get_attn_implementation(model) == "diffusers:_native_math"
    set_attn_implementation(model, "eager")
    assert get_attn_implementation(model) == "eager"
    set_attn_implementation(model, "diffusers:_native_math")
    assert model.transformer_blocks[0].attn.processor._attention_backend == "_native_math"
    attention_dispatch._AttentionBackendRegistry._active_backend = AttentionBackendName.NATIVE


def test_another_models_choice_is_not_followed() -> None:
    """The active backend of diffusers, which any model's set_attention_backend changes, does not reach a served module."""
    model, inputs = made(tiny.flux)
    set_attn_implementation(model, "eager")
    expected = run(model, inputs)
    registry = attention_dispatch._AttentionBackendRegistry
    registry._active_backend = AttentionBackendName._NATIVE_MATH
    try:
        assert torch.equal(run(model, inputs), expected)
        model.set_attn_processor(FluxAttnProcessor())
        with pytest.raises(BridgeError, match="follows diffusers' active backend, which is '_native_math'") as caught:
            run(model, inputs)
        assert "Call attnreg.set_attn_implementation again" in str(caught.value)
        set_attn_implementation(model, "eager")
        assert torch.equal(run(model, inputs), expected)
    finally:
        registry._active_backend = AttentionBackendName.NATIVE


class Mine:
    """A processor of one's own, which computes attention itself."""

    def __call__(self, attn, hidden_states, **_):
        return hidden_states


def test_what_cannot_be_served_is_refused() -> None:
    """Unknown processors, and those that attend another way, are named with a way out; nothing has changed."""
    model, inputs = made(tiny.unet)
    expected = run(model, inputs)
    model.set_attn_processor(attention_processor.AttnProcessor())
    assert get_attn_implementation(model) == "diffusers:AttnProcessor"
    with pytest.raises(BridgeError) as caught:
        set_attn_implementation(model, "sdpa")
    assert str(caught.value) == (
        "diffusers: 'down_blocks.1.attentions.0.transformer_blocks.0.attn1' (Attention) cannot be given a backend: its "
        "processor diffusers.models.attention_processor.AttnProcessor computes attention itself, not with "
        "scaled_dot_product_attention or dispatch_attention_fn. Give the module the processor AttnProcessor2_0 "
        "(set_processor), or leave it out."
    )
    model.set_attn_processor(attention_processor.AttnProcessor2_0())
    model.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(Mine())
    with pytest.raises(BridgeError, match=r"attn2' \(Attention\) .* its processor .*Mine computes attention itself"):
        set_attn_implementation(model, "sdpa")
    assert set(get_attn_implementation(model).values()) == {"diffusers:native", "diffusers:Mine"}
    set_attn_implementation(model, {"down_blocks": "eager", "up_blocks": "eager"})
    model.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(attention_processor.AttnProcessor2_0())
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-5, atol=1e-5)


def test_shared_processors() -> None:
    """A processor that modules share is theirs together: all are served, or none."""
    model, inputs = made(tiny.flux)
    expected = run(model, inputs)
    model.set_attn_processor(FluxAttnProcessor())
    with pytest.raises(BridgeError, match="share a processor, and only one of them would be served. Name both"):
        set_attn_implementation(model, {"transformer_blocks.*": "eager"})
    assert get_attn_implementation(model) == "diffusers:native"
    set_attn_implementation(model, {"transformer_blocks.*": "eager", "single_transformer_blocks.*": "sdpa"})
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(BridgeError, match="share a processor"):
        set_attn_implementation(model, {"transformer_blocks.*": "diffusers:native"})
    bridge.reset(model)
    assert torch.equal(run(model, inputs), expected)


def test_another_of_diffusers_own() -> None:
    """Going back is to what was there; for others of diffusers' own there is diffusers' own call."""
    model, _ = made(tiny.flux)
    with pytest.raises(BridgeError, match="was on 'diffusers:native' before, not on 'diffusers:flash'") as caught:
        set_attn_implementation(model, "diffusers:flash")
    assert "Use diffusers' model.set_attention_backend" in str(caught.value)


def test_split_over_devices() -> None:
    """Context parallelism computes past torch's function: refused before, and at the call if it comes after."""
    model, inputs = made(tiny.flux)
    processor = model.transformer_blocks[0].attn.processor
    set_attn_implementation(model, "sdpa")
    processor._parallel_config = object()
    with pytest.raises(BridgeError, match="splits attention over devices, past any backend. Put diffusers' own"):
        run(model, inputs)
    bridge.reset(model)
    with pytest.raises(BridgeError, match="splits attention over devices. Do without enable_parallelism"):
        set_attn_implementation(model, "sdpa")


def test_needs_are_read_off_the_modules() -> None:
    """What a part needs is known before it is called, so a backend that cannot serve it is refused at once."""
    for make, head_dim in ((tiny.flux, 16), (tiny.wan, 12), (tiny.unet, 8), (tiny.vae, 16)):
        model, _ = made(make, torch.bfloat16)
        needs = bridge.HOST.parts(model)[0].needs
        assert (needs.device, needs.dtype, needs.head_dim) == ("cpu", "bfloat16", head_dim)
    with pytest.raises(attnreg.UnsupportedPartError, match="transformer_blocks.0.attn") as caught:
        set_attn_implementation(made(tiny.flux)[0], "flash_attention_3")
    assert {"device", "dtype"} <= {reason.code for reason in caught.value.reasons}


def test_norms_in_another_dtype_do_not_tell() -> None:
    """The dtype of calls is that of the weights; where these are quantised, nothing is known, and nothing refused."""
    model, _ = made(tiny.flux, torch.bfloat16)
    attn = model.transformer_blocks[0].attn
    attn.norm_q.float()
    assert bridge.HOST.parts(model)[0].needs.dtype == "bfloat16"
    attn.to_q.weight = torch.nn.Parameter(torch.zeros(32, 32, dtype=torch.uint8), requires_grad=False)
    assert bridge.HOST.parts(model)[0].needs.dtype is None


@pytest.mark.parametrize("first", ["backend", "hooks"])
def test_hooks_of_diffusers(first) -> None:
    """Hooks that wrap a module's forward, put there before or after, leave the backend in charge of what runs."""
    calls = []

    def attention(module, query, key, value, attention_mask=None, **kwargs):
        calls.append(query.shape)
        return attnreg.get("sdpa").call(module, query, key, value, attention_mask, **kwargs)

    supports = attnreg.get("sdpa").supports
    attnreg.AttentionInterface.register("counting", attention, mask=attnreg.masks.sdpa_mask, supports=supports)
    model, inputs = made(tiny.flux)
    expected = run(model, inputs)
    if first == "backend":
        set_attn_implementation(model, "counting")
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1000),
        current_timestep_callback=lambda: 500,
        spatial_attention_block_identifiers=("transformer_blocks",),
    )
    diffusers.apply_pyramid_attention_broadcast(model, config)
    if first == "hooks":
        set_attn_implementation(model, "counting")
    assert torch.equal(run(model, inputs), expected)
    assert len(calls) == 2
    run(model, inputs)  # in which the hooks bring back what they have kept
    assert len(calls) == 2
    bridge.reset(model)
    assert get_attn_implementation(model) == "diffusers:native"


def test_pipelines() -> None:
    """A pipeline's models are named by their components, and go back together."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    pipeline = diffusers.DDPMPipeline(unet.eval(), diffusers.DDPMScheduler(num_train_timesteps=2))
    pipeline.set_progress_bar_config(disable=True)

    def image():
        return torch.from_numpy(
            pipeline(generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
        )

    expected = image()
    set_attn_implementation(pipeline, {"unet.down_blocks": "eager"})
    found = get_attn_implementation(pipeline)
    assert {path.split(".")[1] for path, name in found.items() if name == "eager"} == {"down_blocks"}
    torch.testing.assert_close(image(), expected, rtol=1e-4, atol=1e-4)
    bridge.reset(pipeline)
    assert get_attn_implementation(pipeline) == "diffusers:native"
    assert torch.equal(image(), expected)


def test_autocast() -> None:
    """Under autocast a backend is handed what torch's own function would be."""
    model, inputs = made(tiny.unet)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(model, inputs)
        set_attn_implementation(model, "sdpa")
        assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("name", ["sdpa", "counting"])
def test_processors_that_are_modules(name) -> None:
    """IP-Adapter's processors are no parts, and are handed every argument that they take, as masks of the image."""
    calls = []

    def attention(*args, **kwargs):
        calls.append(args)
        return attnreg.get("eager").call(*args, **kwargs)

    eager = attnreg.get("eager")
    attnreg.AttentionInterface.register("counting", attention, mask=eager.mask, supports=eager.supports)
    torch.manual_seed(0)
    attn = attention_processor.Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8).eval()
    attn.set_processor(attention_processor.IPAdapterAttnProcessor2_0(16, 12, (2,), 1.0))
    text = torch.randn(2, 7, 12), [torch.randn(2, 1, 2, 12)]
    given = {"hidden_states": torch.randn(2, 16, 16), "encoder_hidden_states": text}
    masked = {**given, "ip_adapter_masks": [torch.rand(1, 1, 4, 4)]}
    with torch.no_grad():
        expected, unmasked = attn(**masked), attn(**given)
        model = torch.nn.ModuleDict({"attn": attn})
        set_attn_implementation(model, name)
        assert [part.path for part in bridge.HOST.parts(model)] == ["attn"]
        torch.testing.assert_close(attn(**masked), expected)
    assert not torch.allclose(expected, unmasked)
    assert len(calls) == (2 if name == "counting" else 0)  # the text and the image


def test_sd3_with_an_ip_adapter() -> None:
    """What joint_attention_kwargs hand to the processors arrives."""
    model, inputs = made(tiny.sd3)
    for block in model.transformer_blocks:
        block.attn.set_processor(
            attention_processor.SD3IPAdapterJointAttnProcessor2_0(
                hidden_size=16, ip_hidden_states_dim=16, head_dim=8, timesteps_emb_dim=16, scale=1.0
            )
        )
    model.eval()
    given = {
        **inputs,
        "joint_attention_kwargs": {"ip_hidden_states": torch.randn(2, 3, 16), "temb": torch.randn(2, 16)},
    }
    expected, without = run(model, given), run(model, inputs)
    set_attn_implementation(model, "eager")
    torch.testing.assert_close(run(model, given), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, without)


@pytest.mark.parametrize("change", ["set_attn_processor", "set_default_attn_processor", "set_attention_slice"])
def test_a_processor_that_goes_past_the_backend(change) -> None:
    """One that is put in after the backend was set, by the user or by diffusers, raises when it is called."""
    model, inputs = made(tiny.unet)
    expected = run(model, inputs)
    set_attn_implementation(model, "eager")
    argument = {"set_attn_processor": (attention_processor.AttnProcessor(),), "set_attention_slice": (1,)}
    getattr(model, change)(*argument.get(change, ()))
    name = "SlicedAttnProcessor" if change == "set_attention_slice" else "AttnProcessor"
    assert get_attn_implementation(model) == f"diffusers:{name}"
    with pytest.raises(BridgeError, match=rf"another processor since .* its processor .*\.{name} computes attention"):
        run(model, inputs)
    bridge.reset(model)
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-5, atol=1e-5)
    model.set_attn_processor(attention_processor.AttnProcessor2_0())
    set_attn_implementation(model, "eager")
    assert get_attn_implementation(model) == "eager"


@pytest.mark.parametrize("kept_by", ["diffusers", "the user"])
def test_processors_that_are_kept_aside(kept_by) -> None:
    """Processors that are out of the model while it is reset come back as they were."""
    model, _ = made(tiny.flux)
    set_attn_implementation(model, "eager")
    processors = dict(model.attn_processors)
    if kept_by == "diffusers":
        model.fuse_qkv_projections()
        bridge.reset(model)
        model.unfuse_qkv_projections()
    else:
        model.set_attn_processor(FluxAttnProcessor())
        bridge.reset(model)
        model.set_attn_processor(dict(processors))
    assert all(model.attn_processors[path] is each and vars(each) == {} for path, each in processors.items())
    with attention_dispatch.attention_backend("_native_math"):
        assert get_attn_implementation(model) == "diffusers:_native_math"


class MyModule(torch.nn.Module):
    """A processor of one's own that is a module, takes an argument of its own, and attends with torch's function."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(16))

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, shift=0.0):
        heads = (hidden_states * self.scale)[:, None]
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)[:, 0] + shift


def test_a_processor_of_ones_own_that_is_a_module() -> None:
    """It attends for the module that has it: that one's backend answers, and its arguments arrive."""
    calls = []

    def attention(*args, **kwargs):
        calls.append(args)
        return sdpa.call(*args, **kwargs)

    sdpa = attnreg.get("sdpa")
    counting = attnreg.Backend(name="counting", attention=attention, mask=sdpa.mask, supports=sdpa.supports)
    attn = attention_processor.Attention(query_dim=16, heads=2, dim_head=8).eval()
    attn.set_processor(MyModule())
    model, states = torch.nn.ModuleDict({"attn": attn}), torch.randn(1, 4, 16)
    with torch.no_grad():
        expected = attn(states, shift=5.0)
        give(model, counting)
        torch.testing.assert_close(attn(states, shift=5.0), expected)
        assert len(calls) == 1
        bridge.reset(model)
        assert torch.equal(attn(states, shift=5.0), expected)
    assert len(calls) == 1
