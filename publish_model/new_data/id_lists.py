"""Read a list of ids to take out: text, CSV or parquet, in whatever way the dataset's ids may have been written."""

import contextlib
import re
import unicodedata
import uuid
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from pipeline.embeddings_dataset.columns import is_text, plain_values
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN
from pipeline.errors import InputError
from pipeline.files.listing import is_parquet
from pipeline.files.tables import open_parquet, reading
from pipeline.log import logger
from publish_model.new_data.csv_rows import read_rows, reading_text

# Byte-order marks stand inside a list that was put together from several; the other is a web page's.
_INVISIBLE = "\ufeff\u200b"
_WHOLE_FLOAT = re.compile(r"^(-?\d+)\.0+$")


def read_id_list(path: Path, kind: pa.DataType) -> dict[str, list[object]]:
    """Return each id of a list, as text, with the plain values of the dataset's type that it may stand for.

    An id that can be none of that type stands for nothing. Raises InputError if the list cannot be read or is empty.
    """
    listed: dict[str, list[object]] = {}
    if is_parquet(path):
        found = _read_parquet(path, kind)
    else:
        texts = _read_csv(path) if path.suffix.lower() in (".csv", ".tsv") else _read_lines(path)
        found = ((text, _values_of(text, kind)) for text in texts if text.strip())
    for text, values in found:
        listed.setdefault(text, []).extend(values)
    if not listed:
        raise InputError(f"{path}: holds no ids")
    return listed


def _read_parquet(path: Path, kind: pa.DataType) -> Iterable[tuple[str, list[object]]]:
    with reading(path), open_parquet(path) as file:
        if file.schema_arrow.names.count(ID_COLUMN) != 1:
            missing = ID_COLUMN not in file.schema_arrow.names
            raise InputError(f"{path}: column {ID_COLUMN} is {'missing' if missing else 'there more than once'}")
        column = file.read([ID_COLUMN]).column(0)
        column.validate(full=True)
    _warn_of_holes(path, column.null_count)
    for chunk in column.chunks:
        for scalar, value in zip(chunk, plain_values(chunk), strict=True):
            if scalar.is_valid and value == value:  # noqa: PLR0124 (NaN is how pandas says that there is none)
                text = describe_id(scalar)
                yield text, [value] if chunk.type == kind else _values_of(text, kind)


def _read_lines(path: Path) -> list[str]:
    """Return the lines: only a line feed ends one, as ids may hold the others, unless there is none in the list."""
    with reading_text(path) as file:
        content = file.read()
    if "\n" not in content:
        return content.split("\r")
    return [line.removesuffix("\r") for line in content.split("\n")]


def _read_csv(path: Path) -> list[str]:
    rows = read_rows(path)
    names = next(rows, (0, []))[1]
    if names.count(ID_COLUMN) != 1:
        raise InputError(
            f"{path}: {'no' if ID_COLUMN not in names else 'more than one'} column {ID_COLUMN} in its first line: name "
            "the column of ids so, and no other"
        )
    place = names.index(ID_COLUMN)
    texts = [row[place] if place < len(row) else "" for _, row in rows]
    _warn_of_holes(path, sum(not text.strip() for text in texts))
    return texts


def _warn_of_holes(path: Path, num_holes: int) -> None:
    if num_holes:
        logger.warning("%s: %d rows without an id are passed over", path, num_holes)


def _values_of(text: str, kind: pa.DataType) -> list[object]:
    """Return the values of a type that a listed text may stand for: as it is, without blanks or quotes around it.

    Text is taken composed and decomposed, as file names come in both; binary ids as UTF-8, 0x... or a UUID.
    """
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    bare = text.strip().strip(_INVISIBLE).strip()
    unquoted = bare[1:-1].replace('""', '"') if len(bare) > 1 and bare[0] == bare[-1] == '"' else bare
    forms = list(dict.fromkeys((text, bare, unquoted)))
    if is_text(kind):
        composed = [unicodedata.normalize(how, form) for form in forms for how in ("NFC", "NFD")]
        return list(dict.fromkeys([*forms, *composed]))
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return [value for form in forms for value in _bytes_of(form)]
    if pa.types.is_integer(kind):  # with one id missing pandas makes floats of them all
        bare, unquoted = (_WHOLE_FLOAT.sub(r"\1", form) for form in (bare, unquoted))
    for form in (bare, unquoted):
        try:
            return plain_values(pa.array([form], pa.string()).cast(kind))
        except (pa.ArrowException, ValueError):
            continue
    return []


def _bytes_of(text: str) -> list[object]:
    values: list[object] = [text.encode()]
    with contextlib.suppress(ValueError):
        values.append(uuid.UUID(text).bytes)
    if text.startswith("0x"):
        with contextlib.suppress(ValueError):
            values.append(bytes.fromhex(text[2:]))
    return values


def describe_id(scalar: pa.Scalar) -> str:
    """Return an id as one line of text: binary as UTF-8 or 0x..., unprintable characters as escapes."""
    if isinstance(scalar, pa.ExtensionScalar):
        scalar = scalar if isinstance(scalar.as_py(), uuid.UUID) else scalar.value
    try:
        value = scalar.as_py()
    except (ValueError, OverflowError):
        value = scalar
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            return f"0x{value.hex()}"
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in str(value))
