"""Explore an embeddings dataset in the browser: map, neighbours and thumbnails, by Apple's embedding-atlas.

    python evaluate_embeddings/explore.py OUTPUT

Reads the dataset that stage 8 wrote (a random sample if it has more than a million images) and, for thumbnails, the
images that it was made from. Serves a page to this machine alone until Ctrl-C; only embedding-atlas' own cache of the
map stays on disk. Needs the extra `explore`: pip install '.[explore]'.
"""

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from evaluate_embeddings.page.atlas_table import write_atlas_table
from pipeline import cli
from pipeline.errors import InputError, PipelineError
from pipeline.log import logger, logging_to

SEED = 42


def explore(folder: Path, images: Path | None, port: int) -> None:
    """Prepare the table and serve it until interrupted.

    Raises InputError if the dataset cannot be read or embedding-atlas is not installed, PipelineError if it fails.
    """
    if importlib.util.find_spec("embedding_atlas") is None:
        raise InputError(
            "embedding-atlas is not installed: pip install '.[explore]', best in an environment of its own"
        )
    if images is not None and not images.exists():
        raise InputError(f"{images}: no such file or folder: correct --images")
    with tempfile.TemporaryDirectory() as scratch:
        table_path = Path(scratch) / "atlas.parquet"
        num_rows, has_images = write_atlas_table(folder, images, table_path, SEED)
        logger.info("%d images; the map is computed once, then open http://localhost:%d", num_rows, port)
        command = [
            sys.executable, "-m", "embedding_atlas.cli", str(table_path), "--vector", "embedding",
            *(["--image", "image"] if has_images else []), "--duckdb", "server", "--host", "localhost",
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
    parser.add_argument(
        "--images", type=Path, metavar="PATH",
        help="packaged parquet or folder of photographs that was embedded (default: as OUTPUT/state.json says)",
    )  # fmt: skip
    parser.add_argument("--port", type=int, default=5055, metavar="N", help="port on this machine (5055)")
    arguments = parser.parse_args(argv)
    with logging_to(None):
        explore(arguments.output, arguments.images, arguments.port)


if __name__ == "__main__":
    cli.run_guarded(main)
