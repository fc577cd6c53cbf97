"""Check where an output is to go: it replaces only what the same tool wrote, and stays out of datasets."""

from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import ConfigError, InputError
from pipeline.files.tables import read_provenance
from pipeline.workspace import open_without_waiting, read_json_object

_LOOKED_AT = 2**20  # bytes in which a mark stands, unless the file is a parquet


def page_mark(tool: str) -> str:
    """Return the line in a page's head, by which the tool that wrote it may replace it."""
    return f'<meta name="generator" content="{tool}">'


def check_replaceable(path: Path, mark: str | bytes, inputs: Iterable[Path | None] = ()) -> None:
    """Raise ConfigError unless `path` is free, or holds a file that carries the tool's mark, and is no input.

    The mark of a parquet is the stage in its provenance; other files contain theirs.
    """
    if any(one is not None and one.resolve() == path.resolve() for one in inputs):
        raise ConfigError(f"{path}: an input, which the output would replace: give another path for the output")
    if path.exists() and not (path.is_file() and carries(path, mark)):
        raise ConfigError(f"{path}: not written by this tool, so it stays: give another path for the output")


def carries(path: Path, mark: str | bytes) -> bool:
    try:
        with open_without_waiting(path) as file:
            start = file.read(_LOOKED_AT)
        if start.startswith(b"PAR1"):
            return (read_provenance(path) or {}).get("stage") == mark
    except (OSError, InputError):
        return False
    return (mark.encode() if isinstance(mark, str) else mark) in start


def check_outside_datasets(path: Path) -> None:
    """Raise ConfigError if `path` lies in an embeddings dataset, where a takedown would take it for another's."""
    for folder in path.resolve().parents:
        if is_dataset(folder):
            raise ConfigError(f"{path}: {folder} is an embeddings dataset: give another path for the output")


def is_dataset(folder: Path) -> bool:
    """Return whether a folder holds an embeddings dataset, begun or complete."""
    has_state = "embedding_version" in read_json_object(folder / "state.json")
    return has_state or ((folder / "parts").is_dir() and (folder / "_rejects").is_dir())
