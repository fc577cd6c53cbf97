"""Stream the images to package in a fixed order: from a folder, a CSV, tars or parquets."""

import itertools
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.embeddings_dataset.packaged_input import (
    FILE_KINDS,
    ID_COLUMN,
    IMAGE_COLUMN,
    IMAGE_SUFFIXES,
    PARQUETS,
    PHOTOGRAPHS,
    TARS,
    InputOptions,
    list_data,
    open_input,
    read_batches,
)
from pipeline.errors import InputError, Rejection, catch_rejection, one_line
from pipeline.files.archive import MAX_IMAGE_BYTES, Member, stream_members
from pipeline.files.identity import hash_json, identify, look_at
from pipeline.files.text_tables import read_csv, whole_or_text
from pipeline.ids import decode_name, reject_repeated
from pipeline.inference.images import check_image
from pipeline.workspace import open_without_waiting

PATH_COLUMN = "path"
# Rows of a parquet that are read at once: each may be a picture of MAX_IMAGE_BYTES, and Arrow takes thrice their bytes.
READ_ROWS = 1


@dataclass
class SourceImage:
    """One image to package: its row without the bytes, its name for people, and the size of its bytes.

    An image in a file of its own is read by `try_image`; `seen` tells how the file looked before.
    """

    row: dict[str, Any]
    name: str
    size: int
    path: Path | None = None
    seen: list[int] | None = None
    data: bytes | None = None
    rejection: Rejection | None = None


@dataclass(frozen=True)
class ImageSource:
    """Images in a fixed order; `inputs` identify the list of them, `num_images` is None if it is unknown.

    `stream` yields them from number `start` on. Where they have no files of their own `seen` tells their state: the
    times of tars, the footers of parquets.
    """

    fields: tuple[pa.Field, ...]  # OSMID and the columns that are kept
    inputs: list[dict[str, Any]]
    num_images: int | None
    stream: Callable[[int], Iterator[SourceImage]]
    seen: str = ""


def open_source(options: InputOptions) -> ImageSource:
    """Open a folder with photographs, tars or parquets, a CSV, a tar or a parquet.

    Raises InputError where it is none of these, or cannot be read.
    """
    path = options.input
    if not path.exists():
        raise InputError(f"{path}: no such file or folder: correct --input")
    is_folder, suffix = path.is_dir(), path.suffix.lower()
    kind, names = list_data(path) if is_folder else (FILE_KINDS.get(suffix, ""), [path.name])
    folder = path if is_folder else path.parent
    if kind == PARQUETS:
        return _open_parquets(options)
    if options != InputOptions(input=path):
        raise InputError(f"{path}: --id-column, --image-column and --keep-columns belong to an --input of parquets")
    if kind == TARS:
        return _open_tars(folder, names)
    if kind == PHOTOGRAPHS and is_folder:
        ids = list(map(decode_name, names))
        if len(set(ids)) < len(ids):  # a byte that is no UTF-8, and its escape written out
            twice = next(one for one, other in itertools.pairwise(ids) if one == other)
            raise InputError(f"{path}: two photographs have the id {twice}: rename one")
        inputs = [{"name": folder.name, "size": len(names), "hash": hash_json(ids)}]
        return _list_files(folder, names, pa.table([pa.array(ids, pa.string())], [ID_COLUMN]), inputs)
    if suffix == ".csv" and not is_folder:
        return _open_csv(path)
    what = "holds neither photographs nor tars nor parquets" if is_folder else "neither .csv, .tar nor .parquet"
    raise InputError(f"{path}: {what}: correct --input")


def _list_files(folder: Path, names: Sequence[str], table: pa.Table, inputs: list[dict[str, Any]]) -> ImageSource:
    def stream(start: int) -> Iterator[SourceImage]:
        batches = table.slice(start).to_batches(1000)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        for row, name in zip(rows, itertools.islice(names, start, None), strict=True):
            path = folder / name
            seen = look_at(path)
            yield SourceImage(row, decode_name(name), seen[0] if seen else 0, path, seen)

    return ImageSource(tuple(table.schema), inputs, table.num_rows, stream)


def try_image(image: SourceImage) -> SourceImage:
    """Read an image if need be, and see whether it can be decoded."""
    outcome = catch_rejection(_read_and_check, image)
    if outcome is not None:
        image.rejection, image.data = outcome, None
    return image


