"""Read a list of ids to take out: text, CSV or parquet."""

import contextlib
import re
import uuid
from pathlib import Path

import pyarrow as pa

from pipeline.embeddings_dataset.columns import plain_values
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN
from pipeline.errors import InputError, escape_controls
from pipeline.files.column_types import plain_type, whole_from_floats
from pipeline.files.listing import is_parquet
from pipeline.files.text_tables import read_id_table, reading_text
from pipeline.log import logger


def read_id_list(path: Path, kind: pa.DataType) -> dict[str, set[object]]:
    """Return each id of a list, as text, with the plain values of the dataset's type that it stands for.

    Text stands for the id that is written so, blanks and quotes included; one that can be none of the type stands for
    nothing. Raises InputError if the list cannot be read or is empty, or an id may be another one that was rounded.
    """
    if is_parquet(path) or path.suffix.lower() in (".csv", ".tsv"):
        column = read_id_table(path, [ID_COLUMN], f"name the column of ids {ID_COLUMN}, and no other")[ID_COLUMN]
        if column.null_count:
            logger.warning("%s: %d rows without an id are passed over", path, column.null_count)
    else:
        with reading_text(path) as file:
            content = file.read()
        # Only a line feed ends a line, as ids may hold the others, unless there is none in the list.
        lines = (line.removesuffix("\r") for line in content.split("\n" if "\n" in content else "\r"))
        column = pa.chunked_array([[line for line in lines if line.strip()]], pa.string())
    listed: dict[str, set[object]] = {}
    for chunk in column.chunks:
        with contextlib.suppress(pa.ArrowNotImplementedError):  # a small parquet may repeat an id 10^8 times
            chunk = chunk.unique()  # noqa: PLW2901
        for scalar, value in zip(chunk, plain_values(chunk), strict=True):
            if value is not None and value == value:  # noqa: PLR0124 (NaN)
                text = value if isinstance(value, str) else describe_id(scalar)
                values = [value] if chunk.type == kind else _values_of(text, kind, path)
                listed.setdefault(text, set()).update(values)  # nanoseconds read like others
    if not listed:
        raise InputError(f"{path}: holds no ids")
    return listed


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
