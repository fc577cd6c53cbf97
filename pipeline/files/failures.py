"""Tell a file whose content is damaged from one that only could not be read now: the first alone may be replaced."""

from pathlib import Path

import pyarrow as pa

from pipeline.errors import DamagedError, InputError, one_line

_MAKE_AGAIN = "remove it and make it again"


def read_failure(path: Path, error: BaseException, damage: str = "damaged") -> InputError:
    """Say why a parquet could not be read, and what to do: a DamagedError only where its content is to blame.

    An OSError with a number is the system's (rights, too many open files, a disk that fails), Arrow's own have none.
    """
    text = one_line(error)[:200]
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: no such file: run the stage that writes it, or correct the path")
    if isinstance(error, OSError) and error.errno is not None:
        return InputError(f"{path}: cannot be read ({error.strerror or text}): put that right, then run this again")
    if isinstance(error, MemoryError):
        return InputError(f"{path}: not enough memory to read it ({text}): free some, then run this again")
    if isinstance(error, pa.ArrowNotImplementedError):
        return InputError(f"{path}: holds a type that cannot be read here ({text}): write it in another type")
    if isinstance(error, UnicodeDecodeError):
        return DamagedError(f"{path}: a column's name or text is not UTF-8 ({text}): write it again in UTF-8")
    return DamagedError(f"{path}: {damage} ({text}): {_MAKE_AGAIN}")
