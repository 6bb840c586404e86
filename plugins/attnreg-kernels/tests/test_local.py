"""Kernels on this disk: registered under a name of the user's, loaded at the first call, whole in graphs."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import attnreg_kernels
import pytest
import torch
from attnreg_kernels import offline
from torch._dynamo.exc import BackendCompilerFailed

import attnreg
from attnreg import InvalidInputError, KernelError, NameTakenError, UnsupportedError, UnsupportedMaskError
from attnreg.masks import causal, flash_attention_mask, sdpa_mask

IN_ROWS = replace(
    attnreg_kernels.CAPABILITIES["flash_attn_2"],
    devices=frozenset({"cpu"}),
    structures=frozenset({"causal", "bidirectional", "sliding_window"}),
    packing=False,
)


def adapter(function, module, query, key, value, attention_mask, *, scaling=None, **_):  # noqa: ARG001
    """Hand everything that is declared on to the function."""
    return function(query, key, value, attention_mask, scaling).transpose(1, 2), None


@pytest.fixture
def registered(kernel: Path, registry: attnreg.Registry):
    """A function that registers a function of the kernel on the CPU as `mine`."""

    def register(function: str = "flash_attn_func", **words) -> attnreg.Backend:
        said = {"convention": "flash_attn_2", "supports": IN_ROWS, "registry": registry, **words}
        return attnreg_kernels.local("mine", kernel, function=function, **said)

    return register


def inputs(*, gradients: bool = False) -> list[torch.Tensor]:
    """Query, key and value, of grouped heads and different lengths."""
    torch.manual_seed(0)
    shapes = ((2, 4, 6, 16), (2, 2, 9, 16), (2, 2, 9, 16))
    return [torch.randn(shape).bfloat16().requires_grad_(gradients) for shape in shapes]


def test_it_is_registered_and_not_loaded(registered, registry: attnreg.Registry, kernel: Path) -> None:
    """It is a backend like any other, which nothing of is imported for."""
    backend = registered()
    assert registry.get("mine") is backend
    assert "mine" in registry.names()
    assert backend.kernel.reasons("cpu") == []
    assert backend.kernel.note == f"from {kernel}"
    registered()  # the same cell of a notebook, run twice
    with pytest.raises(NameTakenError):
        registered("plain_func")
    registered("plain_func", replace=True)


def test_a_build_is_found_in_its_folder(kernel: Path, tmp_path: Path, registry: attnreg.Registry) -> None:
    """The folder may hold builds, of which the one for here is taken."""
    backend = "cuda" if torch.version.cuda else "cpu"
    shutil.copytree(kernel, tmp_path / "build" / f"torch-{backend}")
    found = attnreg_kernels.local(
        "mine", tmp_path, function="flash_attn_func", convention="flash_attn_2", supports=IN_ROWS, registry=registry
    )
    assert found.kernel is not None
    assert Path(found.kernel.load().module.__file__).is_relative_to(tmp_path)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"path": "no/such/folder"}, "the path of a local kernel is 'no/such/folder'; wanted: an existing folder"),
        ({"name": "org/mine"}, "the name of a local kernel is 'org/mine'; wanted: a name without a slash"),
        ({"convention": attnreg_kernels.OWN}, "convention is 'own'; wanted: flash_attn_2, flash_attn_3, or an adapter"),
    ],
)
def test_what_is_no_local_kernel(kernel: Path, registry: attnreg.Registry, words: dict, text: str) -> None:
    """It is refused when it is registered, and nothing is."""
    said = {"name": "mine", "path": kernel, "convention": "flash_attn_2", **words}
    with pytest.raises(InvalidInputError) as caught:
        attnreg_kernels.local(
            said["name"], said["path"], function="f", convention=said["convention"], registry=registry
        )
    assert text in str(caught.value)
    assert "mine" not in registry.names()


def test_functions_that_are_not_as_declared(registered) -> None:
    """A kernel is held to its convention when it is loaded: no function, or one that would swallow what it is told."""
    with pytest.raises(KernelError) as caught:
        registered("no_such_function").kernel.load()
    assert caught.value.reasons[0].code == "hub_function"
    assert "attend, flash_attn_func, flash_attn_varlen_func, inference_func, plain_func" in str(caught.value)
    for function, _missing in (
        ("swallowing_func", "with causal, deterministic"),
        ("attend", "with causal, deterministic"),
    ):
        backend = registered(function, replace=True)
        with pytest.raises(KernelError, match="with causal, deterministic") as caught:
            backend.call(None, *inputs(), None)
        assert [reason.code for reason in backend.kernel.reasons()] == ["hub_function"]
        assert "It follows another convention" in str(caught.value)


def test_offline_a_local_kernels_dependencies_are_trusted_by_name(kernel: Path, tmp_path: Path) -> None:
    """The folder is the user's; what it brings with it is not."""
    shutil.copytree(kernel, tmp_path / "mine")
    metadata = (
        (kernel / "metadata.json")
        .read_text()
        .replace(
            '"python-depends": []',
            '"python-depends": [], "kernel-depends": [{"repo-id": "evil/lib", "revision": "main"}]',
        )
    )
    (tmp_path / "mine" / "metadata.json").write_text(metadata)
    assert offline.obstacles_of(kernel) == []
    assert [reason.code for reason in offline.obstacles_of(tmp_path / "mine")] == ["hub_trust", "hub_not_cached"]


