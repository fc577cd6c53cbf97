"""Embed read batches of packaged images: rows in, embeddings and rejects out."""

import contextlib
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.config import count_cores
from pipeline.embeddings_dataset.columns import hash_bytes
from pipeline.embeddings_dataset.content import Outcome, PartContent, PartPlan, make_content
from pipeline.embeddings_dataset.packaged_input import IMAGE_COLUMN, PackagedInput
from pipeline.errors import Rejection
from pipeline.inference.backbone import Decoded, Embedder, check_embeddings
from pipeline.inference.engine import End, embed_stream
from pipeline.log import EngineWatch


@dataclass
class Picture:
    """The image of row `row` of a read batch."""

    row: int
    data: bytes | None
    image_hash: int = 0


@dataclass
class ReadBatch(End):
    """The rows of one part; in the stream it follows its pictures."""

    plan: PartPlan
    table: pa.Table


class BatchEmbedder:
    """The published model, ready for read batches; `watch` adds up where the time went."""

    def __init__(self, embedder: Embedder, source: PackagedInput, watch: EngineWatch) -> None:
        self._embedder, self._source, self.watch = embedder, source, watch
        self.width = embedder.width

    def embed_each(self, batches: Iterable[ReadBatch]) -> Generator[tuple[ReadBatch, PartContent], None, None]:
        """Yield the content of each read batch's part, in order; the next ones are read and decoded meanwhile.

        `batches` is read in another thread. Raises PipelineError if an embedding is not finite or all zero. A caller
        that may stop early closes the generator.
        """
        stream = embed_stream(self._embedder, self._list_pictures(batches), self._decode, count_cores(), self.watch)
        embedded: list[Picture] = []
        rejected: list[tuple[Picture, Rejection]] = []
        embeddings = [np.empty((0, self.width), dtype=np.float32)]
        with contextlib.closing(stream):
            for done in stream:
                embedded += done.items
                rejected += done.rejected
                if done.embeddings is not None:
                    embeddings.append(done.embeddings)
                batch = done.end
                if isinstance(batch, ReadBatch):
                    with self.watch.measure("write"):
                        places = [f"row {batch.plan.first_row + picture.row}" for picture in embedded]
                        values = np.concatenate(embeddings)
                        check_embeddings(values, places, self.width)
                        rows = np.array([picture.row for picture in embedded], dtype=np.int64)
                        hashes = [picture.image_hash for picture in embedded]
                        refused = [(picture.row, rejection) for picture, rejection in rejected]
                        outcome = Outcome(rows, values, hashes, refused)
                        content = make_content(self._source, batch.plan, batch.table, outcome)
                    yield batch, content
                    embedded, rejected, embeddings = [], [], embeddings[:1]

    def _list_pictures(self, batches: Iterable[ReadBatch]) -> Iterator[Picture | ReadBatch]:
        """Yield each batch's pictures, then the batch; only the images in flight leave Arrow's memory."""
        for batch in batches:
            images = batch.table.column(IMAGE_COLUMN)
            for row in self._source.wanted_rows(batch.table):
                yield Picture(int(row), images[int(row)].as_py())
            yield batch

    def _decode(self, picture: Picture) -> Decoded:
        data, picture.data = picture.data, None  # freed as soon as it is decoded
        if not data:
            raise Rejection("missing_image", "null" if data is None else "0 bytes")
        decoded = self._embedder.decode(data)
        picture.image_hash = hash_bytes(data)
        return decoded
