"""Read packaged images, parquets of image bytes and ids, in read batches and in bounded memory."""

import itertools
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.embeddings_dataset.columns import check_names
from pipeline.errors import InputError, one_line
from pipeline.files.column_types import convert, plain_type, whole_from_floats
from pipeline.files.identity import hash_footer, hash_json
from pipeline.files.listing import PARQUET_SUFFIXES, TAR_SUFFIX, walk_files, warn_of_others
from pipeline.files.tables import (
    BATCH_BYTES,
    BUFFER_BYTES,
    bound_rows,
    open_parquet,
    reading,
    unfolded_bytes,
)
from pipeline.files.text_tables import whole_or_text
from pipeline.ids import decode_name
from pipeline.log import logger

ID_COLUMN, IMAGE_COLUMN, VALID_COLUMN = "OSMID", "image_bytes", "is_valid"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
PARQUETS, PHOTOGRAPHS, TARS = "parquet files", "photographs", "tars"
FILE_KINDS = {
    **dict.fromkeys(PARQUET_SUFFIXES, PARQUETS), **dict.fromkeys(IMAGE_SUFFIXES, PHOTOGRAPHS), TAR_SUFFIX: TARS,
}  # fmt: skip
# Only these tables' own readers know which of their files are live.
_TABLE_FORMATS = {"_delta_log": "Delta", ".hoodie": "Hudi", "metadata/*.metadata.json": "Iceberg"}
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """Where packaged images lie and how they are read.

    `filter_valid` leaves out the rows whose `is_valid` is false; a read batch has `read_batch_size` rows. An image may
    be a struct of `bytes` and `path`, as Hugging Face's datasets have it.
    """

    input: Path
    filter_valid: bool = True
    read_batch_size: int = 1000
    keep_columns: Sequence[str] = ()
    id_column: str = ID_COLUMN
    image_column: str = IMAGE_COLUMN


# The options that shape what is made of an input.
SHAPING_OPTIONS = ("filter_valid", "read_batch_size", "keep_columns", "id_column", "image_column")


@dataclass(frozen=True)
class PackagedInput:
    """Packaged images, identified by content (size, schema and footers) and never by path.

    `places` holds the file of each row group and its number there, `partitions` the kept columns that a file's folders
    name (`year=2020/`).
    """

    path: Path
    options: InputOptions
    size: int
    schema: pa.Schema
    fingerprint: str
    row_group_rows: tuple[int, ...]
    places: tuple[tuple[Path, int], ...] = ()
    partitions: Mapping[Path, Mapping[str, pa.Scalar]] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return sum(self.row_group_rows)

    def wanted_rows(self, table: pa.Table) -> NDArray[np.int64]:
        """Return which rows of a read batch are to be embedded; a null `is_valid` counts as true."""
        if not self.options.filter_valid or VALID_COLUMN not in table.column_names:
            return np.arange(table.num_rows)
        return np.flatnonzero(table[VALID_COLUMN].cast(pa.bool_()).fill_null(True).to_numpy())


# ------------------------------------------------------------------------------------------------ opening


def open_input(options: InputOptions) -> PackagedInput:
    """Read the footers of a packaged parquet or of a folder of them.

    Raises InputError naming the file if it is missing, damaged, empty, or a column is missing or of a wrong type.
    """
    path = options.input
    check_names("--keep-columns", [options.id_column, options.image_column], options.keep_columns)
    kind, names = list_data(path) if path.is_dir() else (PARQUETS, [""])
    if kind != PARQUETS:
        remedy = "package them first, with package_images.py" if names else "correct the path"
        raise InputError(f"{path}: holds {len(names) or 'no'} {kind or PARQUETS}: {remedy}")
    return _open_parquets([path / name for name in names], options)


def list_data(folder: Path) -> tuple[str, list[str]]:
    """Return the kind of the data below a folder and the paths of its files there; count the other files in the log.

    Links to folders are followed; links to photographs and names that begin with a dot are passed over. Raises
    InputError if the folder cannot be read, holds several kinds, or is a table of Delta, Hudi or Iceberg.
    """
    found: dict[str, list[str]] = {kind: [] for kind in (PARQUETS, PHOTOGRAPHS, TARS)}
    others = []
    for path in walk_files(folder):
        name = path.removeprefix(os.path.join(folder, ""))  # noqa: PTH118 (a million of them)
        kind = FILE_KINDS.get(os.path.splitext(name)[1].lower(), "")  # noqa: PTH122
        if kind in ("", PARQUETS) and any(part.startswith("_") for part in name.split("/")):
            continue  # side tables
        mode = os.lstat(path).st_mode if kind == PHOTOGRAPHS else stat.S_IFREG
        if stat.S_ISLNK(mode):  # nothing outside the folders that are named is opened
            others.append(f"{decode_name(name)} (a link)")
        elif kind and stat.S_ISREG(mode):  # reading a pipe would never end
            found[kind].append(name)
        else:
            others.append(decode_name(name))
    kinds = [kind for kind, names in found.items() if names]
    if len(kinds) > 1:
        counts = " and ".join(f"{len(found[kind])} {kind}" for kind in kinds)
        raise InputError(f"{folder}: holds {counts}: give a folder with data of one kind")
    kind = kinds[0] if kinds else ""
    names = sorted(found.get(kind, []), key=decode_name)
    if kind == PARQUETS:
        _refuse_table_formats(folder, names)
    warn_of_others(folder, others, kind or "data")
    return kind, names


