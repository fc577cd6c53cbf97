"""Take over an embeddings dataset that another program wrote in this layout, once it is shown to be what it should be.

The reference implementation's parts hold OSMID and embedding (list<float>) and say nothing of what they were made from.
Which rows of the input a part holds follows from its ids, and from which pictures can be read where some are left out.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.embeddings_dataset.appending import Appending
from pipeline.embeddings_dataset.columns import plain_values, take_rows
from pipeline.embeddings_dataset.hashes import hash_bytes, hash_ids, pack_hashes
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN, IMAGE_COLUMN, read_batches
from pipeline.embeddings_dataset.part_plans import PartContent, PartPlan
from pipeline.embeddings_dataset.parts import EMBEDDING_COLUMN, ForeignError, list_part_files, read_part, write_part
from pipeline.errors import InputError, Rejection
from pipeline.files.tables import open_parquet, reading
from pipeline.inference.images import check_image

# Parts that are looked at, and pictures of each that are embedded again.
SAMPLED_PARTS, SAMPLED_ROWS = 8, 4
# What computing in bfloat16 may cost; another model's embeddings lie near 0.
LEAST_COSINE = 0.999
NORM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Matched:
    """The rows of a read batch that a part holds, and those of its pictures that cannot be read."""

    plan: PartPlan
    table: pa.Table
    rows: NDArray[np.int64]
    rejected: list[tuple[int, Rejection]]
    embeddings: NDArray[np.float32]  # (N, D)

    def image(self, row: int) -> bytes:
        """Return the picture of a row of the read batch."""
        data: bytes = self.table.column(IMAGE_COLUMN)[int(row)].as_py()
        return data


class Adoption:
    """The parts of a dataset that are to be taken over, each matched with the input that it was made from."""

    def __init__(self, appending: Appending, plans: list[PartPlan]) -> None:
        """Find the parts that are not ours.

        Raises InputError for a file that is no part of this input, StaleOutputError for a part of ours that is of
        another recipe.
        """
        self._appending, self._source = appending, appending.source
        self.folder = appending.dataset.folder
        known = {plan.name: plan for plan in plans}
        self.foreign: list[PartPlan] = []
        for name in list_part_files(self.folder):
            path = self.folder / "parts" / name
            if name not in known:
                raise InputError(
                    f"{path}: no part of this input: give the --input and --read-batch-size that it was made with"
                )
            try:
                appending.recipe.check(read_part(path).recipe, path)
            except ForeignError:
                self.foreign.append(known[name])

    def sample(self) -> Iterator[tuple[str, bytes, NDArray[np.float32]]]:
        """Yield some pictures, spread over the parts, each with a name and the embedding (D,) that it has there."""
        places = np.unique(np.linspace(0, len(self.foreign) - 1, SAMPLED_PARTS).astype(int))
        for plan in [self.foreign[place] for place in places]:
            batches = read_batches(self._source, plan.row_group)
            found = self._match(plan, next(itertools.islice(batches, plan.read_batch, None)))
            count = min(SAMPLED_ROWS, len(found.rows))
            for place in np.unique(np.linspace(0, len(found.rows) - 1, count).astype(int)):
                row = int(found.rows[place])
                yield f"{plan.name}, row {plan.first_row + row}", found.image(row), found.embeddings[place]

    def adopt(self, width: int) -> Iterator[PartPlan]:
        """Write each part again with what it was made from, and yield it; a part is replaced in one piece.

        Embeddings have `width` numbers.

        Raises InputError for a part that the input does not account for; those before it are taken over.
        """
        for row_group, group in itertools.groupby(self.foreign, key=lambda plan: plan.row_group):
            plans = {plan.read_batch: plan for plan in group}
            for read_batch, table in enumerate(read_batches(self._source, row_group)):
                if read_batch in plans:
                    plan = plans[read_batch]
                    content = self._assemble(self._match(plan, table), width)
                    write_part(self.folder, plan, content, self._appending.describe(plan))
                    yield plan

    def _match(self, plan: PartPlan, table: pa.Table) -> Matched:
        path = self.folder / "parts" / plan.name
        found, embeddings = read_foreign(path)
        rows, rejected = self._source.wanted_rows(table), []
        if len(rows) != len(found):
            rejected = list(_find_unreadable(table, rows))
            rows = np.setdiff1d(rows, [row for row, _ in rejected])
        ids = [repr(value) for chunk in table.column(ID_COLUMN).chunks for value in plain_values(chunk)]
        if [ids[row] for row in rows] != [repr(value) for value in found]:
            raise InputError(
                f"{path}: its ids are not those of the input's rows {plan.first_row} to "
                f"{plan.first_row + plan.num_rows - 1}: give the --input and --read-batch-size that it was made with, "
                "or move this part away, and stage 8 makes it again"
            )
        return Matched(plan, table, rows, rejected, embeddings)

    def _assemble(self, found: Matched, width: int) -> PartContent:
        if len(found.rows) and found.embeddings.shape[1] != width:
            raise InputError(f"{found.plan.name}: its embeddings have {found.embeddings.shape[1]} numbers, not {width}")
        ids, field = found.table.column(ID_COLUMN).combine_chunks(), found.table.schema.field(ID_COLUMN)
        values = pa.FixedSizeListArray.from_arrays(pa.array(found.embeddings.ravel(), pa.float32()), width)
        embedded_ids = take_rows(ids, found.rows)
        schema = pa.schema([field, pa.field(EMBEDDING_COLUMN, pa.list_(pa.float32(), width))])
        bad = np.array([row for row, _ in found.rejected], dtype=np.int64)
        rejects = pa.table(
            {
                "row": pa.array(found.plan.first_row + bad, pa.int64()),
                ID_COLUMN: take_rows(ids, bad),
                "reason": pa.array([rejection.reason for _, rejection in found.rejected], pa.string()),
                "detail": pa.array([rejection.detail for _, rejection in found.rejected], pa.string()),
            }
        )
        image_hashes = [hash_bytes(found.image(row)) for row in found.rows]
        return PartContent(
            embedded=pa.Table.from_arrays([embedded_ids, values], schema=schema),
            rejects=rejects,
            skipped=found.table.num_rows - len(found.rows) - len(found.rejected),
            hashes=pack_hashes(image_hashes, hash_ids(plain_values(embedded_ids))),
            reasons=dict(Counter(rejection.reason for _, rejection in found.rejected)),
        )


def _find_unreadable(table: pa.Table, rows: NDArray[np.int64]) -> Iterator[tuple[int, Rejection]]:
    for row in rows:
        data = table.column(IMAGE_COLUMN)[int(row)].as_py()
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
        missing = {ID_COLUMN, EMBEDDING_COLUMN} - set(file.schema_arrow.names)
        if missing:
            raise InputError(f"{path}: column {sorted(missing)[0]} is missing: not an embeddings dataset")
        table = file.read([ID_COLUMN, EMBEDDING_COLUMN])
    ids = [value for chunk in table.column(ID_COLUMN).chunks for value in plain_values(chunk)]
    lists = table.column(EMBEDDING_COLUMN).to_pylist()
    widths = {len(values) if values is not None else None for values in lists}
    if len(widths) > 1 or None in widths:
        raise InputError(f"{path}: its embeddings are not lists of one length: move this part away")
    embeddings = np.array(lists, dtype=np.float32).reshape(len(lists), -1 if lists else 0)
    norms = np.linalg.norm(embeddings, axis=1)
    if not bool((np.abs(norms - 1.0) <= NORM_TOLERANCE).all()):  # which NaN is not either
        raise InputError(f"{path}: its embeddings are not of unit length: move this part away")
    return ids, embeddings
