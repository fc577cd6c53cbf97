"""Embed read batches of packaged images: rows in, embeddings and rejects out."""

import contextlib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import count_cores
from pipeline.embeddings_dataset.columns import plain_values, take_rows
from pipeline.embeddings_dataset.hashes import hash_bytes, hash_ids, pack_hashes
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN, IMAGE_COLUMN, PackagedInput
from pipeline.embeddings_dataset.part_plans import PartContent, PartPlan
from pipeline.errors import InputError, Rejection
from pipeline.inference.backbone import Decoded, Embedder, check_embeddings
from pipeline.inference.engine import End, embed_stream
from pipeline.log import EngineWatch
from publish_model.new_data.embed_options import EmbedOptions

# The projector normalises in float32; anything further from 1 comes from another kind of model.
NORM_TOLERANCE = 1e-3


@dataclass
class Picture:
    """The image of row `row` of a read batch."""

    row: int
    data: bytes | None
    image_hash: int = 0


@dataclass
class ReadBatch(End):
    """The rows of one part; in a stream of pictures it stands behind its own."""

    plan: PartPlan
    table: pa.Table


class BatchEmbedder:
    """The published model, ready for read batches; `watch` adds up where the time went."""

    def __init__(
        self, model_dir: Path, source: PackagedInput, precision: str, options: EmbedOptions, watch: EngineWatch
    ) -> None:
        """Load the model for an input and try it on a grey image.

        Raises InputError if it cannot be loaded or does not give L2-normalised embeddings.
        """
        self.watch = watch
        self._source = source
        self._embedder = Embedder(
            model_dir, device=options.device, dtype=precision, batch_size=options.batch_size, trust_remote_code=True
        )
        trial = self._embedder.embed([self._embedder.prepare(Image.new("RGB", (256, 256), (128, 128, 128)))])
        self.width = trial.shape[1]
        if abs(float(np.linalg.norm(trial[0])) - 1.0) > NORM_TOLERANCE:
            raise InputError(
                f"{model_dir}: its embeddings are not L2-normalised: give a model that stage 7 has published, "
                "not a backbone"
            )

    def embed_each(self, batches: Iterable[ReadBatch]) -> Generator[tuple[ReadBatch, PartContent], None, None]:
        """Yield what becomes of each read batch, in order; the next ones are read and decoded meanwhile.

        `batches` is read in another thread. Raises PipelineError if an embedding is not finite or all zero. Whoever
        may stop early closes what is returned.
        """
        stream = embed_stream(self._embedder, self._list_pictures(batches), self._decode, count_cores(), self.watch)
        gathered = Gathered()
        with contextlib.closing(stream):
            for done in stream:
                gathered.embedded += done.items
                gathered.rejected += done.rejected
                if done.embeddings is not None:
                    gathered.embeddings.append(done.embeddings)
                if isinstance(done.end, ReadBatch):
                    with self.watch.measure("write"):
                        content = self._assemble(done.end, gathered)
                    yield done.end, content
                    gathered = Gathered()

    def _list_pictures(self, batches: Iterable[ReadBatch]) -> Iterator[Picture | ReadBatch]:
        """Yield each batch's pictures, then the batch; only the images in flight leave Arrow's memory."""
        for batch in batches:
            images = batch.table.column(IMAGE_COLUMN)
            for row in self._source.wanted_rows(batch.table):
                yield Picture(int(row), images[int(row)].as_py())
            yield batch

    def _decode(self, picture: Picture) -> Decoded:
        data, picture.data = picture.data, None  # held no longer than it takes
        if not data:
            raise Rejection("missing_image", "null" if data is None else "0 bytes")
        decoded = self._embedder.decode(data)
        picture.image_hash = hash_bytes(data)
        return decoded

    def _assemble(self, batch: ReadBatch, gathered: "Gathered") -> PartContent:
        first_row, embedded, rejected = batch.plan.first_row, gathered.embedded, gathered.rejected
        ids, id_field = batch.table.column(ID_COLUMN).combine_chunks(), batch.table.schema.field(ID_COLUMN)
        embeddings = np.concatenate([np.empty((0, self.width), dtype=np.float32), *gathered.embeddings])
        check_embeddings(embeddings, [f"row {first_row + picture.row}" for picture in embedded], self.width)
        table = _embedded_table(ids, id_field, embedded, embeddings)
        return PartContent(
            embedded=self._source.carry_columns(table, batch.table, _rows(embedded)),
            rejects=_reject_table(ids, id_field, rejected, first_row),
            skipped=batch.table.num_rows - len(self._source.wanted_rows(batch.table)),
            hashes=_pack(ids, embedded),
            reasons=dict(Counter(rejection.reason for _, rejection in rejected)),
        )


@dataclass
class Gathered:
    """What has become of a read batch's pictures so far."""

    embedded: list[Picture] = field(default_factory=list)
    embeddings: list[NDArray[np.float32]] = field(default_factory=list)
    rejected: list[tuple[Picture, Rejection]] = field(default_factory=list)


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


def _reject_table(
    ids: pa.Array, id_field: pa.Field, rejected: list[tuple[Picture, Rejection]], first_row: int
) -> pa.Table:
    """Return the row in the input, OSMID, reason and detail of what cannot be embedded."""
    rows = _rows([picture for picture, _ in rejected])
    schema = pa.schema([("row", pa.int64()), id_field, ("reason", pa.string()), ("detail", pa.string())])
    columns = [
        pa.array(first_row + rows, pa.int64()),
        take_rows(ids, rows),
        pa.array([rejection.reason for _, rejection in rejected], pa.string()),
        pa.array([rejection.detail for _, rejection in rejected], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _pack(ids: pa.Array, embedded: list[Picture]) -> bytes:
    id_hashes = hash_ids(plain_values(take_rows(ids, _rows(embedded))))
    return pack_hashes([picture.image_hash for picture in embedded], id_hashes)
