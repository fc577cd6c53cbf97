"""Say how like the training images those of a dataset are, by the statistics that the published folder carries."""

import numpy as np

from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.errors import InputError
from publish_model.model_folder.published_model import check_model, find_model
from publish_model.model_folder.training_similarity import nearest_similarity, read_training

# New images that are looked at, spread over the dataset.
NUM_SAMPLED = 100_000


def measure_drift(dataset: EmbeddingsDataset, model_id: str) -> str:
    """Say which share of a dataset's images is beyond the 99th percentile of distance to the training images.

    Raises InputError where the model cannot be had, carries no statistics, or is not the dataset's.
    """
    model = find_model(model_id, download=False)
    quantiles, reference = read_training(model.folder)
    check_model(dataset, model)
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
