"""Saved models: by directory, by a name on the Hub, with the options of `from_pretrained`, and what goes wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import attnreg
from attnreg import BridgeError, InvalidInputError

transformers = pytest.importorskip("transformers")
bridge = pytest.importorskip("attnreg.integrations.transformers")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel

class Config(PreTrainedConfig):
    model_type = "attnreg_test"

class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.inner = torch.nn.Linear(1, 1)
        self.post_init()
"""


@pytest.fixture(autouse=True)
def _leave_transformers_alone():
    yield
    bridge.disable()


def llama() -> Any:
    """Return a model of one layer."""
    sizes = {"vocab_size": 9, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The directory of a saved model."""
    place = tmp_path_factory.mktemp("models") / "llama"
    llama().save_pretrained(place)
    return place


@pytest.fixture
def hub(tmp_path, saved) -> Path:
    """A cache of the Hub in which `some/model` has one revision, `v1`, and the model in a folder."""
    home = tmp_path / "models--some--model"
    shutil.copytree(saved, home / "snapshots" / COMMIT / "inner")
    (home / "refs").mkdir()
    (home / "refs" / "v1").write_text(COMMIT)
    return tmp_path


def test_options_reach_the_configuration(hub) -> None:
    """Revision, folder, cache and offline mode tell where the class is looked up, too; without one, nothing is found."""
    where = {"cache_dir": hub, "local_files_only": True, "revision": "v1", "subfolder": "inner"}
    model = attnreg.load_model("some/model", attn_implementation="eager", **where, token=False, trust_remote_code=False)
    assert type(model) is transformers.LlamaForCausalLM
    assert attnreg.get_attn_implementation(model) == "eager"
    for missing in ("cache_dir", "revision", "subfolder"):
        options = {key: value for key, value in where.items() if key != missing}
        with pytest.raises(BridgeError, match=r"AutoConfig\.from_pretrained\('some/model', .*local_files_only=True"):
            attnreg.load_model("some/model", **options)


def test_a_name_that_is_not_there(tmp_path) -> None:
    """A name that the Hub does not give says what was tried, shows no secret, and keeps the library's own error."""
    with pytest.raises(BridgeError) as caught:
        attnreg.load_model("no/such-model", cache_dir=tmp_path, local_files_only=True, token="hf_secret")  # noqa: S106
    text = str(caught.value)
    assert text.startswith("transformers: AutoConfig.from_pretrained('no/such-model', cache_dir=")
    assert "local_files_only=True) raised OSError: " in text
    assert text.endswith("or hand over what loads it: load_model(TheClass.from_pretrained, …).")
    assert "hf_secret" not in text
    assert isinstance(caught.value.__cause__, OSError)


def test_a_folder_in_a_directory(saved) -> None:
    """`subfolder` is looked for in a directory, for transformers and diffusers alike."""
    model = attnreg.load_model(saved.parent, subfolder="llama", attn_implementation="eager")
    assert attnreg.get_attn_implementation(model) == "eager"
    with pytest.raises(InvalidInputError, match=r"models0?[/\\]+nothing', where there is no directory"):
        attnreg.load_model(saved.parent, subfolder="nothing")


def test_a_folder_of_diffusers(tmp_path) -> None:
    """A model in a folder of a pipeline's directory is loaded by the class in its configuration."""
    diffusers = pytest.importorskip("diffusers")
    sizes = {"attention_head_dim": 8, "num_layers": 1, "cross_attention_dim": 8, "in_channels": 8, "sample_size": 4}
    diffusers.Transformer2DModel(num_attention_heads=2, norm_num_groups=1, **sizes).save_pretrained(tmp_path / "inner")
    model = attnreg.load_model(tmp_path, subfolder="inner", attn_implementation="eager")
    assert isinstance(model, diffusers.Transformer2DModel)
    assert attnreg.get_attn_implementation(model) == "eager"


@pytest.mark.parametrize(
    "place",
    ["./nothing/here", "/nothing/here", "~/nothing", "a/b/c", "../nothing", Path("nothing/here"), Path("nothing")],
)
def test_paths_that_are_not_there(place) -> None:
    """A string that no model on the Hub is called by, and a path that does not exist, are said to be no directory."""
    with pytest.raises(InvalidInputError) as caught:
        attnreg.load_model(place, local_files_only=True)
    assert str(caught.value) == (
        f"the path of the model is {str(place)!r}, where there is no directory, and which is no name on the Hub; "
        "wanted: the directory of a saved model, or a string such as 'organisation/model'."
    )


def test_a_file_and_nothing(saved) -> None:
    """The path of a file names the directory to hand over, and an empty string is no path."""
    file = saved / "config.json"
    for place in (file, str(file)):
        with pytest.raises(InvalidInputError) as caught:
            attnreg.load_model(place)
        assert str(caught.value) == (
            f"the path of the model is the file {str(file)!r}; wanted: the directory of a saved model, such as {saved}."
        )
    with pytest.raises(InvalidInputError, match="the path of the model is empty; wanted: the directory of a saved"):
        attnreg.load_model("")


@pytest.mark.parametrize(
    ("text", "error", "problem"),
    [
        ("{", InvalidInputError, r"config\.json' is no JSON \(Expecting .*\); wanted: .* one JSON object"),
        (b"\xff", InvalidInputError, r"config\.json' is no JSON \("),
        ("[]", InvalidInputError, r"config\.json' is a JSON list; wanted: a model's configuration, which is one JSON"),
        ("{}", BridgeError, "raised ValueError: Unrecognized model in"),
        ('{"model_type": "nobody"}', BridgeError, "raised ValueError: .*model type `nobody`"),
        ('{"model_type": "llama", "architectures": ["logging"]}', BridgeError, "it has no model class 'logging', from"),
    ],
    ids=range(6),
)
def test_broken_configurations(tmp_path, text, error, problem) -> None:
    """A configuration that is none, or of a model that the library does not know, is an error that says so."""
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(error, match=problem):
        attnreg.load_model(tmp_path)


def test_a_model_with_code_of_its_own(tmp_path, monkeypatch) -> None:
    """A model whose code is beside it is loaded if it is trusted, and refused if not."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    place = tmp_path / "remote"
    place.mkdir()
    (place / "remote_code.py").write_text(CODE)
    references = {"AutoConfig": "remote_code.Config", "AutoModel": "remote_code.Model"}
    config = {"model_type": "attnreg_test", "auto_map": references, "architectures": ["Model"]}
    (place / "config.json").write_text(json.dumps(config))
    torch.save({"inner.weight": torch.ones(1, 1), "inner.bias": torch.ones(1)}, place / "pytorch_model.bin")
    with pytest.raises(BridgeError, match=r"trust_remote_code=False\) raised ValueError"):
        attnreg.load_model(place, trust_remote_code=False)
    model = attnreg.load_model(place, trust_remote_code=True)
    assert type(model).__name__ == "Model"
    assert model.inner.weight.item() == 1
