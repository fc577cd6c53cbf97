"""Bring the rows of a building together in bounded memory."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.files.column_types import convert_table, fill_composite_ids, stored_fields
from pipeline.files.list_columns import ListColumn
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


def read_by_building(
    inventory: Inventory, keep: NDArray[np.bool_], rows_at_a_time: int
) -> Iterator[tuple[Piece, NDArray[np.int64], NDArray[np.int32]]]:
    """Yield the rows of the buildings to keep, in pieces, with their order by building and their codes in it.

    The buildings come as they first appear. No piece ends inside a building, or, where it can be helped, inside a file:
    that is read once, unless it has more than `rows_at_a_time` or shares buildings with others.
    """
    codes = inventory.codes
    order = np.argsort(codes, kind="stable")  # codes count the buildings as they first appear
    order = order[keep[codes[order]]]
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    files = np.searchsorted(np.cumsum(inventory.file_rows), order[starts], side="right")
    buckets = (starts - starts[np.searchsorted(files, files)]) // rows_at_a_time
    parts = starts[(np.diff(files, prepend=-1) != 0) | (np.diff(buckets, prepend=-1) != 0)].tolist()
    cuts = parts[:1]
    for start, stop in itertools.pairwise([*parts, len(order)]):
        if stop - cuts[-1] > rows_at_a_time and start > cuts[-1]:
            cuts.append(start)
    for start, stop in itertools.pairwise([*cuts, len(order)]):
        rows = order[start:stop]
        wanted = np.sort(rows)
        piece = read_piece(inventory, wanted)
        yield piece, np.searchsorted(wanted, rows), codes[rows]
        del piece  # before the next one is read


def read_piece(inventory: Inventory, wanted: NDArray[np.int64]) -> Piece:
    """Read the rows with these numbers among all files, ascending.

    Raises InputError if a file is damaged, or, naming the row, if an embedding is missing, of another length or not
    finite.
    """
    kind = inventory.schema.field("embedding").type
    embeddings = np.empty((len(wanted), kind.list_size), kind.value_type.to_pandas_dtype())
    others = pa.schema([field for field in inventory.schema if field.name != "embedding"])
    tables, first = [others.empty_table()], 0
    for column, num_rows in zip(inventory.embeddings, inventory.file_rows, strict=True):
        begin, end = np.searchsorted(wanted, [first, first + num_rows])
        if begin < end:
            tables.append(read_rows(column, wanted[begin:end] - first, inventory.schema, embeddings[begin:end]))
        first += num_rows
    return Piece(pa.concat_tables(tables, promote_options="default").combine_chunks(), embeddings)


def read_rows(column: ListColumn, rows: NDArray[np.int64], schema: pa.Schema, embeddings: NDArray[Any]) -> pa.Table:
    """Read the embeddings of a file's rows, ascending, into an array (n, D); return what else of `schema` is there."""
    stored = open_parquet(column.path).schema_arrow
    names = [field.name for field in stored_fields(stored, schema) if field.name in stored.names]
    others = [name for name in names if name != column.name]
    batches, start = [], 0
    for batch in read_batches(column.path, names, BATCH_ROWS):
        begin, end = np.searchsorted(rows, [start, start + len(batch)])
        taken = rows[begin:end] - start
        embeddings[begin:end] = column.read(batch.column(column.name), start)[taken]
        batches.append(batch.select(others).take(pa.array(taken)))
        start += len(batch)
    table = fill_composite_ids(convert_table(column.path, pa.Table.from_batches(batches), schema))
    return table.select([name for name in schema.names if name in table.column_names])
