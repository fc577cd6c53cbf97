"""The content of a part: the rows of one read batch that were embedded, and those that were rejected."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.embeddings_dataset.columns import take_rows
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN, PackagedInput
from pipeline.errors import Rejection

EMBEDDING_COLUMN = "embedding"


@dataclass(frozen=True)
class PartPlan:
    """One read batch of the input: rows `first_row` to `first_row + num_rows` of the file."""

    row_group: int
    read_batch: int
    first_row: int
    num_rows: int

    @property
    def name(self) -> str:
        """The part's file name."""
        return f"rg{self.row_group:05d}_rb{self.read_batch:05d}.parquet"

    def rows_within(self, limit: int | None) -> int:
        """Return how many of its rows are among the first `limit` of the input."""
        return self.num_rows if limit is None else max(0, min(self.num_rows, limit - self.first_row))


@dataclass(frozen=True)
class PartContent:
    """The rows of a part, embedded and rejected, and the hash of each embedded image.

    `deleted` counts the rows that delete_ids.py has taken out.
    """

    embedded: pa.Table
    rejects: pa.Table
    skipped: int
    image_hashes: NDArray[np.uint64]  # (N,)
    deleted: int = 0

    @property
    def reasons(self) -> dict[str, int]:
        """How often each reason occurs."""
        return dict(Counter(self.rejects.column("reason").to_pylist()))

    @property
    def counts(self) -> dict[str, int]:
        """The part's line of the ledger; deleted rows are among the dropped ones."""
        out, rejected, dropped = self.embedded.num_rows, self.rejects.num_rows, self.skipped + self.deleted
        counts = {"in": out + rejected + dropped, "out": out, "rejected": rejected, "dropped": dropped}
        return counts | ({"deleted": self.deleted} if self.deleted else {})


@dataclass(frozen=True)
class Outcome:
    """The rows of a read batch that have an embedding, and those that were rejected, both ascending.

    `image_hashes` holds the hash of each embedded image.
    """

    rows: NDArray[np.int64]  # (N,)
    embeddings: NDArray[np.float32]  # (N, D)
    image_hashes: list[int]
    rejected: list[tuple[int, Rejection]]


def make_content(source: PackagedInput, plan: PartPlan, table: pa.Table, outcome: Outcome) -> PartContent:
    """Return the content of a part whose read batch is `table`."""
    ids, id_field = table.column(ID_COLUMN).combine_chunks(), table.schema.field(ID_COLUMN)
    width = outcome.embeddings.shape[1]
    # A list's element is called so when it is read from a parquet: a part that is written again has the same bytes.
    kind = pa.list_(pa.field("element", pa.float32()), width)
    values = pa.FixedSizeListArray.from_arrays(pa.array(outcome.embeddings.ravel(), pa.float32()), type=kind)
    schema = pa.schema([id_field, pa.field(EMBEDDING_COLUMN, kind)])
    embedded = pa.Table.from_arrays([take_rows(ids, outcome.rows), values], schema=schema)
    rejected_rows = np.array([row for row, _ in outcome.rejected], dtype=np.int64)
    rejections = [rejection for _, rejection in outcome.rejected]
    rejects = [
        pa.array(plan.first_row + rejected_rows, pa.int64()),
        take_rows(ids, rejected_rows),
        pa.array([rejection.reason for rejection in rejections], pa.string()),
        pa.array([rejection.detail for rejection in rejections], pa.string()),
    ]
    schema = pa.schema([("row", pa.int64()), id_field, ("reason", pa.string()), ("detail", pa.string())])
    return PartContent(
        embedded=source.carry_columns(embedded, table, outcome.rows),
        rejects=pa.Table.from_arrays(rejects, schema=schema),
        skipped=table.num_rows - len(outcome.rows) - len(rejections),
        image_hashes=np.array(outcome.image_hashes, np.uint64),
    )
