"""Model folders whose settings would choose code, read other files, or build without end are one clear line."""

import json
import shutil

import pytest
from published_models import publish
from safetensors.torch import load_file, save_file

from pipeline.errors import InputError
from pipeline.inference.loading import find_vision_config
from pipeline.inference.model_files import find_missing_files, locate_model, read_settings
from publish_model.model_folder.published_model import find_model


@pytest.fixture(scope="module")
def published(toy_backbone, tmp_path_factory):
    return publish(tmp_path_factory.mktemp("published"), toy_backbone)


@pytest.fixture
def folder(published, tmp_path):
    return shutil.copytree(published, tmp_path / "model")


def change(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


CHOICES = [
    {"attn_implementation": "evil/kernel"}, {"_attn_implementation": {"backbone_config": "evil/kernel"}},
    {"_attn_implementation_internal": "evil/kernel"}, {"experts_implementation": "evil/kernel"},
    {"attn_implementation": "flash_attention_2"}, {"use_kernels": True}, {"backbone": "evil/model"},
]  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
def test_settings_choose_no_code(folder, toy_backbone, tmp_path, choice):
    backbone = shutil.copytree(toy_backbone, tmp_path / "backbone")
    change(backbone / "config.json", **choice)
    with pytest.raises(InputError, match="chooses code"):
        find_vision_config(backbone)
    nested = json.loads((folder / "config.json").read_text())["backbone_config"] | choice
    change(folder / "config.json", backbone_config=nested)
    with pytest.raises(InputError, match="chooses code"):
        find_model(str(folder), download=False, device="cpu").load("float32")


@pytest.mark.parametrize("name", ["../w.safetensors", "/w.safetensors", "..", "w.bin"])
def test_weights_outside_the_folder_are_not_read(folder, name):
    shutil.move(folder / "model.safetensors", folder.parent / "w.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match="weights outside its folder"):
        find_vision_config(folder)


def test_absurd_settings_are_one_line(folder):
    sound = (folder / "config.json").read_text()
    for settings in (
        {"dtype": "evil"},
        {"projector": json.loads(sound)["projector"] | {"num_hidden_layers": 10**9}},
        {"backbone_config": json.loads(sound)["backbone_config"] | {"num_hidden_layers": 10**9}},
        {"backbone_config": json.loads(sound)["backbone_config"] | {"num_hidden_layers": "9"}},
        {"quantization_config": {"quant_method": "torchao", "quant_type": "evil"}},
    ):
        change(folder / "config.json", **settings)
        with pytest.raises(InputError, match=str(folder)):
            find_model(str(folder), download=False, device="cpu").load("float32")
        (folder / "config.json").write_text(sound)
    (folder / "config.json").write_text("[" * 200_000)
    with pytest.raises(InputError, match="not a model folder"):
        read_settings(folder / "config.json")


def test_names_of_weights_control_no_terminal(folder, capfd):
    weights = load_file(folder / "model.safetensors")
    weights["\x1b[2J\x9bevil"] = weights.pop(sorted(weights)[0])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="1 weights are missing"):
        find_model(str(folder), download=False, device="cpu").load("float32")
    assert not {"\x1b", "\x9b"} & set(capfd.readouterr().err)


def test_an_index_of_numbers_is_one_line(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}')
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json cannot be read"):
        find_missing_files(folder)


def load_class():
    from publish_model.modeling_spatial_embeddings import SpatialEmbeddingsModel

    return SpatialEmbeddingsModel


def test_an_address_is_refused_without_its_password():
    with pytest.raises(InputError, match=r"http://\*\*\*@host/x: an address") as caught:
        locate_model("http://user:SECRET@host/x", "give a folder", download=False)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [
        {"crop_size": {"height": -5, "width": 0}}, {"resample": 99}, {"rescale_factor": "x"}, {"image_mean": ["a"] * 3},
    ],
)  # fmt: skip
def test_an_image_processor_that_fails_is_one_line(folder, setting):
    change(folder / "preprocessor_config.json", **setting)
    with pytest.raises(InputError, match=r"image processor can|cannot embed"):
        find_model(str(folder), download=False, device="cpu").load("float32")


@pytest.mark.parametrize("name", ["~nobody-here/model", "a\0b"])
def test_a_home_of_nobody_is_no_model_and_no_backbone(folder, name):
    with pytest.raises(InputError):
        locate_model(name, "give a folder", download=True)
    change(folder / "config.json", backbone_model_name=name, backbone_config=None)
    with pytest.raises(InputError, match="its backbone"):
        find_model(str(folder), download=False, device="cpu")
