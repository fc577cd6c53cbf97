"""The parts of an embeddings dataset: plan them, compare their recipes, read and write them."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.embeddings_dataset.columns import list_values
from pipeline.embeddings_dataset.content import EMBEDDING_COLUMN, PartContent, PartPlan
from pipeline.embeddings_dataset.hashes import checksum_tables, hash_ids
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN, IMAGE_COLUMN, PackagedInput
from pipeline.errors import DamagedError, InputError, StaleOutputError
from pipeline.files.tables import PROVENANCE_KEY, open_parquet, read_provenance, reading, write_parquet
from pipeline.inference.precision import Precision

STAGE = "generate_embeddings_from_parquet"
HASHES_KEY = PROVENANCE_KEY + b".image_hashes"
# The keys of a part's provenance that describe its content, not what it was made from.
_CONTENT_KEYS = ("cut", "counts", "reasons", "checksum")


def plan_parts(source: PackagedInput) -> list[PartPlan]:
    """Return a plan for every read batch of every row group, in input order."""
    plans, first_row, read_batch_size = [], 0, source.options.read_batch_size
    for row_group, num_rows in enumerate(source.row_group_rows):
        for read_batch, start in enumerate(range(0, num_rows, read_batch_size)):
            plans.append(PartPlan(row_group, read_batch, first_row + start, min(read_batch_size, num_rows - start)))
        first_row += num_rows
    return plans


@dataclass(frozen=True)
class ModelRecord:
    """What a dataset records of the model that makes its embeddings; `version` is the short id of what computes."""

    model_id: str
    version: str
    precision: Precision


@dataclass(frozen=True)
class Recipe:
    """What all parts of a dataset have in common and a rerun must not change."""

    input_size: int
    input_schema: list[str]
    row_group_fingerprint: str
    read_batch_size: int
    filter_valid: bool
    precision: str
    embedding_version: str
    keep_columns: list[str] = field(default_factory=list)
    id_column: str = ID_COLUMN
    image_column: str = IMAGE_COLUMN

    def check(self, found: dict[str, Any], where: Path) -> None:
        """Raise StaleOutputError naming the first key in which what is there differs from this recipe."""
        for key, wanted in asdict(self).items():
            if found.get(key) != wanted:
                hint = " (another model, processor, pooling or precision)" if key == "embedding_version" else ""
                raise StaleOutputError(
                    f"{where}: made from another input, model or setting: {key} was {_shorten(found.get(key))} and is "
                    f"now {_shorten(wanted)}{hint}: give another --output, or --overwrite to begin anew"
                )


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


# ------------------------------------------------------------------------------------------------ a part that is there


class ForeignError(StaleOutputError):
    """A sound file that this project did not write: it is never removed or replaced."""


def foreign(path: Path) -> ForeignError:
    """Return the error for a file that is not ours."""
    return ForeignError(
        f"{path}: not written by this project (it does not say what it was made from): adopt the dataset with "
        "adopt_embeddings.py, or give another path"
    )


@dataclass(frozen=True)
class Part:
    """A part that is there and readable; `provenance` is all that its footer says.

    `recipe` names what it was made from as `state.json` does.
    """

    path: Path
    plan: PartPlan
    provenance: dict[str, Any]
    recipe: dict[str, Any]
    counts: dict[str, int]
    reasons: dict[str, int]
    checksum: str | None

    @property
    def num_deleted(self) -> int:
        """Rows that delete_ids.py has taken out."""
        return self.counts.get("deleted", 0)

    @property
    def rejects_path(self) -> Path:
        """The file that lists its rejects."""
        return rejects_beside(self.path)

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """Read its rows.

        Raises InputError naming the file if it cannot be read, DamagedError if it is damaged.
        """
        return _read_table(self.path, columns)

    def read_content(self) -> PartContent:
        """Read all that `write_part` wrote."""
        rejects, skipped = _read_table(self.rejects_path), self.counts["dropped"] - self.num_deleted
        hashes = read_hashes(self.path)
        return PartContent(as_written(self.read()), rejects, skipped, hashes, self.reasons, self.num_deleted)

    def rewrite(self, content: PartContent) -> None:
        """Write it again with other rows and the same origin."""
        made_from = {key: value for key, value in self.provenance.items() if key not in _CONTENT_KEYS}
        write_part(self.path.parents[1], self.plan, content, made_from)


def count_rows(parts: Iterable[Part]) -> dict[str, Any]:
    """Add up the counts of parts under the names of `state.json`."""
    sums, reasons, whole = Counter[str](), Counter[str](), 0
    for part in parts:
        sums.update(part.counts)
        reasons.update(part.reasons)
        whole += part.counts["in"] == part.plan.num_rows
    return {
        "rows_embedded": sums["out"],
        "rows_rejected": sums["rejected"],
        "rows_skipped_invalid": sums["dropped"] - sums["deleted"],
        **({"rows_deleted": sums["deleted"]} if sums["deleted"] else {}),
        "rejected_by_reason": dict(sorted(reasons.items())),
        "parts_done": whole,
    }


def rejects_beside(path: Path) -> Path:
    """Return the rejects of a part, or the part of rejects."""
    return path.parents[1] / ("_rejects" if path.parent.name == "parts" else "parts") / path.name


def list_part_files(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return a dataset's part files by name, each with numbers that change when the file is replaced."""
    parts_dir = folder / "parts"
    if not parts_dir.is_dir():
        return {}
    with os.scandir(parts_dir) as entries:
        stats = {one.name: one.stat() for one in entries if one.name.endswith(".parquet") and one.name[0] not in "._"}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in sorted(stats.items())}


