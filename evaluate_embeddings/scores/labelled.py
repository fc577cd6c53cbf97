"""Read any embeddings dataset, and the labels that say which of its images show one building."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import InputError, one_line
from pipeline.files.list_columns import find_embedding
from pipeline.files.listing import is_parquet, list_files
from pipeline.files.tables import open_parquet, reading
from pipeline.files.writing import read_json_object
from pipeline.log import logger
from pipeline.retrieval.scores import Embeddings, normalise_rows

# The column that names an image, in the order of preference: stage 8's, then that of the merged splits.
ID_COLUMNS = ("OSMID", "streetview_image_id")
LABEL_COLUMN = "building_id"
_BATCH_ROWS = 8192

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class EmbeddingsTable:
    """The rows of an embeddings dataset, in its order."""

    place: Path
    ids: pa.StringArray  # (N,)
    embeddings: Embeddings  # (N, D), L2-normalised


def read_embeddings(folder: Path) -> EmbeddingsTable:
    """Read OUTPUT/parts/*.parquet of stage 8, or the parquets that lie in the folder itself.

    Raises InputError if there are none, one is damaged or lacks a column, the widths differ, an id is null, or a row
    is not finite or zero.
    """
    columns = [find_embedding(path) for path in list_parts(folder)]
    known = next((column for column in columns if column.width), columns[0])
    for column in columns:
        if column.width not in (None, known.width):
            raise InputError(
                f"{column.path}: embeddings of {column.width} numbers, {known.path.name} has {known.width}: "
                "give one dataset"
            )
    embeddings = np.empty((sum(count_rows(column.path) for column in columns), known.width or 0), np.float32)
    ids, done = [], 0
    for column in columns:  # one at a time is open: a dataset has thousands
        path, first = column.path, done
        with reading(path), open_parquet(path) as file:
            name = find_id_column(path, file.schema_arrow)
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[name, column.name]):
                ids.append(to_text(path, batch.column(name)))
                embeddings[done : done + batch.num_rows] = column.read(batch.column(column.name), done - first)
                done += batch.num_rows
    if not done:
        raise InputError(f"{folder}: holds no embedding: embed some images with stage 8 first")
    try:
        return EmbeddingsTable(folder, pa.concat_arrays(ids), normalise_rows(embeddings))
    except InputError as error:
        raise InputError(f"{folder}: {one_line(error)}") from None


def count_rows(path: Path) -> int:
    """Return the rows of a parquet, by its footer."""
    with open_parquet(path) as file:
        num_rows: int = file.metadata.num_rows
        return num_rows


def list_parts(folder: Path) -> list[Path]:
    """Return the parquets of a dataset, in the order of its input.

    Raises InputError if there are none.
    """
    places = (folder / "parts", folder.with_name(f"{folder.name}.parts") / "parts", folder)
    for place in places:
        paths = [path for path in list_files(place, hidden=(".", "_")) if is_parquet(path)] if place.is_dir() else []
        if paths:
            _log_if_incomplete(place.parent)
            return paths
    raise InputError(f"{folder}: no parts/*.parquet and no parquet: give the folder that stage 8 wrote")


def _log_if_incomplete(folder: Path) -> None:
    state = read_json_object(folder / "state.json")
    if state.get("complete") is False:
        logger.warning(
            "%s is not complete: %s of %s rows are embedded, and only those are scored",
            folder, state.get("rows_embedded"), state.get("rows_total"),
        )  # fmt: skip


def find_id_column(path: Path, schema: pa.Schema) -> str:
    """Return the name of the column that names the images.

    Raises InputError if there is none.
    """
    for name in ID_COLUMNS:
        if schema.get_field_index(name) >= 0:
            return name
    raise InputError(f"{path}: no column {' or '.join(ID_COLUMNS)}: one of them must name the image")


def to_text(path: Path, column: pa.Array) -> pa.StringArray:
    """Return ids of any scalar type as text, so that 7 meets 7 whatever its width.

    Raises InputError if one is null or they cannot be text.
    """
    if column.null_count:
        raise InputError(f"{path}: an id is null: give every image one")
    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{path}: ids of type {column.type} cannot be compared ({one_line(error)[:100]})") from None


def label_rows(ids: pa.StringArray, labels_path: Path | None) -> pa.StringArray:
    """Return the building of each id, (N,), null where the labels do not know it; without labels the id itself.

    Raises InputError if the labels are damaged, lack a column, or give an id two buildings.
    """
    if labels_path is None:
        return ids
    file = open_parquet(labels_path)
    name = find_id_column(labels_path, file.schema_arrow)
    if file.schema_arrow.get_field_index(LABEL_COLUMN) < 0:
        raise InputError(f"{labels_path}: no column {LABEL_COLUMN}: it must say which building each {name} shows")
    with reading(labels_path):
        table = file.read(columns=[name, LABEL_COLUMN])
    known = to_text(labels_path, table[name].combine_chunks())
    buildings = table[LABEL_COLUMN].combine_chunks().cast(pa.string())
    pairs = pa.table({"id": known, "building": buildings}).group_by(["id", "building"]).aggregate([])
    if pairs.num_rows != len(known.unique()):
        counts = pairs["id"].value_counts()
        twice = next(entry["values"] for entry in counts.to_pylist() if entry["counts"] > 1)
        raise InputError(f"{labels_path}: {name} {twice} has two buildings: give each image one")
    return buildings.take(pc.index_in(ids, value_set=known))


def match_rows(ids: pa.StringArray, other_ids: pa.StringArray, other_name: str) -> tuple[Rows, Rows]:
    """Return the rows of the one and of the other that are of the same images, in the order of the one.

    Rows meet by their id where ids are unique; where they repeat (several images of one building), both must be of the
    same images in the same order. Raises InputError where neither holds, or nothing meets.
    """
    if ids.equals(other_ids):
        return np.arange(len(ids)), np.arange(len(ids))
    if any(len(names.unique()) != len(names) for names in (ids, other_ids)):
        raise InputError(
            f"{other_name}: ids repeat and are not the same in the same order, so that images cannot be matched: "
            "embed the same input with both models"
        )
    places = pc.index_in(ids, value_set=other_ids)
    kept = np.flatnonzero(places.is_valid().to_numpy(zero_copy_only=False))
    if not len(kept):
        raise InputError(f"{other_name}: has no image in common with the first: embed the same input with both models")
    logger.info("%s: %d of %d images are in both", other_name, len(kept), len(ids))
    return kept, places.take(pa.array(kept)).to_numpy().astype(np.int64)
