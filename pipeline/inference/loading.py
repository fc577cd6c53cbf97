"""Load a vision model; refuse other models and missing weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import MODEL_MAPPING, AutoConfig, AutoModel

from pipeline.errors import InputError, one_line


def load_model(folder: Path, dtype: torch.dtype | str, pooling_type: str, trust_remote_code: bool) -> torch.nn.Module:
    """Load a vision model. Raises InputError where weights are missing, which would be random numbers."""
    config = find_vision_config(folder, trust_remote_code)
    try:
        model, info = AutoModel.from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _cannot_load(folder, error) from None
    unused = None if pooling_type == "pooler_output" else "pooler."
    missing = [key for key in info["missing_keys"] if not (unused and key.startswith(unused))]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} weights are missing ({sorted(missing)[0]}, ...): fetch the model again, "
            "or set [embedding_model].pooling_type to cls_token if only its pooler is missing"
        )
    return model  # type: ignore[no-any-return]


def find_vision_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return a model's configuration, or its vision tower's where it takes text as well (CLIP, SigLIP).

    Raises InputError for a model that takes no pictures, or a configuration that cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _cannot_load(folder, error) from None
    if type(config) not in MODEL_MAPPING or _takes_pictures(config):  # unmapped: it brings its own code
        return config
    tower = getattr(config, "vision_config", None)
    if type(tower) in MODEL_MAPPING and _takes_pictures(tower):
        return tower
    raise InputError(
        f"{folder}: a {config.model_type} model does not take pictures alone: set [embedding_model].model_name to a "
        "vision model, such as a DINOv3 or DINOv2 ViT, or the vision tower of a CLIP or SigLIP"
    )


def _cannot_load(folder: Path, error: Exception) -> InputError:
    if "trust_remote_code" in str(error):  # as in transformers' message
        return InputError(
            f"{folder}: the model comes with code of its own, which is not run unasked: read it, then set "
            "[embedding_model].trust_remote_code = true"
        )
    return InputError(f"{folder}: the model cannot be loaded ({one_line(error)[:300]}): fetch it again")


def _takes_pictures(config: Any) -> bool:
    """Whether a configuration's model takes pictures alone."""
    kinds: Any = MODEL_MAPPING[type(config)]
    kind = kinds[0] if isinstance(kinds, (list, tuple)) else kinds
    return kind.main_input_name == "pixel_values" and getattr(config, "text_config", None) is None
