"""Read ids from the CSVs, lists and parquets of other programs: text stays as it stands, and an id is never a float."""

import contextlib
import csv
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError, one_line, unreadable
from pipeline.files.column_types import whole_from_floats
from pipeline.files.listing import is_parquet
from pipeline.files.tables import BATCH_BYTES, open_parquet, read_batches, reading, unfolded_bytes
from pipeline.log import logger

_ROWS_AT_A_TIME = 65_536


@contextmanager
def reading_text(path: Path) -> Iterator[TextIO]:
    """Open a text in UTF-8, with or without a byte-order mark; line ends stay as they are."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as text:
            yield text
    except OSError as error:
        raise unreadable(path, error) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV or text in UTF-8 ({one_line(error)[:200]}): save it as such") from None


def read_csv(path: Path, required: Sequence[str | tuple[str, ...]], remedy: str, *, others: bool = False) -> pa.Table:
    """Return the required columns of a CSV as text, exactly as it stands there; with `others` all columns.

    Commas, semicolons or tabs separate the columns, whichever occurs most in the first line; empty lines are skipped.
    Raises InputError where the file cannot be read, lacks a column, or a row has too few or too many values.
    """
    # pandas fills short rows without a word, and pyarrow takes a quote that is never closed for text.
    csv.field_size_limit(2**31 - 1)  # outlines beside the ids are longer than the 128 KiB of the module's default
    with reading_text(path) as file:
        header = re.sub(r'"[^"]*"', "", file.readline())  # a quoted name may hold any of them
        file.seek(0)
        reader = csv.reader(file, delimiter=max(",;\t", key=header.count), strict=True)
        rows = enumerate(filter(None, reader))
        names = [name.strip() for name in next(rows, (0, list[str]()))[1]]
        wanted = find_columns(path, names, required, remedy)
        if others:
            if len(set(names) - {""}) < len(names):
                raise InputError(f"{path}: its first line has to name each column once, and none blank: correct it")
            wanted += [name for name in names if name not in wanted]
        places = [names.index(name) for name in wanted]
        schema = pa.schema([(name, pa.string()) for name in wanted])
        tables = [schema.empty_table()]
        while chunk := list(itertools.islice(rows, _ROWS_AT_A_TIME)):
            for number, row in chunk:
                if len(row) != len(names):
                    raise InputError(
                        f"{path}: row {number} below the names has {len(row)} values for {len(names)} columns: "
                        "correct it (a comma or a line break in a value needs quotes)"
                    )
            columns = [[row[place] for _, row in chunk] for place in places]
            tables.append(pa.Table.from_arrays([pa.array(one, pa.string()) for one in columns], schema=schema))
    table = pa.concat_tables(tables)
    for name in wanted[: len(required)]:
        if pc.any(pc.match_substring_regex(table[name], r"^-?\d[.,]\d+E\+\d+$"), min_count=0).as_py():
            logger.warning("%s: column %s: 1.23E+18 and the like: a spreadsheet may have made one of two", path, name)
    return table


def read_id_table(path: Path, required: Sequence[str | tuple[str, ...]], remedy: str) -> pa.Table:
    """Return the required columns: of a CSV as text, blank ones null; of a parquet in their types, floats as int64."""
    if not is_parquet(path):
        texts = read_csv(path, required, remedy)
        return pa.table({name: null_blanks(texts[name]) for name in texts.column_names})
    with open_parquet(path) as file:
        names = find_columns(path, file.schema_arrow.names, required, remedy)
        tables, num_bytes = [file.schema_arrow.empty_table().select(names).replace_schema_metadata()], 0
    for batch in read_batches(path, names, _ROWS_AT_A_TIME):
        tables.append(pa.Table.from_batches([batch]))
        if (num_bytes := num_bytes + unfolded_bytes(tables[-1])) > 2 * BATCH_BYTES:
            raise InputError(f"{path}: {sum(map(len, tables))} rows take {num_bytes} bytes of ids: correct it")
    table = pa.concat_tables(tables)
    with reading(path):
        table.validate(full=True)
    return pa.table({name: whole_from_floats(table[name], name, path) for name in names})


def find_columns(path: Path, names: Sequence[str], required: Sequence[str | tuple[str, ...]], remedy: str) -> list[str]:
    """Return the required columns' names, of a tuple of names the first; raise InputError where one is not unique."""
    found = []
    for one in required:
        choice = (one,) if isinstance(one, str) else one
        name = next((name for name in choice if name in names), None)
        if name is None or names.count(name) > 1:
            what = "no" if name is None else "more than one"
            raise InputError(f"{path}: {what} column {name or ' or '.join(choice)}: {remedy}")
        found.append(name)
    return found


def null_blanks(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return a column of text with null where it is empty or white space alone."""
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(column), ""), pa.scalar(None, pa.string()), column)


def whole_or_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column as int64 if each value is written as an int64 prints (not 007, +5, 1.0), else as it stands."""
    column = null_blanks(column)
    if pc.all(pc.match_substring_regex(column, r"^(0|-?[1-9][0-9]{0,18})$"), min_count=0).as_py():
        with contextlib.suppress(pa.ArrowInvalid):  # beyond int64
            return column.cast(pa.int64())
    return column
