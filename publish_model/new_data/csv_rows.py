"""Read text and CSV files as people's programs write them, and tell whole numbers from other text."""

import codecs
import csv
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from pipeline.errors import InputError, one_line

# The longer marks first: UTF-32's begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
# Outlines beside the ids are longer than the 128 KiB that the csv module takes by default.
_MAX_FIELD = 2**31 - 1
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,18}")


@contextmanager
def reading_text(path: Path) -> Iterator[TextIO]:
    """Open a text in UTF-8, or in the encoding that its byte-order mark names; line ends stay as they are.

    Raises InputError where it, or the CSV in it, cannot be read.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")
        with open(path, encoding=encoding, newline="") as text:
            yield text
    except OSError as error:
        problem = error.strerror or one_line(error)
        raise InputError(f"{path}: cannot be read ({problem}): correct the path, or put that right") from None
    except (UnicodeDecodeError, csv.Error) as error:
        kind = "a text" if isinstance(error, UnicodeDecodeError) and path.suffix.lower() == ".txt" else "a CSV"
        raise InputError(f"{path}: not {kind} in UTF-8 ({one_line(error)[:200]}): save it as such") from None


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the records that are not empty, each with the number of its last line; the first has the columns' names.

    Commas, semicolons or tabs separate the columns, whichever occurs most in the first line. Raises InputError where
    the file cannot be read.
    """
    csv.field_size_limit(_MAX_FIELD)
    with reading_text(path) as file:
        header = file.readline()
        file.seek(0)
        reader = csv.reader(file, delimiter=max(",;\t", key=header.count), strict=True)
        first = next((values for values in reader if values), None)
        if first is not None:
            yield reader.line_num, [name.strip() for name in first]
        yield from ((reader.line_num, values) for values in reader if values)


def is_whole(text: str) -> bool:
    """Return whether a text is a whole number that fits int64, written as one: 7, but not 007, 7.0, 1e5 or 1_000."""
    return bool(_WHOLE.fullmatch(text)) and -(2**63) <= int(text) < 2**63
