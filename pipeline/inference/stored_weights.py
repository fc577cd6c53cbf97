"""Read the tensors of a model folder's safetensors files one at a time: a backbone may be larger than the memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModel

from pipeline.errors import InputError, one_line
from pipeline.inference.loading import find_vision_config
from pipeline.inference.settings_check import read_index

# The format's names of the types that weights may have.
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """A tensor to write; it is read only when it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def cast(self, dtype: torch.dtype | None) -> "Tensor":
        """Return the tensor as floats of another type; integers stay as they are."""
        if dtype is None or not self.dtype.is_floating_point:
            return self
        return replace(self, dtype=dtype, read=lambda: self.read().to(dtype))


def tensors_of(state_dict: dict[str, torch.Tensor]) -> list[Tensor]:
    """List the tensors of a state dict."""
    return [
        Tensor(name, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)  # type: ignore[misc]
        for name, tensor in state_dict.items()
    ]


def locate_weights(folder: Path) -> dict[str, Path]:
    """Return the safetensors file of each weight of a model folder, none if it has no such file."""
    index_path = folder / "model.safetensors.index.json"
    found: dict[str, Path] = {}
    try:
        if index_path.is_file():
            names = sorted(read_index(index_path))
        else:
            names = [name for name in ("model.safetensors",) if (folder / name).is_file()]
        for name in names:
            with safe_open(folder / name, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), folder / name)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder}: its weights cannot be read ({one_line(error)[:200]}): fetch the model again"
        ) from None
    return found


def list_stored(folder: Path) -> list[Tensor]:
    """List the tensors of a model folder's safetensors files, if it has any."""
    return [_describe_stored(name, path) for name, path in locate_weights(folder).items()]


def _describe_stored(name: str, path: Path) -> Tensor:
    def read() -> torch.Tensor:
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    with safe_open(path, framework="pt") as file:
        part = file.get_slice(name)
        shape, kind = tuple(part.get_shape()), part.get_dtype()
    if kind not in _TYPES:
        raise InputError(f"{path}: {name} is of type {kind}: take the backbone's unquantised weights")
    return Tensor(name, shape, _TYPES[kind], read)


def build_empty(folder: Path) -> tuple[Any, torch.nn.Module]:
    """Return a backbone's configuration, and its model on the meta device for the names and shapes."""
    config = find_vision_config(folder)
    try:
        with torch.device("meta"):
            model: torch.nn.Module = AutoModel.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: the backbone cannot be loaded ({one_line(error)[:200]})") from None
    return config, model