def read_part(path: Path) -> Part:
    """Return a part.

    Raises ForeignError if this project did not write it, DamagedError if it is not as it was written, InputError if it
    cannot be read.
    """
    provenance = read_provenance(path)
    if provenance is None or provenance.get("stage") != STAGE:
        # A changed byte in a part's footer hides its origin; its rejects then still tell it.
        if is_ours(rejects_beside(path)):
            raise DamagedError(f"{path}: damaged (it does not say what it was made from, but its rejects do)")
        raise foreign(path)
    try:
        recipe = {**provenance["inputs"][0], **provenance["settings"]}
        _ = recipe["embedding_version"]
        plan, checksum = PartPlan(**provenance["part"]), provenance.get("checksum")
        return Part(path, plan, provenance, recipe, provenance["counts"], provenance["reasons"], checksum)
    except (LookupError, TypeError):
        raise DamagedError(f"{path}: damaged (its provenance is incomplete)") from None


def is_ours(path: Path) -> bool:
    """Return whether a parquet is there, readable and written by stage 8."""
    try:
        return (read_provenance(path) or {}).get("stage") == STAGE
    except InputError:
        return False


def write_part(folder: Path, plan: PartPlan, content: PartContent, made_from: dict[str, Any]) -> None:
    """Write a part behind its rejects, so that where the part is, both are.

    `made_from` is the provenance; the keys that describe the content are added here.
    """
    provenance = made_from | {
        "cut": content.counts["in"] < plan.num_rows,
        "counts": content.counts,
        "reasons": content.reasons,
        "checksum": checksum_tables(content.embedded, content.rejects),
    }
    hashes = {HASHES_KEY: content.hashes}  # beside the rejects, where no reader of the data carries them along
    write_parquet(folder / "_rejects" / plan.name, content.rejects, provenance, hashes)
    write_parquet(folder / "parts" / plan.name, content.embedded, provenance)


def _read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    with reading(path), open_parquet(path) as file:
        table: pa.Table = file.read(columns)
        table.validate(full=True)  # a changed byte may leave text that is none
        return table.replace_schema_metadata()


def read_hashes(part_path: Path) -> bytes:
    """Return the hashes that `write_part` kept for a part."""
    with open_parquet(rejects_beside(part_path)) as file:
        value: bytes = (file.metadata.metadata or {}).get(HASHES_KEY, b"")
        return value


def read_ids(path: Path) -> list[object]:
    """Return the ids of a part as plain Python values."""
    return list_values(_read_table(path, [ID_COLUMN]).column(0))


def hash_rows(table: pa.Table) -> list[int]:
    """Return the hash of each row's id."""
    return hash_ids(list_values(table.column(ID_COLUMN)))


def as_written(table: pa.Table) -> pa.Table:
    """Name the element of the embeddings as stage 8 does, so that a part that is written again has the same bytes."""
    place, kind = table.schema.get_field_index(EMBEDDING_COLUMN), table.schema.field(EMBEDDING_COLUMN).type
    if not pa.types.is_fixed_size_list(kind):
        return table
    field = pa.field(EMBEDDING_COLUMN, pa.list_(kind.value_type, kind.list_size))
    return table.set_column(place, field, table.column(place).cast(field.type))


def embeddings_of(table: pa.Table) -> NDArray[np.float32]:
    """Return the embeddings of a part's rows, (N, D)."""
    column = table.column(EMBEDDING_COLUMN)
    width = column.type.list_size
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in column.chunks]
    return np.concatenate([np.empty((0, width), np.float32), *chunks]).astype(np.float32, copy=False)
