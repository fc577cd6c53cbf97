"""Measure how time and memory of stages 1 to 5 and 9 grow with the number of images, on synthetic data.

    python benchmarks/scale.py [--merge 1000 100000 1000000] [--width 256] [--tars 100 1000 10000]
                               [--search 1000 10000 40000] [--evaluate 1000 20000 100000] [--folder DIR] [--output FILE]

Each measurement is a process of its own: the seconds of the stage's `main` and its peak resident memory. Beside stage 3
stands a plain copy of its input by Arrow.
"""

import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from benchmarks.memory import read_peak

COPY = "plain Arrow copy"
STAGES = {
    "stage 1": "preprocess_raw_data.process_tar",
    "stage 2": "generate_embeddings.generate_embeddings",
    "stage 3": "preprocess_raw_data.merge_and_split",
    "stage 4": "preprocess_raw_data.compute_fingerprints",
    "stage 5": "difficulty_metadata.compute_visual_neighbors",
    "stage 9": "evaluate_embeddings.evaluate",
}

Row = dict[str, Any]


def copy_plainly(folder: Path) -> None:
    """Copy the embedding files into one parquet with stage 3's compression."""
    import pyarrow.parquet as pq

    from pipeline.files import tables

    paths = sorted((folder / "embeddings").glob("*.parquet"))
    with tables.parquet_writer(folder / "copy.parquet", pq.read_schema(paths[0]).remove_metadata(), {}) as writer:
        for path in paths:
            for batch in pq.ParquetFile(path).iter_batches(1024):
                writer.write_batch(batch.replace_schema_metadata(None))


def run_stage(name: str, folder: Path) -> None:
    """Run one stage in this process, which has imported nothing yet, and print its seconds and peak memory."""
    started = time.perf_counter()
    if name == COPY:
        copy_plainly(folder)
    else:
        importlib.import_module(STAGES[name]).main(["--config", str(folder / "config.toml")])
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_mib": read_peak() / 2**20}))


def measure(name: str, folder: Path, count: int) -> Row:
    """Measure one stage on the data in `folder`."""
    from benchmarks.harness import run_child

    return {"what": name, "images": count, **run_child(__file__, "--child", name, "--folder", folder)}


def measure_merge(folder: Path, count: int, width: int) -> list[Row]:
    """Measure stage 3 and a plain copy of its input."""
    synthetic = importlib.import_module("benchmarks.synthetic")
    synthetic.make_embeddings(folder, count, width)
    synthetic.make_config(folder)
    return [measure(name, folder, count) for name in (COPY, "stage 3")]


def measure_tars(folder: Path, count: int, _width: int) -> list[Row]:
    """Measure the stages that read tars on one tar of pictures of 64 pixels; stage 2 has a toy backbone."""
    synthetic = importlib.import_module("benchmarks.synthetic")
    synthetic.make_tars(folder / "raw", synthetic.draw_pictures(64), count)
    synthetic.make_config(folder, embedding_model={"model_name": "backbone", "dtype": "float32"})
    synthetic.make_backbone(folder)
    return [measure(name, folder, count) for name in ("stage 1", "stage 2", "stage 4")]


def measure_search(folder: Path, count: int, _width: int) -> list[Row]:
    """Measure stage 5 with its own choice of engine."""
    synthetic = importlib.import_module("benchmarks.synthetic")
    synthetic.make_fingerprints(folder, count)
    synthetic.make_config(folder)
    return [measure("stage 5", folder, count)]


def measure_evaluation(folder: Path, count: int, width: int) -> list[Row]:
    """Measure stage 9 on a test split of `count` images, with 2,000 photographs at most."""
    importlib.import_module("benchmarks.synthetic").make_evaluation(folder, count, width, min(count, 2_000))
    return [measure("stage 9", folder, count)]


MEASUREMENTS = {"merge": measure_merge, "search": measure_search, "tars": measure_tars, "evaluate": measure_evaluation}
SIZES = {
    "merge": [1_000, 100_000, 1_000_000],
    "search": [1_000, 10_000, 40_000],
    "tars": [100, 1_000, 10_000],
    "evaluate": [1_000, 20_000, 100_000],
}


def main() -> None:
    """Measure from a command line."""
    if "--child" in sys.argv:
        run_stage(sys.argv[2], Path(sys.argv[4]))
        return
    from benchmarks.harness import make_parser, write_results

    parser = make_parser(__doc__)
    for name, sizes in SIZES.items():
        parser.add_argument(f"--{name}", type=int, nargs="*", default=sizes, metavar="N", help="numbers of images")
    parser.add_argument("--width", type=int, default=256, help="numbers of an embedding in stages 3 and 9")
    parser.add_argument("--folder", type=Path, help="where the data go (default: the temporary folder)")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for name, measurement in MEASUREMENTS.items():
        for count in getattr(arguments, name):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                rows += measurement(Path(folder), count, arguments.width)
    write_results(rows, arguments.output, width=arguments.width)


if __name__ == "__main__":
    main()
