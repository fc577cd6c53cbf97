"""Say why a file could not be read or written; only one whose content is damaged may be replaced."""

import os
from pathlib import Path

import pyarrow as pa

from pipeline.errors import DamagedError, InputError, PipelineError, one_line


def read_failure(path: Path, error: BaseException, damage: str = "damaged") -> InputError:
    """Say why a parquet could not be read, and what to do: a DamagedError only where its content is to blame.

    An OSError with a number is the system's (rights, too many open files, a disk that fails), Arrow's own have none.
    """
    text = one_line(error)[:200]
    if isinstance(error, FileNotFoundError):
        what = "no such file: run the stage that writes it, or correct the path"
    elif path.is_dir():
        what = "a folder, not a parquet file: correct the path"
    elif isinstance(error, OSError) and error.errno is not None:
        what = f"cannot be read ({os.strerror(error.errno)}): put that right, then run this again"
    elif isinstance(error, MemoryError):
        what = f"not enough memory to read it ({text}): free some, then run this again"
    elif isinstance(error, pa.ArrowNotImplementedError):
        what = f"holds a type that cannot be read here ({text}): write it in another type"
    elif "encrypted" in text:  # Arrow has no class of its own for it
        what = f"is encrypted ({text}): write it without encryption"
    elif isinstance(error, UnicodeDecodeError):
        return DamagedError(f"{path}: a column's name or text is not UTF-8 ({text}): write it again in UTF-8")
    else:
        return DamagedError(f"{path}: {damage} ({text}): remove it and make it again")
    return InputError(f"{path}: {what}")


def write_failure(path: Path, error: OSError) -> PipelineError:
    """Say in one line why `path` could not be written and what to do."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return PipelineError(f"cannot write {path} ({reason}): free space or allow writing there, then run this again")