def _read_and_check(image: SourceImage) -> None:
    if image.path is not None:
        image.data = read_file(image.path)
    if image.rejection is None:
        _check_size(image.size)
        check_image(image.data or b"")


def read_file(path: Path) -> bytes:
    """Return the bytes of an image file.

    Raises Rejection `missing_image` where there is no such file or it cannot be read, `image_too_large` for one that
    no camera makes.
    """
    try:
        with open_without_waiting(path) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            _check_size(num_bytes)
            return file.read(num_bytes + 1)
    except (OSError, ValueError) as error:  # the second for a zero byte
        raise Rejection("missing_image", getattr(error, "strerror", None) or one_line(error)) from None


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_IMAGE_BYTES:
        raise Rejection("image_too_large", f"{num_bytes} bytes, at most {MAX_IMAGE_BYTES} are read")


def _open_csv(path: Path) -> ImageSource:
    identity = identify(path)
    remedy = "its first line names OSMID, path and what to keep, each once"
    texts = read_csv(path, [ID_COLUMN, PATH_COLUMN], remedy, others=True)
    if not texts.num_rows:
        raise InputError(f"{path}: holds no rows: correct --input")
    columns = {name: whole_or_text(texts[name]) for name in texts.column_names if name != PATH_COLUMN}
    names = texts[PATH_COLUMN].to_pylist()
    return _list_files(path.parent, names, pa.table(columns | {PATH_COLUMN: texts[PATH_COLUMN]}), [identity])


def _open_tars(folder: Path, names: Sequence[str]) -> ImageSource:
    def cut(name: str) -> str:
        return decode_name(name.rpartition(".")[0])

    def stream_all() -> Iterator[SourceImage]:
        for prefix, same in itertools.groupby(sorted(names, key=cut), cut):
            firsts: dict[Hashable, str] = {}
            for tar_name in same:
                for member in filter(_is_image, stream_members(folder / tar_name)):
                    name = f"{prefix}/{member.name}"
                    rejection = reject_repeated(name, f"{decode_name(tar_name)}/{member.name}", firsts)
                    if not member.is_file:
                        rejection = Rejection("missing_image", "a link or device, which is not followed")
                    data = member.read() if rejection is None else None
                    yield SourceImage({ID_COLUMN: name}, name, member.size, data=data, rejection=rejection)

    looks = [look_at(folder / name) or [0, 0] for name in names]
    inputs = [{"name": decode_name(name), "size": size} for name, (size, _) in zip(names, looks, strict=True)]
    return ImageSource(
        (pa.field(ID_COLUMN, pa.string()),), inputs, None,
        lambda start: itertools.islice(stream_all(), start, None), hash_json(looks),
    )  # fmt: skip


def _is_image(member: Member) -> bool:
    hidden = member.name.rpartition("/")[2].startswith(".")
    return member.name.lower().endswith(IMAGE_SUFFIXES) and not member.isdir() and not hidden


def _open_parquets(options: InputOptions) -> ImageSource:
    source = open_input(replace(options, read_batch_size=READ_ROWS))
    groups = range(len(source.row_group_rows))
    columns = [ID_COLUMN, *options.keep_columns]

    def stream_all() -> Iterator[SourceImage]:
        for table in itertools.chain.from_iterable(read_batches(source, group) for group in groups):
            wanted = source.wanted_rows(table).tolist()
            for number, row in enumerate(table.select(columns).to_pylist()):
                data = table[IMAGE_COLUMN][number].as_py() if number in wanted else None
                rejection = None if data else Rejection("missing_image", "no bytes, or is_valid is false")
                yield SourceImage(row, str(row[ID_COLUMN]), len(data or b""), data=data or None, rejection=rejection)

    sample = next(table for group in groups for table in read_batches(source, group))
    described = hash_json([source.fingerprint, options.id_column, options.image_column, columns])
    inputs = [{"name": source.path.name, "size": source.size, "hash": described}]
    return ImageSource(
        tuple(sample.schema.field(name) for name in columns), inputs, source.num_rows,
        lambda start: itertools.islice(stream_all(), start, None), described,
    )  # fmt: skip
