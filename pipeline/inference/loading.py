"""Load a vision model; refuse others, missing weights, settings that choose code, and own code unless it is trusted."""

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, dynamic_module_utils
from transformers.utils import logging as transformers_logging

from pipeline.errors import InputError, one_line
from pipeline.inference.model_files import read_index, read_settings
from pipeline.log import LineFormat, logger
from pipeline.workspace import private_folder

# What transformers raises for settings or weights that make no sense.
PROBLEMS = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, ImportError,
    RuntimeError, MemoryError, SafetensorError, StrictDataclassError, pickle.UnpicklingError,
)  # fmt: skip

# For other names transformers imports a library, or fetches code from the hub.
ATTENTIONS = (None, "eager", "sdpa")
# No vision model has as many layers; transformers would build them one by one.
MOST_LAYERS = 1000
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_LAYERS = re.compile(r"layers?$|depths?$|repeats?$|blocks?$|depth_coefficient$")

# Which weights are left over or missing is judged below, and anything else is an error.
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
for _handler in logging.getLogger("transformers").handlers:  # it prints names of weights as they are
    _handler.setFormatter(LineFormat("[transformers] %(message)s"))


@contextlib.contextmanager
def writing_weights(path: Path) -> Iterator[None]:
    """Raise the OSError that safetensors hides when it cannot write below `path`, as on a full disk."""
    try:
        yield
    except SafetensorError as error:
        if not (number := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def load_model(
    folder: Path,
    config: Any,
    dtype: torch.dtype | str,
    pooling_type: str,
    trust_remote_code: bool = False,
    model_class: Any = AutoModel,
) -> torch.nn.Module:
    """Load a vision model whose configuration `find_vision_config` gave; `dtype` auto is the type of its weights.

    A pooler that is missing and not used is zero. Raises InputError where other weights are missing, which would be
    random numbers, or weights are not finite.
    """
    trust = {"trust_remote_code": trust_remote_code} if model_class is AutoModel else {}
    if dtype == "auto":
        config.dtype = None  # what the configuration says may be another one
    with naming_model(folder):
        model, info = model_class.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True, **trust)
    needs_pooler = pooling_type == "pooler_output"
    missing = [key for key in info["missing_keys"] if needs_pooler or not key.startswith("pooler.")]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} weights are missing ({sorted(missing)[0]}, ...): fetch the model again, "
            "or set [embedding_model].pooling_type to cls_token if only its pooler is missing"
        )
    for key in info["missing_keys"]:
        torch.nn.init.zeros_(model.get_parameter(key))
    for name, weight in model.named_parameters():  # attention may make finite numbers of NaN
        is_plain = weight.is_floating_point() and weight.itemsize > 1 and weight.numel()
        if is_plain and not torch.stack(weight.aminmax()).isfinite().all():  # much faster than `isfinite` alone
            raise InputError(f"{folder}: {name} holds numbers that are not finite: fetch the model again")
    return model  # type: ignore[no-any-return]


def find_vision_config(folder: Path, trust_remote_code: bool = False, model_class: Any = AutoModel) -> Any:
    """Return a model's configuration, or its vision tower's where it takes text as well (CLIP, SigLIP).

    With a `model_class` of this project, the folder's own code is neither run nor trusted.
    Raises InputError for a model that takes no pictures, or a configuration that cannot be loaded.
    """
    check_folder(folder, trust_remote_code)
    with naming_model(folder):
        if model_class is not AutoModel:
            return model_class.config_class.from_pretrained(folder)
        if trust_remote_code:
            announce_code(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if type(config) not in MODEL_MAPPING:  # it brings its own code
        return config
    for one in (config, getattr(config, "vision_config", None)):
        if type(one) in MODEL_MAPPING and _takes_pictures(one):
            return one
    raise InputError(
        f"{folder}: a {config.model_type} model does not take pictures alone: set [embedding_model].model_name to a "
        "vision model, such as a DINOv3 or DINOv2 ViT, or the vision tower of a CLIP or SigLIP"
    )


def check_folder(folder: Path, trust_remote_code: bool) -> None:
    """Raise InputError for a folder that must not reach transformers; a trusted one may choose code."""
    for path in folder.iterdir():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError(f"{path}: a pipe or device, not a file: fetch the model again")
    for path in folder.glob("*.index.json"):
        read_index(path)
    inner: list[Any] = [read_settings(folder / "config.json")]
    if not trust_remote_code and (folder / "adapter_config.json").exists():
        raise InputError(f"{folder}: an adapter of another model (adapter_config.json): take the whole model")
    for one in inner:  # and what is found on the way
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
        return any(name not in ATTENTIONS for name in (value.values() if isinstance(value, dict) else [value]))
    if key in {"backbone", "architecture"}:  # a hub id, or a library's address of one
        return isinstance(value, str) and any(sign in value for sign in "/:")
    return key in {"use_kernels", "kernel_config", "checkpoint_path"} and bool(value)


@functools.cache
def announce_code(folder: Path) -> None:
    """Log the code files of a model folder that is trusted, by their hashes, and prepare to run them.

    transformers copies code before it imports it: into a folder of this process, since $HF_HOME may not be writable,
    and processes that start at once would copy over one another's files.
    Raises InputError where the configuration takes code from elsewhere.
    """
    auto_map = read_settings(folder / "config.json").get("auto_map")
    if "--" in str(auto_map):
        raise InputError(f"{folder}: its config.json names code of another repository (auto_map), which is never run")
    for path in sorted(folder.glob("*.py")) if auto_map else []:
        logger.warning("%s: its code is run, as asked: SHA-256 %s", path, hashlib.sha256(path.read_bytes()).hexdigest())
    if "transformers_modules" not in sys.modules:  # else a place is taken, from which all later code is imported
        dynamic_module_utils.HF_MODULES_CACHE = str(_code_folder())  # type: ignore[attr-defined]


@functools.cache
def _code_folder() -> Path:
    """Return this process's folder for models' code: a second one would stand behind it in Python's path."""
    return private_folder("models-code-")


@contextlib.contextmanager
def naming_model(folder: Path) -> Iterator[None]:
    """Raise InputError, naming a model's folder, where its settings or weights make no sense."""
    try:
        yield
    except PROBLEMS as error:
        if "trust_remote_code" in str(error):  # as in transformers' message
            raise InputError(
                f"{folder}: the model comes with code of its own, which is not run unasked: read it, then set "
                "[embedding_model].trust_remote_code = true, or give --trust-remote-code to a tool"
            ) from None
        raise InputError(f"{folder}: the model cannot be loaded ({one_line(error)[:300]}): fetch it again") from None


def _takes_pictures(config: Any) -> bool:
    kinds: Any = MODEL_MAPPING[type(config)]
    kind = kinds[0] if isinstance(kinds, (list, tuple)) else kinds
    return kind.main_input_name == "pixel_values" and getattr(config, "text_config", None) is None
