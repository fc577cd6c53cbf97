"""Parquet between the stages: schemas, provenance, writing in one piece, reading with checks.

Readers raise InputError where a file is missing, or lacks a column or a value, DamagedError where it is damaged.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import VERSION
from pipeline.errors import DamagedError, InputError, Rejection, StaleOutputError, one_line
from pipeline.files.column_types import check_columns, convert_table, fill_composite_ids, stored_fields
from pipeline.log import logger
from pipeline.workspace import parse_json, read_json_object, writing_to

PROVENANCE_KEY = b"spatial_building_embeddings"

ID_COLUMNS = [
    ("dataset_id", pa.int64()),
    ("target_id", pa.int64()),
    ("patch_id", pa.int64()),
    ("street_view_id", pa.int64()),
    ("target_lat", pa.float64()),
    ("target_lon", pa.float64()),
    ("building_id", pa.string()),
    ("streetview_image_id", pa.string()),
]
FILE_COLUMNS = [("image_path", pa.string()), ("tar_file", pa.string())]
CAMERA_COLUMNS = [(name, pa.float64()) for name in ("street_lat", "street_lon", "distance_m", "heading", "pitch")]
# The place of the image's bytes in its tar, so that a reader need not scan terabytes for one picture.
PLACE_COLUMNS = [("image_offset", pa.int64()), ("image_size", pa.int64())]

INTERMEDIATE_SCHEMA = pa.schema(ID_COLUMNS + FILE_COLUMNS + CAMERA_COLUMNS + PLACE_COLUMNS)
FINGERPRINT_ID_SCHEMA = pa.schema(
    [(name, dict(ID_COLUMNS)[name]) for name in ("streetview_image_id", "building_id", "target_lat", "target_lon")]
)
REJECT_SCHEMA = pa.schema([("member", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


# Read ahead of each column: a foreign parquet may hold all its rows in one group.
BUFFER_BYTES = 2**20
# What a batch may take in memory, where its file says less.
BATCH_BYTES = 2**30
# Rows that a byte of a file can stand for: runs of one value take next to nothing.
_ROWS_PER_BYTE = 2**20


@contextmanager
def parquet_writer(
    path: Path,
    schema: pa.Schema,
    provenance: dict[str, Any],
    metadata: Mapping[bytes, bytes] | None = None,
    **options: Any,
) -> Iterator[pq.ParquetWriter]:
    """Yield a writer, with options of ParquetWriter, of a parquet that appears under `path` only when complete."""
    described = schema.with_metadata({**(metadata or {}), PROVENANCE_KEY: json.dumps(provenance, sort_keys=True)})
    with writing_to(path) as temporary:
        writer = pq.ParquetWriter(temporary, described, **(choose_encodings(schema) | options))
        try:
            yield writer
        finally:
            writer.close()


def choose_encodings(schema: pa.Schema) -> dict[str, Any]:
    """Return a ParquetWriter's options: zstd, and floats in lists split by byte, which halves bfloat16-born values."""
    # A list's values are the leaf `NAME.list.element`; for plain `NAME` the encoding is silently dropped.
    split, plain = [], []
    for field in schema:
        is_fixed = pa.types.is_fixed_size_list(field.type)
        if not (is_fixed or pa.types.is_list(field.type)):
            plain += [] if pa.types.is_nested(field.type) else [field.name]
        elif pa.types.is_floating(field.type.value_type):
            split.append(f"{field.name}.list.element")
        elif not is_fixed:
            plain.append(f"{field.name}.list.element")  # names and small numbers, which repeat
    return {"compression": "zstd", "use_dictionary": plain, "use_byte_stream_split": split or False}


def write_parquet(
    path: Path, table: pa.Table, provenance: dict[str, Any], metadata: Mapping[bytes, bytes] | None = None
) -> None:
    with parquet_writer(path, table.schema, provenance, metadata) as writer:
        writer.write_table(table)


def write_rejects(path: Path, rejects: Iterable[tuple[str, Rejection]], provenance: dict[str, Any]) -> None:
    rows = [{"member": name, "reason": one.reason, "detail": one.detail} for name, one in rejects]
    write_parquet(path, pa.Table.from_pylist(rows, schema=REJECT_SCHEMA), provenance)


