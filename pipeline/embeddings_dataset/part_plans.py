"""What the parts of an embeddings dataset are: what they have in common, which rows each holds, what became of them."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.embeddings_dataset.packaged_input import PackagedInput
from pipeline.errors import StaleOutputError
from pipeline.inference.precision import Precision


@dataclass(frozen=True)
class Recipe:
    """What all parts of a dataset have in common, and what a rerun must not change."""

    input_size: int
    input_schema: list[str]
    row_group_fingerprint: str
    read_batch_size: int
    filter_valid: bool
    precision: str
    embedding_version: str
    keep_columns: list[str] = field(default_factory=list)

    def check(self, found: dict[str, Any], where: Path) -> None:
        """Raise StaleOutputError naming the first thing in which what is there already differs."""
        for key, wanted in asdict(self).items():
            # Datasets of version 1.0 say nothing of kept columns, as they have none.
            if found.get(key, [] if key == "keep_columns" else None) != wanted:
                hint = " (another model, processor, pooling or precision)" if key == "embedding_version" else ""
                raise StaleOutputError(
                    f"{where}: made from another input, model or setting: {key} was {_shorten(found.get(key))} and is "
                    f"now {_shorten(wanted)}{hint}: give another --output, or --overwrite to begin anew"
                )


@dataclass(frozen=True)
class ModelRecord:
    """What a dataset records of the model that makes its embeddings; `version` is the short id of what computes."""

    model_id: str
    version: str
    precision: Precision


def make_recipe(source: PackagedInput, precision: str, embedding_version: str) -> Recipe:
    """Combine an input as it is read, the type that is computed in, and the id of what computes."""
    return Recipe(
        source.size, source.describe_schema(), source.fingerprint, source.read_batch_size, source.filter_valid,
        precision, embedding_version, list(source.keep_columns),
    )  # fmt: skip


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


def plan_parts(source: PackagedInput) -> list[PartPlan]:
    """Return every read batch of every row group, in input order."""
    plans, first_row, read_batch_size = [], 0, source.read_batch_size
    for row_group, num_rows in enumerate(source.row_group_rows):
        for read_batch, start in enumerate(range(0, num_rows, read_batch_size)):
            plans.append(PartPlan(row_group, read_batch, first_row + start, min(read_batch_size, num_rows - start)))
        first_row += num_rows
    return plans


@dataclass(frozen=True)
class PartContent:
    """What has become of a read batch's rows; `hashes` (N, 2) uint64 are of each embedded image and its id.

    `deleted` counts the rows that were taken out for good (see delete_ids.py).
    """

    embedded: pa.Table
    rejects: pa.Table
    skipped: int
    hashes: bytes
    reasons: dict[str, int]
    deleted: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """The part's line of the ledger; what was deleted is among the dropped."""
        out, rejected, dropped = self.embedded.num_rows, self.rejects.num_rows, self.skipped + self.deleted
        counts = {"in": out + rejected + dropped, "out": out, "rejected": rejected, "dropped": dropped}
        return counts | ({"deleted": self.deleted} if self.deleted else {})


@dataclass(frozen=True)
class PartRecord:
    """What a part that is there says of itself."""

    counts: dict[str, int]
    reasons: dict[str, int]


def count_rows(records: Iterable[tuple[PartRecord, int]]) -> dict[str, Any]:
    """Add up what parts say of themselves, each given with the rows of its read batch, as `state.json` counts it."""
    sums = {"out": 0, "rejected": 0, "dropped": 0, "deleted": 0}
    reasons: dict[str, int] = {}
    whole = 0
    for record, num_rows in records:
        for key in sums:
            sums[key] += record.counts.get(key, 0)
        for reason, count in record.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
        whole += record.counts["in"] == num_rows
    deleted = {"rows_deleted": sums["deleted"]} if sums["deleted"] else {}
    return {
        "rows_embedded": sums["out"],
        "rows_rejected": sums["rejected"],
        "rows_skipped_invalid": sums["dropped"] - sums["deleted"],
        **deleted,
        "rejected_by_reason": dict(sorted(reasons.items())),
        "parts_done": whole,
    }


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
