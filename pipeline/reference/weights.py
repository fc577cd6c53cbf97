"""Map the weights of the reference implementation's projector, and others without an architecture, onto ours."""

import re
from pathlib import Path
from typing import Any

import torch

from pipeline.config import TrainingModelSection
from pipeline.errors import InputError
from pipeline.log import logger

Weights = dict[str, torch.Tensor]

# Keys of the projector's weights in checkpoints without an architecture.
WEIGHT_KEYS = ("projector", "projector_state_dict", "model_state_dict", "state_dict", "model")
# Prefixes that wrappers add to the names.
PREFIXES = ("module.", "_orig_mod.", "model.", "projector.")
# The reference's layers, in its older projector fc1 and fc2, and ours, whose `norms` follow `hidden` and `output`.
REFERENCE_LAYERS = {
    "input_layer": "hidden.0", "fc1": "hidden.0", "input_norm": "norms.0", "output_layer": "output", "fc2": "output",
    "residual_proj": "shortcut",
}  # fmt: skip


def read_weights(
    path: Path, content: dict[str, Any], section: TrainingModelSection, *, is_activation_known: bool = False
) -> dict[str, Any]:
    """Return the content of a checkpoint without an architecture with `architecture` and `projector` as ours have them.

    Widths and depth come from the weights, dropout and activation from the section. A missing bias is one of zeros.
    Understands the names of this projector's own layers and of the reference implementation's. Other names stay, and
    the projector refuses them.
    """
    key = next((key for key in WEIGHT_KEYS if isinstance(content.get(key), dict)), None)
    rest = {name: value for name, value in content.items() if key and name != key}
    stored = content[key] if key else content
    tensors = {str(name): value for name, value in stored.items() if isinstance(value, torch.Tensor) and value.numel()}
    weights = _strip_prefixes(tensors)
    if not weights:
        raise InputError(f"{path}: holds no projector weights: make it with stage 6")
    layers = {name.partition(".")[0] for name in weights}
    if layers & {"shortcut", "output"} and any(name.startswith("backbone.") for name in tensors):
        raise InputError(f"{path}: a published model, whose power of the features these lack: give its checkpoint")
    if not layers & {"shortcut", "output"}:
        weights = _rename_reference(path, weights)
    architecture = _infer_architecture(path, weights, section)
    if not is_activation_known and architecture["num_hidden_layers"]:
        source = "as configured" if "activation" in section.model_fields_set else "the default"
        logger.warning(
            "%s: names no activation: %s is assumed (%s of [training_model].activation); where it was another one, the "
            "embeddings are wrong", path, section.activation, source,
        )  # fmt: skip
    zeros = {
        name.removesuffix("weight") + "bias": weight.new_zeros(len(weight))
        for name, weight in weights.items() if name.endswith("weight") and weight.ndim
    }  # fmt: skip
    return rest | {"architecture": architecture, "projector": zeros | weights}


def _infer_architecture(path: Path, weights: Weights, section: TrainingModelSection) -> dict[str, Any]:
    depth = sum(bool(re.fullmatch(r"hidden\.\d+\.weight", name)) for name in weights)
    hidden = [f"hidden.{number}.weight" for number in range(depth)]
    has_shortcut = "shortcut.weight" in weights
    ends = ("shortcut.weight", "shortcut.weight") if has_shortcut else ("hidden.0.weight", "output.weight")
    for name in (*ends, *hidden):
        if name not in weights or weights[name].ndim != 2:
            raise _not_mapped(path, f"{name} is missing or no matrix")
    input_dim, output_dim = weights[ends[0]].shape[1], len(weights[ends[1]])
    widths = [len(weights[name]) for name in hidden]
    return {
        "input_dim": input_dim, "output_dim": output_dim,
        "hidden_dim": widths[0] if widths else section.hidden_dim,
        "num_hidden_layers": len(widths), "dropout": section.dropout, "activation": section.activation,
        "input_power": 1.0, "hidden_dims": widths if len(set(widths)) > 1 else None,
        "layer_norm": "norms.0.weight" in weights, "use_residual": has_shortcut,
    }  # fmt: skip


def _strip_prefixes(weights: Weights) -> Weights:
    """Strip the wrappers' prefixes; where some names start with `projector.`, drop the other weights."""
    while True:
        inner = {key: value for key, value in weights.items() if key.startswith("projector.")}
        weights = inner or weights
        prefix = next((prefix for prefix in PREFIXES if weights and all(key.startswith(prefix) for key in weights)), "")
        if not prefix:
            return weights
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}


def _rename_reference(path: Path, weights: Weights) -> Weights:
    """Map the reference implementation's projector onto this one's names.

    It computes y = output_layer(h) + residual_proj(x), L2-normalised: x are the features and h the result of
    input_layer and each of hidden_layers on x, each followed by an activation. With norms, one follows each layer, the
    output layer too, before activation and sum. Without residual_proj nothing is added, whatever the widths.
    No file of the older projector with norms was seen: their names (norm1, ln_2, layer_norm2, ...) and their place
    behind the layer of that number are a guess, which the log says.
    """
    depth = sum(bool(re.fullmatch(r"hidden_layers\.\d+\.weight", name)) for name in weights)
    names = REFERENCE_LAYERS | {"output_norm": f"norms.{depth + 1}"}
    for number in range(depth):
        names |= {f"hidden_layers.{number}": f"hidden.{number + 1}", f"hidden_norms.{number}": f"norms.{number + 1}"}
    split = {name: name.rpartition(".") for name in weights}
    for layer in {layer for layer, _, _ in split.values()} if "fc1.weight" in weights else ():
        if match := re.fullmatch(r"(?:layer_?)?(?:norm|ln)_?([12])", layer):
            names[layer] = names["input_norm" if match[1] == "1" else "output_norm"]
            logger.warning("%s: %s is assumed to be a LayerNorm directly behind fc%s; where it stands elsewhere, the "
                           "embeddings are wrong", path, layer, match[1])  # fmt: skip
    renamed = {f"{names.get(layer, layer)}.{part}": weights[name] for name, (layer, _, part) in split.items()}
    if len(renamed) < len(weights):
        raise _not_mapped(path, "two of its layers have the same place")
    return renamed


def _not_mapped(path: Path, why: str) -> InputError:
    return InputError(f"{path}: cannot be mapped onto the projector ({why}): train again with stage 6")
