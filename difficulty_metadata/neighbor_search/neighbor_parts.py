"""Neighbours found so far, in files that survive a kill and that shards fill together.

A part holds PART_ANCHORS images that follow one another, and shard I of N makes every N-th part. So any number of
shards gives the same bytes, and each goes on where another number stopped.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.files.tables import open_parquet, parquet_writer, reading
from pipeline.files.units import Provenance, Unit

# A kill costs at most one part: 24 MB with 150 neighbours. Numbers are stored as they are in memory: encoding them took
# six times as long, and a GPU's search would wait for it.
PART_ANCHORS = 20_000
_TYPES = {"rows": np.int32, "distances": np.float32}


@dataclass(frozen=True)
class PartStore:
    """The parts of one output; each carries the output's provenance."""

    folder: Path
    num_anchors: int
    num_neighbors: int
    provenance: Provenance

    @property
    def parts(self) -> range:
        return range(-(-self.num_anchors // PART_ANCHORS))

    def anchors(self, part: int) -> np.ndarray:
        """Return the rows (A,) int64 that a part holds."""
        return np.arange(part * PART_ANCHORS, min((part + 1) * PART_ANCHORS, self.num_anchors))

    def path(self, part: int) -> Path:
        return self.folder / f"{part:06d}.parquet"

    def unit(self, part: int) -> Unit:
        return Unit(f"part {part}", (self.path(part),), lambda _: self.provenance)

    def write(self, part: int, rows: np.ndarray, distances: np.ndarray) -> None:
        """Write the neighbours (A, k) of a part's anchors, -1 and inf where there are fewer."""
        # A row holds an anchor's numbers in one piece.
        schema = pa.schema(
            [(name, pa.binary(np.dtype(kind).itemsize * self.num_neighbors)) for name, kind in _TYPES.items()]
        )
        stored = map(np.ascontiguousarray, (rows, distances), _TYPES.values())
        columns = [
            pa.FixedSizeBinaryArray.from_buffers(field.type, len(values), [None, pa.py_buffer(values)])
            for field, values in zip(schema, stored, strict=True)
        ]
        with parquet_writer(
            self.path(part), schema, self.provenance,
            compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True,
        ) as writer:  # fmt: skip
            writer.write_table(pa.table(columns, schema=schema))

    def read(self, part: int, name: str) -> np.ndarray:
        """Return "rows" or "distances" (A, k) of a part. Raises InputError if it is missing or damaged."""
        path = self.path(part)
        with open_parquet(path) as file, reading(path):
            column = file.read([name]).column(0).combine_chunks()
        values = np.frombuffer(column.buffers()[1], _TYPES[name]).reshape(-1, self.num_neighbors)
        return values[column.offset : column.offset + len(column)]
