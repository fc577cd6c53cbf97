"""Read an embeddings dataset that is there already, without its input: its state and its parts."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.files.listing import list_files
from pipeline.files.tables import hash_json, open_parquet, reading
from pipeline.inference.model_files import identify_model
from pipeline.log import logger
from publish_model.dataset.part_plans import PartContent, PartPlan, PartRecord, name_version
from publish_model.dataset.parts import read_hashes, read_part_provenance, read_state, recipe_of, resolve_dataset_dir
from publish_model.new_data.packaged_input import ID_COLUMN

EMBEDDING_COLUMN = "embedding"
# Rows that are compared with queries at a time: 64 MiB of 256 float32.
BLOCK_ROWS = 65_536


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
        return self.path.parents[1] / "_rejects" / self.path.name

    @property
    def checksum(self) -> str | None:
        """The checksum of its data; parts of version 1.0 have none."""
        return self.provenance.get("checksum")

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """Read its rows.

        Raises InputError naming the file if it is damaged.
        """
        with reading(self.path), open_parquet(self.path) as file:
            table: pa.Table = file.read(columns)
            return table.replace_schema_metadata()

    def read_content(self) -> PartContent:
        """Read all that `write_part_files` wrote."""
        with reading(self.rejects_path), open_parquet(self.rejects_path) as file:
            rejects = file.read().replace_schema_metadata()
        deleted = self.record.counts.get("deleted", 0)
        skipped = self.record.counts["dropped"] - deleted
        return PartContent(
            as_written(self.read()), rejects, skipped, read_hashes(self.path), self.record.reasons, deleted
        )


def as_written(table: pa.Table) -> pa.Table:
    """Name the element of the embeddings as stage 8 does, so that a part that is written again has the same bytes."""
    place = table.schema.get_field_index(EMBEDDING_COLUMN)
    kind = table.schema.field(place).type
    if not pa.types.is_fixed_size_list(kind):
        return table
    field = pa.field(EMBEDDING_COLUMN, pa.list_(kind.value_type, kind.list_size))
    return table.cast(table.schema.set(place, field))


@dataclass(frozen=True)
class EmbeddedDataset:
    """What a dataset directory holds: its state (empty where that is lost) and its parts in input order."""

    folder: Path
    state: dict[str, Any]
    parts: tuple[Part, ...]

    @property
    def schema(self) -> pa.Schema:
        """The columns of its parts."""
        with open_parquet(self.parts[0].path) as file:
            schema: pa.Schema = file.schema_arrow.remove_metadata()
            return schema

    @property
    def num_rows(self) -> int:
        """Embedded rows."""
        return sum(part.record.counts["out"] for part in self.parts)

    @property
    def precision(self) -> str:
        """The type that its model computed in."""
        return str(recipe_of(self.parts[0].provenance).get("precision"))

    def check_model(self, folder: Path) -> None:
        """Raise InputError if a published model is not the one that made the embeddings."""
        try:
            pooling = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("pooling_type")
        except (OSError, ValueError, AttributeError):
            raise InputError(f"{folder}: not a model folder (config.json): correct --model-id") from None
        version = name_version(identify_model(folder), str(pooling), self.precision)
        if version != self.parts[0].provenance.get("embedding_version"):
            raise InputError(f"{folder}: not the model that the embeddings of {self.folder} were made with")

    def identify(self) -> dict[str, Any]:
        """Tell it apart by content, as an input of what is made from it."""
        parts = [[part.path.name, part.checksum or part.path.stat().st_size] for part in self.parts]
        version = self.parts[0].provenance.get("embedding_version")
        return {"name": "parts", "hash": hash_json(parts), "rows": self.num_rows, "embedding_version": version}


def read_part(path: Path) -> Part | None:
    """Return a part, None where it cannot be read or its metadata lack what a part says of itself.

    Raises StaleOutputError for a parquet that was not made here.
    """
    provenance = read_part_provenance(path)
    if provenance is None:
        return None
    try:
        plan = PartPlan(**provenance["part"])
        return Part(path, plan, PartRecord(provenance["counts"], provenance["reasons"]), provenance)
    except (KeyError, TypeError):
        return None


def list_part_paths(folder: Path) -> list[Path]:
    """Return the part files of a dataset by name.

    Raises InputError if their folder cannot be read.
    """
    parts_dir = folder / "parts"
    if not parts_dir.is_dir():
        return []
    return [path for path in list_files(parts_dir, hidden=(".", "_")) if path.suffix == ".parquet"]


def open_dataset(output: Path) -> EmbeddedDataset:
    """Open a dataset that stage 8 wrote.

    Raises InputError where there is none or a part is damaged; one that is not complete is said so.
    """
    folder = resolve_dataset_dir(output)
    paths = list_part_paths(folder)
    if not paths:
        raise InputError(f"{folder}: holds no embeddings (parts/*.parquet): run stage 8 first, or correct the path")
    parts: list[Part] = []
    for path in paths:
        part = read_part(path)
        if part is None or part.plan.name != path.name:
            raise InputError(f"{path}: damaged: run verify_embeddings.py --repair and stage 8 again")
        if parts and part.provenance.get("embedding_version") != parts[0].provenance.get("embedding_version"):
            raise InputError(f"{path}: made by another model than {parts[0].path.name}: run verify_embeddings.py")
        parts.append(part)
    state = read_state(folder / "state.json") or {}
    if not state.get("complete"):
        logger.warning("%s: not complete: what is there is used", folder)
    parts.sort(key=lambda part: part.plan.first_row)
    return EmbeddedDataset(folder, state, tuple(parts))


def embeddings_of(table: pa.Table) -> NDArray[np.float32]:
    """Return the embeddings of a part's rows, (N, D)."""
    column = table.column(EMBEDDING_COLUMN)
    width = column.type.list_size
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in column.chunks]
    if not chunks:
        return np.empty((0, width), dtype=np.float32)
    return np.ascontiguousarray(np.concatenate(chunks), dtype=np.float32)


def read_blocks(dataset: EmbeddedDataset, block_rows: int = BLOCK_ROWS) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the embeddings in blocks of about `block_rows` (N, D), each with the number of its first row."""
    first, held, num_held = 0, [], 0
    for part in dataset.parts:
        held.append(embeddings_of(part.read([EMBEDDING_COLUMN])))
        num_held += len(held[-1])
        if num_held >= block_rows:
            yield first, np.concatenate(held)
            first, held, num_held = first + num_held, [], 0
    if num_held:
        yield first, np.concatenate(held)


def read_ids_at(dataset: EmbeddedDataset, rows: list[int]) -> dict[int, Any]:
    """Return the ids of some embedded rows of the dataset, which are counted over all parts in order."""
    found: dict[int, Any] = {}
    first = 0
    for part in dataset.parts:
        inside = [row for row in rows if first <= row < first + part.record.counts["out"]]
        if inside:
            column = part.read([ID_COLUMN]).column(0)
            found |= {row: column[row - first] for row in inside}
        first += part.record.counts["out"]
    return found
