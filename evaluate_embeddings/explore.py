"""Explore an embeddings dataset in the browser: map, neighbours and thumbnails, by Apple's embedding-atlas.

    python evaluate_embeddings/explore.py OUTPUT --images INPUT

Reads the dataset that stage 8 wrote (a random sample if it has more than a million images) and, for thumbnails, the
images that it was made from; a path that the dataset itself names is never opened. Serves a page to this machine alone
until Ctrl-C; only embedding-atlas' own cache of the map stays on disk. Needs the extra `explore`:
pip install '.[explore]'.
"""

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from evaluate_embeddings.scores.embeddings_table import to_text
from pipeline import cli
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN
from pipeline.embeddings_dataset.parts import EMBEDDING_COLUMN, embeddings_of
from pipeline.errors import InputError, PipelineError, Rejection
from pipeline.inference.images import decode_rgb
from pipeline.log import Progress, logger, logging_to
from pipeline.pages import shrink, to_jpeg

# More than a browser can move about smoothly is sampled.
MAX_ROWS, SEED = 1_000_000, 42
THUMBNAIL_SIDE, JPEG_QUALITY = 96, 70


def write_atlas_table(output: Path, images: Path | None, path: Path) -> int:
    """Write id, embedding and, given the input of stage 8, a thumbnail of each image; return the rows.

    Raises InputError if the dataset or its input cannot be read.
    """
    dataset = EmbeddingsDataset(output)
    source = None if images is None else dataset.open_input(images)
    if source is None:
        logger.warning("no thumbnails: give --images, the input of stage 8")
    rows: Sequence[int] = range(dataset.num_rows)
    if len(rows) > MAX_ROWS:
        logger.warning("%s: a random sample of %d of %d images is shown", output, MAX_ROWS, len(rows))
        rows = np.sort(np.random.default_rng(SEED).choice(len(rows), MAX_ROWS, replace=False)).tolist()
    width = dataset.schema.field(EMBEDDING_COLUMN).type.list_size
    schema = pa.schema([(ID_COLUMN, pa.string()), (EMBEDDING_COLUMN, pa.list_(pa.float32(), width))])
    if source is not None:
        schema = schema.append(pa.field("image", pa.struct([("bytes", pa.binary())])))
        pictures = dataset.read_images(source, rows)
    with pq.ParquetWriter(path, schema) as writer, Progress("prepare", len(rows), "images") as progress:
        for part, _, places in dataset.locate(rows):
            table = part.read([ID_COLUMN, EMBEDDING_COLUMN]).take(places)
            ids = to_text(part.path, table[ID_COLUMN].combine_chunks())
            arrays = [ids, pa.FixedSizeListArray.from_arrays(embeddings_of(table).reshape(-1), width)]
            if source is not None:
                arrays.append(pa.array([{"bytes": make_thumbnail(next(pictures)[1])} for _ in places], schema[2].type))
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            progress.advance(len(places))
    return len(rows)


def make_thumbnail(data: bytes) -> bytes | None:
    """Return a small JPEG, None if the picture cannot be read any more."""
    try:
        return to_jpeg(shrink(decode_rgb(data), THUMBNAIL_SIDE), JPEG_QUALITY)
    except Rejection:
        return None


def explore(folder: Path, images: Path | None, port: int) -> None:
    """Prepare the table and serve it until interrupted.

    Raises InputError if the dataset cannot be read or embedding-atlas is not installed, PipelineError if it fails.
    """
    if importlib.util.find_spec("embedding_atlas") is None:
        raise InputError(
            "embedding-atlas is not installed: pip install '.[explore]', best in an environment of its own"
        )
    with tempfile.TemporaryDirectory() as scratch:
        table_path = Path(scratch) / "atlas.parquet"
        num_rows = write_atlas_table(folder, images, table_path)
        logger.info("%d images; the map is computed once, then open http://localhost:%d", num_rows, port)
        command = [
            sys.executable, "-m", "embedding_atlas.cli", str(table_path), "--vector", "embedding",
            *(["--image", "image"] if images else []), "--duckdb", "server", "--host", "localhost",
            "--port", str(port), "--no-auto-port",
        ]  # fmt: skip
        # stdout carries paths alone, so its banner goes with the log.
        done = subprocess.run(command, check=False, stdout=sys.stderr)
    if done.returncode:
        raise PipelineError(f"embedding-atlas ended with exit code {done.returncode}: see its message above")


def main(argv: Sequence[str] | None = None) -> None:
    """Run from a command line."""
    parser = cli.make_parser(__doc__, config=False)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="embeddings dataset that stage 8 wrote")
    parser.add_argument("--images", type=Path, metavar="PATH", help="what stage 8 embedded, for thumbnails")
    parser.add_argument("--port", type=int, default=5055, metavar="N", help="port on this machine (5055)")
    arguments = parser.parse_args(argv)
    with logging_to(None):
        explore(arguments.output, arguments.images, arguments.port)


if __name__ == "__main__":
    cli.run_guarded(main)
