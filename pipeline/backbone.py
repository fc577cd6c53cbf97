"""Run a pretrained vision model: images in, pooled embeddings out."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModel
from transformers.utils import logging as transformers_logging

from pipeline.devices import choose_device, describe_device, keep_freed_memory
from pipeline.errors import InputError, PipelineError, one_line
from pipeline.log import logger

# Images in one forward pass. On two CPU cores 8 is four times as fast as 32 for a convolutional backbone (its
# activations then stay in the cache); on a GPU a pass must be large enough to fill the chip.
CPU_MICRO_BATCH = 8
CUDA_BATCH = 64

# No camera makes pictures of this shape. At 256 pixels of the shorter edge it takes 50 MB; a crop keeps 0.3 % of them.
RIBBON_RATIO = 256

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Embedder:
    """A model with its image processor, on a device, in evaluation mode.

    `prepare` may be called from many threads; `embed` from one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        pooling_type: str = "pooler_output",
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = "auto",
        compile_model: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        """Load model and processor from a local folder.

        Raises InputError if either cannot be loaded or weights are missing.
        """
        self.device = choose_device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.pooling_type = pooling_type
        self.dtype = _DTYPES[dtype] if dtype != "auto" else _default_dtype(self.device)
        self.micro_batch = _choose_micro_batch(self.device, batch_size)
        transformers_logging.disable_progress_bar()
        self.processor = load_processor(folder, trust_remote_code)
        self.model = load_model(folder, self.dtype, pooling_type, trust_remote_code).to(self.device).eval()
        if self.device.type == "cpu":
            self.model.to(memory_format=torch.channels_last)  # twice as fast for convolutions, the same values
        self.compile_model = compile_model
        if compile_model:
            self.model.compile(dynamic=False)
        logger.info(
            "model %s: %s, %s, %s, %d images a pass",
            folder.name, type(self.model).__name__, describe_device(self.device), self.dtype, self.micro_batch,
        )  # fmt: skip

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """Return an RGB image as the model's own processor makes it, (3, H, W) float32."""
        if getattr(self.processor, "do_center_crop", False):
            image = cut_ribbon(image)
        pixels: torch.Tensor = self.processor(images=[image], return_tensors="pt")["pixel_values"][0]
        return pixels

    def embed(self, pixels: Sequence[torch.Tensor]) -> NDArray[np.float32]:
        """Return the pooled outputs, (N, D) float32, not normalised, of prepared images in order."""
        parts = []
        # Processors without a crop give images of several sizes; each pass takes neighbours of one size.
        for _, group in itertools.groupby(pixels, key=lambda tensor: tensor.shape):
            waiting = list(group)
            while waiting:
                count = self.micro_batch  # which a pass that is out of memory makes smaller
                parts.append(self._forward(torch.stack(waiting[:count])))
                waiting = waiting[count:]
        return np.concatenate(parts)

    def measure_width(self) -> int:
        """Return the length of an embedding, by embedding a grey picture."""
        return int(self.embed([self.prepare(Image.new("RGB", (224, 224), "grey"))]).shape[1])

    def _forward(self, batch: torch.Tensor) -> NDArray[np.float32]:
        """Embed one pass, in halves where the GPU's memory does not hold it."""
        count = len(batch)
        if self.compile_model and count < self.micro_batch:  # a new shape would compile anew
            batch = torch.cat([batch, batch[-1:].expand(self.micro_batch - count, -1, -1, -1)])
        try:
            with torch.inference_mode():
                layout = torch.channels_last if self.device.type == "cpu" else torch.contiguous_format
                outputs = self.model(pixel_values=batch.to(self.device, self.dtype, memory_format=layout))
                return self._pool(outputs)[:count].float().cpu().numpy()
        except torch.cuda.OutOfMemoryError:
            if count == 1:
                raise PipelineError("the GPU cannot hold the model and one image: use a larger one") from None
        torch.cuda.empty_cache()
        self.micro_batch = max(1, count // 2)
        logger.warning("out of GPU memory: going on with %d images a pass", self.micro_batch)
        halves = [self._forward(half) for half in batch[:count].split(self.micro_batch)]
        return np.concatenate(halves)

    def _pool(self, outputs: object) -> torch.Tensor:
        """Return (B, D) as `pooling_type` says."""
        if self.pooling_type == "cls_token":
            tokens: torch.Tensor = outputs.last_hidden_state  # type: ignore[attr-defined]
            if tokens.ndim != 3:  # (B, C, H, W) of a convolutional one
                raise InputError(
                    f"{type(self.model).__name__} has no CLS token: set [embedding_model].pooling_type to pooler_output"
                )
            return tokens[:, 0]
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is None:
            raise InputError(
                f"{type(self.model).__name__} has no pooler_output: set [embedding_model].pooling_type to cls_token"
            )
        return pooled.flatten(1)  # type: ignore[no-any-return]


def _default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the chip is made for it; never float16, which breaks DINOv3."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _choose_micro_batch(device: torch.device, batch_size: int | str) -> int:
    if device.type == "cuda":
        return CUDA_BATCH if isinstance(batch_size, str) else batch_size
    return CPU_MICRO_BATCH if isinstance(batch_size, str) else min(batch_size, CPU_MICRO_BATCH)


def cut_ribbon(image: Image.Image) -> Image.Image:
    """Return the middle of an image that is more than RIBBON_RATIO times as long as wide; others as they are.

    A processor that brings the shorter edge to 256 pixels makes 4 GB of an image of 1 x 20,000, to keep a square from
    its middle. What it keeps stays the same but for a shift of half a pixel: the cut is centred as its crop is.
    """
    width, height = image.size
    longest = RIBBON_RATIO * min(width, height)
    if max(width, height) <= longest:
        return image
    x, y = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((x, y, width - x, height - y))


def load_processor(folder: Path, trust_remote_code: bool) -> Any:
    if not any(folder.glob("*processor_config.json")):
        logger.warning("%s says nothing of its image processor: taken is the default of its kind", folder)
    try:
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: no image processor can be loaded ({one_line(error)[:300]}): fetch the model again"
        ) from None


def load_model(folder: Path, dtype: torch.dtype | str, pooling_type: str, trust_remote_code: bool) -> torch.nn.Module:
    """Load the weights and refuse to run on any that the folder lacks, which would be random numbers."""
    try:
        model, info = AutoModel.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: the model cannot be loaded ({one_line(error)[:300]}): fetch it again") from None
    unused = "pooler." if pooling_type == "cls_token" else None
    missing = [key for key in info["missing_keys"] if not (unused and key.startswith(unused))]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} weights are missing ({sorted(missing)[0]}, ...): fetch the model again, "
            "or set [embedding_model].pooling_type to cls_token if only its pooler is missing"
        )
    return model  # type: ignore[no-any-return]


def check_embeddings(embeddings: NDArray[np.float32], names: Sequence[str], width: int | None = None) -> None:
    """Raise PipelineError naming the first image whose embedding is not finite, all zero, or of another width."""
    if width is not None and embeddings.shape[1] != width:
        raise PipelineError(f"the model gives {embeddings.shape[1]} numbers an image, expected {width}: wrong model")
    bad = ~np.isfinite(embeddings).all(axis=1) | ~embeddings.any(axis=1)
    if bad.any():
        name = names[int(np.flatnonzero(bad)[0])]
        raise PipelineError(
            f"{name}: its embedding is not finite or all zero, and {int(bad.sum()) - 1} more of {len(names)}: "
            'the weights are damaged or the dtype is wrong; try [embedding_model].dtype = "float32"'
        )
