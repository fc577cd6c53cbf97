"""Read a list of ids to take out: text, CSV or parquet, in whatever way the dataset's ids may have been written."""

import contextlib
import re
import unicodedata
import uuid
from pathlib import Path

import pyarrow as pa

from pipeline.embeddings_dataset.columns import plain_values
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN
from pipeline.errors import InputError
from pipeline.files.column_types import plain_type, whole_from_floats
from pipeline.files.listing import is_parquet
from pipeline.files.text_tables import read_id_table, reading_text
from pipeline.log import logger

# Byte-order marks stand inside a list that was put together from several; the other is a web page's.
_INVISIBLE = "\ufeff\u200b"
_WHOLE = re.compile(r"(0|-?[1-9][0-9]*)(\.0+)?")


def read_id_list(path: Path, kind: pa.DataType) -> dict[str, list[object]]:
    """Return each id of a list, as text, with the plain values of the dataset's type that it may stand for, the nearest
    first.

    An id that can be none of that type stands for nothing. Raises InputError if the list cannot be read or is empty, or
    an id may be another one that was rounded.
    """
    is_exact, is_table = is_parquet(path), is_parquet(path) or path.suffix.lower() in (".csv", ".tsv")
    if is_table:
        remedy = f"name the column of ids {ID_COLUMN}, and no other"
        chunks = read_id_table(path, [ID_COLUMN], remedy, short_rows=True).column(0).chunks
    else:
        chunks = [pa.array(_read_lines(path), pa.string())]
    listed: dict[str, list[object]] = {}
    num_holes = 0
    for chunk in chunks:
        for scalar, value in zip(chunk, plain_values(chunk), strict=True):
            if not scalar.is_valid or not (is_exact or str(value).strip()):
                num_holes += 1
                continue
            text = value if isinstance(value, str) else describe_id(scalar)
            values = [value] if is_exact and chunk.type == kind else _values_of(text, kind, path)
            if listed.setdefault(text, values) != values:  # nanoseconds and control characters read like others
                listed[f"{text} ({values[0]!r})"] = values
    if not listed:
        raise InputError(f"{path}: holds no ids")
    if num_holes and is_table:
        logger.warning("%s: %d rows without an id are passed over", path, num_holes)
    return listed


def _read_lines(path: Path) -> list[str]:
    """Return the lines: only a line feed ends one, as ids may hold the others, unless there is none in the list."""
    with reading_text(path) as file:
        content = file.read()
    if "\n" not in content:
        return content.split("\r")
    return [line.removesuffix("\r") for line in content.split("\n")]


def _values_of(text: str, kind: pa.DataType, path: Path) -> list[object]:
    """Return the values of a type that a listed text may stand for: as it is, without blanks or quotes around it.

    Text is taken composed and decomposed, as file names come in both; binary ids as UTF-8, 0x... or a UUID.
    """
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    bare = text.strip().strip(_INVISIBLE).strip()
    unquoted = bare[1:-1].replace('""', '"') if len(bare) > 1 and bare[0] == bare[-1] == '"' else bare
    forms = list(dict.fromkeys((text, bare, unquoted)))
    if plain_type(kind) == pa.string():
        composed = [unicodedata.normalize(how, form) for form in forms for how in ("NFC", "NFD")]
        return list(dict.fromkeys([*forms, *composed]))
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return [value for form in forms for value in _bytes_of(form)]
    whole = _WHOLE.fullmatch(bare) or _WHOLE.fullmatch(unquoted)
    if pa.types.is_integer(kind):  # 007 is none, 7.0 comes from pandas
        if whole and whole[2]:
            whole_from_floats(pa.array([float(whole[0])]), ID_COLUMN, path)
        bare = unquoted = whole[1] if whole else ""
    for form in (bare, unquoted):
        with contextlib.suppress(pa.ArrowException, ValueError):
            return plain_values(pa.array([form], pa.string()).cast(kind))
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
