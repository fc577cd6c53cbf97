"""Run a pretrained vision model: encoded images in, pooled embeddings out."""

import itertools
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel

from pipeline.errors import DeviceMemoryError, InputError, PipelineError, one_line
from pipeline.inference.devices import (
    COMPILE_ERRORS,
    choose_device,
    compile_blocks,
    describe_device,
    full_precision,
    is_convolutional,
    keep_freed_memory,
    needing_memory,
    uncompile,
)
from pipeline.inference.loading import find_vision_config, load_model
from pipeline.inference.pixels import (
    decode_pixels,
    draw_picture,
    load_processor,
    prepare,
    prepare_on_device,
    travels_whole,
    works_on_tensors,
)
from pipeline.inference.pooling import PoolingError, embed_views
from pipeline.inference.precision import measure_cosines
from pipeline.log import logger

# Images in one forward pass on a CPU, and their pixels: a convolutional backbone's activations then stay in the cache
# (8 of 224 pixels are four times as fast as 32). Not measured at start: a resumed run has to form the same passes.
CPU_MICRO_BATCH = 8
CPU_MICRO_BATCH_PIXELS = 8 * 224 * 224
# Images in one forward pass on a GPU that is given no number, halved where its memory does not hold them. An H100 does
# 64 to 256 pictures of a ViT-7B at one rate (161 to 164 img/s).
GPU_MICRO_BATCH = 256
# Least cosine between a picture's embeddings after resizing on the device and on the CPU.
LEAST_RESIZED_COSINE = 0.9999

# A decoded image: the model's input (3, h, w) float32, or pixels (3, H, W) uint8 that the GPU prepares.
Decoded = torch.Tensor


@dataclass(frozen=True)
class Staged:
    """Inputs of a pass on their way to the device, (n, 3, h, w) for each size, and the event of their arrival."""

    batches: list[torch.Tensor]
    arrived: torch.cuda.Event | None = None


@dataclass
class Launched:
    """A pass under way: its outputs by part, (n, D) each, and the events around each part on the GPU."""

    parts: list[torch.Tensor]
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]]

    def result(self) -> NDArray[np.float32]:
        """Wait for the embeddings, (N, D) float32."""
        if self.events:
            self.events[-1][1].synchronize()
        return torch.cat(self.parts).numpy()


