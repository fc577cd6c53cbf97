"""Bring the rows of a building together, in memory where they fit and through files on disk where they do not."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.tables import open_parquet, reading
from preprocess_raw_data.embedding_inventory import Inventory

BATCH_ROWS = 1024
# Fewer than the usual limit of 1,024 for a process; where memory_mb asks for smaller pieces they are larger than that.
MAX_OPEN_FILES = 512


def order_rows(codes: NDArray[np.int32], keep: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the kept rows, building by building in the order of first appearance, each building's in their order."""
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first[inverse], kind="stable")
    return order[keep[order]]


def cut_buckets(ordered_codes: NDArray[np.int32], rows_at_a_time: int) -> NDArray[np.int64]:
    """Return the positions that cut ordered rows into pieces of about `rows_at_a_time`, never inside a building."""
    starts = np.flatnonzero(np.diff(ordered_codes, prepend=-1))
    buckets = starts // rows_at_a_time
    return np.append(starts[np.flatnonzero(np.diff(buckets, prepend=-1))], len(ordered_codes))


def read_in_order(
    inventory: Inventory, group: list[int], keep: NDArray[np.bool_], rows_at_a_time: int, scratch_dir: Path
) -> Iterator[tuple[pa.Table, NDArray[np.int32]]]:
    """Yield a group's kept rows and their building codes, grouped by building, about `rows_at_a_time` at a time.

    A group that is larger goes once through files on disk, one per piece of the output.
    """
    codes = np.concatenate([inventory.codes[number] for number in group])
    order = order_rows(codes, keep[codes])
    if len(codes) <= rows_at_a_time:
        tables = [read_whole(inventory.paths[number]) for number in group]
        yield pa.concat_tables(tables).replace_schema_metadata(None).take(pa.array(order)), codes[order]
        return
    cuts = cut_buckets(codes[order], max(rows_at_a_time, len(codes) // MAX_OPEN_FILES))
    bucket_of_row = np.full(len(codes), -1, np.int64)
    bucket_of_row[order] = np.repeat(np.arange(len(cuts) - 1), np.diff(cuts))
    spilled = spill(inventory, group, bucket_of_row, scratch_dir)
    for bucket, path in enumerate(spilled):
        with pa.OSFile(str(path)) as file:
            table = pa.ipc.open_stream(file).read_all()
        path.unlink()
        spilled_rows = np.flatnonzero(bucket_of_row == bucket)
        wanted_rows = order[cuts[bucket] : cuts[bucket + 1]]
        yield table.take(pa.array(np.searchsorted(spilled_rows, wanted_rows))), codes[wanted_rows]


def read_whole(path: Path) -> pa.Table:
    """Return all of a file; raises InputError if it is damaged."""
    with reading(path):
        return open_parquet(path).read()


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield a file's rows piece by piece; raises InputError if it is damaged."""
    batches = open_parquet(path).iter_batches(BATCH_ROWS)
    while True:
        with reading(path):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def spill(inventory: Inventory, group: list[int], bucket_of_row: NDArray[np.int64], scratch_dir: Path) -> list[Path]:
    """Write every kept row to the file of its bucket, in one pass over the group."""
    paths = [scratch_dir / f"{bucket:06d}.arrow" for bucket in range(int(bucket_of_row.max(initial=-1)) + 1)]
    start = 0
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(pa.ipc.new_stream(str(path), inventory.schema)) for path in paths]
        for number in group:
            for batch in read_batches(inventory.paths[number]):
                buckets = bucket_of_row[start : start + len(batch)]
                start += len(batch)
                for bucket in np.unique(buckets[buckets >= 0]):
                    rows = batch.filter(pa.array(buckets == bucket))
                    writers[bucket].write_batch(rows.replace_schema_metadata(None))
    return paths
