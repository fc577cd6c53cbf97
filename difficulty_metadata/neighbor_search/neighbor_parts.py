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
    check_columns,
    describe_difference,
    matches,
    open_parquet,
    parquet_writer,
    read_provenance,
    reading,
)
from pipeline.ids import Shard

# What a kill costs at most. A part of 150 neighbours takes 24 MB.
PART_ANCHORS = 20_000
_TYPES = {"rows": np.int32, "distances": np.float32}
# A reader holds one such group of each shard.
_ROWS_PER_GROUP = 1_024


class PartStore:
    """The folder of the parts of one output, for one way of sharing the anchors out."""

    def __init__(self, output_path: Path, num_anchors: int, num_neighbors: int, provenance: dict[str, Any]) -> None:
        """`provenance` is what the output will carry: parts of other inputs or settings are refused."""
        self.folder = output_path.parent / f"_{output_path.stem}_parts"
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
        """Raise StaleOutputError if any of the parts of `count` shards was made from other inputs or settings."""
        for shard in (Shard(index, count) for index in range(count)):
            for part in range(self.count_parts(shard)):
                self.is_done(shard, part)

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
        columns = [
            pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), field.type.value_type), self.num_neighbors)
            for field, values in zip(schema, (rows, distances), strict=True)
        ]
        with parquet_writer(self.path(shard, part), schema, self._provenance) as writer:
            writer.write_table(pa.table(columns, schema=schema), row_group_size=_ROWS_PER_GROUP)

    def stream(self, count: int, rows_per_block: int, columns: tuple[str, ...]) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield the named columns (B, k) of all anchors in their order, block by block, from `count` shards.

        Raises InputError if a part is missing or damaged.
        """
        readers = [_ShardReader(self, Shard(index, count), columns) for index in range(count)]
        for start in range(0, self.num_anchors, rows_per_block):
            block = np.arange(start, min(start + rows_per_block, self.num_anchors))
            merged = [np.empty((len(block), self.num_neighbors), dtype=_TYPES[name]) for name in columns]
            for index, reader in enumerate(readers):
                places = np.flatnonzero(block % count == index)
                for target, values in zip(merged, reader.take(len(places)), strict=bool(len(places))):
                    target[places] = values
            yield tuple(merged)

    def stream_shard(self, shard: Shard, columns: tuple[str, ...]) -> Iterator[list[np.ndarray]]:
        """Yield the named columns (rows, k) of one shard, group by group."""
        for part in range(self.count_parts(shard)):
            path = self.path(shard, part)
            with open_parquet(path) as file, reading(path):
                check_columns(path, file.schema_arrow, self._schema())
                if file.metadata.num_rows != len(self.anchors(shard, part)):
                    raise InputError(f"{path}: {file.metadata.num_rows} rows, not its anchors': remove it")
                for batch in file.iter_batches(batch_size=_ROWS_PER_GROUP, columns=list(columns)):
                    yield [batch.column(name).flatten().to_numpy().reshape(-1, self.num_neighbors) for name in columns]

    def _schema(self) -> pa.Schema:
        return pa.schema(
            [(name, pa.list_(pa.from_numpy_dtype(kind), self.num_neighbors)) for name, kind in _TYPES.items()]
        )


class _ShardReader:
    """Reads a shard from its first row on, as many rows at a time as are asked for."""

    def __init__(self, store: PartStore, shard: Shard, columns: tuple[str, ...]) -> None:
        self._groups = store.stream_shard(shard, columns)
        self._group: list[np.ndarray] = []

    def take(self, count: int) -> list[np.ndarray]:
        """Return the next `count` rows of each column."""
        taken: list[list[np.ndarray]] = []
        while count:
            if not (self._group and len(self._group[0])):
                self._group = next(self._groups)
            taken.append([values[:count] for values in self._group])
            self._group = [values[count:] for values in self._group]
            count -= len(taken[-1][0])
        return [np.concatenate(values) for values in zip(*taken, strict=True)]
