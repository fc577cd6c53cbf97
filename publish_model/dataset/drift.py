"""Say how like the training images new ones are: by the similarity of each to its nearest training image.

The published folder carries a sample of the training embeddings, without ids, and the quantiles of the similarity
between images of buildings that were not trained on (the validation split) and the nearest of that sample. New images
that are like these fall below the first percentile of similarity, that is beyond the 99th of distance, in 1 % of cases.
"""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from publish_model.dataset.embeddings_dataset import EmbeddingsDataset
from publish_model.new_data.published_model import find_model

FILE_NAME = "training_similarity.json"
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# 2,000 vectors of 256 float16 are 1 MB, and 2,000 queries give the first percentile from 20 of them.
NUM_REFERENCE = NUM_QUERIES = 2000
# New images that are looked at, spread over the dataset.
NUM_SAMPLED = 100_000

Embeddings = NDArray[np.float32]


def nearest_similarity(queries: Embeddings, reference: Embeddings) -> NDArray[np.float32]:
    """Return the cosine of each of (N, D) unit vectors to the nearest of (R, D), (N,)."""
    blocks = [queries[start : start + 4096] @ reference.T for start in range(0, len(queries), 4096)]
    return np.concatenate([block.max(axis=1) for block in blocks]) if blocks else np.empty(0, dtype=np.float32)


def describe_training(reference: Embeddings, queries: Embeddings) -> dict[str, Any]:
    """Return what the published folder carries: the sample (R, D) and the quantiles of similarity to it."""
    stored = reference.astype("<f2")
    similarity = nearest_similarity(queries, stored.astype(np.float32))
    return {
        "what": "cosine similarity of held-out images to the nearest of a sample of the training embeddings",
        "quantiles": {str(q): round(float(np.quantile(similarity, q)), 6) for q in QUANTILES},
        "num_queries": len(queries),
        "reference_shape": list(stored.shape),
        "reference_float16": base64.b64encode(stored.tobytes()).decode("ascii"),
    }


def read_training(folder: Path) -> tuple[dict[str, float], Embeddings]:
    """Return the quantiles and the sample (R, D) that a published folder carries.

    Raises InputError if it carries none.
    """
    try:
        content = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        values = np.frombuffer(base64.b64decode(content["reference_float16"]), dtype="<f2")
        reference = values.reshape(content["reference_shape"]).astype(np.float32)
        return {str(key): float(value) for key, value in content["quantiles"].items()}, reference
    except FileNotFoundError:
        raise InputError(f"{folder}: carries no {FILE_NAME}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{folder / FILE_NAME}: damaged: publish the model again") from None


def measure_drift(dataset: EmbeddingsDataset, model_id: str) -> str:
    """Say which share of a dataset's images is beyond the 99th percentile of distance to the training images.

    Raises InputError where the model cannot be had, carries no statistics, or is not the dataset's.
    """
    model = find_model(model_id, download=False)
    quantiles, reference = read_training(model.folder)
    dataset.check_model(model)
    step = max(1, dataset.num_rows // NUM_SAMPLED)
    blocks = (block[-first % step :: step] for first, block in dataset.read_blocks())
    similarity = np.concatenate([np.empty(0, np.float32), *(nearest_similarity(block, reference) for block in blocks)])
    if not len(similarity):
        raise InputError("the dataset holds no embeddings")
    share = float(np.mean(similarity < quantiles["0.01"]))
    return (
        f"likeness to the training images: {share:.1%} of {len(similarity)} images are beyond the 99th percentile of "
        f"distance (1 % is to be expected); median similarity {np.median(similarity):.3f}, "
        f"held-out images {quantiles['0.5']:.3f}"
    )
