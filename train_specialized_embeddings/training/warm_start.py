"""Start from the checkpoint of another run: its projector, in the coordinates that it was trained in."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.log import logger
from pipeline.retrieval.checkpoint import Checkpoint, build_projector, load_checkpoint
from pipeline.retrieval.projector import Projector
from train_specialized_embeddings.training.coordinates import Coordinates, restore_coordinates


@dataclass(frozen=True)
class WarmStart:
    """A projector of coordinates, and these; folded they are the checkpoint's projector."""

    coordinates: Coordinates
    inner: Checkpoint  # its projector is of the coordinates

    def make_projector(self) -> Projector:
        """Return the projector with the checkpoint's weights, ready to train."""
        return build_projector(self.inner).train()


def load_warm_start(path: Path, config: Config, width: int, embedded_with: Any) -> WarmStart:
    """Read what `[training].init_checkpoint` names; the configuration has its say about dropout alone.

    `width` is that of the features, `embedded_with` how they were made. Raises InputError where the checkpoint is
    missing or damaged, has other widths, is of embeddings that were made otherwise, or holds no coordinates.
    """
    found = load_checkpoint(path, config.training_model, input_dim=width)
    made_with = found.provenance.get("embedded_with")
    if isinstance(made_with, dict) and isinstance(embedded_with, dict) and made_with != embedded_with:
        key = min(key for key in made_with | embedded_with if made_with.get(key) != embedded_with.get(key))
        raise InputError(
            f"{path}: trained on embeddings made with {key} {made_with.get(key)!r}, these were made with "
            f"{embedded_with.get(key)!r}: leave out [training].init_checkpoint, or use the same embeddings"
        )
    state, weights = found.rest.get("coordinates"), found.rest.get("average")
    if not (isinstance(state, dict) and isinstance(weights, dict)):
        raise InputError(
            f"{path}: does not hold the coordinates that training would go on in: [training].init_checkpoint takes "
            "what this version's stage 6 wrote; leave it out"
        )
    coordinates = restore_coordinates(state)
    architecture = found.architecture | {
        "input_dim": len(coordinates.spread), "input_power": 1.0, "input_norm": False,
        "dropout": config.training_model.dropout,
    }  # fmt: skip
    logger.info("training starts from %s of epoch %s, whose architecture it keeps", path, found.rest.get("epoch"))
    return WarmStart(coordinates, Checkpoint(path, architecture, weights))