def test_without_a_companion_sequences_are_refused(registered) -> None:
    """A mask that needs sequences of different lengths is refused, also where another's formatter has made it."""
    backend = registered()
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[0, :3] = False
    mask = flash_attention_mask(2, 6, 9, 3, mask_function=causal(), attention_mask=padding)
    with pytest.raises(UnsupportedMaskError, match="Declare its companion"):
        backend.call(None, *inputs(), mask)
    request = attnreg.Request(structures=frozenset({"padding"}))
    assert [reason.code for reason in backend.reasons(request)] == ["mask"]


def test_an_adapter(registered) -> None:
    """A function of another convention computes through the adapter that was declared with it."""
    supports = attnreg.Capabilities(devices=frozenset({"cpu"}), grouped_query=False)
    backend = registered("attend", convention=adapter, supports=supports, mask=sdpa_mask)
    query, key, _ = torch.randn(3, 1, 2, 5, 8)
    mask = backend.format(batch_size=1, q_length=5, kv_length=5, mask_function=causal(), attention_mask=None)
    output, _ = backend.call(None, query, key, key, mask, scaling=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True, scale=0.3)
    torch.testing.assert_close(output, expected.transpose(1, 2))


@pytest.mark.parametrize("padded", [False, True])
def test_in_a_graph_it_is_one_operator(registered, *, padded: bool) -> None:
    """torch.compile(fullgraph=True) gives the same output, and the gradients that the function itself brings."""
    supports = replace(attnreg_kernels.CAPABILITIES["flash_attn_2"], devices=frozenset({"cpu"}))
    backend = registered(varlen="flash_attn_varlen_func", supports=supports)
    mask = None
    if padded:
        padding = torch.ones(2, 9, dtype=torch.bool)
        padding[0, :3] = False
        mask = flash_attention_mask(2, 6, 9, 3, mask_function=causal(), attention_mask=padding)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return backend.call(None, *tensors, mask, softcap=20.0, is_causal=True)[0]

    found = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        tensors = inputs(gradients=True)
        output = call(*tensors)
        output.float().square().sum().backward()
        found.append([output.detach(), *(each.grad for each in tensors)])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_a_gradient_that_the_function_does_not_bring(registered) -> None:
    """Outside of a graph it is torch's; in a graph an operator has none, and says so instead of giving 0."""
    backend = registered("plain_func")

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return backend.call(None, *tensors, None, is_causal=False)[0]

    query, key, _ = inputs()
    tensors = [each.requires_grad_() for each in (query, key.repeat(1, 2, 1, 1), key.repeat(1, 2, 1, 1))]
    run(*tensors).sum().backward()
    assert tensors[2].grad is not None
    assert bool(tensors[2].grad.any())
    output = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors)
    with pytest.raises(UnsupportedError, match="its gradient in a graph"):
        output.sum().backward()


def written(folder: Path, source: str, kernel: Path) -> Path:
    """Put a kernel of *source* into *folder*, under an id of its own."""
    folder.mkdir()
    metadata = (kernel / "metadata.json").read_text()
    (folder / "metadata.json").write_text(metadata.replace("_attnreg_flash_on_cpu", f"_{folder.name}"))
    (folder / "__init__.py").write_text(source)
    return folder


