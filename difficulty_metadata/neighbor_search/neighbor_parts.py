"""Neighbours found so far, in files that survive a kill and that shards fill together.

Shard I of N has the rows I, I + N, I + 2 N, ... of the table, and writes them in parts of PART_ANCHORS. The process
that finds the parts of all shards complete merges them row by row, so any number of shards gives the same bytes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import InputError
from pipeline.files import workspace
from pipeline.files.tables import describe_difference, matches, open_parquet, parquet_writer, read_provenance, reading
from pipeline.ids import Shard

# A kill costs at most one part: 24 MB with 150 neighbours. Numbers are stored as they are in memory: encoding them took
# six times as long, and a GPU's search would wait for it.
PART_ANCHORS = 20_000
_TYPES = {"rows": np.int32, "distances": np.float32}
# A reader holds one such group of each shard.
_ROWS_PER_GROUP = 1_024


def parts_dir(output_path: Path) -> Path:
    """Return the folder of an output's parts."""
    return output_path.parent / f"_{output_path.stem}_parts"


class PartStore:
    """The folder of the parts of one output."""

    def __init__(self, output_path: Path, num_anchors: int, num_neighbors: int, provenance: dict[str, Any]) -> None:
        """Take the output's provenance, too: parts of other inputs or settings are refused."""
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
        """Return a part's file."""
        return self.folder / f"{shard.index:05d}-of-{shard.count:05d}-{part:05d}.parquet"

    def paths(self, shard: Shard) -> list[Path]:
        """Return the files of a shard's parts."""
        return [self.path(shard, part) for part in range(self.count_parts(shard))]

    def is_done(self, shard: Shard, part: int) -> bool:
        """Whether a part is there. Raises StaleOutputError if it was made from other inputs or settings."""
        path = self.path(shard, part)
        return path.exists() and matches(path, read_provenance(path), self._provenance)

    def check(self, count: int) -> None:
        """Raise StaleOutputError if a part of any of `count` shards was made from other inputs or settings."""
        for index in range(count):
            shard = Shard(index, count)
            for part in range(self.count_parts(shard)):
                self.is_done(shard, part)

    def is_all_done(self, count: int) -> bool:
        """Whether the parts of all `count` shards are there, made from these inputs with these settings."""
        paths = [path for index in range(count) for path in self.paths(Shard(index, count))]
        return all(path.exists() for path in paths) and not any(
            describe_difference(read_provenance(path) or {}, self._provenance) for path in paths
        )

    def remove(self, shard: Shard) -> None:
        """Remove a shard's parts, to make them again."""
        for path in self.paths(shard):
            workspace.remove(path)

    def remove_all(self) -> None:
        """Remove the parts of all shards; another process may be doing the same."""
        workspace.discard(self.folder)

    def write(self, shard: Shard, part: int, rows: np.ndarray, distances: np.ndarray) -> None:
        """Write the neighbours (A, k) of a part's anchors, -1 and inf where there are fewer."""
        # A row holds an anchor's numbers in one piece.
        schema = pa.schema(
            [(name, pa.binary(np.dtype(kind).itemsize * self.num_neighbors)) for name, kind in _TYPES.items()]
        )
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
                if file.metadata.num_rows != len(self.anchors(shard, part)):
                    raise InputError(f"{path}: {file.metadata.num_rows} rows instead of its anchors': remove it")
                for batch in file.iter_batches(batch_size=_ROWS_PER_GROUP, columns=list(columns)):
                    yield [self._view(batch, name) for name in columns]

    def _view(self, batch: pa.RecordBatch, name: str) -> np.ndarray:
        column = batch.column(name)
        values = np.frombuffer(column.buffers()[1], _TYPES[name]).reshape(-1, self.num_neighbors)
        return values[column.offset : column.offset + len(column)]


class _ShardReader:
    """Reads a shard's rows in order, any number at a time."""

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
