"""Bring the rows of a building together in bounded memory."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.files.column_types import convert_table, fill_composite_ids, stored_fields
from pipeline.files.tables import open_parquet, read_batches
from preprocess_raw_data.merging.embedding_inventory import Inventory

BATCH_ROWS = 1024


@dataclass(frozen=True)
class Piece:
    """Rows in memory; the embeddings are one array, because Arrow would copy all chunks to take some rows."""

    columns: pa.Table  # N rows of all columns but the embeddings
    embeddings: NDArray[Any]  # (N, D)

    def take(self, rows: NDArray[np.int64], schema: pa.Schema) -> pa.Table:
        """Return some rows with all columns, as `schema` orders them."""
        taken = self.columns.take(pa.array(rows))
        values = pa.array(self.embeddings[rows].reshape(-1))
        embedding = pa.FixedSizeListArray.from_arrays(values, type=schema.field("embedding").type)
        return pa.table([embedding if name == "embedding" else taken[name] for name in schema.names], schema=schema)


def order_rows(codes: NDArray[np.int32], keep: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the kept rows by building, in the order of the buildings' first appearance."""
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first[inverse], kind="stable")
    return order[keep[order]]


def cut_buckets(ordered_codes: NDArray[np.int32], rows_at_a_time: int) -> NDArray[np.int64]:
    """Return the positions that cut ordered rows into pieces of about `rows_at_a_time`, never inside a building."""
    starts = np.flatnonzero(np.diff(ordered_codes, prepend=-1))
    buckets = starts // rows_at_a_time
    return np.append(starts[np.flatnonzero(np.diff(buckets, prepend=-1))], len(ordered_codes))


def read_in_order(
    inventory: Inventory, group: list[int], keep: NDArray[np.bool_], rows_at_a_time: int
) -> Iterator[tuple[Piece, NDArray[np.int64], NDArray[np.int32]]]:
    """Yield a group's kept rows, about `rows_at_a_time` at a time, with their order by building and their codes in it.

    A larger group, as of files that share buildings, is read once for each piece.
    """
    codes = np.concatenate([inventory.codes[number] for number in group])
    order = order_rows(codes, keep[codes])
    for start, stop in itertools.pairwise(cut_buckets(codes[order], rows_at_a_time)):
        wanted = order[start:stop]
        is_wanted = np.zeros(len(codes), bool)
        is_wanted[wanted] = True
        piece = gather(read_group(inventory, group, is_wanted), len(wanted), inventory)
        yield piece, np.searchsorted(np.flatnonzero(is_wanted), wanted), codes[wanted]
        del piece  # before the next one is read


def read_group(
    inventory: Inventory, group: list[int], is_wanted: NDArray[np.bool_]
) -> Iterator[tuple[pa.RecordBatch, NDArray[np.bool_]]]:
    """Yield the batches of a group's files with wanted rows, with the inventory's columns, and which rows these are.

    Raises InputError if a file is damaged, or, naming the row, if an embedding is missing, of another length or not
    finite.
    """
    done = 0
    for number in group:
        column, start = inventory.embeddings[number], 0
        stored = open_parquet(column.path).schema_arrow
        names = [field.name for field in stored_fields(stored, inventory.schema) if field.name in stored.names]
        for batch in read_batches(column.path, names, BATCH_ROWS):
            rows = column.read(batch.column(batch.schema.get_field_index(column.name)), start)
            mask = is_wanted[done : done + len(batch)]
            if mask.any():
                yield complete_batch(column.path, batch, rows, inventory.schema), mask
            start, done = start + len(batch), done + len(batch)


def complete_batch(path: Path, batch: pa.RecordBatch, rows: NDArray[Any], schema: pa.Schema) -> pa.RecordBatch:
    """Return a file's batch with the columns and types of `schema`; `rows` (n, D) are its embeddings."""
    table = pa.Table.from_batches([batch]).drop_columns(["embedding"])
    table = fill_composite_ids(convert_table(path, table, schema))
    arrays = []
    for field in schema:
        if field.name == "embedding":
            values = rows.astype(field.type.value_type.to_pandas_dtype(), copy=False)
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=field.type))
        elif field.name in table.column_names:
            column = table[field.name].cast(field.type).combine_chunks()
            arrays.append(column.chunk(0) if isinstance(column, pa.ChunkedArray) else column)
        else:
            arrays.append(pa.nulls(len(batch), field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def gather(batches: Iterable[tuple[pa.RecordBatch, NDArray[np.bool_]]], num_rows: int, inventory: Inventory) -> Piece:
    """Put the wanted rows of batches, `num_rows` in all, together."""
    names = [name for name in inventory.schema.names if name != "embedding"]
    kind = inventory.schema.field("embedding").type
    embeddings = np.empty((num_rows, kind.list_size), kind.value_type.to_pandas_dtype())
    columns, start = [], 0
    for batch, mask in batches:
        block = batch.column("embedding").flatten().to_numpy().reshape(len(batch), -1)
        stop = start + int(mask.sum())
        embeddings[start:stop] = block[mask]
        columns.append(batch.select(names).filter(pa.array(mask)))
        start = stop
    schema = pa.schema([inventory.schema.field(name) for name in names])
    return Piece(pa.Table.from_batches(columns, schema).combine_chunks(), embeddings)
