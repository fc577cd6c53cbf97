"""Read packaged images in read batches, in bounded memory: parquets of image bytes and ids, or photographs."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.embeddings_dataset.columns import take_rows
from pipeline.errors import DamagedError, InputError, one_line
from pipeline.files.listing import is_parquet, walk_files, warn_of_others
from pipeline.files.tables import BUFFER_BYTES, UNMAPPED_KEY, hash_footer, hash_json, open_parquet, read_failure
from pipeline.ids import decode_name
from pipeline.log import logger

ID_COLUMN, IMAGE_COLUMN, VALID_COLUMN = "OSMID", "image_bytes", "is_valid"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Photographs of one row group, which is what `--shard` deals out.
IMAGES_PER_GROUP = 1000
ImageFile = tuple[str, int]  # path below the folder, bytes


@dataclass(frozen=True)
class PackagedInput:
    """Packaged images and how they are read, identified by content (size, schema and footers) and never by path.

    `places` holds the file of each row group and its number there; a folder of photographs has `images` instead.
    `filter_valid` leaves out the rows whose `is_valid` is false; a read batch has `read_batch_size` rows.
    """

    path: Path
    size: int
    schema: pa.Schema
    fingerprint: str
    row_group_rows: tuple[int, ...]
    places: tuple[tuple[Path, int], ...] = ()
    images: tuple[ImageFile, ...] = ()
    filter_valid: bool = True
    read_batch_size: int = 1000
    keep_columns: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows of the whole input."""
        return sum(self.row_group_rows)

    def wanted_rows(self, table: pa.Table) -> NDArray[np.int64]:
        """Return which rows of a read batch are to be embedded."""
        return np.flatnonzero(valid_rows(table)) if self.filter_valid else np.arange(table.num_rows)

    def embedded_rows(self, table: pa.Table, first_row: int, rejects: pa.Table) -> NDArray[np.int64]:
        """Return which rows of a read batch have an embedding, in order: those neither skipped nor rejected."""
        return np.setdiff1d(self.wanted_rows(table), rejects.column("row").to_numpy() - first_row)

    def carry_columns(self, embedded: pa.Table, table: pa.Table, rows: NDArray[np.int64]) -> pa.Table:
        """Add the kept columns to a part's embeddings, from these rows of its read batch."""
        for name in self.keep_columns:
            column = table.column(name).combine_chunks()
            embedded = embedded.append_column(table.schema.field(name), take_rows(column, rows))
        return embedded


# ------------------------------------------------------------------------------------------------ opening


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """Where packaged images lie and how they are read, see `PackagedInput`."""

    input: Path
    filter_valid: bool = True
    read_batch_size: int = 1000
    keep_columns: Sequence[str] = ()


def open_input(options: InputOptions) -> PackagedInput:
    """Open the input that options name; see `open_packaged`."""
    return open_packaged(
        options.input,
        filter_valid=options.filter_valid,
        read_batch_size=options.read_batch_size,
        keep_columns=options.keep_columns,
    )


def open_packaged(
    path: Path, *, filter_valid: bool = True, read_batch_size: int = 1000, keep_columns: Sequence[str] = ()
) -> PackagedInput:
    """Read the footers of a packaged parquet or of a folder of them, or list a folder of photographs.

    Raises InputError naming the file if it is missing, damaged, empty, or a column is missing or of a wrong type.
    """
    paths = _list_parquets(path) if path.is_dir() else [path]
    source = _open_parquets(path, paths, filter_valid, keep_columns) if paths else _open_photographs(path, keep_columns)
    return replace(source, filter_valid=filter_valid, read_batch_size=read_batch_size, keep_columns=tuple(keep_columns))


