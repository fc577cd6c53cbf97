"""Compare every path through the engine with a float32 loop over the model's own processor, by the smallest cosine."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.inference.backbone import Decoded, Embedder
from pipeline.inference.pixels import decode_pixels
from pipeline.inference.precision import measure_cosines

# What every path has to reach.
LEAST_COSINE = {torch.float32: 0.9999, torch.bfloat16: 0.999}


def embed_plainly(processor: Any, model: torch.nn.Module, photographs: Sequence[bytes]) -> NDArray[np.float64]:
    """Return the reference embeddings (N, D): one image at a time, in float32."""
    device = next(model.parameters()).device
    rows = []
    with torch.no_grad():
        for data in photographs:
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
            inputs = processor(images=image, return_tensors="pt")
            rows.append(model(pixel_values=inputs["pixel_values"].to(device)).pooler_output.flatten(1)[0].cpu().numpy())
    return np.stack(rows).astype(np.float64)


def smallest_cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return the smallest of the cosines between the rows of two matrices."""
    return float(measure_cosines(a, b).min())


def check_paths(embedder: Embedder, photographs: Sequence[bytes], expected: NDArray[Any]) -> dict[str, float]:
    """Return the smallest cosine of each path that this embedder has, by its name.

    The paths: whole pictures to the device, pictures prepared on the CPU, one image a pass, 64 images a pass.
    """
    paths: dict[str, list[Decoded]] = {"prepared on the CPU": [embedder.prepare(decode_pixels(d)) for d in photographs]}
    if embedder.resizes_on_device:
        paths["resized on the device"] = [decode_pixels(data) for data in photographs]
    found = {name: smallest_cosine(embedder.embed(images), expected) for name, images in paths.items()}
    alone = np.concatenate([embedder.embed([image]) for image in paths["prepared on the CPU"]])
    found["one image a pass"] = smallest_cosine(alone, expected)
    many = paths["prepared on the CPU"] * -(-64 // len(photographs))
    found["64 a pass"] = smallest_cosine(embedder.embed(many)[: len(photographs)], expected)
    return found
