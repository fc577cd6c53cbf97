"""Write a model's weights as safetensors, one tensor at a time: a backbone may be larger than the memory."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModel

from pipeline.errors import InputError, one_line
from pipeline.inference.loading import find_vision_config, load_model
from pipeline.log import logger

# The hub's limit for one file.
MAX_SHARD_BYTES = 5_000_000_000
# The types of weights and their names in the format.
TYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_TYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}


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
            names = sorted(set(json.loads(index_path.read_text(encoding="utf-8"))["weight_map"].values()))
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


def list_backbone(folder: Path, pooling_type: str, scratch_dir: Path) -> list[Tensor]:
    """List a backbone's tensors under the names that AutoModel reads for its class.

    Stored tensors of these shapes are streamed. Other folders (a head on top, another format) are loaded once, and
    transformers saves them into `scratch_dir`. Raises InputError if the backbone cannot be loaded.
    """
    config, model = build_empty(folder)
    stored = list_stored(folder)
    same_class = (config.architectures or [None])[0] == type(model).__name__
    if same_class and sorted(tensor.shape for tensor in stored) == sorted(_list_shapes(model)):
        return stored
    logger.info("%s: its weights are stored for another class: loading them as %s", folder, type(model).__name__)
    loaded = load_model(folder, "auto", pooling_type, trust_remote_code=False)
    if pooling_type != "pooler_output" and stored and not any("pooler." in tensor.name for tensor in stored):
        # The class has a pooler that this backbone lacks and nobody uses: do not publish random numbers.
        for parameter in getattr(loaded, "pooler", torch.nn.Module()).parameters():
            torch.nn.init.zeros_(parameter)
    loaded.save_pretrained(scratch_dir, max_shard_size=f"{MAX_SHARD_BYTES // 10**9}GB")  # type: ignore[operator]
    return list_stored(scratch_dir)


def build_empty(folder: Path) -> tuple[Any, torch.nn.Module]:
    """Return a backbone's configuration, and its model on the meta device for the names and shapes."""
    config = find_vision_config(folder)
    try:
        with torch.device("meta"):
            model: torch.nn.Module = AutoModel.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: the backbone cannot be loaded ({one_line(error)[:200]})") from None
    return config, model


def _list_shapes(model: torch.nn.Module) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in model.state_dict().values()]


def list_published_backbone(folder: Path, settings_dir: Path) -> list[Tensor]:
    """List the `backbone.*` tensors of a published model without the prefix.

    Raises InputError if they are not those of the backbone whose config.json lies in `settings_dir`.
    """
    prefix = "backbone."
    found = [tensor for tensor in list_stored(folder) if tensor.name.startswith(prefix)]
    missing = Counter(_list_shapes(build_empty(settings_dir)[1])) - Counter(tensor.shape for tensor in found)
    if missing:
        raise InputError(
            f"{folder}: {missing.total()} weights of its backbone are missing, one of shape {next(iter(missing))}: "
            "correct backbone_model_name in its config.json, or fetch the model again"
        )
    return [replace(tensor, name=tensor.name.removeprefix(prefix)) for tensor in found]


def stored_type(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the float type of most elements."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.dtype.is_floating_point:
            counts[tensor.dtype] += math.prod(tensor.shape)
    return counts.most_common(1)[0][0] if counts else torch.float32


def write_weights(folder: Path, tensors: Sequence[Tensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write `model.safetensors`, or numbered shards and their index if it would exceed one shard."""
    shards = _cut(tensors, max_shard_bytes)
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.num_bytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _cut(tensors: Sequence[Tensor], max_shard_bytes: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _write_file(path: Path, tensors: Sequence[Tensor]) -> None:
    """Write one safetensors file: the header's length, the header as JSON, then the tensors' bytes without gaps."""
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            file.write(tensor.read().contiguous().reshape(-1).view(torch.uint8).numpy().data)
