"""Take over an embeddings dataset that another program wrote in this layout.

The reference implementation's parts hold OSMID and embedding (list<float>) and no provenance. The ids of a part tell
which rows of the input it holds; where some are missing, their pictures have to be unreadable.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.embeddings_dataset.appending import Appending
from pipeline.embeddings_dataset.checks import NORM_TOLERANCE
from pipeline.embeddings_dataset.columns import hash_bytes, plain_values
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN, IMAGE_COLUMN
from pipeline.embeddings_dataset.parts import EMBEDDING_COLUMN, Outcome, PartPlan, make_content, read_planned
from pipeline.errors import InputError, Rejection
from pipeline.files.tables import open_parquet, reading
from pipeline.inference.images import check_image

# Pictures that are embedded again.
SAMPLED_IMAGES = 32
# Computing in bfloat16 costs less than this; another model's embeddings lie near 0.
LEAST_COSINE = 0.999


def sample(store: Appending, foreign: list[PartPlan]) -> Iterator[tuple[str, bytes, NDArray[np.float32]]]:
    """Yield some pictures, spread over all rows, each with a name and the embedding (D,) that it has there."""
    starts = np.cumsum([0, *(open_parquet(store.dataset.path_of(plan.name)).metadata.num_rows for plan in foreign)])
    chosen = np.linspace(0, starts[-1] - 1, min(SAMPLED_IMAGES, int(starts[-1]))).astype(int)  # of all rows
    pieces = zip(foreign, np.split(chosen, np.searchsorted(chosen, starts[1:-1])), starts, strict=False)
    places = {plan: piece - start for plan, piece, start in pieces if len(piece)}
    for plan, table in read_planned(store.source, places):
        found = _match(store, plan, table)
        for place in places[plan].tolist():
            row = int(found.rows[place])
            image = table.column(IMAGE_COLUMN)[row].as_py()
            yield f"{plan.name}, row {plan.first_row + row}", image, found.embeddings[place]


def adopt(store: Appending, foreign: list[PartPlan], width: int) -> Iterator[PartPlan]:
    """Write each part again with its provenance, in one piece, and yield its plan; embeddings have `width` numbers.

    Raises InputError for a part that the input does not account for; those before it are taken over.
    """
    for plan, table in read_planned(store.source, foreign):
        found = _match(store, plan, table)
        if not len(found.rows):
            found = replace(found, embeddings=np.empty((0, width), np.float32))
        elif found.embeddings.shape[1] != width:
            raise InputError(f"{plan.name}: embeddings of {found.embeddings.shape[1]} numbers, not {width}")
        store.write_part(plan, make_content(store.source, plan, table, found))
        yield plan


def _match(store: Appending, plan: PartPlan, table: pa.Table) -> Outcome:
    """Return the rows of a read batch that a part holds, and the pictures that cannot be read where some lack."""
    path = store.dataset.path_of(plan.name)
    found, embeddings = read_foreign(path)
    rows, rejected = store.source.wanted_rows(table), []
    images = table.column(IMAGE_COLUMN)
    if len(rows) != len(found):
        rejected = list(_find_unreadable(images, rows))
        rows = np.setdiff1d(rows, [row for row, _ in rejected])
    ids = _make_comparable(plain_values(table.column(ID_COLUMN)))
    if [ids[row] for row in rows] != _make_comparable(found):
        raise InputError(
            f"{path}: its ids are not those of the input's rows {plan.first_row} to "
            f"{plan.first_row + plan.num_rows - 1}: give the --input and --read-batch-size that it was made with, "
            "or move this part away, and stage 8 makes it again"
        )
    hashes = [hash_bytes(images[int(row)].as_py() or b"") for row in rows]
    return Outcome(rows, embeddings, hashes, rejected)


def _make_comparable(ids: list[object]) -> list[str]:
    """Return ids as text; pandas makes doubles of whole numbers, and NaN of the nulls, where one is null."""
    whole = (int(value) if isinstance(value, float) and value.is_integer() else value for value in ids)
    return [repr(None if repr(value) == "nan" else value) for value in whole]


def _find_unreadable(images: pa.ChunkedArray, rows: NDArray[np.int64]) -> Iterator[tuple[int, Rejection]]:
    for row in rows:
        data = images[int(row)].as_py()
        try:
            if not data:
                raise Rejection("missing_image", "null" if data is None else "0 bytes")
            check_image(data)
        except Rejection as rejection:
            yield int(row), rejection


def read_foreign(path: Path) -> tuple[list[object], NDArray[np.float32]]:
    """Return the ids (N,) and embeddings (N, D) of a part that another program wrote.

    Raises InputError where it holds none, or not unit vectors of one length.
    """
    with reading(path), open_parquet(path) as file:
        if missing := {ID_COLUMN, EMBEDDING_COLUMN} - set(file.schema_arrow.names):
            raise InputError(f"{path}: column {sorted(missing)[0]} is missing: not an embeddings dataset")
        table = file.read([ID_COLUMN, EMBEDDING_COLUMN])
    lists = table.column(EMBEDDING_COLUMN).to_pylist()
    try:
        embeddings = np.array(lists, dtype=np.float32).reshape(len(lists), -1 if lists else 0)
    except (TypeError, ValueError):
        raise InputError(f"{path}: its embeddings are not lists of one length: move this part away") from None
    norms = np.linalg.norm(embeddings, axis=1)
    if not bool((np.abs(norms - 1.0) <= NORM_TOLERANCE).all()):  # NaN neither
        raise InputError(f"{path}: its embeddings are not of unit length: move this part away")
    return plain_values(table.column(ID_COLUMN)), embeddings
