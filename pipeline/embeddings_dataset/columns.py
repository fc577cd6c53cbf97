"""Columns of any type: their values as plain Python objects, hashes of these, some of their rows, and their names."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import ConfigError


def plain_values(column: pa.Array | pa.ChunkedArray) -> list[object]:
    """Return the values as Python objects that are equal where the ids are, whatever the column's type.

    Times are numbers, as Python has no place for nanoseconds, years beyond 9999 and unknown time zones.
    """
    if isinstance(column, pa.ChunkedArray):
        return [value for chunk in column.chunks for value in plain_values(chunk)]
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = _map_innermost(column.type, _with_numbers)
    return list((column if kind == column.type else column.cast(kind)).to_pylist())


def _map_innermost(kind: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    if pa.types.is_map(kind):
        return pa.map_(_map_innermost(kind.key_type, change), _map_innermost(kind.item_type, change))
    if pa.types.is_struct(kind):
        return pa.struct([bare_field(kind.field(index), change) for index in range(kind.num_fields)])
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(bare_field(kind.value_field, change), kind.list_size)
    makers = {"list": pa.list_, "large_list": pa.large_list, "list_view": pa.list_view}
    make = (makers | {"large_list_view": pa.large_list_view}).get(str(kind).partition("<")[0])
    return make(bare_field(kind.value_field, change)) if make else change(kind)


def bare_field(field: pa.Field, change: Callable[[pa.DataType], pa.DataType] = lambda kind: kind) -> pa.Field:
    """Return a field, and those in it, without what programs noted beside its type: notes may name ids."""
    notes = {key: value for key, value in (field.metadata or {}).items() if key.startswith(b"ARROW:extension:")}
    return field.with_type(_map_innermost(field.type, change)).with_metadata(notes or None)


def _decoded(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _with_numbers(kind: pa.DataType) -> pa.DataType:
    if not pa.types.is_temporal(kind):
        return kind
    return pa.int32() if kind.bit_width == 32 else pa.int64()


def take_rows(column: pa.Array, rows: NDArray[np.int64]) -> pa.Array:
    """Return the given rows of a column of any type, its type unchanged, without dictionary entries of other rows.

    A read batch carries the entries of its whole row group, and deleted ids may be among them.
    """
    if pa.types.is_dictionary(column.type):
        indices = column.indices.take(pa.array(rows))
        used = np.unique(indices.drop_null().to_numpy(zero_copy_only=False))
        places = pc.index_in(indices, pa.array(used, indices.type)).cast(indices.type)
        return pa.DictionaryArray.from_arrays(
            places, column.dictionary.take(pa.array(used)), ordered=column.type.ordered
        )
    try:
        taken = column.take(pa.array(rows))
    except pa.ArrowNotImplementedError:  # a string_view, or a list or struct of them
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else []
        taken = pa.concat_arrays([column.slice(int(run[0]), len(run)) for run in runs] or [column.slice(0, 0)])
    if "dictionary<" not in str(column.type):
        return taken
    return taken.cast(_map_innermost(column.type, _decoded)).cast(column.type)


def filter_rows(table: pa.Table, wanted: NDArray[np.bool_]) -> pa.Table:
    """Return the rows of a table that are wanted (N,), whatever the types of its columns."""
    rows = np.flatnonzero(wanted)
    columns = [take_rows(column.combine_chunks(), rows) for column in table.columns]
    return pa.Table.from_arrays(columns, schema=table.schema)


def hash_bytes(data: bytes, salt: bytes = b"") -> int:
    """Return a 64-bit hash, the same in every process."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=salt).digest(), "little")


def hash_ids(values: Iterable[object], salt: bytes = b"") -> NDArray[np.uint64]:
    """Return the 64-bit hashes of plain Python values, (N,)."""
    return np.fromiter((hash_bytes(repr(one).encode("utf-8", "surrogatepass"), salt) for one in values), np.uint64)


def checksum_tables(*tables: pa.Table) -> str:
    """Return a hash of the values of tables, whatever their chunks and encodings are; float lists count by their bytes.

    A column's plain Python values are hashed as text, which for the ids of a part costs about a millisecond.
    """
    digest = hashlib.blake2b(digest_size=16)
    for table in tables:
        for field, column in zip(table.schema, table.columns, strict=True):
            # A list's type names its element otherwise after it was stored.
            kind = "list" if pa.types.is_nested(field.type) else str(field.type)
            digest.update(f"{field.name}\0{kind}\0{len(column)}\0".encode())
            for chunk in column.chunks:
                # Lists of text come as objects, whose bytes are addresses.
                numeric = pa.types.is_fixed_size_list(chunk.type) and pa.types.is_primitive(chunk.type.value_type)
                if numeric and chunk.null_count == 0:
                    digest.update(np.ascontiguousarray(chunk.flatten().to_numpy(zero_copy_only=False)).tobytes())
                else:
                    for value in plain_values(chunk):
                        digest.update(repr(value).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def check_names(where: str, made: Sequence[str], passed_on: Iterable[str]) -> None:
    """Raise ConfigError where a tool would write two columns of one name, of those it makes and those it passes on."""
    twice = [name for name, count in Counter([*made, *passed_on]).items() if count > 1]
    if twice:
        raise ConfigError(
            f"{where}: there would be two columns {twice[0]}: name columns once each, other than {', '.join(made)}, "
            "which are made here"
        )