def _open_parquets(path: Path, paths: list[Path], filter_valid: bool, keep_columns: Sequence[str]) -> PackagedInput:
    schemas, rows, places, footers = [], [], [], []
    for file_path in paths:
        with open_parquet(file_path) as file:
            metadata, schema = file.metadata, file.schema_arrow
        footers.append(hash_footer(file_path))
        _check_columns(file_path, schema, filter_valid, keep_columns)
        if UNMAPPED_KEY in (metadata.metadata or {}):
            _check_mapped(file_path, schema, [ID_COLUMN, *keep_columns])
        schemas.append(schema)
        rows += [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        places += [(file_path, index) for index in range(metadata.num_row_groups)]
    if not sum(rows):
        raise InputError(f"{path}: holds no rows: package images first, or correct the path")
    used = [ID_COLUMN, IMAGE_COLUMN, *([VALID_COLUMN] if filter_valid else []), *keep_columns]
    for file_path, schema in zip(paths, schemas, strict=True):
        for name in used:
            types = [str(one.field(name).type) if name in one.names else "missing" for one in (schema, schemas[0])]
            if types[0] != types[1]:
                raise InputError(
                    f"{file_path}: column {name} is {types[0]}, in {paths[0].name} it is {types[1]}: package all files "
                    "in the same way"
                )
    size = sum(file_path.stat().st_size for file_path in paths)
    fingerprint = footers[0] if path.is_file() else hash_json(footers)
    return PackagedInput(path, size, schemas[0], fingerprint, tuple(rows), tuple(places))


def _list_parquets(folder: Path) -> list[Path]:
    """Return the parquets below a folder by path, without temporary and side tables, and count the other files."""
    files = [Path(entry.path) for entry in walk_files(folder, hidden=(".", "_"))]
    paths = sorted(path for path in files if is_parquet(path))
    if paths:
        warn_of_others(folder, (str(path.relative_to(folder)) for path in set(files) - set(paths)), "parquet files")
    return paths


def _open_photographs(folder: Path, keep_columns: Sequence[str]) -> PackagedInput:
    images = list_images(folder)
    if not images:
        raise InputError(f"{folder}: holds neither parquet files nor photographs: correct the path")
    if keep_columns:
        raise InputError(f"{folder}: photographs have no columns to keep: leave out --keep-columns")
    rows = [min(IMAGES_PER_GROUP, len(images) - start) for start in range(0, len(images), IMAGES_PER_GROUP)]
    schema = pa.schema([(ID_COLUMN, pa.string()), (IMAGE_COLUMN, pa.large_binary())])
    listed = [[decode_name(name), size] for name, size in images]
    size = sum(size for _, size in images)
    return PackagedInput(folder, size, schema, hash_json(listed), tuple(rows), images=tuple(images))


def list_images(folder: Path) -> list[ImageFile]:
    """Return the photographs below a folder by path, with their sizes, and count the other files in the log.

    Links to folders are followed; links to files and names that begin with a dot are passed over. Raises InputError if
    a folder cannot be read.
    """
    found, others, num_links = [], [], 0
    for entry in walk_files(folder):
        name = os.path.relpath(entry.path, folder).replace(os.sep, "/")
        if not name.lower().endswith(IMAGE_SUFFIXES) or not (entry.is_symlink() or entry.is_file()):
            others.append(name)  # reading a pipe would never end
        elif entry.is_symlink():  # nothing outside the folders that are named is opened
            num_links += 1
        else:
            found.append((name, entry.stat().st_size))
    if num_links:
        logger.warning("%s: %d links are passed over: copy the files there", folder, num_links)
    warn_of_others(folder, map(decode_name, others), "photographs")
    return sorted(found, key=lambda image: decode_name(image[0]))


def _check_columns(path: Path, schema: pa.Schema, filter_valid: bool, keep_columns: Sequence[str]) -> None:
    """Raise one InputError that names every column which cannot be used."""
    problems = []
    for name, accepts, expected in (
        (ID_COLUMN, lambda kind: not (pa.types.is_nested(kind) or pa.types.is_union(kind)), "a scalar type"),
        (IMAGE_COLUMN, _is_binary, "binary"),
        # A column of nulls alone has no type.
        (VALID_COLUMN, lambda kind: pa.types.is_boolean(kind) or pa.types.is_null(kind), "bool"),
    ):
        count = len(schema.get_all_field_indices(name))
        if name == VALID_COLUMN and (not filter_valid or count == 0):
            continue
        if count != 1:
            problems.append(f"column {name} is missing" if count == 0 else f"column {name} is there {count} times")
        elif not accepts(schema.field(name).type):
            problems.append(f"column {name} is {schema.field(name).type}, expected {expected}")
    for name in keep_columns:
        count = len(schema.get_all_field_indices(name))
        if count != 1:
            problems.append(f"column {name} of --keep-columns is there {count} times")
    if problems:
        raise InputError(f"{path}: {', '.join(problems)}: package the images again, or correct the path")


def _is_binary(kind: pa.DataType) -> bool:
    # binary_view is younger than the oldest pyarrow that is supported.
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or str(kind) == "binary_view")


