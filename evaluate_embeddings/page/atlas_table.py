"""Write the table that embedding-atlas opens: id, embedding and thumbnail of each image of an embeddings dataset."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from evaluate_embeddings.scores.embeddings_table import count_rows, find_id_column, list_parts, to_text
from pipeline.embeddings_dataset.dataset import resolve_dataset_dir
from pipeline.embeddings_dataset.packaged_input import IMAGE_COLUMN, VALID_COLUMN, valid_rows
from pipeline.embeddings_dataset.parts import rejects_beside
from pipeline.errors import InputError, Rejection
from pipeline.files.list_columns import find_embedding
from pipeline.files.tables import open_parquet, read_provenance, reading
from pipeline.files.writing import read_json_object
from pipeline.inference.images import decode_rgb
from pipeline.log import Progress, logger
from pipeline.pages import shrink, to_jpeg

# More than a browser can move about smoothly is sampled.
MAX_ROWS = 1_000_000
THUMBNAIL_SIDE, JPEG_QUALITY = 96, 70
_BATCH_ROWS = 256

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Selection:
    """One parquet of a dataset, and its rows to show."""

    path: Path
    id_column: str
    chosen: Rows  # ascending, within the part


def write_atlas_table(folder: Path, images: Path | None, output: Path, seed: int) -> tuple[int, bool]:
    """Write id, embedding and, if possible, a thumbnail of each image; return the rows, and whether thumbnails exist.

    `images` is the input of stage 8, a packaged parquet or a folder of photographs (default: from state.json).
    Raises InputError if the dataset cannot be read or holds no row.
    """
    parts = choose_rows(folder, seed)
    images = images or read_input_path(folder)
    photos = _open_photos(parts, images)
    width = next(found.width for part in parts if (found := find_embedding(part.path)).width)
    columns = [pa.field("OSMID", pa.string()), pa.field("embedding", pa.list_(pa.float32(), width))]
    if photos is not None:
        columns.append(pa.field("image", pa.struct([("bytes", pa.binary())])))
    total = sum(len(part.chosen) for part in parts)
    with pq.ParquetWriter(output, pa.schema(columns)) as writer, Progress("prepare", total, "images") as progress:
        for ids, embeddings in _read_rows(parts):
            arrays = [ids, embeddings]
            if photos is not None:
                arrays.append(pa.array([{"bytes": next(photos)} for _ in range(len(ids))], columns[2].type))
            writer.write_batch(pa.record_batch(arrays, schema=pa.schema(columns)))
            progress.advance(len(ids))
    return total, photos is not None


def choose_rows(folder: Path, seed: int) -> list[Selection]:
    """Return the parts with the rows to show: all rows, or with a warning a random MAX_ROWS."""
    paths = list_parts(folder)
    counts = [count_rows(path) for path in paths]
    total = sum(counts)
    if not total:
        raise InputError(f"{folder}: holds no embedding: embed some images with stage 8 first")
    chosen = np.arange(total)
    if total > MAX_ROWS:
        chosen = np.sort(np.random.default_rng(seed).choice(total, MAX_ROWS, replace=False))
        logger.warning("%s: a random sample of %d of %d images is shown", folder, MAX_ROWS, total)
    starts = np.cumsum([0, *counts])
    cuts = np.searchsorted(chosen, starts)
    return [
        Selection(
            path, find_id_column(path, open_parquet(path).schema_arrow), chosen[cuts[n] : cuts[n + 1]] - starts[n]
        )
        for n, path in enumerate(paths)
    ]


def read_input_path(folder: Path) -> Path | None:
    """Return the path of the dataset's input from its state.json, None if that is not on this machine."""
    path = read_json_object(resolve_dataset_dir(folder) / "state.json").get("input_path")
    return Path(path) if isinstance(path, str) and Path(path).exists() else None


