"""Write a model's weights as safetensors, one file at a time: a backbone may be larger than the memory."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from pipeline.errors import InputError
from pipeline.inference.loading import load_model
from pipeline.inference.stored_weights import Tensor, build_empty, list_stored
from pipeline.log import logger

# A file is in memory while it is written; the hub takes up to 5 GB.
MAX_SHARD_BYTES = 2_000_000_000


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
    by_name = {tensor.name: tensor for tensor in tensors}
    empty = {tensor.name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in tensors}
    split = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_bytes)
    for file_name, names in split.filename_to_tensors.items():
        save_file({name: by_name[name].read().contiguous() for name in names}, folder / file_name, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