def count_rejects(provenance: dict[str, Any], num_items: int, rejects: Iterable[Rejection]) -> dict[str, Any]:
    """Return an output's provenance with its `counts` and the `reasons` of its rejects."""
    reasons = Counter(rejection.reason for rejection in rejects)
    counts = {"in": num_items, "out": num_items - reasons.total(), "rejected": reasons.total()}
    return provenance | {"counts": counts, "reasons": dict(reasons)}


def rejects_path(output_path: Path) -> Path:
    """Return the path of an output's rejects: the same name in the folder `_rejects` beside it."""
    return output_path.parent / "_rejects" / output_path.name


def open_parquet(path: Path, buffer_size: int = 0) -> pq.ParquetFile:
    """Open a parquet file; with a `buffer_size` read a column chunk piece by piece."""
    # Pre-buffering, which newer versions do by default, reads whole row groups whatever the buffer.
    options = {"buffer_size": buffer_size, "pre_buffer": not buffer_size, "page_checksum_verification": True}
    if path.exists() and not path.is_file():  # opening a pipe would never end
        raise InputError(f"{path}: a folder or a pipe, not a parquet file: correct the path")
    try:
        file = pq.ParquetFile(path, **options)
        footer = file.metadata
        rows = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
        if min(rows, default=0) < 0 or sum(rows) != footer.num_rows or sum(rows) > path.stat().st_size * _ROWS_PER_BYTE:
            raise pa.ArrowInvalid(f"its footer claims {footer.num_rows} rows")
        return file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise read_failure(path, error, "not a readable parquet file") from None


def read_failure(path: Path, error: BaseException, damage: str = "damaged") -> InputError:
    """Say why a parquet could not be read: a DamagedError only where its content is to blame, not the system."""
    text = one_line(error)[:200]
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: no such file: run the stage that writes it, or correct the path")
    is_of_system = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
    if is_of_system or isinstance(error, pa.ArrowNotImplementedError) or "encrypted" in text:
        return InputError(f"{path}: cannot be read ({text}): put that right, then run this again")
    return DamagedError(f"{path}: {damage} ({text}): remove it and make it again")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn a failure to decode a parquet's content into an InputError naming the file (see `read_failure`)."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise read_failure(path, error) from None


