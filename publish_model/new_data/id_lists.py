"""Read a list of ids to take out: text, CSV or parquet."""

import contextlib
import itertools
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.embeddings_dataset.columns import plain_values, take_rows
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN
from pipeline.errors import InputError, escape_controls
from pipeline.files.column_types import plain_type, whole_from_floats
from pipeline.files.listing import is_parquet
from pipeline.files.text_tables import read_id_table, reading_text
from pipeline.log import logger

_ROWS_AT_A_TIME = 65_536


def read_id_list(path: Path) -> pa.Array:
    """Return the ids of a list.

    Raises InputError if the list cannot be read or is empty.
    """
    if is_parquet(path) or path.suffix.lower() in (".csv", ".tsv"):
        column = read_id_table(path, [ID_COLUMN], f"name the column of ids {ID_COLUMN}, and no other")[ID_COLUMN]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if column.null_count:
            logger.warning("%s: %d rows without an id are passed over", path, column.null_count)
        with contextlib.suppress(pa.ArrowNotImplementedError):  # a small parquet may repeat an id 10^8 times
            column = pa.chunked_array([chunk.unique() for chunk in column.chunks], column.type)
        column = take_rows(column.combine_chunks(), np.flatnonzero(column.is_valid()))
    else:
        with reading_text(path) as file:
            content = file.read()
        if "\r" in content and "\n" not in content:
            raise InputError(f"{path}: has carriage returns and no line feed: end each id with a line feed")
        found = re.finditer("[^\n]+", content)  # ids may hold other line breaks
        lines = (line[0].removesuffix("\r") for line in found if line[0].strip())
        column = pa.array([], pa.large_string())
        while some := list(itertools.islice(lines, 10 * _ROWS_AT_A_TIME)):
            column = pa.concat_arrays([column, pa.array(some, column.type)])
    if not len(column):
        raise InputError(f"{path}: holds no ids")
    return column.cast(pa.large_string()) if plain_type(column.type) == pa.string() else column


def plain_ids(column: pa.Array, kind: pa.DataType, path: Path) -> Iterator[object]:
    """Yield the plain value of a dataset's type that each listed id stands for, else its text, which no row has.

    Text stands for the id that is written so, blanks and quotes included. Raises InputError if an id may be another
    one that was rounded.
    """
    for start in range(0, len(column), _ROWS_AT_A_TIME):
        rows = column[start : start + _ROWS_AT_A_TIME]
        if plain_type(rows.type) == plain_type(kind):
            yield from plain_values(rows)
        else:
            yield from (next(iter(_values_of(text, kind, path)), text) for text in map(name_id, rows))


def name_id(scalar: pa.Scalar) -> str:
    """Return an id as text, one that is text as it is."""
    return scalar.as_py() if plain_type(scalar.type) == pa.string() else describe_id(scalar)


def _values_of(text: str, kind: pa.DataType, path: Path) -> list[object]:
    """Return the plain value of a type that a listed text stands for, if any; binary ids as UTF-8, 0x... or a UUID."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    if plain_type(kind) == pa.string():
        return [text]
    bare = text.strip()
    with contextlib.suppress(pa.ArrowException, ValueError):
        if pa.types.is_fixed_size_binary(kind) and len(bare) == 36:
            return [uuid.UUID(bare).bytes]
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
            return [bytes.fromhex(bare[2:]) if bare.startswith("0x") else text.encode()]
        if pa.types.is_integer(kind):  # 007 is none, 7.0 comes from pandas
            whole = re.fullmatch(r"(0|-?[1-9][0-9]*)(\.0+)?", bare)
            if whole and whole[2]:
                whole_from_floats(pa.array([float(bare)]), ID_COLUMN, path)
            bare = whole[1] if whole else ""
        return plain_values(pa.array([bare], pa.string()).cast(kind))
    return []


def describe_id(scalar: pa.Scalar) -> str:
    """Return an id as one line of text: binary as UTF-8 or 0x..., control characters and tabs as escapes."""
    if isinstance(scalar, pa.ExtensionScalar):
        scalar = scalar if isinstance(scalar.as_py(), uuid.UUID) else scalar.value
    try:
        value = scalar.as_py()
    except (ValueError, OverflowError):  # a time beyond Python's
        value = plain_values(pa.repeat(scalar, 1))[0]
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            return f"0x{value.hex()}"
    return escape_controls(str(value)).replace("\t", "\\t")
