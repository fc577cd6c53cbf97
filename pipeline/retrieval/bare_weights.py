"""Read checkpoints that hold weights without an architecture: infer it from the weights' names and shapes."""

import re
from pathlib import Path
from typing import Any

import torch

from pipeline.config import TrainingModelSection
from pipeline.errors import InputError

# Prefixes that wrappers add to the names.
PREFIXES = ("module.", "_orig_mod.", "model.", "projector.")
# Names that only the reference implementation's projector has.
REFERENCE_LAYERS = {"input_layer", "hidden_layers", "output_layer", "residual_proj"}

StateDict = dict[str, torch.Tensor]


def read_bare_weights(
    path: Path, content: dict[str, Any], section: TrainingModelSection
) -> tuple[dict[str, Any], StateDict]:
    """Return the architecture and weights: widths and depth from the weights, dropout and activation from the section.

    Understands the names of this projector's own layers, of the reference implementation's, and of a sequence of
    linear layers, which gets a shortcut of zeros (a single layer is the shortcut itself).
    """
    weights = _strip_prefixes(
        {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor) and value.numel()}
    )
    if not weights:
        raise InputError(f"{path}: holds no projector weights: make it with stage 6")
    layers = {name.partition(".")[0] for name in weights}
    if layers & REFERENCE_LAYERS:
        weights = _rename_reference(path, weights)
    elif "shortcut" not in layers:
        weights = _rename_sequence(path, weights)
    return _infer_architecture(path, weights, section), weights


def _infer_architecture(path: Path, weights: StateDict, section: TrainingModelSection) -> dict[str, Any]:
    """Infer the projector's constructor arguments from its weights."""
    depth = sum(bool(re.fullmatch(r"hidden\.\d+\.weight", name)) for name in weights)
    hidden = [f"hidden.{number}.weight" for number in range(depth)]
    for name in ("shortcut.weight", *hidden):
        if name not in weights or weights[name].ndim != 2:
            raise _not_mapped(path, f"{name} is missing or no matrix")
    output_dim, input_dim = weights["shortcut.weight"].shape
    widths = [len(weights[name]) for name in hidden]
    return {
        "input_dim": int(input_dim), "output_dim": int(output_dim),
        "hidden_dim": widths[0] if widths else section.hidden_dim,
        "num_hidden_layers": len(widths), "dropout": section.dropout, "activation": section.activation,
        "input_power": 1.0, "hidden_dims": widths if len(set(widths)) > 1 else None,
    }  # fmt: skip


def _strip_prefixes(weights: StateDict) -> StateDict:
    """Strip the wrappers' prefixes; where some names start with `projector.`, drop the other weights."""
    while True:
        inner = {key: value for key, value in weights.items() if key.startswith("projector.")}
        weights = inner or weights
        prefix = next((prefix for prefix in PREFIXES if weights and all(key.startswith(prefix) for key in weights)), "")
        if not prefix:
            return weights
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}


def _rename_reference(path: Path, weights: StateDict) -> StateDict:
    """Map the reference implementation's projector onto this one's names.

    It computes y = output_layer(h) + residual_proj(x), L2-normalised: x are the features and h the result of
    input_layer and each of hidden_layers on x, each followed by an activation and dropout.
    Without `residual_proj` nothing is added. But if input and output are equally wide, x itself may be added; the names
    do not tell, and the checkpoint is refused.
    """
    depth = sum(bool(re.fullmatch(r"hidden_layers\.\d+\.weight", name)) for name in weights)
    targets = {"input_layer": "hidden.0", "output_layer": "output", "residual_proj": "shortcut"}
    targets |= {f"hidden_layers.{number}": f"hidden.{number + 1}" for number in range(depth)}
    known = {f"{name}.{part}" for name in targets for part in ("weight", "bias")}
    unknown = sorted(weights.keys() - known)
    needed = [f"{name}.weight" for name in targets if name != "residual_proj" or "residual_proj.weight" in weights]
    wrong = [name for name in needed if name not in weights or weights[name].ndim != 2]
    if unknown or wrong:
        raise _not_mapped(path, f"{unknown[0]} is not known" if unknown else f"{wrong[0]} is missing or no matrix")
    wide, narrow = weights["input_layer.weight"], weights["output_layer.weight"]
    renamed: StateDict = {}
    if "residual_proj.weight" not in weights:
        if wide.shape[-1] == narrow.shape[0]:
            raise _not_mapped(
                path, f"residual_proj is missing, and with {len(narrow)} numbers in and out the input may be added as "
                "it is; put the identity, or zeros, into it as residual_proj.weight"
            )  # fmt: skip
        weights = weights | {"residual_proj.weight": wide.new_zeros(narrow.shape[0], wide.shape[-1])}
    for name, target in targets.items():
        renamed |= _rename_layer(weights, name + ".", target)
    return renamed


def _rename_sequence(path: Path, weights: StateDict) -> StateDict:
    """Map a plain MLP, with linear layers numbered as in nn.Sequential, onto the projector's names."""
    # A layer's name with its dot; a single layer may have none.
    names = [key.removesuffix("weight") for key, value in weights.items() if key.endswith("weight") and value.ndim == 2]
    known = {f"{name}{part}" for name in names for part in ("weight", "bias")}
    others = [key for key in weights if key not in known]
    if others:
        raise _not_mapped(path, f"{others[0]} is not part of a linear layer")
    if len(names) > 1:
        places = [(place[1], int(place[2]), name) for name in names if (place := re.fullmatch(r"(.*?)(\d+)\.", name))]
        if len(places) < len(names) or len({prefix for prefix, _, _ in places}) > 1:
            # They may be parallel: shapes do not tell.
            raise _not_mapped(path, f"{', '.join(names)}: not one numbered sequence of layers")
        names = [name for _, _, name in sorted(places)]
    matrices = [weights[f"{name}weight"] for name in names]
    if any(b.shape[1] != a.shape[0] for a, b in zip(matrices[:-1], matrices[1:], strict=True)):
        raise _not_mapped(path, "its layers do not follow one another")
    targets = ["shortcut"] if len(names) == 1 else [f"hidden.{i}" for i in range(len(names) - 1)] + ["output"]
    renamed: StateDict = {}
    for name, target in zip(names, targets, strict=True):
        renamed |= _rename_layer(weights, name, target)
    if len(names) > 1:
        renamed["shortcut.weight"] = matrices[0].new_zeros(matrices[-1].shape[0], matrices[0].shape[1])
        renamed["shortcut.bias"] = matrices[0].new_zeros(matrices[-1].shape[0])
    return renamed


def _rename_layer(weights: StateDict, name: str, target: str) -> StateDict:
    """Return a linear layer's weight and bias, or zeros as the bias, under another name."""
    matrix = weights[f"{name}weight"]
    return {f"{target}.weight": matrix, f"{target}.bias": weights.get(f"{name}bias", matrix.new_zeros(len(matrix)))}


def _not_mapped(path: Path, why: str) -> InputError:
    return InputError(f"{path}: cannot be mapped onto the projector ({why}): train again with stage 6")
