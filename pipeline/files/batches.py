"""Read a parquet piece by piece, in memory that depends on neither its rows nor its row groups."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from pipeline.files.tables import open_parquet, reading

# Read ahead of each column: a foreign parquet may hold all its rows in one group.
BUFFER_BYTES = 2**20


def read_batches(path: Path, columns: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Yield some columns of a parquet, in their order, `batch_rows` rows at a time or fewer.

    Raises InputError if the file is missing or damaged.
    """
    with open_parquet(path, BUFFER_BYTES) as file:
        # One reader over all row groups keeps every one's compressed bytes until it is done (seen with pyarrow 26).
        for group in range(file.num_row_groups):
            batches = file.iter_batches(batch_rows, row_groups=[group], columns=columns)
            while True:
                with reading(path):  # decoding alone: what fails in the caller is no damage of this file
                    batch = next(batches, None)
                if batch is None:
                    break
                yield batch.select(columns).replace_schema_metadata(None)
