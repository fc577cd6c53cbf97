"""Refuse a model folder whose settings would choose code, read other files, or build a model without end."""

import re
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, one_line
from pipeline.inference.model_files import read_index, read_settings

# For other names transformers imports a library, or fetches code from the hub.
ATTENTIONS = (None, "eager", "sdpa")
# No vision model has as many layers; transformers would build them one by one.
MOST_LAYERS = 1000
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_LAYERS = re.compile(r"layers?$|depths?$|repeats?$|blocks?$|depth_coefficient$")


def check_folder(folder: Path, trust_remote_code: bool = False) -> None:
    """Raise InputError for a folder that must not reach transformers; a trusted one may choose code."""
    for path in folder.iterdir():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError(f"{path}: a pipe or device, not a file: fetch the model again")
    for path in folder.glob("*.index.json"):
        read_index(path)
    settings = read_settings(folder / "config.json")
    if not trust_remote_code and (folder / "adapter_config.json").exists():
        raise InputError(f"{folder}: an adapter of another model (adapter_config.json): take the whole model")
    inner: list[Any] = [settings]
    while inner:
        one = inner.pop()
        inner += one if isinstance(one, list) else one.values() if isinstance(one, dict) else []
        for key, value in one.items() if isinstance(one, dict) else []:
            if not trust_remote_code and _chooses_code(key, value):
                raise InputError(
                    f"{folder}: {key} in its config.json chooses code or a library ({one_line(value)[:100]}): "
                    "remove the key there, or take another model"
                )
            numbers = value if isinstance(value, list) else [value]
            if _LAYERS.search(key) and sum(x for x in numbers if isinstance(x, (int, float))) > MOST_LAYERS:
                raise InputError(f"{folder}: {key} in its config.json is over {MOST_LAYERS}: fetch the model again")


def _chooses_code(key: str, value: Any) -> bool:
    """Whether a setting names code or another repository; a quantised model needs its library."""
    if _IMPLEMENTATION.fullmatch(key):
        names = list(value.values()) if isinstance(value, dict) else [value]
        return any(name not in ATTENTIONS for name in names)
    if key in {"backbone", "architecture"}:  # a hub id, or a library's address of one
        return isinstance(value, str) and any(sign in value for sign in "/:")
    return key in {"use_kernels", "kernel_config", "checkpoint_path"} and bool(value)
