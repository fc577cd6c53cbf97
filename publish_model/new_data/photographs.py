"""Embed a few photographs, one vector each, as stage 8 does it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError, Rejection
from publish_model.new_data.image_sources import read_file

# Decoded at a time; larger inputs are stage 8's.
BLOCK_IMAGES = 32


def embed_photographs(paths: Sequence[Path], model_dir: Path, precision: str, device: str) -> NDArray[np.float32]:
    """Return the embeddings of image files, (N, D) float32, in their order.

    Raises InputError, which says how many, where any of them cannot be read as an image.
    """
    for path in paths:  # found before a large model is loaded
        if not path.is_file():
            raise InputError(f"{path}: no such file: correct the path")
    from pipeline.inference.backbone import Embedder, check_embeddings

    embedder = Embedder(model_dir, device=device, dtype=precision, batch_size=BLOCK_IMAGES, trust_remote_code=True)
    blocks, problems = [], []
    for start in range(0, len(paths), BLOCK_IMAGES):
        decoded = []
        for path in paths[start : start + BLOCK_IMAGES]:
            try:
                decoded.append(embedder.decode(read_file(path)))
            except Rejection as rejection:
                problems.append(f"{path}: {rejection}")
        if decoded and not problems:
            blocks.append(embedder.embed(decoded))
    if problems:
        more = f" (and {len(problems) - 1} more of {len(paths)})" if len(problems) > 1 else ""
        raise InputError(f"{problems[0]}{more}: give JPEG, PNG or WebP images")
    embeddings = np.concatenate(blocks)
    check_embeddings(embeddings, [str(path) for path in paths])
    return embeddings