def bound_rows(path: Path, group: pq.RowGroupMetaData, batch_rows: int) -> int:
    """Return how many of `batch_rows` to decode at once, as a value that is stored once may be in each of them.

    At most BATCH_BYTES come of a dictionary then. Writers keep dictionaries below 1 MB.
    """
    largest = 1
    with open(path, "rb") as file:
        for number in range(group.num_columns):
            chunk = group.column(number)
            if chunk.has_dictionary_page and chunk.total_uncompressed_size * batch_rows > BATCH_BYTES:
                file.seek(chunk.dictionary_page_offset)
                largest = max(largest, _read_page_size(file.read(16)))
    return max(1, min(batch_rows, BATCH_BYTES // largest))


def _read_page_size(header: bytes) -> int:
    """Return the unpacked size in a page's header, which begins with type and size in Thrift's compact form."""
    rest, value = iter(header), 0
    for _ in range(2):
        next(rest, 0)  # the field's header
        value, shift = 0, 0
        for byte in rest:
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
    return value >> 1  # no sign


def unfolded_bytes(table: pa.Table) -> int:
    """Return the bytes that a table takes as plain values: a dictionary's one value may stand in every row."""
    num_bytes = 0
    for column in table.columns:
        if not pa.types.is_dictionary(column.type):
            num_bytes += column.nbytes
            continue
        with suppress(pa.ArrowNotImplementedError):  # values of one length, such as numbers
            for chunk in column.chunks:
                lengths = pc.binary_length(chunk.dictionary).cast(pa.int64())
                num_bytes += pc.sum(lengths.take(chunk.indices)).as_py() or 0
    return num_bytes


def read_batches(
    path: Path, columns: list[str], batch_rows: int, groups: Iterable[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield some columns of a parquet's row groups (None: all), at most `batch_rows` rows at a time."""
    with open_parquet(path, BUFFER_BYTES) as file:
        # One reader over all row groups keeps every one's compressed bytes until it is done (seen with pyarrow 26).
        for group in range(file.num_row_groups) if groups is None else groups:
            bound = bound_rows(path, file.metadata.row_group(group), batch_rows)
            batches = file.iter_batches(bound, row_groups=[group], columns=columns)
            while True:
                with reading(path):  # only decoding: the caller's failures are no damage of this file
                    batch = next(batches, None)
                if batch is None:
                    break
                yield batch.select(columns).replace_schema_metadata(None)


def read_columns(path: Path, fields: Iterable[pa.Field], remedy: str, *, with_others: bool = False) -> pa.Table:
    """Return some columns, none of them empty, with the given types; `with_others` the other columns follow."""
    wanted = pa.schema(fields)
    with open_parquet(path) as file, reading(path):
        stored = stored_fields(file.schema_arrow, wanted)
        check_columns(path, file.schema_arrow, stored)
        table = file.read(columns=None if with_others else [field.name for field in stored])
    table = fill_composite_ids(convert_table(path, table, stored))
    for name in wanted.names:
        if table[name].null_count:
            raise InputError(f"{path}: column {name} has empty values: {remedy}")
    others = [name for name in table.column_names if with_others and name not in wanted.names]
    return table.select([*wanted.names, *others])


def read_ids(paths: list[Path], fields: Iterable[pa.Field], remedy: str) -> list[pa.Table]:
    """Return some columns of each file; raise InputError if a `streetview_image_id` is there twice."""
    tables = [read_columns(path, fields, remedy) for path in paths]
    ids = pa.chunked_array([chunk for table in tables for chunk in table["streetview_image_id"].chunks], pa.string())
    if pc.count_distinct(ids).as_py() < len(ids):
        counts = pc.value_counts(ids)
        repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0]
        holders = zip(paths, tables, strict=True)
        names = [path.name for path, table in holders if pc.is_in(repeated, table["streetview_image_id"]).as_py()]
        raise InputError(
            f"{paths[0].parent}: image {repeated} is there more than once, in {', '.join(names)}: remove one"
        )
    return tables


def read_provenance(path: Path, *, warn: bool = False) -> dict[str, Any] | None:
    """Return the provenance that a parquet or a JSON file carries, else None, with a warning if asked for."""
    if path.suffix == ".json":
        content = read_json_object(path)
        beside = content.get(PROVENANCE_KEY.decode(), content.get("provenance"))
        return as_provenance(content if "stage" in content else beside)
    found = provenance_of(open_parquet(path).metadata)
    if found is None and warn:
        logger.warning("%s carries no provenance: taken as it is, its columns and types are checked", path)
    return found


def provenance_of(footer: pq.FileMetaData) -> dict[str, Any] | None:
    """Return the provenance in a parquet's footer, None where there is none."""
    try:
        return as_provenance(parse_json((footer.metadata or {}).get(PROVENANCE_KEY, b"null")))
    except ValueError:
        return None


def as_provenance(content: Any) -> dict[str, Any] | None:
    """Return what stands where provenance is kept, None if it has not the shape of this project's."""
    if not isinstance(content, dict):
        return None
    parts = {"inputs": list, "settings": dict, "counts": dict, "reasons": dict}
    is_shaped = all(isinstance(content.get(key, kind()), kind) for key, kind in parts.items())
    return content if is_shaped and all(isinstance(one, dict) for one in content.get("inputs", [])) else None


def is_complete(path: Path, provenance: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether `path` is there and can be kept (see `matches`)."""
    return not overwrite and path.exists() and matches(path, read_provenance(path), provenance)


def matches(path: Path, found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> bool:
    """Return True if an output's provenance is the wanted one, else raise StaleOutputError naming the difference."""
    difference = "it does not say what it was made from" if found is None else describe_difference(found, wanted)
    if difference:
        raise StaleOutputError(
            f"{path}: made from other inputs or settings ({difference}): give --overwrite to make it again, "
            "or set another output path"
        )
    return True


def describe_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Name the first difference of two provenances, None if they agree; a tar that is gone is none."""
    if old.get("stage") != new.get("stage"):
        return f"it was made by {old.get('stage')}"
    before, after = (one.get("settings", {}) for one in (old, new))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            return f"{key} was {before.get(key)!r} and is now {after.get(key)!r}"
    before, after = ({str(item.get("name")): item for item in one.get("inputs", [])} for one in (old, new))
    for name in sorted(before.keys() | after.keys()):
        if name not in before:
            return f"input {name} was not among its inputs"
        if name not in after and not name.endswith(".tar"):
            return f"input {name} is gone"
        if name in after and before[name] != after[name]:
            return f"input {name} has changed"
    return None


def make_provenance(stage: str, inputs: Iterable[Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return an output's provenance: stage, version, inputs (see `identify`) and settings."""
    return {"stage": stage, "version": VERSION, "inputs": list(inputs), "settings": dict(settings)}
