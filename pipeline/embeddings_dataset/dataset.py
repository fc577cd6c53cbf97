"""An embeddings dataset: the one door to `parts/`, `_rejects/`, `_deleted/` and `state.json` of a directory."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.embeddings_dataset.packaged_input import ID_COLUMN, PackagedInput, open_packaged
from pipeline.embeddings_dataset.part_plans import count_rows
from pipeline.embeddings_dataset.parts import (
    EMBEDDING_COLUMN,
    Part,
    embeddings_of,
    foreign,
    is_foreign_state,
    list_part_files,
    read_part,
)
from pipeline.errors import DamagedError, InputError
from pipeline.files.tables import hash_json, open_parquet
from pipeline.files.writing import write_json
from pipeline.log import logger

# Rows that are compared with queries at a time: 64 MiB of 256 float32.
BLOCK_ROWS = 65_536


def resolve_dataset_dir(output: Path) -> Path:
    """Return the directory that an OUTPUT stands for: itself, or OUTPUT.parts where a file or a dataset forces that."""
    sidecar = output.with_name(output.name + ".parts")
    if output.is_file() or (not output.exists() and (sidecar / "state.json").exists()):
        return sidecar
    return output


def count_parts(parts: Sequence[Part]) -> dict[str, Any]:
    """Add up what parts say of themselves, as `state.json` counts it."""
    return count_rows((part.record, part.plan.num_rows) for part in parts)


class EmbeddingsDataset:
    """The dataset that an OUTPUT stands for, there or not; nothing is read before it is asked for.

    Whatever this project did not write is told from what it did by its provenance (see `read_part`): it raises
    ForeignError, and is never removed or replaced.
    """

    def __init__(self, output: Path) -> None:
        self.folder = resolve_dataset_dir(output)
        self.state_path = self.folder / "state.json"
        self._parts: tuple[Part, ...] | None = None

    # ------------------------------------------------------------------------------------------ what is there

    @property
    def state(self) -> dict[str, Any] | None:
        """What `state.json` says, None where it is missing, damaged or not ours."""
        try:
            state = json.loads(self.state_path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return state if isinstance(state, dict) and state.get("embedding_version") else None

    def path_of(self, name: str) -> Path:
        """Return where the part of a name lies."""
        return self.folder / "parts" / name

    def find_begun(self) -> dict[str, Any] | None:
        """Return what the dataset that is there was made from: by its state, or, where that is lost, by a part.

        None stands for a dataset that has not begun. Raises ForeignError for one that this project did not write.
        """
        if (state := self.state) is not None:
            return state
        for name in list_part_files(self.folder):
            try:
                part = read_part(self.path_of(name))
            except DamagedError:
                continue
            logger.warning("%s: missing or damaged: made again from the parts", self.state_path)
            return part.recipe | {key: part.provenance[key] for key in ("fidelity",) if key in part.provenance}
        if is_foreign_state(self.state_path):
            raise foreign(self.state_path)
        return None

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its parts in input order; a dataset that is not complete is said so.

        Raises InputError where there is none or a part is damaged, ForeignError where one is not ours.
        """
        if self._parts is None:
            self._parts = self._open_parts()
        return self._parts

    def _open_parts(self) -> tuple[Part, ...]:
        names = list_part_files(self.folder)
        if not names:
            raise InputError(
                f"{self.folder}: holds no embeddings (parts/*.parquet): run stage 8 first, or correct the path"
            )
        parts: list[Part] = []
        for name in names:
            path = self.path_of(name)
            try:
                part = read_part(path)
                if part.plan.name != name:
                    raise DamagedError(name)
            except DamagedError:
                raise InputError(f"{path}: damaged: run verify_embeddings.py --repair and stage 8 again") from None
            if parts and part.embedding_version != parts[0].embedding_version:
                raise InputError(f"{path}: made by another model than {parts[0].path.name}: run verify_embeddings.py")
            parts.append(part)
        if not (self.state or {}).get("complete"):
            logger.warning("%s: not complete: what is there is used", self.folder)
        return tuple(sorted(parts, key=lambda part: part.plan.first_row))

    def use_parts(self, parts: tuple[Part, ...] | None) -> None:
        """Take these for its parts, None to look again: they have been checked, or changed."""
        self._parts = parts

    def update_state(self) -> None:
        """Write the state, where there is one, with what the parts say of themselves."""
        state = self.state
        if state is None:
            return
        counted = count_parts(self.parts)
        state = {key: value for key, value in state.items() if key != "rows_deleted"} | counted
        write_json(self.state_path, state | {"complete": counted["parts_done"] == state["parts_total"]})

    # ------------------------------------------------------------------------------------------ reading

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
    def recipe(self) -> dict[str, Any]:
        """What it was made from."""
        return self.parts[0].recipe

    @property
    def model_id(self) -> str:
        """The published model that it names."""
        return str((self.state or {}).get("model_id", ""))

    @property
    def embedding_version(self) -> str | None:
        """The short id of the model and precision that made its embeddings."""
        return self.parts[0].embedding_version

    def open_input(self, path: Path, recipe: dict[str, Any] | None = None) -> PackagedInput:
        """Open the input that it was made from.

        Raises InputError where it cannot be read, or is another one.
        """
        recipe = recipe or self.recipe
        source = open_packaged(
            path,
            filter_valid=bool(recipe.get("filter_valid", True)),
            read_batch_size=int(recipe["read_batch_size"]),
            keep_columns=recipe.get("keep_columns", []),
        )
        if source.fingerprint != recipe.get("row_group_fingerprint"):
            raise InputError(f"{path}: not the input that {self.folder} was made from: give that one")
        return source

    def identify(self) -> dict[str, Any]:
        """Tell it apart by content, as an input of what is made from it."""
        parts = [[part.path.name, part.checksum or part.path.stat().st_size] for part in self.parts]
        return {
            "name": "parts",
            "hash": hash_json(parts),
            "rows": self.num_rows,
            "embedding_version": self.embedding_version,
        }

    def read_blocks(self, block_rows: int = BLOCK_ROWS) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield the embeddings in blocks of about `block_rows` (N, D), each with the number of its first row."""
        first, held, num_held = 0, [], 0
        for part in self.parts:
            held.append(embeddings_of(part.read([EMBEDDING_COLUMN])))
            num_held += len(held[-1])
            if num_held >= block_rows:
                yield first, np.concatenate(held)
                first, held, num_held = first + num_held, [], 0
        if num_held:
            yield first, np.concatenate(held)

    def locate(self, rows: list[int]) -> Iterator[tuple[Part, dict[int, int]]]:
        """Yield the parts that hold some embedded rows, counted over all parts in order, and their rows there."""
        first = 0
        for part in self.parts:
            end = first + part.record.counts["out"]
            inside = {row: row - first for row in rows if first <= row < end}
            if inside:
                yield part, inside
            first = end

    def read_ids_at(self, rows: list[int]) -> dict[int, Any]:
        """Return the ids of some embedded rows."""
        found: dict[int, Any] = {}
        for part, inside in self.locate(rows):
            column = part.read([ID_COLUMN]).column(0)
            found |= {row: column[place] for row, place in inside.items()}
        return found