def _read_rows(parts: list[Selection]) -> Iterator[tuple[pa.Array, pa.Array]]:
    for part in parts:
        column, done = find_embedding(part.path), 0
        with reading(part.path):
            for batch, rows in _cut(open_parquet(part.path), [part.id_column, column.name], part.chosen):
                ids = to_text(part.path, batch.column(part.id_column).take(pa.array(rows)))
                first_row = int(part.chosen[done] - rows[0])
                values = column.read(batch.column(column.name), first_row)[rows].astype(np.float32)
                done += len(rows)
                yield ids, pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _cut(file: pq.ParquetFile, columns: list[str], chosen: Rows) -> Iterator[tuple[pa.RecordBatch, Rows]]:
    """Yield the batches that hold a chosen row, with its places in the batch."""
    start = 0
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
        low, high = np.searchsorted(chosen, [start, start + batch.num_rows])
        if high > low:
            yield batch, chosen[low:high] - start
        start += batch.num_rows


# ------------------------------------------------------------------------------------------------ photographs


def _open_photos(parts: list[Selection], images: Path | None) -> Iterator[bytes | None] | None:
    """Return the thumbnails of the shown rows, in order; None, with a warning, if there are no images."""
    if all(open_parquet(part.path).schema_arrow.get_field_index(IMAGE_COLUMN) >= 0 for part in parts):
        return (_shrink_bytes(data) for part in parts for data in _read_column(part.path, part.chosen))
    if images is None:
        logger.warning("no thumbnails: what was embedded is not here; give --images")
        return None
    if images.is_file():
        return (_shrink_bytes(data) for data in _read_column(images, locate_rows(parts, images)))
    return (_shrink_file(images / name) for part in parts for name in _read_names(part))


def locate_rows(parts: list[Selection], images: Path) -> Rows:
    """Return the rows of the packaged parquet that the shown rows were made from, ascending.

    A part holds, in their order, the rows of its read batch that were neither skipped as invalid nor rejected.
    Raises InputError if a part does not record where it begins, or was made from another parquet.
    """
    file = open_parquet(images)
    with reading(images):
        valid = valid_rows(file.read([name for name in (VALID_COLUMN,) if name in file.schema_arrow.names]))
    found = []
    for part in parts:
        provenance = read_provenance(part.path) or {}
        place = provenance.get("part")
        if not isinstance(place, dict):
            raise InputError(f"{part.path}: does not say which rows of the input it holds: give no --images")
        first, end = place["first_row"], place["first_row"] + place["num_rows"]
        is_filtered = provenance.get("settings", {}).get("filter_valid", True)
        rows = first + np.flatnonzero(valid[first:end]) if is_filtered else np.arange(first, end)
        rejects = rejects_beside(part.path)
        if rejects.is_file():
            rows = np.setdiff1d(rows, open_parquet(rejects).read(["row"])["row"].to_numpy())
        if len(rows) < count_rows(part.path) or end > len(valid):
            raise InputError(f"{images}: is not what {part.path.name} was made from: correct --images")
        found.append(rows[part.chosen])
    return np.concatenate(found)


def _read_column(path: Path, rows: Rows) -> Iterator[bytes | None]:
    with reading(path):
        for batch, places in _cut(open_parquet(path, 2**20), [IMAGE_COLUMN], rows):
            column = batch.column(0)
            yield from (column[place].as_py() for place in places.tolist())


def _read_names(part: Selection) -> Iterator[str]:
    for batch, rows in _cut(open_parquet(part.path), [part.id_column], part.chosen):
        yield from to_text(part.path, batch.column(0).take(pa.array(rows))).to_pylist()


def _shrink_file(path: Path) -> bytes | None:
    try:
        return _shrink_bytes(path.read_bytes())
    except OSError:
        return None


def _shrink_bytes(data: bytes | None) -> bytes | None:
    """Return a small JPEG, None if the picture cannot be read."""
    try:
        return to_jpeg(shrink(decode_rgb(data or b""), THUMBNAIL_SIDE), JPEG_QUALITY)
    except Rejection:
        return None
