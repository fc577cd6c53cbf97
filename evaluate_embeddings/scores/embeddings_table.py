"""Read any embeddings dataset: this project's, another program's, or a folder of parquets with embeddings."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.parts import ForeignError, list_part_files
from pipeline.errors import InputError, one_line
from pipeline.files.list_columns import find_embedding, find_width
from pipeline.files.listing import is_parquet, list_files
from pipeline.files.tables import open_parquet, read_batches
from pipeline.files.text_tables import find_columns
from pipeline.retrieval.labels import ID_COLUMNS, to_text
from pipeline.retrieval.scores import Embeddings, normalise_rows

_BATCH_ROWS = 8192


def read_embeddings(folder: Path) -> tuple[pa.StringArray, Embeddings]:
    """Return ids (N,) and L2-normalised embeddings (N, D) of stage 8's OUTPUT, or of the parquets in a folder.

    Raises InputError if there are none, one is damaged or lacks a column, the widths differ, an id is null, or a row
    is not finite or zero.
    """
    columns, id_columns, num_rows = [], [], 0
    for path in list_parts(folder):  # one at a time is open: a dataset has thousands
        with open_parquet(path) as file:
            id_columns += find_columns(path, file.schema_arrow.names, [ID_COLUMNS], "it must name the image")
            num_rows += file.metadata.num_rows
        columns.append(find_embedding(path))
    embeddings = np.empty((num_rows, find_width(columns, "give one dataset")), np.float32)
    ids, done = [], 0
    for column, name in zip(columns, id_columns, strict=True):
        first = done
        for batch in read_batches(column.path, [name, column.name], _BATCH_ROWS):
            ids.append(to_text(column.path, batch.column(name)))
            embeddings[done : done + batch.num_rows] = column.read(batch.column(column.name), done - first)
            done += batch.num_rows
    if not done:
        raise InputError(f"{folder}: holds no embedding: embed some images with stage 8 first")
    names = pa.concat_arrays(ids)
    if names.null_count:
        raise InputError(f"{folder}: an id is null: give every image one")
    try:
        return names, normalise_rows(embeddings)
    except InputError as error:
        raise InputError(f"{folder}: {one_line(error)}") from None


def list_parts(folder: Path) -> list[Path]:
    """Return the parquets of a dataset in the order of its input."""
    dataset = EmbeddingsDataset(folder)
    paths = [dataset.path_of(name) for name in list_part_files(dataset.folder)]
    try:
        if paths:
            return [part.path for part in dataset.parts]
    except ForeignError:
        if dataset.state is not None:  # a stray file among ours
            raise
        return paths
    if folder.is_dir():
        paths = [path for path in list_files(folder, hidden=(".", "_")) if is_parquet(path)]
    if not paths:
        raise InputError(f"{folder}: no parts/*.parquet and no parquet: give the folder that stage 8 wrote")
    return paths