def _refuse_table_formats(folder: Path, names: list[str]) -> None:
    places = {folder / parent for name in names for parent in PurePosixPath(name).parents}
    for place, (mark, name) in itertools.product(sorted({folder.parent, *places}), _TABLE_FORMATS.items()):
        if any(place.glob(mark)):
            raise InputError(
                f"{place}: a {name} table, whose files hold deleted and replaced rows too: read it with its own "
                "library, write the rows to embed as plain parquet files, and give that folder"
            )


def _open_parquets(files: list[Path], options: InputOptions) -> PackagedInput:
    path, schemas, rows, places, footers = options.input, [], [], [], []
    folder_values: list[dict[str, str]] = []
    for file_path in files:
        pairs = [part.partition("=") for part in file_path.relative_to(path).parts[:-1]]  # Hive: year=2020/
        values = {key: "" if value == _NO_PARTITION else unquote(value) for key, is_pair, value in pairs if is_pair}
        with open_parquet(file_path) as file, reading(file_path):
            metadata, schema = file.metadata, file.schema_arrow
            folder_values.append(values)
            _check_columns(file_path, schema, options, [name for name in options.keep_columns if name not in values])
            if plain_type(schema.field(options.id_column).type) == pa.float64():
                whole_from_floats(file.read([options.id_column]).column(0), options.id_column, file_path)
        footers.append(hash_footer(file_path))
        schemas.append(schema)
        rows += [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        places += [(file_path, index) for index in range(metadata.num_row_groups)]
    if not sum(rows):
        raise InputError(f"{path}: holds no rows: package images first, or correct the path")
    near = [name for name in schemas[0].names if name.strip().lower() == VALID_COLUMN]
    if near and VALID_COLUMN not in near:
        logger.warning("%s: column %s is not read: its name would have to be %s", path, near[0], VALID_COLUMN)
    for name in (options.id_column, options.image_column, VALID_COLUMN, *options.keep_columns):
        first, *others = (_describe_type(schema, name, options) for schema in schemas)
        for file_path, kind in zip(files[1:], others, strict=True):
            if kind != first:
                raise InputError(
                    f"{file_path}: column {name} is {kind}, in {files[0].name} it is {first}: package all files in the "
                    "same way"
                )
    partitions = _keep_partitions(path, folder_values, {*options.keep_columns} - {*schemas[0].names})
    size = sum(file_path.stat().st_size for file_path in files)
    fingerprint = footers[0] if path.is_file() else hash_json([footers, folder_values] if partitions else footers)
    return PackagedInput(
        path, options, size, schemas[0], fingerprint, tuple(rows), tuple(places),
        partitions={file: {name: one[number] for name, one in partitions.items()} for number, file in enumerate(files)},
    )  # fmt: skip


def _describe_type(schema: pa.Schema, name: str, options: InputOptions) -> str:
    """Return a column's type as it has to be in all files; ids that are floats are read as whole numbers."""
    if name not in schema.names:
        return "missing"
    kind = re.sub("large_|_view", "", str(schema.field(name).type))
    return "int64" if name == options.id_column and re.search("float|double", kind) else kind


def _keep_partitions(path: Path, folder_values: list[dict[str, str]], keep_columns: set[str]) -> dict[str, pa.Array]:
    """Return the kept columns that folders name, a value for each file, and say which others they name."""
    keys = dict.fromkeys(key for values in folder_values for key in values)
    if others := ",".join(key for key in keys if key not in keep_columns):
        what = "to keep it as a column, unless the files have one, which counts"
        logger.warning("%s: its folders name %s: give --keep-columns %s %s", path, others, others, what)
    return {
        key: whole_or_text(pa.array([values.get(key, "") for values in folder_values]))
        for key in keys if key in keep_columns
    }  # fmt: skip


def _check_columns(path: Path, schema: pa.Schema, options: InputOptions, kept: Sequence[str]) -> None:
    """Raise one InputError that names every column which cannot be used."""
    accepts: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
        options.id_column: ("a scalar type", lambda kind: not (pa.types.is_nested(kind) or pa.types.is_union(kind))),
        options.image_column: ("binary, or a struct with bytes", _is_image),
    }
    problems = []
    if options.filter_valid and VALID_COLUMN in schema.names:  # nulls alone have no type
        accepts[VALID_COLUMN] = ("bool", lambda kind: pa.types.is_boolean(kind) or pa.types.is_null(kind))
    for name in dict.fromkeys([*accepts, *kept]):
        expected, is_right = accepts.get(name, ("", lambda _: True))
        count = len(schema.get_all_field_indices(name))
        if count != 1:
            problems.append(f"column {name} is {'missing' if count == 0 else f'there {count} times'}")
        elif name in kept and any(one.strip() == name != one for one in schema.names):
            problems.append(f"column {name} is there with blanks around its name too: rename one")
        elif not is_right(schema.field(name).type):
            problems.append(f"column {name} is {schema.field(name).type}, expected {expected}")
    if problems:
        structs = [one.name for one in schema if one.name != options.image_column and _is_image(one.type)]
        hint = f", or give --image-column {structs[0]}" if structs else ""
        raise InputError(f"{path}: {', '.join(problems)}: package the images again, or correct the path{hint}")


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    # binary_view is younger than the oldest pyarrow that is supported.
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or str(kind) == "binary_view")