class Embedder:
    """A model with its image processor, on a device, in evaluation mode.

    An image goes through `decode`, `stage` and `launch`. Many threads may call `decode`, and on a CPU `launch`; the
    others are each called from one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        pooling_type: str = "pooler_output",
        image_size: int | None = None,
        scales: Sequence[int] = (),
        flip: bool = False,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = "auto",
        compile_model: bool = False,
        trust_remote_code: bool = False,
        model_class: Any = AutoModel,
    ) -> None:
        """Load model and processor from a local folder, and try them on a drawn picture.

        The folder's own code is run where it is trusted, and never with a `model_class` of this project.

        `image_size` is the side of the model's input, None for the processor's own; for `scales` and `flip` see
        `embed_views`. `dtype` is one of `precision.MODES`; auto is bfloat16 on a GPU, unchecked, and float32 on a CPU.
        Raises InputError if model or processor cannot be loaded, weights are missing, or the model cannot embed.
        """
        self.device = choose_device(device)
        self.on_gpu = self.device.type == "cuda"
        if not self.on_gpu:
            keep_freed_memory()
        self.pooling_type, self.scales, self.flip = pooling_type, tuple(scales), flip
        # Never float16, which breaks DINOv3.
        self.mode = dtype if dtype != "auto" else "bfloat16" if self.on_gpu else "float32"
        self.dtype = torch.bfloat16 if self.mode == "bfloat16" else torch.float32
        # Refuses a text model before its image processor is missed.
        model_config = find_vision_config(folder, trust_remote_code, model_class)
        self.processor = load_processor(folder, image_size)
        self.resizes_on_device = self.on_gpu and works_on_tensors(self.processor)
        # High priority: what runs there is short, and would otherwise wait for a whole pass.
        self._side = torch.cuda.Stream(priority=-1) if self.on_gpu else None
        self.model: Any = load_model(folder, model_config, self.dtype, pooling_type, trust_remote_code, model_class)
        size = sum(parameter.nbytes for parameter in self.model.parameters()) / 1e9
        remedy = 'take a larger one, or set [embedding_model].dtype to "bfloat16"'
        with needing_memory(f"the model of {size:.1f} GB", remedy):
            self.model.to(self.device).eval()
        # Twice as fast for convolutions, with the same values; on a CPU also for a ViT's patches.
        convolves = not self.on_gpu or is_convolutional(self.model)
        self._layout = torch.channels_last if convolves else torch.contiguous_format
        self.model.to(memory_format=self._layout)
        self.compile_model, self.num_graphs = False, 0
        self.micro_batch = GPU_MICRO_BATCH if isinstance(batch_size, str) else batch_size
        self.width = self._try(folder, image_size or 0)
        if self.resizes_on_device:
            self._judge_resizing()
        if compile_model:
            self._compile()
        logger.info(
            "model %s: %s, %s, %s, attention %s, %d images a pass",
            folder.name, type(self.model).__name__, describe_device(self.device), self.mode,
            getattr(self.model.config, "_attn_implementation", None) or "none", self.micro_batch,
        )  # fmt: skip

    def decode(self, data: bytes) -> Decoded:
        """Decode an image, and prepare it unless the GPU does that. Raises Rejection if it cannot be used."""
        pixels = decode_pixels(data)
        return pixels if self.resizes_on_device and travels_whole(*pixels.shape[1:]) else self.prepare(pixels)

    def prepare(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn an image's pixels (3, H, W) uint8 into the model's input (3, h, w) float32."""
        return prepare(self.processor, pixels)

    def stage(self, images: Sequence[Decoded]) -> Staged:
        """Bring decoded images to the device while it computes; neighbours of one size make a batch."""
        remedy = "or set [embedding_model].batch_size to a smaller number"
        with torch.cuda.stream(self._side), needing_memory("the pictures of a pass", remedy):  # a stream of None: a CPU
            groups = itertools.groupby(self._finish(images), key=lambda tensor: (tensor.shape, tensor.device))
            batches = [torch.stack(list(group)) for _, group in groups]
            if self.on_gpu:
                batches = [batch if batch.is_cuda else batch.pin_memory() for batch in batches]
                batches = [batch.to(self.device, self.dtype, non_blocking=True) for batch in batches]
            return Staged(batches, self._side.record_event() if self._side else None)

    def _finish(self, images: Sequence[Decoded]) -> list[torch.Tensor]:
        """Return the model's inputs, (3, h, w) each, preparing pixels on the device."""
        found = dict(enumerate(images))
        whole = {place: image for place, image in found.items() if image.dtype == torch.uint8}
        if whole:
            pixels = self._upload(list(whole.values()))
            found |= zip(whole, prepare_on_device(self.processor, pixels, self.device), strict=True)
        return list(found.values())

    def _upload(self, pictures: list[torch.Tensor]) -> list[torch.Tensor]:
        """Bring pictures (3, H, W) uint8 to the device in one copy."""
        sizes = [picture.numel() for picture in pictures]
        buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=self.on_gpu)
        torch.cat([picture.flatten() for picture in pictures], out=buffer)
        pieces = buffer.to(self.device, non_blocking=True).split(sizes)
        return [piece.view(picture.shape) for piece, picture in zip(pieces, pictures, strict=True)]

    def launch(self, staged: Staged) -> Launched:
        """Start the forward passes; on a CPU this computes them."""
        if staged.arrived is not None:
            current = torch.cuda.current_stream()
            current.wait_event(staged.arrived)
            for batch in staged.batches:
                batch.record_stream(current)
        launched = Launched([], [])
        for waiting in staged.batches:
            done = 0
            while done < len(waiting):
                batch = waiting[done : done + self.micro_batch]
                done += len(batch) if self._forward(batch, launched) else 0
        return launched

    def embed(self, images: Sequence[Decoded]) -> NDArray[np.float32]:
        """Return the embeddings (N, D) float32, not normalised, of decoded or prepared images in order."""
        return self.launch(self.stage(images)).result()

    def _try(self, folder: Path, image_size: int) -> int:
        """Embed a drawn picture and return the embedding's width; on a CPU, bound the pixels of a pass before.

        Raises InputError where the processor or the model fails, or a size is no multiple of the model's patches.
        """
        name, side = type(self.model).__name__, getattr(self.model.config, "patch_size", None)
        for size in self.scales or (image_size,):
            if isinstance(side, int) and size % side:
                raise InputError(
                    f"{folder}: {size} pixels are no multiple of its patches of {side}, and their edge would be cut "
                    f"off: take {size // side * side} or {(size // side + 1) * side} in [embedding_model].image_size "
                    "or scales"
                )
        try:
            prepared = self.prepare(draw_picture(640, 640))
            if not self.on_gpu:
                most = min(CPU_MICRO_BATCH, CPU_MICRO_BATCH_PIXELS // prepared[0].numel())
                self.micro_batch = min(self.micro_batch, max(1, most))
            return int(self.embed([prepared]).shape[1])
        except PoolingError as error:
            other = "cls_token" if self.pooling_type == "pooler_output" else "pooler_output"
            raise InputError(f"{name} {error}: set [embedding_model].pooling_type to {other}") from None
        except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError, AttributeError) as error:
            raise InputError(
                f"{folder}: {name} or its image processor cannot embed a picture ({one_line(error)[:200]}): leave "
                "[embedding_model].image_size at auto and scales empty, correct preprocessor_config.json, or give "
                "another model"
            ) from None

    def _judge_resizing(self) -> None:
        """Resize on the CPU from now on, where the device's way gives a faint picture another embedding."""
        # Of half the contrast: rounding moves its embedding as far as a photograph's.
        pixels, cosine = draw_picture(512, 384) // 2 + 64, -1.0
        there, here = self._finish([pixels])[0], self.prepare(pixels)
        if there.shape == here.shape:
            [cosine] = measure_cosines(self.embed([there]), self.embed([here]))
        if cosine < LEAST_RESIZED_COSINE:
            logger.info("pictures are resized on the CPU: on the GPU an embedding has a cosine of %.5f", cosine)
            self.resizes_on_device = False

    def _extract(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the features (B, D) float32 of the model's inputs, over all views of them."""
        # Without autocast's cache, which would hold a second copy of the weights.
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, self.mode == "bfloat16_autocast", cache_enabled=False
        )
        with autocast, full_precision(tf32=self.mode == "tf32") if self.on_gpu else nullcontext():
            return embed_views(self.model, inputs, self.pooling_type, self.scales, self.flip)[0]

    def _forward(self, batch: torch.Tensor, launched: Launched) -> bool:
        """Start one pass; where the GPU's memory does not hold it, halve the passes and return False."""
        count = len(batch)
        if self.compile_model and count < self.micro_batch:  # a new shape would compile anew
            batch = torch.cat([batch, batch[-1:].expand(self.micro_batch - count, -1, -1, -1)])
        try:
            with torch.inference_mode():
                inputs = batch.to(self.device, self.dtype, memory_format=self._layout)
                started = record_time() if self.on_gpu else None
                launched.parts.append(fetch(self._extract(inputs)[:count]))
                if started is not None:
                    launched.events.append((started, record_time()))
                return True
        except torch.cuda.OutOfMemoryError:
            if count == 1:
                raise DeviceMemoryError("the GPU cannot hold the model and one image: use a larger one") from None
        torch.cuda.empty_cache()
        self.micro_batch = count // 2
        logger.warning("out of GPU memory: going on with %d images a pass", self.micro_batch)
        return False

    def _compile(self) -> None:
        """Compile the model's blocks and run a pass; log why and go on without where that fails."""
        self.compile_model = True
        num_blocks = compile_blocks(self.model)
        num_before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        started = time.monotonic()
        try:
            self.embed([self.prepare(draw_picture(640, 640))] * self.micro_batch)
        except COMPILE_ERRORS as error:
            logger.warning("going on without torch.compile: %s", one_line(error)[:200])
            uncompile(self.model)
            self.compile_model = False
        else:
            self.num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - num_before
            logger.info("compiled %d blocks as %d graphs in %.0f s",
                        num_blocks, self.num_graphs, time.monotonic() - started)  # fmt: skip


def fetch(pooled: torch.Tensor) -> torch.Tensor:
    """Copy to the host; from a GPU into pinned memory, without waiting."""
    if pooled.device.type != "cuda":
        return pooled
    host = torch.empty(pooled.shape, dtype=pooled.dtype, pin_memory=True)
    return host.copy_(pooled, non_blocking=True)


def record_time() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


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
