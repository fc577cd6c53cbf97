"""The loop that a user would write to embed images: one at a time, in float32; and how near two results are."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def embed_plainly(model_dir: Path, images: Iterable[bytes], pooling_type: str = "pooler_output") -> np.ndarray:
    """Return the embeddings of encoded images, (N, D) float64."""
    import torch
    from transformers import AutoImageProcessor, AutoModel

    processor = AutoImageProcessor.from_pretrained(model_dir)
    model = AutoModel.from_pretrained(model_dir, dtype=torch.float32).eval()
    rows = []
    for data in images:
        with torch.no_grad():
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
            outputs = model(**processor(images=image.convert("RGB"), return_tensors="pt"))
        pooled = (
            outputs.pooler_output.flatten(1) if pooling_type == "pooler_output" else outputs.last_hidden_state[:, 0]
        )
        rows.append(pooled[0].numpy())
    return np.stack(rows).astype(np.float64)


def smallest_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the smallest of the cosines between the rows of two matrices."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())