@pytest.mark.parametrize(
    "error",
    [
        "ValueError('do not trust this GPU')",
        "ValueError('CUDA version 12 needed')",
        "FileNotFoundError('libcudart.so.12')",
        "ConnectionError('no licence server')",
        "RuntimeError('not for the current device')",
    ],
)
def test_what_a_kernel_says_is_no_advice(kernel: Path, tmp_path: Path, registry: attnreg.Registry, error: str) -> None:
    """Whatever a kernel's own module raises, the remedy is the publisher's, and never more trust."""
    folder = written(tmp_path / "raising", f"raise {error}", kernel)
    backend = attnreg_kernels.local(
        "mine", folder, function="f", convention="flash_attn_2", supports=IN_ROWS, registry=registry
    )
    assert backend.kernel is not None
    with pytest.raises(KernelError) as caught:
        backend.kernel.load()
    assert [(each.code, each.fix) for each in caught.value.reasons] == [
        ("kernel_import", "Report this to those who publish it.")
    ]


def test_two_names_of_one_kernel_import_it_once(kernel: Path, tmp_path: Path, registry: attnreg.Registry) -> None:
    """Two threads that ask for it by two names at once wait for each other."""
    count = (
        "import pathlib, time\nwith open(pathlib.Path(__file__).parent / 'count', 'a') as file:\n    file.write('x')\n"
    )
    source = (kernel / "__init__.py").read_text()
    folder = written(tmp_path / "counting", f"{count}time.sleep(0.3)\n{source}", kernel)
    backends = [
        attnreg_kernels.local(
            name, folder, function="flash_attn_func", convention="flash_attn_2", supports=IN_ROWS, registry=registry
        )
        for name in ("one", "two")
    ]
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda backend: backend.kernel.load().module, backends)
    assert first is second
    assert (folder / "count").read_text() == "x"


def equal_heads() -> list[torch.Tensor]:
    """Query, key and value with gradients, of as many heads."""
    query, key, _ = inputs()
    return [each.detach().requires_grad_() for each in (query, key.repeat(1, 2, 1, 1), key.repeat(1, 2, 1, 1))]


def test_a_function_for_inference_alone(registered) -> None:
    """Where gradients are wanted it raises, instead of training without them; without gradients it computes."""
    backend = registered("inference_func")
    tensors = equal_heads()
    with pytest.raises(UnsupportedError) as caught:
        backend.call(None, *tensors, None, is_causal=False)
    assert str(caught.value) == (
        "backend 'mine' cannot do what is asked:\n"
        "  backward: wants gradients; supported: what its function brings, which is none. Declare it without "
        "(supports=..., backward=False), call it under torch.no_grad(), or choose another one."
    )
    with torch.no_grad():
        assert not backend.call(None, *tensors, None, is_causal=False)[0].requires_grad


def test_an_adapter_for_inference_alone(registered) -> None:
    """An adapter's function is held to the same: gradients that are wanted are there, or an error."""

    def detached(function, module, query, key, value, attention_mask, *, scaling=None, **_):
        return adapter(function, module, query, key, value, attention_mask, scaling=scaling)[0].detach(), None

    supports = attnreg.Capabilities(devices=frozenset({"cpu"}))
    backend = registered("attend", convention=detached, supports=supports, mask=sdpa_mask)
    with pytest.raises(UnsupportedError, match="supported: what its function brings, which is none"):
        backend.call(None, *equal_heads(), None, is_causal=False)


@pytest.mark.parametrize("compiled", [False, True])
def test_there_is_no_gradient_of_the_lse(registered, *, compiled: bool) -> None:
    """Whoever asks for it gets an error, and not a gradient of 0; detached, it stands beside that of the output."""
    backend = registered(supports=replace(IN_ROWS, lse=True))

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, _, lse = backend.call(None, *tensors, None, is_causal=False, return_lse=True)
        return output, lse

    def detached(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, lse = run(*tensors)
        return output, lse.detach()

    def backward(function, tensors: list[torch.Tensor]) -> None:
        call = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
        output, lse = call(*tensors)
        (output.float().square().sum() + lse.sum()).backward()

    error = BackendCompilerFailed if compiled else UnsupportedError
    with pytest.raises(error, match="wants the gradient of the log-sum-exp; supported: that of the output"):
        backward(run, inputs(gradients=True))
    tensors = inputs(gradients=True)
    backward(detached, tensors)
    assert tensors[0].grad is not None
    assert bool(tensors[0].grad.any())


def test_the_kernel_is_loaded_once(registered) -> None:
    """The module is imported at the first call, under the id in its metadata."""
    backend = registered()
    backend.call(None, *inputs(), None)
    assert "_attnreg_flash_on_cpu" in sys.modules
    assert backend.kernel.load() is backend.kernel.load()
