"""Embed read batches of packaged images: rows in, embeddings and rejects out."""

import contextlib
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.config import count_cores
from pipeline.embeddings_dataset.columns import hash_bytes
from pipeline.embeddings_dataset.packaged_input import IMAGE_COLUMN, PackagedInput
from pipeline.embeddings_dataset.parts import Outcome, PartContent, PartPlan, make_content
from pipeline.errors import Rejection
from pipeline.inference.backbone import Decoded, Embedder, check_embeddings
from pipeline.inference.engine import End, embed_stream
from pipeline.log import Stopwatch


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


def embed_batches(
    embedder: Embedder, source: PackagedInput, batches: Iterable[ReadBatch], watch: Stopwatch
) -> Generator[tuple[ReadBatch, PartContent], None, None]:
    """Yield the content of each read batch's part, in order; the next ones are read and decoded meanwhile.

    `batches` is read in another thread; `watch` adds up where the time went. A caller that may stop early closes the
    generator. Raises PipelineError if an embedding is not finite or all zero.
    """

    def list_pictures() -> Iterator[Picture | ReadBatch]:
        for batch in batches:  # only the images in flight leave Arrow's memory
            images = batch.table.column(IMAGE_COLUMN)
            for row in source.wanted_rows(batch.table):
                yield Picture(int(row), images[int(row)].as_py())
            yield batch

    def decode(picture: Picture) -> Decoded:
        data, picture.data = picture.data, None  # freed as soon as it is decoded
        if not data:
            raise Rejection("missing_image", "null" if data is None else "0 bytes")
        picture.image_hash = hash_bytes(data)
        return embedder.decode(data)

    embedded: list[Picture] = []
    rejected: list[tuple[int, Rejection]] = []
    embeddings = [np.empty((0, embedder.width), dtype=np.float32)]
    with contextlib.closing(embed_stream(embedder, list_pictures(), decode, count_cores(), watch)) as stream:
        for done in stream:
            embedded += done.items
            rejected += [(picture.row, rejection) for picture, rejection in done.rejected]
            if done.embeddings is not None:
                embeddings.append(done.embeddings)
            batch = done.end
            if isinstance(batch, ReadBatch):
                with watch.measure("write"):
                    values = np.concatenate(embeddings)
                    rows = np.array([picture.row for picture in embedded], dtype=np.int64)
                    check_embeddings(values, [f"row {row}" for row in batch.plan.first_row + rows], embedder.width)
                    found = Outcome(rows, values, [picture.image_hash for picture in embedded], rejected)
                    content = make_content(source, batch.plan, batch.table, found)
                yield batch, content
                embedded, rejected, embeddings = [], [], embeddings[:1]
