"""Kernels: a package is there or not, of a right version or not, sound or not, and what `auto` makes of each."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys

import pytest
import torch
from doubles import BUILTIN, formatter
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet

import attnreg
from attnreg import (
    Backend,
    Capabilities,
    InvalidInputError,
    Kernel,
    KernelError,
    NoBackendError,
    Registry,
    Request,
    UnsupportedError,
    explain,
    resolve,
)
from attnreg.discovery import Discovery
from attnreg.plugins import PluginFinder

MODULE = "plugin_toy_kernel"
SOUND = "def attend(): pass\n\n\nclass cute:\n    attend = staticmethod(attend)\n"
ASKED = f'Reinstall it for this torch and CUDA, and look at what it says: python -c "import {MODULE}".'
MISSING = "Install it: pip install toy-kernel."


def kernel(**parts) -> Kernel:
    """A kernel in the distribution `toy-kernel`, which an adapter made for versions 2.6 to 3 calls."""
    toy = {"distribution": "toy-kernel", "module": MODULE, "functions": ("attend",), "versions": ">=2.6,<3"}
    return Kernel(**toy | parts)


def texts(reasons) -> list[str]:
    """What reasons say."""
    return [str(reason) for reason in reasons]


@pytest.fixture
def toy(site):
    """A function that installs `toy-kernel` with *code* as its module, anew if it is there."""

    def install(code: str | None = SOUND, version: str = "2.8.3") -> None:
        for old in site.path.glob("toy_kernel-*"):
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
        sys.modules.pop(MODULE, None)
        site.install("toy-kernel", version, modules={} if code is None else {MODULE: code})
        importlib.invalidate_caches()

    return install


PROBLEMS = [
    (
        "kernel_missing",
        None,
        "",
        "kernel_missing: wants the package toy-kernel (>=2.6,<3); supported: no such package is installed here. "
        "Install it: pip install toy-kernel.",
    ),
    (
        "kernel_version",
        "3.0.0",
        SOUND,
        "kernel_version: wants the package toy-kernel (>=2.6,<3); supported: toy-kernel 3.0.0 is installed here. "
        "Install one of those: pip install toy-kernel.",
    ),
    (
        "kernel_import",
        "2.8.3",
        "raise ImportError('libcudart.so.12: cannot open shared object file\\nand much more')",
        f"kernel_import: wants toy-kernel 2.8.3; supported: {MODULE} cannot be imported (ImportError: libcudart.so.12: "
        f"cannot open shared object file). {ASKED}",
    ),
    (
        "kernel_import",
        "2.8.3",
        "import sys; sys.exit(3)",
        f"kernel_import: wants toy-kernel 2.8.3; supported: {MODULE} cannot be imported (SystemExit: 3). {ASKED}",
    ),
    (
        "kernel_import",
        "2.8.3",
        "raise RuntimeError",
        f"kernel_import: wants toy-kernel 2.8.3; supported: {MODULE} cannot be imported (RuntimeError). {ASKED}",
    ),
    (
        "kernel_import",
        "2.8.3",
        "class Odd(BaseException): pass\nraise Odd('no exception of the usual kind')",
        f"kernel_import: wants toy-kernel 2.8.3; supported: {MODULE} cannot be imported (Odd: no exception of the usual "
        f"kind). {ASKED}",
    ),
    (
        "kernel_import",
        "2.8.3",
        "this is no python",
        f"kernel_import: wants toy-kernel 2.8.3; supported: {MODULE} cannot be imported (SyntaxError: invalid syntax "
        f"({MODULE}.py, line 1)). {ASKED}",
    ),
    (
        "kernel_attribute",
        "2.8.3",
        "def other(): pass",
        f"kernel_attribute: wants toy-kernel 2.8.3; supported: {MODULE} has no attend (AttributeError: module "
        f"'{MODULE}' has no attribute 'attend'). {ASKED}",
    ),
    (
        "kernel_attribute",
        "2.8.3",
        "def __getattr__(name): raise OSError('undefined symbol: _ZN')",
        f"kernel_attribute: wants toy-kernel 2.8.3; supported: {MODULE} has no attend (OSError: undefined symbol: "
        f"_ZN). {ASKED}",
    ),
]


@pytest.mark.parametrize(("code", "version", "source", "text"), PROBLEMS, ids=[text[:90] for *_, text in PROBLEMS])
def test_each_problem_has_its_code_and_its_remedy(toy, code, version, source, text) -> None:
    """What keeps a kernel from being used is one reason, word for word, in the error and for `reasons()` afterwards."""
    if version is not None:
        toy(source, version)
    found = kernel()
    before = texts(found.reasons())
    assert before == ([text] if code in ("kernel_missing", "kernel_version") else [])
    for _ in range(2):
        with pytest.raises(KernelError) as caught:
            found.load()
        assert [reason.code for reason in caught.value.reasons] == [code]
        assert str(caught.value) == f"the kernel of toy-kernel cannot be used:\n  {text}"
        assert caught.value.name == "toy-kernel"
        assert texts(found.reasons()) == [text]
    assert (caught.value.__cause__ is None) == (before != [])


def test_the_install_hint_is_the_remedy(toy) -> None:
    """An adapter's own words on how to get the package stand where `pip install` would."""
    hint = kernel(install="pip install toy-kernel --no-build-isolation")
    assert hint.reasons()[0].fix == "Install it: pip install toy-kernel --no-build-isolation."
    toy(version="2.5")
    assert hint.reasons()[0].fix == "Install one of those: pip install toy-kernel --no-build-isolation."
    assert str(kernel(distribution="other", versions="").reasons()[0]).startswith(
        "kernel_missing: wants the package other; supported: no such package is installed here."
    )