# ------------------------------------------------------------------------------------------------ reading


def read_batches(source: PackagedInput, row_group: int) -> Iterator[pa.Table]:
    """Yield the rows of one row group in read batches, the last one shorter, under the names of packaged images."""
    options, batch_rows = source.options, source.options.read_batch_size
    path, own_group = source.places[row_group]
    is_struct = pa.types.is_struct(source.schema.field(options.image_column).type)
    columns = [options.id_column, f"{options.image_column}.bytes" if is_struct else options.image_column]
    columns += [name for name in options.keep_columns if name not in source.partitions[path]]
    if options.filter_valid and VALID_COLUMN in source.schema.names and VALID_COLUMN not in columns:
        columns.append(VALID_COLUMN)
    held: pa.Table | None = None
    # Without a buffer pyarrow reads a row group's whole column chunk, and a row group may hold 10^6 images.
    with reading(path), open_parquet(path, BUFFER_BYTES) as file:
        # A batch ends early where Arrow's 2 GiB of bytes a chunk are full, so batches are put together here.
        group = file.metadata.row_group(own_group)
        for batch in file.iter_batches(bound_rows(path, group, batch_rows), row_groups=[own_group], columns=columns):
            table = _as_packaged(source, path, pa.Table.from_batches([batch]))
            held = table if held is None else pa.concat_tables([held, table])
            if (num_bytes := unfolded_bytes(held)) > max(2 * BATCH_BYTES, 2 * group.total_byte_size):
                raise InputError(
                    f"{path}: {held.num_rows} rows take {num_bytes} bytes, though the file is small: give a "
                    "smaller --read-batch-size if that is meant"
                )
            while held.num_rows >= batch_rows:
                yield held.slice(0, batch_rows)
                held = held.slice(batch_rows)
    if held is not None and held.num_rows:
        yield held


def _as_packaged(source: PackagedInput, path: Path, table: pa.Table) -> pa.Table:
    """Give the id and the image their usual names and types, add what folders name, and check that text is text."""
    image, others = table.column(source.options.image_column), table.drop_columns(source.options.image_column)
    columns = {IMAGE_COLUMN: pc.struct_field(image, "bytes") if pa.types.is_struct(image.type) else image}
    for name, column in zip(others.column_names, others.columns, strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            raise InputError(
                f"{path}: column {name}: text that is not UTF-8 ({one_line(error)[:200]}): write it in UTF-8, or as "
                "binary"
            ) from None
        is_id, kind = name == source.options.id_column, source.schema.field(name).type
        if is_id and plain_type(kind) == pa.float64():
            kind = pa.int64()
        # Floats beside whole numbers, large_string beside string.
        same = column if column.type == kind else convert(path, column, pa.field(name, kind))
        columns[ID_COLUMN if is_id else name] = same
    columns |= {name: pa.repeat(value, table.num_rows) for name, value in source.partitions[path].items()}
    return pa.table(columns)


def list_pictures(source: PackagedInput) -> Iterator[bytes]:
    """Yield the encoded pictures that are to be embedded, from the first one on."""
    for table in itertools.chain.from_iterable(read_batches(source, group) for group in range(len(source.places))):
        images = table.column(IMAGE_COLUMN)
        yield from (data for row in source.wanted_rows(table) if (data := images[int(row)].as_py()))
