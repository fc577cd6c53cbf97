"""Stream the images to package in a fixed order: from a folder, a CSV or tars."""

import itertools
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.embeddings_dataset.packaged_input import (
    ID_COLUMN,
    IMAGE_COLUMN,
    IMAGE_SUFFIXES,
    VALID_COLUMN,
    list_images,
)
from pipeline.errors import InputError, Rejection, one_line
from pipeline.files.archive import MAX_IMAGE_BYTES, Member, stream_members
from pipeline.files.listing import list_files
from pipeline.files.tables import hash_json, identify
from pipeline.ids import decode_name
from publish_model.new_data.csv_rows import is_whole, read_rows

PATH_COLUMN = "path"
_DECIMAL = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
# Columns of a CSV get the first type that fits every value; 007, 1_000 and nan stay text.
_TYPES: tuple[tuple[pa.DataType, Callable[[str], object], Callable[[str], Any]], ...] = (
    (pa.int64(), is_whole, int),
    (pa.float64(), _DECIMAL.fullmatch, float),
    (pa.string(), lambda _: True, str),
)
_TEXT = len(_TYPES) - 1


@dataclass(frozen=True)
class SourceImage:
    """One image to package: its row without the bytes, and its name for people; `read` raises Rejection."""

    row: dict[str, Any]
    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class ImageSource:
    """Images in a fixed order; `inputs` identify them by content, `num_images` is None if it is unknown."""

    fields: tuple[pa.Field, ...]  # OSMID and the columns that are kept
    inputs: list[dict[str, Any]]
    num_images: int | None
    stream: Callable[[int], Iterator[SourceImage]]  # from image number `start` on


def open_source(path: Path) -> ImageSource:
    """Open a folder of photographs or of tars, a CSV, or a tar.

    Raises InputError where it is none of these, or cannot be read.
    """
    if path.is_dir():
        tars = [file for file in list_files(path) if file.suffix.lower() == ".tar"]
        return _open_tars(tars) if tars else _open_folder(path)
    if path.suffix.lower() == ".tar":
        return _open_tars([path])
    if path.suffix.lower() == ".csv":
        return _open_table(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder: correct --input")
    raise InputError(f"{path}: neither a folder, nor a .csv of OSMID and path, nor a .tar: correct --input")


# ------------------------------------------------------------------------------------------------ a folder


def _open_folder(folder: Path) -> ImageSource:
    images = list_images(folder)
    if not images:
        raise InputError(f"{folder}: holds neither photographs nor tars: correct --input")
    names = [name for name, _ in images]

    def stream(start: int) -> Iterator[SourceImage]:
        for name in names[start:]:
            identifier = decode_name(name)
            yield SourceImage({ID_COLUMN: identifier}, identifier, partial(read_file, folder / name))

    listed = hash_json([[decode_name(name), size] for name, size in images])
    inputs = [{"name": folder.name, "size": sum(size for _, size in images), "hash": listed}]
    return ImageSource((pa.field(ID_COLUMN, pa.string()),), inputs, len(images), stream)


def read_file(path: Path) -> bytes:
    """Return the bytes of an image file.

    Raises Rejection `missing_image` where there is no such file or it cannot be read, `image_too_large` for one that
    no camera makes.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for without end
            raise Rejection("missing_image", "not a file")
        check_size(status.st_size)
        return path.read_bytes()
    except OSError as error:
        raise Rejection("missing_image", error.strerror or one_line(error)) from None


def check_size(num_bytes: int) -> None:
    """Raise Rejection `image_too_large` for a file that is not even read."""
    if num_bytes > MAX_IMAGE_BYTES:
        raise Rejection("image_too_large", f"{num_bytes} bytes, at most {MAX_IMAGE_BYTES} are read")


# ------------------------------------------------------------------------------------------------ a CSV


def _open_table(path: Path) -> ImageSource:
    identity = identify(path)
    names = _read_header(path)
    kinds = dict.fromkeys(names, 0)  # index into _TYPES
    count = 0
    for values in _read_records(path, names):
        count += 1
        for name, text in values.items():
            while text and not _TYPES[kinds[name]][1](text):
                kinds[name] += 1
    if not count:
        raise InputError(f"{path}: holds no rows: correct --input")
    kinds[PATH_COLUMN] = _TEXT
    if kinds[ID_COLUMN]:
        kinds[ID_COLUMN] = _TEXT  # 1.1 and 1.10 are two ids
    kept = (ID_COLUMN, *(name for name in names if name != ID_COLUMN))
    parse = {name: _TYPES[kinds[name]][2] for name in names}

    def stream(start: int) -> Iterator[SourceImage]:
        for values in itertools.islice(_read_records(path, names), start, None):
            row = {name: parse[name](text) if text else None for name, text in values.items()}
            yield SourceImage(row, values[PATH_COLUMN], partial(_read_named, path.parent, values[PATH_COLUMN]))

    fields = tuple(pa.field(name, _TYPES[kinds[name]][0]) for name in kept)
    return ImageSource(fields, [identity], count, stream)


def _read_named(folder: Path, name: str) -> bytes:
    if not name:
        raise Rejection("missing_image", "no path is given")
    if "\0" in name:
        raise Rejection("missing_image", "no path can hold a zero byte")
    return read_file(folder / name)


def _read_header(path: Path) -> list[str]:
    names = next(read_rows(path), (0, []))[1]
    for name in (ID_COLUMN, PATH_COLUMN):
        if name not in names:
            raise InputError(f"{path}: column {name} is missing: its first line names OSMID, path and what to keep")
    if len(set(names)) < len(names) or "" in names:
        raise InputError(f"{path}: its first line has to name each column once: correct it")
    for name in (IMAGE_COLUMN, VALID_COLUMN, "embedding"):
        if name in names:
            raise InputError(f"{path}: column {name} has the name of one that is made here: give it another name")
    return names


def _read_records(path: Path, names: Sequence[str]) -> Iterator[dict[str, str]]:
    for number, values in itertools.islice(read_rows(path), 1, None):
        if len(values) != len(names):
            raise InputError(
                f"{path}: line {number} has {len(values)} values for {len(names)} columns: correct it (a comma or a "
                "line break in a value needs quotes)"
            )
        yield dict(zip(names, values, strict=True))


# ------------------------------------------------------------------------------------------------ tars


def _open_tars(tars: Sequence[Path]) -> ImageSource:
    def stream(start: int) -> Iterator[SourceImage]:
        images = ((tar, member) for tar in tars for member in stream_members(tar) if _is_image(member))
        for tar, member in itertools.islice(images, start, None):
            identifier = f"{decode_name(tar.stem)}/{member.name}"
            yield SourceImage({ID_COLUMN: identifier}, identifier, _read_member(member))

    return ImageSource((pa.field(ID_COLUMN, pa.string()),), [identify(tar) for tar in tars], None, stream)


def _is_image(member: Member) -> bool:
    hidden = member.name.rpartition("/")[2].startswith(".")
    return member.name.lower().endswith(IMAGE_SUFFIXES) and not member.is_folder and not hidden


def _read_member(member: Member) -> Callable[[], bytes]:
    """Read a member now, as its tar is read in order; what is wrong with it is raised when it is asked for."""
    data = member.read() if member.is_file and member.size <= MAX_IMAGE_BYTES else b""

    def give() -> bytes:
        if not member.is_file:
            raise Rejection("missing_image", "a link or device, which is not followed")
        check_size(member.size)
        return data

    return give
