"""Embed one read batch of packaged images: rows in, embeddings and rejects out."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.backbone import Embedder, check_embeddings
from pipeline.config import count_cores
from pipeline.errors import InputError, Rejection
from pipeline.images import decode_rgb
from pipeline.log import Stopwatch
from pipeline.workers import map_in_order
from publish_model.duplicates import hash_bytes, hash_ids, pack_hashes
from publish_model.packaged_input import ID_COLUMN, IMAGE_COLUMN, plain_values, take_rows, valid_rows
from publish_model.part_plans import PartContent

# The projector normalises in float32; anything further from 1 comes from another kind of model.
NORM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Picture:
    """The image of row `row` of a read batch as the model takes it, or why it cannot be taken."""

    row: int
    image_hash: int = 0
    pixels: torch.Tensor | None = None
    rejection: Rejection | None = None


class BatchEmbedder:
    """The published model, ready for read batches; `watch` adds up where the time went."""

    def __init__(self, model_dir: Path, device: str, precision: str, batch_size: int, watch: Stopwatch) -> None:
        """Load the model and try it on a grey image.

        Raises InputError if it cannot be loaded or does not give L2-normalised embeddings.
        """
        self.batch_size = batch_size
        self.watch = watch
        self._embedder = Embedder(
            model_dir, device=device, dtype=precision, batch_size=batch_size, trust_remote_code=True
        )
        trial = self._embedder.embed([self._embedder.prepare(Image.new("RGB", (256, 256), (128, 128, 128)))])
        self.width = trial.shape[1]
        if abs(float(np.linalg.norm(trial[0])) - 1.0) > NORM_TOLERANCE:
            raise InputError(
                f"{model_dir}: its embeddings are not L2-normalised: give a model that stage 7 has published, "
                "not a backbone"
            )

    def embed(self, table: pa.Table, first_row: int) -> PartContent:
        """Embed the rows of a read batch, which begins at row `first_row` of the input.

        Raises PipelineError if an embedding is not finite or all zero.
        """
        ids = table.column(ID_COLUMN).combine_chunks()
        wanted = np.flatnonzero(valid_rows(table))
        embedded: list[Picture] = []
        rejected: list[Picture] = []
        embeddings = [np.empty((0, self.width), dtype=np.float32)]
        pictures = self._prepare_in_order(table.column(IMAGE_COLUMN), wanted)
        while batch := self._take(pictures):
            rejected += [picture for picture in batch if picture.rejection is not None]
            ready = [picture for picture in batch if picture.pixels is not None]
            if ready:
                embeddings.append(self._embed_pictures(ready, first_row))
            embedded += [Picture(picture.row, picture.image_hash) for picture in ready]  # without the pixels
        return PartContent(
            embedded=_embedded_table(ids, table.schema.field(ID_COLUMN), embedded, np.concatenate(embeddings)),
            rejects=_reject_table(ids, table.schema.field(ID_COLUMN), rejected, first_row),
            skipped=table.num_rows - len(wanted),
            hashes=_pack(ids, embedded),
            reasons=dict(Counter(picture.rejection.reason for picture in rejected if picture.rejection)),
        )

    def _prepare_in_order(self, images: pa.ChunkedArray, rows: NDArray[np.int64]) -> Iterator[Picture]:
        """Yield each row's picture, decoded by threads; only those in flight leave Arrow's memory."""
        items = ((int(row), images[int(row)].as_py()) for row in rows)
        return map_in_order(lambda item: self._prepare(*item), items, count_cores(), in_flight=2 * self.batch_size)

    def _prepare(self, row: int, data: bytes | None) -> Picture:
        if not data:
            detail = "null" if data is None else "0 bytes"
            return Picture(row, rejection=Rejection("missing_image", detail))
        try:
            image = decode_rgb(data)
        except Rejection as rejection:
            return Picture(row, rejection=rejection)
        return Picture(row, hash_bytes(data), self._embedder.prepare(image))

    def _take(self, pictures: Iterator[Picture]) -> list[Picture]:
        with self.watch.measure("wait for decoding"):
            return list(islice(pictures, self.batch_size))

    def _embed_pictures(self, pictures: list[Picture], first_row: int) -> NDArray[np.float32]:
        with self.watch.measure("compute"):
            embeddings = self._embedder.embed([picture.pixels for picture in pictures if picture.pixels is not None])
        check_embeddings(embeddings, [f"row {first_row + picture.row}" for picture in pictures], self.width)
        return embeddings


def _rows(pictures: list[Picture]) -> NDArray[np.int64]:
    return np.array([picture.row for picture in pictures], dtype=np.int64)


def _embedded_table(
    ids: pa.Array, id_field: pa.Field, embedded: list[Picture], embeddings: NDArray[np.float32]
) -> pa.Table:
    """Return OSMID and embedding (N, D) in input order."""
    width = embeddings.shape[1]
    values = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel(), pa.float32()), width)
    schema = pa.schema([id_field, pa.field("embedding", pa.list_(pa.float32(), width))])
    return pa.Table.from_arrays([take_rows(ids, _rows(embedded)), values], schema=schema)


def _reject_table(ids: pa.Array, id_field: pa.Field, rejected: list[Picture], first_row: int) -> pa.Table:
    """Return the row in the input, OSMID, reason and detail of what cannot be embedded."""
    rejections = [picture.rejection for picture in rejected if picture.rejection is not None]
    schema = pa.schema([("row", pa.int64()), id_field, ("reason", pa.string()), ("detail", pa.string())])
    columns = [
        pa.array(first_row + _rows(rejected), pa.int64()),
        take_rows(ids, _rows(rejected)),
        pa.array([rejection.reason for rejection in rejections], pa.string()),
        pa.array([rejection.detail for rejection in rejections], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _pack(ids: pa.Array, embedded: list[Picture]) -> bytes:
    id_hashes = hash_ids(plain_values(take_rows(ids, _rows(embedded))))
    return pack_hashes([picture.image_hash for picture in embedded], id_hashes)
