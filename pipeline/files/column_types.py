"""Read columns of all types that mean the same as one: text, whole numbers, floats, and ids made from other columns."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError, one_line
from pipeline.log import logger


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type under which a column is read: text is string, whole numbers are int64, floats are float64."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view":
        return pa.string()
    if pa.types.is_integer(kind):
        return pa.int64()
    return pa.float64() if pa.types.is_floating(kind) else kind


def is_list_of(kind: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether a type is one of lists, of one length or not, whose values are read as `wanted` (see `plain_type`)."""
    is_list = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return bool(is_list and plain_type(kind.value_type) == wanted)


def whole_from_floats(
    column: pa.Array | pa.ChunkedArray, name: str, place: Path | str, *, quiet: bool = False
) -> pa.Array | pa.ChunkedArray:
    """Return ids that are floats as int64, other ids unchanged: with one id missing pandas makes floats of them all.

    NaN becomes null. Raises InputError where an id is not whole, or so large that several may have become one.
    """
    if plain_type(column.type) != pa.float64():
        return column
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    values = np.asarray(column)
    present = ~np.isnan(values)
    limit = 2.0 ** (np.finfo(values.dtype).nmant + 1)  # 2^53 for doubles
    rounded = present & ~((np.abs(values) < limit) & (values == np.floor(values)))
    if rounded.any():
        raise InputError(
            f"{place}: column {name} holds ids as floats, such as {float(values[rounded][0])!r}, in which two ids may "
            "have become one: write them anew as text or as int64 (in pandas read them with dtype=str or dtype='Int64')"
        )
    if not quiet:
        logger.warning("%s: column %s holds floats, which are all whole: taken as whole numbers", place, name)
    return pa.array(np.where(present, values, 0).astype(np.int64), mask=~present)


def convert(path: Path, column: Any, field: pa.Field) -> Any:
    """Return a column in a field's type (see `whole_from_floats`); raise InputError if a value does not fit."""
    if field.type == pa.int64():
        column = whole_from_floats(column, field.name, path, quiet=True)
    try:
        return column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        problem = f"{column.type} where {field.type} is expected ({one_line(error)[:200]})"
        raise InputError(f"{path}: column {field.name} holds {problem}: make the file again") from None


def convert_table(path: Path, table: pa.Table, fields: Iterable[pa.Field]) -> pa.Table:
    """Return a table with these fields' types, and other columns in their plain types."""
    types = {field.name: field.type for field in fields}
    schema = pa.schema([(field.name, types.get(field.name, plain_type(field.type))) for field in table.schema])
    return pa.table([convert(path, table[field.name], field) for field in schema], schema=schema)


def check_columns(path: Path, schema: pa.Schema, required: Iterable[pa.Field] | pa.Schema) -> None:
    """Raise InputError naming every required column that is missing, or of a type that is not taken."""
    problems = []
    for field in required:
        index = schema.get_field_index(field.name)
        if index < 0:
            problems.append(f"column {field.name} is missing")
            continue
        if pa.types.is_list(field.type) and is_list_of(schema.field(index).type, field.type.value_type):
            continue
        kinds = {plain_type(schema.field(index).type), field.type}
        if len(kinds) > 1 and kinds != {pa.int64(), pa.float64()}:
            problems.append(f"column {field.name} is {schema.field(index).type}, expected {field.type}")
    if problems:
        raise InputError(f"{path}: {', '.join(problems)}: make the file again with the stage that writes it")


# Ids that files of another program may lack, and the columns that each is made from (see pipeline/ids.py).
_SOURCES = {
    "dataset_id": [pa.field("tar_file", pa.string())],
    "building_id": [pa.field("dataset_id", pa.int64()), pa.field("target_id", pa.int64())],
    "streetview_image_id": [pa.field("dataset_id", pa.int64()), pa.field("patch_id", pa.int64())],
}


def stored_fields(schema: pa.Schema, fields: Iterable[pa.Field]) -> list[pa.Field]:
    """Return the fields to read from a file: in place of an id that it lacks, the columns that it is made from."""
    found: dict[str, pa.Field] = {}
    for field in fields:
        sources = [field] if field.name in schema.names else stored_fields(schema, _SOURCES.get(field.name, []))
        is_made = sources and all(source.name in schema.names for source in sources)
        for source in sources if is_made else [field]:
            found.setdefault(source.name, source)
    return list(found.values())


def fill_composite_ids(table: pa.Table) -> pa.Table:
    """Add the ids that a table lacks and has the columns of; a null number, or a tar of another name, gives a null."""
    for name, sources in _SOURCES.items():
        if name in table.column_names or not {source.name for source in sources} <= set(table.column_names):
            continue
        first = table[sources[0].name].cast(pa.string())
        if name == "dataset_id":
            ids = pc.struct_field(pc.extract_regex(first, r"(?:^|[/\\])(?P<id>\d+)\.tar$"), 0).cast(pa.int64())
        else:
            second = table[sources[1].name].cast(pa.string())
            ids = pc.binary_join_element_wise(pc.utf8_lpad(first, 4, "0"), second, "_")
        table = table.append_column(name, ids)
    return table
