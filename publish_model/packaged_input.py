"""Read packaged images: a parquet of image bytes with an identifier, in read batches, in bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import InputError, one_line
from pipeline.tables import hash_footer, open_parquet

ID_COLUMN, IMAGE_COLUMN, VALID_COLUMN = "OSMID", "image_bytes", "is_valid"
# Without a buffer pyarrow reads a row group's whole column chunk, and a row group may hold 10^6 images.
READ_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class PackagedInput:
    """A packaged parquet, told apart by content: its size, its schema and its footer, never its path."""

    path: Path
    size: int
    schema: pa.Schema
    fingerprint: str
    row_group_rows: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the whole file."""
        return sum(self.row_group_rows)

    def describe_schema(self) -> list[str]:
        """Return `name: type` of every column."""
        return [f"{field.name}: {field.type}" for field in self.schema]


def open_packaged(path: Path, *, filter_valid: bool) -> PackagedInput:
    """Read the footer of a packaged parquet and check its columns.

    Raises InputError naming the file if it is missing, damaged, empty, or a column is missing or of a wrong type.
    """
    if path.is_dir():
        raise InputError(f"{path}: a folder, not a parquet file: give the packaged parquet itself")
    with open_parquet(path) as file:
        metadata, schema = file.metadata, file.schema_arrow
    _check_columns(path, schema, filter_valid)
    rows = tuple(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
    if not sum(rows):
        raise InputError(f"{path}: holds no rows: package images first, or correct the path")
    return PackagedInput(path, path.stat().st_size, schema, hash_footer(path), rows)


def _check_columns(path: Path, schema: pa.Schema, filter_valid: bool) -> None:
    """Raise one InputError that names every column which cannot be used."""
    problems = []
    for name, accepts, expected in (
        (ID_COLUMN, _is_scalar, "a scalar type"),
        (IMAGE_COLUMN, _is_binary, "binary"),
        (VALID_COLUMN, _is_boolean, "bool"),
    ):
        count = len(schema.get_all_field_indices(name))
        if name == VALID_COLUMN and (not filter_valid or count == 0):
            continue
        if count != 1:
            problems.append(f"column {name} is missing" if count == 0 else f"column {name} is there {count} times")
        elif not accepts(schema.field(name).type):
            problems.append(f"column {name} is {schema.field(name).type}, expected {expected}")
    if problems:
        raise InputError(f"{path}: {', '.join(problems)}: package the images again, or correct the path")


def _is_scalar(kind: pa.DataType) -> bool:
    return not (pa.types.is_nested(kind) or pa.types.is_union(kind))


def _is_binary(kind: pa.DataType) -> bool:
    # binary_view is younger than the oldest pyarrow that is supported.
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or str(kind) == "binary_view")


def _is_boolean(kind: pa.DataType) -> bool:
    return bool(pa.types.is_boolean(kind) or pa.types.is_null(kind))  # a column of nulls alone has no type


def read_batches(source: PackagedInput, row_group: int, batch_rows: int, *, with_valid: bool) -> Iterator[pa.Table]:
    """Yield the rows of one row group in tables of `batch_rows`, the last one shorter.

    Raises InputError if the file cannot be read.
    """
    columns = [ID_COLUMN, IMAGE_COLUMN]
    if with_valid and VALID_COLUMN in source.schema.names:
        columns.append(VALID_COLUMN)
    held: pa.Table | None = None
    try:
        with open_parquet(source.path, buffer_size=READ_BUFFER_BYTES) as file:
            # A batch ends early where Arrow's 2 GiB of bytes a chunk are full, so batches are put together here.
            for batch in file.iter_batches(batch_rows, row_groups=[row_group], columns=columns):
                table = pa.Table.from_batches([batch])
                held = table if held is None else pa.concat_tables([held, table])
                while held.num_rows >= batch_rows:
                    yield held.slice(0, batch_rows)
                    held = held.slice(batch_rows)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{source.path}: row group {row_group} cannot be read ({one_line(error)[:200]}): fetch the file again"
        ) from None
    if held is not None and held.num_rows:
        yield held


def valid_rows(table: pa.Table) -> NDArray[np.bool_]:
    """Return which rows are to be embedded, (N,); a null `is_valid` counts as true."""
    if VALID_COLUMN not in table.column_names:
        return np.ones(table.num_rows, dtype=bool)
    column = table.column(VALID_COLUMN).cast(pa.bool_()).fill_null(True)
    return np.asarray(column.to_numpy(), dtype=bool)


def take_rows(column: pa.Array, rows: NDArray[np.int64]) -> pa.Array:
    """Return the given rows of a column of any type, its type unchanged."""
    if pa.types.is_dictionary(column.type) and not column.type.ordered:
        return _compact(column.take(pa.array(rows)))
    try:
        return column.take(pa.array(rows))
    except pa.ArrowNotImplementedError:  # string_view
        return pa.concat_arrays([column.slice(int(row), 1) for row in rows]) if len(rows) else column.slice(0, 0)


def _compact(column: pa.DictionaryArray) -> pa.Array:
    """Drop the dictionary entries that no row uses: a read batch carries those of its whole row group."""
    encoded = column.dictionary_decode().dictionary_encode()
    return pa.DictionaryArray.from_arrays(encoded.indices.cast(column.type.index_type), encoded.dictionary)


def plain_values(column: pa.Array) -> list[object]:
    """Return the values as Python objects that are equal where the ids are, whatever the column's type."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_temporal(column.type):  # nanoseconds have no place in Python's datetime
        column = column.view(pa.int32() if column.type.bit_width == 32 else pa.int64())
    values: list[object] = column.to_pylist()
    return values
