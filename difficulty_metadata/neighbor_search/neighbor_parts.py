"""The search's unfinished business: neighbours found so far, in files that survive a kill and can be shared out.

Shard I of N has the rows I, I + N, I + 2 N, ... of the table, and writes them in parts of PART_ANCHORS. Whoever finds
the parts of all shards complete merges them, row by row, which is why any number of shards gives the same bytes.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import InputError
from pipeline.files.tables import (
    describe_difference,
    matches,
    open_parquet,
    parquet_writer,
    read_provenance,
    reading,
)
from pipeline.ids import Shard

# What a kill costs at most. A part of 150 neighbours takes 24 MB: as the numbers are in memory, because encoding them
# took six times as long, and would have to keep up with a GPU's search.
PART_ANCHORS = 20_000
_TYPES = {"rows": np.int32, "distances": np.float32}
# A reader holds one such group of each shard.
_ROWS_PER_GROUP = 1_024


def parts_dir(output_path: Path) -> Path:
    """Return the folder of an output's parts."""
    return output_path.parent / f"_{output_path.stem}_parts"


class PartStore:
    """The folder of the parts of one output, for one way of sharing the anchors out."""

    def __init__(self, output_path: Path, num_anchors: int, num_neighbors: int, provenance: dict[str, Any]) -> None:
        """`provenance` is what the output will carry: parts of other inputs or settings are refused."""
        self.folder = parts_dir(output_path)
        self.num_anchors = num_anchors
        self.num_neighbors = num_neighbors
        self._provenance = provenance

    def anchors(self, shard: Shard, part: int) -> np.ndarray:
        """Return the rows (A,) int64 that a part holds."""
        return np.arange(shard.index, self.num_anchors, shard.count)[part * PART_ANCHORS : (part + 1) * PART_ANCHORS]

    def count_parts(self, shard: Shard) -> int:
        """Return how many parts a shard has; a shard beyond the last row has none."""
        return -(-len(range(shard.index, self.num_anchors, shard.count)) // PART_ANCHORS)

    def path(self, shard: Shard, part: int) -> Path:
        """Return where a part is kept."""
        return self.folder / f"{shard.index:05d}-of-{shard.count:05d}-{part:05d}.parquet"

    def is_done(self, shard: Shard, part: int) -> bool:
        """Whether a part is there.

        Raises StaleOutputError if it was made from other inputs or settings.
        """
        path = self.path(shard, part)
        return path.exists() and matches(path, read_provenance(path), self._provenance)

    def check(self, count: int) -> None:
        """Raise StaleOutputError if any of the parts of `count` shards was made from other inputs or settings.

        Raises InputError if one is of an earlier version: all that is searched beside it could not be merged with it.
        """
        for shard in (Shard(index, count) for index in range(count)):
            for part in range(self.count_parts(shard)):
                if self.is_done(shard, part):
                    path = self.path(shard, part)
                    with open_parquet(path) as file:
                        self._check_form(path, file.schema_arrow)

    def is_all_done(self, count: int) -> bool:
        """Whether the parts of all `count` shards are there, made from these inputs with these settings."""
        shards = [Shard(index, count) for index in range(count)]
        paths = [self.path(shard, part) for shard in shards for part in range(self.count_parts(shard))]
        if not all(path.exists() for path in paths):
            return False
        return all(describe_difference(read_provenance(path) or {}, self._provenance) is None for path in paths)

    def remove(self, shard: Shard) -> None:
        """Remove a shard's parts, to make them again."""
        for part in range(self.count_parts(shard)):
            self.path(shard, part).unlink(missing_ok=True)

    def remove_all(self) -> None:
        """Remove everybody's parts, once the output is there; another process may be doing the same."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, shard: Shard, part: int, rows: np.ndarray, distances: np.ndarray) -> None:
        """Write the neighbours (A, k) of a part's anchors, -1 and inf where there are fewer."""
        schema = self._schema()
        columns = []
        for field, values in zip(schema, (rows, distances), strict=True):
            stored = pa.py_buffer(np.ascontiguousarray(values, _TYPES[field.name]))
            columns.append(pa.FixedSizeBinaryArray.from_buffers(field.type, len(values), [None, stored]))
        with parquet_writer(self.path(shard, part), schema, self._provenance, raw=True) as writer:
            writer.write_table(pa.table(columns, schema=schema), row_group_size=_ROWS_PER_GROUP)

    def stream(self, count: int, rows_per_block: int, columns: tuple[str, ...]) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield the named columns (B, k) of all anchors in their order, block by block, from `count` shards.

        Raises InputError if a part is missing or damaged.
        """
        readers = [_ShardReader(self, Shard(index, count), columns) for index in range(count)]
        for start in range(0, self.num_anchors, rows_per_block):
            num_rows = min(rows_per_block, self.num_anchors - start)
            merged = [np.empty((num_rows, self.num_neighbors), dtype=_TYPES[name]) for name in columns]
            for index, reader in enumerate(readers):
                reader.fill([target[(index - start) % count :: count] for target in merged])
            yield tuple(merged)

    def stream_shard(self, shard: Shard, columns: tuple[str, ...]) -> Iterator[list[np.ndarray]]:
        """Yield the named columns (rows, k) of one shard, group by group."""
        for part in range(self.count_parts(shard)):
            path = self.path(shard, part)
            with open_parquet(path) as file, reading(path):
                self._check_form(path, file.schema_arrow)
                if file.metadata.num_rows != len(self.anchors(shard, part)):
                    raise InputError(f"{path}: {file.metadata.num_rows} rows, not its anchors': remove it")
                for batch in file.iter_batches(batch_size=_ROWS_PER_GROUP, columns=list(columns)):
                    yield [self._view(batch, name) for name in columns]

    def _check_form(self, path: Path, found: pa.Schema) -> None:
        if not found.equals(self._schema()):
            raise InputError(
                f"{path}: not as this version writes parts: remove the folder {self.folder} and run this again"
            )

    def _view(self, batch: pa.RecordBatch, name: str) -> np.ndarray:
        column = batch.column(name)
        values = np.frombuffer(column.buffers()[1], _TYPES[name]).reshape(-1, self.num_neighbors)
        return values[column.offset : column.offset + len(column)]

    def _schema(self) -> pa.Schema:
        """Return the columns of a part; each row is an anchor's numbers, one after the other."""
        return pa.schema(
            [(name, pa.binary(np.dtype(kind).itemsize * self.num_neighbors)) for name, kind in _TYPES.items()]
        )


class _ShardReader:
    """Reads a shard from its first row on, as many rows at a time as are asked for."""

    def __init__(self, store: PartStore, shard: Shard, columns: tuple[str, ...]) -> None:
        self._groups = store.stream_shard(shard, columns)
        self._group: list[np.ndarray] = []

    def fill(self, targets: list[np.ndarray]) -> None:
        """Put the next rows of each column into its target (rows, k)."""
        done = 0
        while done < len(targets[0]):
            if not (self._group and len(self._group[0])):
                self._group = next(self._groups)
            num_rows = min(len(targets[0]) - done, len(self._group[0]))
            for target, values in zip(targets, self._group, strict=True):
                target[done : done + num_rows] = values[:num_rows]
            self._group = [values[num_rows:] for values in self._group]
            done += num_rows