def _check_mapped(path: Path, schema: pa.Schema, names: Sequence[str]) -> None:
    """Raise InputError for a used column whose type this Arrow may not know, such as Int128."""
    for name in names:
        if "fixed_size_binary" in str(schema.field(name).type):
            raise InputError(f"{path}: column {name} is of a type that cannot be read here: write it in another type")


# ------------------------------------------------------------------------------------------------ reading


def read_batches(source: PackagedInput, row_group: int, *, with_images: bool = True) -> Iterator[pa.Table]:
    """Yield the rows of one row group in read batches, the last one shorter.

    Without images this takes seconds for millions of rows. Raises InputError if a file cannot be read.
    """
    if source.images:
        yield from _read_photographs(source, row_group, with_images)
        return
    batch_rows = source.read_batch_size
    columns = [ID_COLUMN, *([IMAGE_COLUMN] if with_images else []), *source.keep_columns]
    if source.filter_valid and VALID_COLUMN in source.schema.names and VALID_COLUMN not in columns:
        columns.append(VALID_COLUMN)
    path, own_group = source.places[row_group]
    held: pa.Table | None = None
    try:
        # Without a buffer pyarrow reads a row group's whole column chunk, and a row group may hold 10^6 images.
        with open_parquet(path, BUFFER_BYTES) as file:
            # A batch ends early where Arrow's 2 GiB of bytes a chunk are full, so batches are put together here.
            for batch in file.iter_batches(batch_rows, row_groups=[own_group], columns=columns):
                table = pa.Table.from_batches([batch])
                _check_text(path, table)
                held = table if held is None else pa.concat_tables([held, table])
                while held.num_rows >= batch_rows:
                    yield held.slice(0, batch_rows)
                    held = held.slice(batch_rows)
    except (pa.ArrowException, OSError) as error:
        if "UTF8" in str(error):  # Arrow checks a dictionary's text itself
            raise _not_text(path, f"one of {', '.join(columns)}", error) from None
        failure = read_failure(path, error)
        if isinstance(failure, DamagedError):
            what = f"row group {own_group} cannot be read ({one_line(error)[:200]})"
            failure = DamagedError(f"{path}: {what}: fetch the file again")
        raise failure from None
    if held is not None and held.num_rows:
        yield held


def _check_text(path: Path, table: pa.Table) -> None:
    for name in table.column_names:
        if name != IMAGE_COLUMN:
            try:
                table.column(name).validate(full=True)
            except pa.ArrowInvalid as error:
                raise _not_text(path, name, error) from None


def _not_text(path: Path, name: str, error: BaseException) -> InputError:
    return InputError(
        f"{path}: column {name}: text that is not UTF-8 ({one_line(error)[:200]}): write it in UTF-8, or as binary"
    )


def _read_photographs(source: PackagedInput, row_group: int, with_images: bool) -> Iterator[pa.Table]:
    """Yield photographs as packaged rows; a file that cannot be read any more has null bytes."""
    first, num_rows = row_group * IMAGES_PER_GROUP, source.row_group_rows[row_group]
    for start in range(0, num_rows, source.read_batch_size):
        end = min(start + source.read_batch_size, num_rows)
        names = [name for name, _ in source.images[first + start : first + end]]
        table = pa.table({ID_COLUMN: pa.array([decode_name(name) for name in names], pa.string())})
        if with_images:
            images = [_read_bytes(source.path / name) for name in names]
            table = table.append_column(IMAGE_COLUMN, pa.array(images, pa.large_binary()))
        yield table


def _read_bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def list_pictures(source: PackagedInput) -> Iterator[bytes]:
    """Yield the encoded pictures that are to be embedded, from the first one on."""
    for row_group in range(len(source.row_group_rows)):
        for table in read_batches(source, row_group):
            images = table.column(IMAGE_COLUMN)
            yield from (data for row in source.wanted_rows(table) if (data := images[int(row)].as_py()))


def valid_rows(table: pa.Table) -> NDArray[np.bool_]:
    """Return which rows are to be embedded, (N,); a null `is_valid` counts as true."""
    if VALID_COLUMN not in table.column_names:
        return np.ones(table.num_rows, dtype=bool)
    column = table.column(VALID_COLUMN).cast(pa.bool_()).fill_null(True)
    return np.asarray(column.to_numpy(), dtype=bool)
