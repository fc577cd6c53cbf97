"""Write a model's weights as safetensors, one tensor at a time: a backbone may be larger than the memory."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import InputError
from pipeline.inference.loading import load_model
from pipeline.inference.stored_weights import TYPE_NAMES, Tensor, build_empty, list_stored
from pipeline.log import logger

# The hub's limit for one file.
MAX_SHARD_BYTES = 5_000_000_000


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
    loaded = load_model(folder, config, "auto", pooling_type)
    if pooling_type != "pooler_output" and stored and not any("pooler." in tensor.name for tensor in stored):
        # The class has a pooler that this backbone lacks and nobody uses: do not publish random numbers.
        for parameter in getattr(loaded, "pooler", torch.nn.Module()).parameters():
            torch.nn.init.zeros_(parameter)
    loaded.save_pretrained(scratch_dir, max_shard_size=f"{MAX_SHARD_BYTES // 10**9}GB")  # type: ignore[operator]
    return list_stored(scratch_dir)


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