def test_the_gpu_is_one_that_the_kernel_is_for(toy, monkeypatch) -> None:
    """A GPU outside of the kernel's range is a reason on CUDA alone, where there is a GPU; loading refuses it too."""
    toy()
    hopper = kernel(min_gpu="9.0", max_gpu="10.3")
    assert hopper.reasons("cuda") == [] or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    for capability, refused in (((8, 6), True), ((9, 0), False), ((10, 0), False), ((10, 3), False), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda it=capability: it)
        assert [reason.code for reason in hopper.reasons("cuda")] == (["gpu"] if refused else [])
        assert hopper.reasons("cpu") == hopper.reasons() == []
        assert kernel().reasons("cuda") == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(KernelError) as caught:
        hopper.load()
    assert str(caught.value) == (
        "the kernel of toy-kernel cannot be used:\n  gpu: wants NVIDIA A100, of compute capability 8.0; supported: "
        "compute capabilities from 9.0 up to 10.3. Choose another backend or GPU."
    )
    assert MODULE not in sys.modules
    assert texts(kernel(min_gpu="9.0").reasons("cuda")) == [
        "gpu: wants NVIDIA A100, of compute capability 8.0; supported: compute capabilities from 9.0. Choose another "
        "backend or GPU."
    ]


def test_a_folder_of_the_right_name_is_no_package(site) -> None:
    """A namespace package that another distribution made can be imported, and is not the kernel's package."""
    folder = site.path / "plugin_toy_folder"
    folder.mkdir()
    (folder / "cute.py").write_text("def attend(): pass\n")
    site.install("other-kernel", "4.0")
    importlib.invalidate_caches()
    importlib.import_module("plugin_toy_folder.cute")
    found = kernel(module="plugin_toy_folder", functions=("cute.attend",))
    assert [reason.code for reason in found.reasons()] == ["kernel_missing"]
    with pytest.raises(KernelError, match="no such package is installed here"):
        found.load()
    site.install("toy-kernel", "2.8.3")
    importlib.invalidate_caches()
    assert found.load().cute.attend is not None


def test_a_function_can_be_one_of_a_part(toy) -> None:
    """A dotted name is looked up part by part; the part that is missing is the reason."""
    toy()
    assert kernel(functions=("attend", "cute.attend")).load().cute.attend is not None
    with pytest.raises(KernelError, match=rf"{MODULE} has no cute.forward \(AttributeError: "):
        kernel(functions=("cute.forward",)).load()


