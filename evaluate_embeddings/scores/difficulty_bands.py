"""Pick, out of the difficulty metadata, images with a negative of each band, the hardest first."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from evaluate_embeddings.scores.metrics import Evaluation
from pipeline.errors import InputError
from pipeline.files.tables import check_columns, open_parquet, reading
from pipeline.retrieval.candidates import RowGroups

COLUMNS = [pa.field("target_coord_hash", pa.string()), pa.field("neighbor_building_ids", pa.list_(pa.string())),
           pa.field("neighbor_bands", pa.list_(pa.int32()))]  # fmt: skip
# Images of the split that are looked at, so that the file of millions of lists is not read to its end.
NUM_CANDIDATES = 200
_BATCH_ROWS = 1024


@dataclass(frozen=True)
class BandExample:
    """An image and, for each band found, a row of a building that is its neighbour in that band."""

    anchor: int
    negatives: tuple[tuple[int, int], ...]  # (band, row), the hardest band first


def find_band_examples(path: Path, evaluation: Evaluation, limit: int) -> list[BandExample]:
    """Return up to `limit` images of different buildings, those with most bands first.

    Only buildings of the split are negatives here, as only their pictures can be found. Of a building the image is
    taken that the projector finds most similar: the metadata name buildings, not images.
    Raises InputError if the file is missing, damaged or lacks a column.
    """
    rows_of_images = {name: row for row, name in enumerate(evaluation.features.image_ids.to_pylist())}
    buildings = {name: code for code, name in enumerate(evaluation.features.building_ids.to_pylist())}
    groups = RowGroups(evaluation.codes)
    found: dict[int, BandExample] = {}  # by the anchor's building
    for image_id, neighbor_ids, bands in _read_neighbors(path, evaluation.features.image_ids):
        anchor = rows_of_images[image_id]
        nearest: dict[int, int] = {}
        for building_id, band in zip(neighbor_ids, bands, strict=True):
            # A building has neighbours in several bands: each is shown once.
            if building_id in buildings and band not in nearest and buildings[building_id] not in nearest.values():
                nearest[band] = buildings[building_id]
        negatives = tuple((band, _most_similar(evaluation, groups, anchor, nearest[band])) for band in sorted(nearest))
        own = int(evaluation.codes[anchor])
        if negatives and len(negatives) > len(found[own].negatives if own in found else ()):
            found[own] = BandExample(anchor, negatives)
    return sorted(found.values(), key=lambda example: (-len(example.negatives), example.anchor))[:limit]


def _most_similar(evaluation: Evaluation, groups: RowGroups, anchor: int, building: int) -> int:
    embeddings, rows = evaluation.embeddings["projector"], groups.rows_of(building)
    return int(rows[np.argmax(embeddings[rows] @ embeddings[anchor])])


def _read_neighbors(path: Path, image_ids: pa.StringArray) -> Iterator[tuple[str, list[str], list[int]]]:
    """Yield id, neighbours and bands of the first NUM_CANDIDATES images of the file that are of the split."""
    file = open_parquet(path)
    check_columns(path, file.schema_arrow, COLUMNS[:1])
    if any(file.schema_arrow.get_field_index(field.name) < 0 for field in COLUMNS):
        raise InputError(f"{path}: not difficulty metadata: make it with stage 5")
    left = NUM_CANDIDATES
    with reading(path):
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[field.name for field in COLUMNS]):
            chosen = batch.filter(pc.is_in(batch.column(0), value_set=image_ids)).slice(0, left)
            left -= chosen.num_rows
            yield from zip(*(chosen.column(name).to_pylist() for name in chosen.schema.names), strict=True)
            if left <= 0:
                return
