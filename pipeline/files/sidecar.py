"""The uncompressed copy of a merged split, which is mapped into memory where the parquet would have to be decoded.

merged_dir/_sidecar/{split}-{identity}/ holds `embeddings.npy`, (N, D), and `ids.arrow`, the other columns as one record
batch. It is made once for the parquet whose identity its name carries, and may be deleted at any time.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.files import tables
from pipeline.files.lists import ListColumn, find_embedding
from pipeline.files.tables import read_batches
from pipeline.files.workspace import writing_folder
from pipeline.log import logger

FOLDER = "_sidecar"
# Counted up when what the folder holds changes, so that older ones are made again.
_LAYOUT = 1
# Numbers decoded at a time: 16 MiB of float32, which is 1,024 rows of a 7B backbone.
_BATCH_NUMBERS = 2**22

View = tuple[NDArray[Any], pa.RecordBatch]


def map_columns(path: Path, fields: Iterable[pa.Field]) -> View:
    """Return a split's embeddings (N, D) and the columns `fields`, all mapped from its sidecar and read-only.

    The embeddings have the stored type, float32 or float16; `building_id` comes as a dictionary in order of first
    appearance. Where there is no sidecar of this very parquet it is made, and those of earlier ones are removed;
    where the folder cannot be written it is made in the temporary folder ($TMPDIR), for this process alone.
    Raises InputError if the parquet is damaged or holds nulls, or an embedding is not finite or all zero (naming the
    image), PipelineError where the disk is full.
    """
    names = [field.name for field in fields]
    key = tables.hash_json([tables.identify(path), names, _LAYOUT])[:16]
    folder = path.parent / FOLDER / f"{path.stem}-{key}"
    with suppress(OSError, EOFError, ValueError, pa.ArrowException):  # not there, or somebody has cut it short
        return _open(folder)
    if os.access(folder.parent if folder.parent.is_dir() else path.parent, os.W_OK):
        for stale in folder.parent.glob(f"{path.stem}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        _make(folder, path, names)
        return _open(folder)
    with tempfile.TemporaryDirectory() as scratch:  # what is mapped outlives its name
        logger.warning("%s cannot be written: the copy in %s serves this run alone", path.parent, tempfile.gettempdir())
        _make(Path(scratch) / folder.name, path, names)
        return _open(Path(scratch) / folder.name)


def _open(folder: Path) -> View:
    embeddings = np.load(folder / "embeddings.npy", mmap_mode="r")
    ids = pa.ipc.open_file(pa.memory_map(str(folder / "ids.arrow"))).get_batch(0)
    return embeddings, ids


def _make(folder: Path, path: Path, names: list[str]) -> None:
    file = tables.open_parquet(path)
    column = find_embedding(path)
    kind, shape = column.dtype, (file.metadata.num_rows, column.width or 0)
    size = shape[0] * shape[1] * kind.itemsize / 1e9
    logger.info("%s: its uncompressed copy, %.1f GB, is made once in %s", path.name, size, folder.parent)
    with writing_folder(folder) as temporary:
        ids = _read_ids(path, file, names)
        with open(temporary / "embeddings.npy", "wb") as out:
            header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(out, header)
            for block in _read_embeddings(column, ids.column("streetview_image_id")):
                out.write(block.data)
        with pa.ipc.new_file(str(temporary / "ids.arrow"), ids.schema) as writer:
            writer.write_batch(ids)


def _read_ids(path: Path, file: pq.ParquetFile, names: list[str]) -> pa.RecordBatch:
    """Return columns in one piece each, so that each can be mapped as one array."""
    with tables.reading(path):
        table = file.read(columns=names)
    columns = {}
    for name in names:
        column = table[name]
        if column.null_count:
            raise _nulls(path, name)
        column = column.cast(pa.string()) if pa.types.is_large_string(column.type) else column
        column = pc.dictionary_encode(column) if name == "building_id" else column
        whole = column.combine_chunks()
        # Some versions of pyarrow leave a chunked array of one chunk.
        columns[name] = whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
    return pa.RecordBatch.from_arrays(list(columns.values()), names=names)


def _read_embeddings(column: ListColumn, image_ids: pa.Array) -> Iterator[NDArray[Any]]:
    """Yield the embeddings in checked blocks (rows, D)."""
    start = 0
    for batch in read_batches(column.path, [column.name], max(1, _BATCH_NUMBERS // max(1, column.width or 0))):
        block = np.ascontiguousarray(column.read(batch.column(0), start, check_finite=False))
        _check_block(column.path, block, image_ids.slice(start, len(batch)), start)
        yield block
        start += len(batch)


def _nulls(path: Path, name: str) -> InputError:
    return InputError(f"{path}: column {name} has nulls: make the file again with stage 3")


def _check_block(path: Path, block: NDArray[Any], image_ids: pa.Array, start: int) -> None:
    bad = ~np.isfinite(block).all(axis=1) | ~block.any(axis=1)
    if bad.any():
        row = int(np.argmax(bad))
        raise InputError(
            f"{path}: the embedding of image {image_ids[row]} is not finite or all zero (row {start + row}, "
            f"{int(bad.sum())} such rows near it): "
            "run stage 2 again, with another [embedding_model].dtype if it comes back"
        )