@given(
    version=st.sampled_from(["2.5.9", "2.6", "2.8.3", "2.8.3+cu12torch2.8", "2.9.0a1", "2.9.0.dev1", "3.0.0b2", "3.0"]),
    wanted=st.sampled_from(["", ">=2.6,<3", ">=2.6", "==2.8.*", ">=3.0.0b1", "<2.6", "!=2.8.3"]),
)
def test_versions_are_judged_as_pip_does_with_pre(version, wanted) -> None:
    """A version is right exactly where PEP 440 says so, and a pre-release is as good as any."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        info = Path(folder) / f"toy_kernel-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: toy-kernel\nVersion: {version}\n")
        sys.path.insert(0, folder)
        try:
            codes = [reason.code for reason in kernel(versions=wanted).reasons()]
        finally:
            sys.path.remove(folder)
    right = SpecifierSet(wanted).contains(version, prereleases=True)
    assert codes == ([] if right else ["kernel_version"])


def test_a_version_that_is_none(toy) -> None:
    """A package built with a version that PEP 440 does not know is of another version, and no crash."""
    toy(version="unknown")
    assert [reason.code for reason in kernel().reasons()] == ["kernel_version"]
    assert kernel(versions="").reasons() == []


def test_asking_imports_nothing(toy) -> None:
    """`reasons()` and `version()` read metadata: a package that ends the process at import does no harm."""
    toy("import os; os._exit(9)")
    assert kernel().version() == "2.8.3"
    assert kernel().reasons() == kernel().reasons("cpu") == kernel().reasons("cuda") == []
    assert MODULE not in sys.modules


def test_the_module_is_imported_once(toy, monkeypatch) -> None:
    """The first call imports; every later one returns the same module without looking anything up."""
    monkeypatch.setattr(sys, "runs", [], raising=False)
    toy("import sys\nsys.runs.append(1)\n" + SOUND)
    found = kernel()
    module = found.load()
    toy(None, version="9.9")
    assert found.load() is module
    assert sys.runs == [1]


def test_a_kernel_that_was_mended_works(toy) -> None:
    """A failure is no verdict for ever: the next attempt looks again, and a success clears what was said."""
    toy("raise OSError('no driver')")
    found = kernel()
    with pytest.raises(KernelError):
        found.load()
    assert [reason.code for reason in found.reasons()] == ["kernel_import"]
    toy("raise OSError('still no driver')  # and longer")
    toy()
    assert found.load().attend is not None
    assert found.reasons() == []


def test_keyboard_interrupt_is_not_swallowed(toy) -> None:
    """The person at the keyboard is no broken kernel."""
    toy("raise KeyboardInterrupt")
    found = kernel()
    with pytest.raises(KeyboardInterrupt):
        found.load()
    assert found.reasons() == []


def test_copies_leave_the_module_out(toy) -> None:
    """A loaded kernel pickles and copies as what it declares; the copy is equal, and imports the module itself."""
    toy()
    loaded = kernel(min_gpu="8.0", note="untried", install="somehow")
    loaded.load()
    for twin in (pickle.loads(pickle.dumps(loaded)), copy.copy(loaded), copy.deepcopy(loaded)):  # noqa: S301 - our own
        assert twin == loaded
        assert hash(twin) == hash(loaded)
        assert twin._module is None
        assert "_module" not in repr(twin)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (
            {"versions": "2.6 or later"},
            "Kernel(versions=...) is '2.6 or later'; wanted: a version specifier, such as '>=2.6,<3'.",
        ),
        ({"versions": "2.6"}, "Kernel(versions=...) is '2.6'; wanted: a version specifier, such as '>=2.6,<3'."),
        ({"min_gpu": "sm90"}, "Kernel(min_gpu=...) is 'sm90'; wanted: a compute capability, such as '9.0'."),
        ({"min_gpu": "9"}, "Kernel(min_gpu=...) is '9'; wanted: a compute capability, such as '9.0'."),
        ({"max_gpu": "9.0a"}, "Kernel(max_gpu=...) is '9.0a'; wanted: a compute capability, such as '9.0'."),
    ],
)
def test_what_means_nothing_is_refused(parts, text) -> None:
    """A version or a compute capability that cannot be read is an error where the kernel is declared."""
    with pytest.raises(InvalidInputError) as caught:
        kernel(**parts)
    assert str(caught.value) == text


def test_declaring_a_kernel_imports_no_torch() -> None:
    """A plugin's module declares its kernel and stays as light as that."""
    code = (
        "import attnreg, sys; k = attnreg.Kernel(distribution='toy', module='toy', versions='>=1', min_gpu='8.0'); "
        "print([r.code for r in k.reasons()], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['kernel_missing'] False"


NAMES = {
    "absent": ("kernel_missing", None),
    "old": ("kernel_version", SOUND),
    "broken": ("kernel_import", "raise OSError('undefined symbol')"),
    "changed": ("kernel_attribute", "def other(): pass"),
    "sound": ("", SOUND),
    "second": ("", SOUND),
}
"""Backends from the highest priority to the lowest: what is wrong with the kernel of each, and its module."""


@pytest.fixture
def registry(site, request):
    """The built-ins, and one backend for each of `NAMES`, its kernel in a distribution of its own."""
    registry = getattr(request, "param", None) or Registry(lambda: PluginFinder(lambda: Discovery((), ())))
    fill(site, registry)
    return registry


def fill(site, registry: Registry) -> None:
    """Install the kernels, and add the backends."""
    for priority, (name, (_, source)) in enumerate(reversed(NAMES.items())):
        module = f"plugin_kernel_of_{name}"
        if source is not None:
            site.install(f"kernel-{name}", "1.0" if name == "old" else "2.8.3", modules={module: source})
        own = Kernel(distribution=f"kernel-{name}", module=module, functions=("attend",), versions=">=2")
        supports = Capabilities(priority=1000 + priority, is_causal=True, softcap=name == "broken")
        registry.add(Backend(name=name, attention=adapter(name, own), mask=formatter, supports=supports, kernel=own))
    importlib.invalidate_caches()


def adapter(name: str, own: Kernel):
    """Make a function that loads its kernel, as adapters do, returns the query, and says who it was."""

    def attention(module, query, key, value, attention_mask=None, **kwargs):
        own.load()
        ran.append(name)
        return query.transpose(1, 2), None

    return attention


ran: list[str] = []


def imported() -> list[str]:
    """Names of backends whose kernel's module is imported."""
    return [name for name in NAMES if f"plugin_kernel_of_{name}" in sys.modules]


def test_auto_chooses_the_best_whose_kernel_loads(registry) -> None:
    """Missing, old, broken and changed kernels are skipped, each with its reason; what is below is not imported."""
    explanation = explain(registry=registry)
    assert explanation.winner == "sound"
    found = {each.name: [reason.code for reason in each.reasons] for each in explanation.candidates}
    assert {name: found[name] for name in NAMES} == {name: [code] if code else [] for name, (code, _) in NAMES.items()}
    able = [each.name for each in explanation.candidates if not each.reasons]
    assert able[:2] == ["sound", "second"]
    assert set(able[2:]) <= set(BUILTIN)
    assert sys.modules.keys() & {"plugin_kernel_of_second", "plugin_kernel_of_old"} == set()
    assert "plugin_kernel_of_sound" in sys.modules
    assert resolve("auto", registry=registry).name == "sound"
    again = {each.name: [reason.code for reason in each.reasons] for each in explain(registry=registry).candidates}
    assert again == found


def test_a_kernel_of_a_backend_that_is_refused_is_not_imported(registry) -> None:
    """Only what could win is imported: a refusal by what is declared comes before any kernel."""
    assert explain(Request(sinks=True), registry=registry).winner not in NAMES
    assert imported() == []
    explain(Request(softcap=True), registry=registry)
    assert "plugin_kernel_of_broken" not in sys.modules, "the import raised"
    assert registry.get("broken").kernel.reasons()[0].code == "kernel_import"


def test_one_candidate_alone_has_its_kernel_looked_at(registry) -> None:
    """`only` imports the kernel of the one that is asked about, and of no other."""
    assert explain(only="second", registry=registry).winner == "second"
    assert imported() == ["second"]
    explanation = explain(only="broken", registry=registry)
    assert explanation.winner is None
    assert [reason.code for reason in explanation.candidates[0].reasons] == ["kernel_import"]
    assert "kernel-broken 2.8.3" in str(explanation)


@pytest.mark.parametrize(("name", "code"), [("absent", "kernel_missing"), ("old", "kernel_version")])
def test_a_named_backend_without_its_kernel_never_falls_back(registry, name, code) -> None:
    """An explicit name whose kernel is not there raises with that reason."""
    with pytest.raises(UnsupportedError) as caught:
        resolve(name, registry=registry)
    assert [reason.code for reason in caught.value.reasons] == [code]
    assert str(caught.value).startswith(
        f"backend {name!r} cannot do what is asked:\n  {code}: wants the package kernel-"
    )


def test_nobody_can(registry) -> None:
    """If no kernel that could serve loads, the error has each one's reason."""
    with pytest.raises(NoBackendError) as caught:
        resolve("auto", Request(softcap=True, paged=True), registry=registry)
    assert [reason.code for reason in caught.value.candidates["absent"]] == ["kernel_missing", "softcap", "paged"]
    assert [reason.code for reason in caught.value.candidates["sound"]] == ["softcap", "paged"]


@pytest.mark.parametrize("registry", [attnreg.default_registry], indirect=True, ids=["the default registry"])
def test_attention_with_auto_and_by_name(registry) -> None:
    """The functional call chooses as `explain` does; a name whose kernel fails raises, and nobody else runs."""
    query = torch.randn(1, 2, 3, 8)
    ran.clear()
    assert torch.equal(attnreg.attention(query, query, query, impl="auto", is_causal=True), query)
    assert ran == ["sound"]
    for name, (code, _) in NAMES.items():
        if code:
            with pytest.raises(UnsupportedError) as caught:
                attnreg.attention(query, query, query, impl=name, is_causal=True)
            assert [reason.code for reason in caught.value.reasons] == [code]
    assert ran == ["sound"]
    attnreg.attention(query, query, query, impl="second", is_causal=True)
    assert ran == ["sound", "second"]
