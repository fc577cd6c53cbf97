"""The parts of an embeddings dataset as files: read, written, and told from what this project did not write."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.embeddings_dataset.columns import plain_values
from pipeline.embeddings_dataset.hashes import checksum_tables, hash_ids
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN
from pipeline.embeddings_dataset.part_plans import PartContent, PartPlan, PartRecord
from pipeline.errors import DamagedError, InputError, StaleOutputError
from pipeline.files.tables import PROVENANCE_KEY, open_parquet, read_provenance, reading, write_parquet

STAGE = "generate_embeddings_from_parquet"
HASHES_KEY = PROVENANCE_KEY + b".image_hashes"
EMBEDDING_COLUMN = "embedding"
# What is added to a part's provenance when it is written: it describes the content, not what it was made from.
_OF_THE_CONTENT = ("cut", "counts", "reasons", "checksum")


class ForeignError(StaleOutputError):
    """A sound file that this project did not write: it is never removed or replaced."""


def foreign(path: Path) -> ForeignError:
    """Say that a file is not ours, and what to do."""
    return ForeignError(
        f"{path}: not written by this project (it does not say what it was made from): adopt the dataset with "
        "adopt_embeddings.py, or give another path"
    )


@dataclass(frozen=True)
class Part:
    """A part that is there and readable, with what its metadata says."""

    path: Path
    plan: PartPlan
    record: PartRecord
    provenance: dict[str, Any]

    @property
    def rejects_path(self) -> Path:
        """Where its rejects are listed."""
        return rejects_beside(self.path)

    @property
    def recipe(self) -> dict[str, Any]:
        """What it was made from, by the names of `state.json`."""
        inputs = self.provenance.get("inputs") or [{}]
        return {**inputs[0], **self.provenance.get("settings", {})}

    @property
    def embedding_version(self) -> str | None:
        """The short id of what computed it."""
        return self.provenance.get("embedding_version")

    @property
    def checksum(self) -> str | None:
        """The checksum of its data; parts of version 1.0 have none."""
        return self.provenance.get("checksum")

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """Read its rows.

        Raises InputError naming the file if it cannot be read, DamagedError if it is damaged.
        """
        return _read_table(self.path, columns)

    def read_content(self) -> PartContent:
        """Read all that `write_part` wrote."""
        rejects = _read_table(self.rejects_path)
        deleted = self.record.counts.get("deleted", 0)
        skipped = self.record.counts["dropped"] - deleted
        return PartContent(
            as_written(self.read()), rejects, skipped, read_hashes(self.path), self.record.reasons, deleted
        )

    def rewrite(self, content: PartContent) -> None:
        """Write it again with other rows; what it was made from stays."""
        made_from = {key: value for key, value in self.provenance.items() if key not in _OF_THE_CONTENT}
        write_part(self.path.parents[1], self.plan, content, made_from)


def _read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    with reading(path), open_parquet(path) as file:
        table: pa.Table = file.read(columns)
        table.validate(full=True)  # a changed byte may leave text that is none
        return table.replace_schema_metadata()


def rejects_beside(part_path: Path) -> Path:
    """Return where the rejects of a part lie, or the part of rejects."""
    own, other = ("parts", "_rejects") if part_path.parent.name == "parts" else ("_rejects", "parts")
    assert part_path.parent.name == own
    return part_path.parents[1] / other / part_path.name


def list_part_files(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return a dataset's part files by name, with what changes when a file is replaced."""
    parts_dir = folder / "parts"
    if not parts_dir.is_dir():
        return {}
    with os.scandir(parts_dir) as entries:
        parquets = [entry for entry in entries if entry.name.endswith(".parquet") and entry.name[0] not in "._"]
        stats = {entry.name: entry.stat() for entry in parquets}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in sorted(stats.items())}


def read_part(path: Path) -> Part:
    """Return a part.

    Raises ForeignError if this project did not write it, DamagedError if it did, but not as it is now, InputError if
    it cannot be read.
    """
    provenance = read_provenance(path)
    if provenance is None or provenance.get("stage") != STAGE:
        # A changed byte in the footer takes away what a part says of itself; its rejects then still say it.
        if _is_ours(rejects_beside(path)):
            raise DamagedError(f"{path}: damaged (it does not say what it was made from, but its rejects do)")
        raise foreign(path)
    try:
        plan = PartPlan(**provenance["part"])
        return Part(path, plan, PartRecord(provenance["counts"], provenance["reasons"]), provenance)
    except (KeyError, TypeError):
        raise DamagedError(f"{path}: damaged (what it says of itself is incomplete)") from None


def _is_ours(path: Path) -> bool:
    try:
        return (read_provenance(path) or {}).get("stage") == STAGE
    except InputError:
        return False


def is_foreign_state(path: Path) -> bool:
    """Whether a `state.json` is sound and another program's; one that is damaged or empty may be replaced."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    return isinstance(state, dict) and bool(state) and not state.get("embedding_version")


def write_part(folder: Path, plan: PartPlan, content: PartContent, made_from: dict[str, Any]) -> None:
    """Write a part and its rejects; the part comes last, so that where it is, both are.

    `made_from` is the provenance; what became of its rows is added here.
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


def read_hashes(part_path: Path) -> bytes:
    """Return the hashes that `write_part` kept for a part."""
    with open_parquet(rejects_beside(part_path)) as file:
        value: bytes = (file.metadata.metadata or {}).get(HASHES_KEY, b"")
        return value


def read_ids(path: Path) -> list[object]:
    """Return the ids of a part as plain Python values."""
    return [value for chunk in _read_table(path, [ID_COLUMN]).column(0).chunks for value in plain_values(chunk)]


def hash_rows(table: pa.Table) -> list[int]:
    """Return the hash of each row's id."""
    return [value for chunk in table.column(ID_COLUMN).chunks for value in hash_ids(plain_values(chunk))]


def as_written(table: pa.Table) -> pa.Table:
    """Name the element of the embeddings as stage 8 does, so that a part that is written again has the same bytes."""
    place = table.schema.get_field_index(EMBEDDING_COLUMN)
    kind = table.schema.field(place).type
    if not pa.types.is_fixed_size_list(kind):
        return table
    field = pa.field(EMBEDDING_COLUMN, pa.list_(kind.value_type, kind.list_size))
    return table.set_column(place, field, table.column(place).cast(field.type))


def embeddings_of(table: pa.Table) -> NDArray[np.float32]:
    """Return the embeddings of a part's rows, (N, D)."""
    column = table.column(EMBEDDING_COLUMN)
    width = column.type.list_size
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in column.chunks]
    if not chunks:
        return np.empty((0, width), dtype=np.float32)
    return np.ascontiguousarray(np.concatenate(chunks), dtype=np.float32)
