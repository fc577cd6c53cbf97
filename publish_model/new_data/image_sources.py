"""Stream the images to package in a fixed order: from a folder, a CSV or tars."""

import itertools
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
from pipeline.files.text_tables import read_csv, whole_or_text
from pipeline.ids import decode_name

PATH_COLUMN = "path"


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
    """Open a CSV; each column is int64 if its values are whole numbers written as such, else text as it stands."""
    identity = identify(path)
    remedy = "its first line names OSMID, path and what to keep, each column once"
    texts = read_csv(path, [ID_COLUMN, PATH_COLUMN], remedy, others=True)
    for name in (IMAGE_COLUMN, VALID_COLUMN, "embedding"):
        if name in texts.column_names:
            raise InputError(f"{path}: column {name} has the name of one that is made here: give it another name")
    if not texts.num_rows:
        raise InputError(f"{path}: holds no rows: correct --input")
    names = texts.column_names
    columns = {name: texts[name] if name == PATH_COLUMN else whole_or_text(texts[name]) for name in names}
    table = pa.table(columns)

    def stream(start: int) -> Iterator[SourceImage]:
        for batch in table.slice(start).to_batches(1000):
            for row in batch.to_pylist():
                name = row[PATH_COLUMN]
                yield SourceImage(row, name, partial(_read_named, path.parent, name))

    return ImageSource(tuple(table.schema), [identity], table.num_rows, stream)


def _read_named(folder: Path, name: str) -> bytes:
    if not name:
        raise Rejection("missing_image", "no path is given")
    if "\0" in name:
        raise Rejection("missing_image", "no path can hold a zero byte")
    return read_file(folder / name)


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
