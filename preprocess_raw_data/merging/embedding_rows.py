"""Read the ids and positions of all embedding files, then their rows by building, in bounded memory."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import InputError, one_line
from pipeline.files.column_types import check_columns, convert_table, fill_composite_ids, plain_type, stored_fields
from pipeline.files.list_columns import ListColumn, find_embedding
from pipeline.files.tables import FILE_COLUMNS, ID_COLUMNS, open_parquet, read_batches, read_ids, read_provenance
from pipeline.log import logger
from pipeline.retrieval.geography import mean_positions
from preprocess_raw_data.merging.splits import Buildings

INVENTORY_COLUMNS = {"building_id", "streetview_image_id", "target_lat", "target_lon"}
# Ids, names and positions, roughly.
BYTES_BESIDE_EMBEDDING = 300
BATCH_ROWS = 1024


@dataclass(frozen=True)
class Inventory:
    embeddings: list[ListColumn]  # of each file
    file_rows: list[int]  # of each file
    codes: NDArray[np.int32]  # of each row of all files: its building, as a row of `buildings`
    buildings: Buildings  # as they first appear
    row_bytes: int
    schema: pa.Schema  # of the merged rows, without the columns about the tar


def take_inventory(paths: list[Path]) -> Inventory:
    """Read the ids of all files.

    Raises InputError if a file is damaged, of another shape or model than the first, or repeats an image.
    """
    schema, columns = check_files(paths)
    fields = [field for field in pa.schema(ID_COLUMNS) if field.name in INVENTORY_COLUMNS]
    tables = read_ids(paths, fields, "make the file again with stage 2")
    if not any(map(len, tables)):
        raise InputError(f"{paths[0].parent}: its {len(paths)} files hold no rows: see the rejects of stages 1 and 2")
    ids = pa.concat_tables(tables)
    encoded = ids["building_id"].cast(pa.string()).combine_chunks().dictionary_encode()
    building_ids, codes = encoded.dictionary, encoded.indices.to_numpy()
    lat, lon = ids["target_lat"].to_numpy(), ids["target_lon"].to_numpy()
    kind = schema.field("embedding").type
    return Inventory(
        columns,
        [len(table) for table in tables],
        codes,
        Buildings(building_ids, *mean_positions(codes, lat, lon, len(building_ids))),
        kind.list_size * kind.value_type.bit_width // 8 + BYTES_BESIDE_EMBEDDING,
        pa.schema([field for field in schema if field.name not in dict(FILE_COLUMNS)]),
    )


def check_files(paths: list[Path]) -> tuple[pa.Schema, list[ListColumn]]:
    """Return the merged schema, with the columns of all files and the embedding last, and each file's embeddings.

    Raises InputError naming the first file that lacks an id, or differs from an earlier one in a type, the width or the
    model.
    """
    ids = pa.schema(ID_COLUMNS)
    schemas = [open_parquet(path).schema_arrow.remove_metadata() for path in paths]
    merged, columns, model, tars = ids, list[ListColumn](), None, dict[str, Path]()
    for path, found in zip(paths, schemas, strict=True):
        check_columns(path, found, stored_fields(found, ids))
        column = find_embedding(path)
        columns.append(column)
        kinds = {field.name: plain_type(field.type) for field in found if field.name not in {*ids.names, column.name}}
        kinds |= {column.name: column.arrow_type} if column.width else {}
        try:
            merged = pa.unify_schemas([merged, pa.schema(kinds)], promote_options="permissive")
            if column.width and not pa.types.is_fixed_size_list(merged.field(column.name).type):
                raise pa.ArrowTypeError(f"embeddings of {column.width} numbers")
        except pa.ArrowTypeError as error:
            raise InputError(
                f"{path}: not the columns of the files before it ({one_line(error)}): make one of them again"
            ) from None
        provenance = read_provenance(path, warn=True) or {}
        for digest in filter(None, (one.get("digest") for one in provenance.get("inputs", []))):
            if (first := tars.setdefault(str(digest), path)) != path:
                logger.warning("%s, %s: made from one tar under two numbers: remove one", first.name, path.name)
        settings = provenance.get("settings")
        model = model or settings
        if settings and settings != model:
            raise InputError(f"{path}: embedded with {settings}, {paths[0].name} with {model}: make one of them again")
    for path, schema in zip(paths, schemas, strict=True):
        if missing := set(merged.names) - {name for name, _ in ID_COLUMNS + FILE_COLUMNS} - set(schema.names):
            logger.warning("%s has no %s: null in its rows", path.name, ", ".join(sorted(missing)))
    kind = merged.field("embedding").type if "embedding" in merged.names else columns[0].arrow_type
    return pa.schema([*(field for field in merged if field.name != "embedding"), ("embedding", kind)]), columns


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
        # No name holds the piece here, so that it is gone before the next one is read.
        yield read_piece(inventory, wanted), np.searchsorted(wanted, rows), codes[rows]


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
