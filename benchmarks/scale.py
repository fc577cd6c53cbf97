"""Measure how time and memory of stages 1 to 5 and 9 grow with the number of images, on synthetic data.

    python benchmarks/scale.py [--merge 1000 100000 1000000] [--width 256] [--tars 100 1000 10000]
                               [--search 1000 10000 40000] [--evaluate 1000 20000 100000] [--folder DIR] [--output FILE]

Each measurement is a process of its own: the seconds of the stage's `main` and its peak resident memory.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from benchmarks import harness, memory, synthetic
from pipeline.stages import STAGES

# The numbers of images of each measurement, and the stages that it runs.
SIZES = {
    "merge": ([1_000, 100_000, 1_000_000], [3]),
    "search": ([1_000, 10_000, 40_000], [5]),
    "tars": ([100, 1_000, 10_000], [1, 2, 4]),
    "evaluate": ([1_000, 20_000, 100_000], [9]),
}


def make_data(kind: str, folder: Path, count: int, width: int) -> None:
    """Write what the stages of a measurement read; pictures have 64 pixels, and stage 2 a toy backbone."""
    if kind == "evaluate":
        synthetic.make_evaluation(folder, count, width, min(count, 2_000))
        return
    if kind == "merge":
        synthetic.make_embeddings(folder, count, width)
    elif kind == "search":
        synthetic.make_fingerprints(folder, count)
    else:
        synthetic.make_tars(folder / "raw", synthetic.draw_pictures(64), count)
        synthetic.make_backbone(folder)
    synthetic.make_config(folder, embedding_model={"model_name": "backbone", "dtype": "float32"})


def measure(number: int, folder: Path, count: int) -> dict[str, Any]:
    """Measure one stage on the data in `folder`."""
    found = harness.run_child(memory.__file__, STAGES[number].module, "--config", folder / "config.toml")
    return {"what": f"stage {number}", "images": count, **found}


def main(argv: list[str] | None = None) -> None:
    """Measure from a command line."""
    parser = harness.make_parser(__doc__)
    for name, (sizes, _) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, nargs="*", default=sizes, metavar="N", help="numbers of images")
    parser.add_argument("--width", type=int, default=256, help="numbers of an embedding in stages 3 and 9")
    parser.add_argument("--folder", type=Path, help="where the data go (default: the temporary folder)")
    arguments = parser.parse_args(argv)
    rows = []
    for name, (_, numbers) in SIZES.items():
        for count in getattr(arguments, name):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                make_data(name, Path(folder), count, arguments.width)
                rows += [measure(number, Path(folder), count) for number in numbers]
    harness.write_results(rows, arguments.output, width=arguments.width)


if __name__ == "__main__":
    main()
