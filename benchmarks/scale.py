"""Measure how time and memory grow with the number of images, stage by stage, on synthetic data.

    python benchmarks/scale.py [--merge 1000 100000 300000 1000000] [--width 256] [--tars 100 1000 3000 10000]
                               [--search 1000 10000 20000 40000] [--members N] [--folder DIR] [--output FILE]

Every measurement is a process of its own, so that its peak memory is its own: seconds of the stage's `main` (imports
of the script included, the interpreter's start not), peak resident memory, and the bytes that it read and wrote by
system calls (what is read through a memory map is not among them). The smallest size stands for the start of a stage,
its imports and the like; the exponent is that of a power law through what the others take beyond it, and the
extrapolation goes on from the largest size by it. Beside stage 3 stands a plain copy of the same files by
Arrow, with the same compression. `--members N` adds stage 1 on a tar of N tiny members. Prints a Markdown table, and
writes JSON to `--output`.
"""

import argparse
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

import numpy as np

from benchmarks import synthetic
from pipeline.cli import installed_version
from pipeline.config import count_cores

FULL, RAW = 5_800_000, 25_000_000
COPY, READ = "plain Arrow copy", "training split, read"
TINY = "stage 1, tiny members"
STAGES = {
    "stage 1": "preprocess_raw_data.process_tar",
    "stage 2": "generate_embeddings.generate_embeddings",
    "stage 3": "preprocess_raw_data.merge_and_split",
    "stage 4": "preprocess_raw_data.compute_fingerprints",
    "stage 5": "difficulty_metadata.compute_visual_neighbors",
    TINY: "preprocess_raw_data.process_tar",
}

Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------ in a child


def copy_plainly(folder: Path) -> None:
    """Copy the embedding files into one parquet with stage 3's columns, row groups and compression."""
    import pyarrow.parquet as pq

    from pipeline.files import tables
    from preprocess_raw_data.merge_and_split import ROW_GROUP_ROWS

    paths = sorted((folder / "embeddings").glob("*.parquet"))
    names = [name for name in pq.read_schema(paths[0]).names if name not in ("image_path", "tar_file")]
    schema = pq.read_table(paths[0], columns=names).schema.remove_metadata()
    with tables.parquet_writer(folder / "copy.parquet", schema, {}) as writer:
        for path in paths:
            for batch in pq.ParquetFile(path).iter_batches(ROW_GROUP_ROWS, columns=names):
                writer.write_batch(batch.select(names).replace_schema_metadata(None))


def read_split(folder: Path) -> None:
    """Read the training split as training does."""
    from pipeline.retrieval.features import load_features

    load_features(folder / "merged" / "train.parquet")


def run_child(name: str, folder: Path) -> None:
    """Do one measurement in this process and print it as JSON."""
    before, started = read_io(), time.perf_counter()
    if name in STAGES:
        importlib.import_module(STAGES[name]).main(["--config", str(folder / "config.toml")])
    elif name == COPY:
        copy_plainly(folder)
    else:
        read_split(folder)
    seconds = time.perf_counter() - started
    after = read_io()
    print(json.dumps({"seconds": seconds, "read": after[0] - before[0], "written": after[1] - before[1],
                      "peak": read_peak()}))  # fmt: skip


def read_io() -> tuple[int, int]:
    """Return the bytes that this process has read and written so far; zeros where the system does not say."""
    try:
        lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return 0, 0
    return int(lines["rchar"]), int(lines["wchar"])


def read_peak() -> int:
    """Return this process's peak resident memory in bytes.

    Not by getrusage where there is /proc: a child's figure there begins with what its parent held when it started.
    """
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ------------------------------------------------------------------------------------------------ in the parent


def measure(name: str, folder: Path, count: int) -> Row:
    """Measure one stage on what lies in `folder`."""
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {name} at {count}: {done.stderr.strip().splitlines()[-1]}")
    row = {"what": name, "images": count, **json.loads(done.stdout.splitlines()[-1])}
    print(format_row(row), file=sys.stderr, flush=True)
    return row


def measure_merge(folder: Path, count: int, width: int) -> list[Row]:
    """Measure stage 3, a plain copy of its input, and training's view of its output."""
    synthetic.make_embeddings(folder, count, width)
    synthetic.make_config(folder)
    rows = [measure(COPY, folder, count)]
    (folder / "copy.parquet").unlink()
    rows.append(measure("stage 3", folder, count))
    shutil.rmtree(folder / "embeddings")
    return [*rows, measure(READ, folder, count)]


def measure_tars(folder: Path, count: int, side: int, names: tuple[str, ...]) -> list[Row]:
    """Measure the stages that read tars on one tar of `count` images."""
    synthetic.make_tar(folder, count, side)
    synthetic.make_config(folder, embedding_model={"model_name": "backbone", "dtype": "float32"})
    if "stage 2" in names:
        synthetic.make_backbone(folder)
    return [measure(name, folder, count) for name in names]


def measure_search(folder: Path, count: int) -> list[Row]:
    """Measure stage 5 with the engine that it chooses itself."""
    synthetic.make_fingerprints(folder, count)
    synthetic.make_config(folder)
    return [measure("stage 5", folder, count)]


def fit_growth(rows: list[Row]) -> dict[str, Any]:
    """Fit seconds = start + c * images^exponent, the start being the smallest size's seconds, and go on by it."""
    start, *others = sorted(rows, key=lambda row: row["images"])
    beyond = {row["images"]: row["seconds"] - start["seconds"] for row in others}
    beyond = {size: seconds for size, seconds in beyond.items() if seconds > 0}  # noise, where work is next to nothing
    fit: dict[str, Any] = {"start": start["seconds"], "exponent": None, "at_full": None, "at_raw": None}
    if len(beyond) > 1:
        sizes, seconds = (np.log(list(values)) for values in (beyond.keys(), beyond.values()))
        fit["exponent"] = exponent = float(np.polyfit(sizes, seconds, 1)[0])
        largest = max(beyond)
        for key, size in (("at_full", FULL), ("at_raw", RAW)):
            fit[key] = start["seconds"] + beyond[largest] * (size / largest) ** exponent
    return fit


def format_row(row: Row, start: float = 0.0) -> str:
    """Return one line of the table; `start` is what the stage takes for next to no images."""
    cells = [
        row["what"],
        f"{row['images']:,}",
        f"{row['seconds']:.2f}",
        f"{1e6 * (row['seconds'] - start) / row['images']:.1f}",
        f"{row['peak'] / 2**20:,.0f}",
        f"{row['read'] / 1e6:,.1f}",
        f"{row['written'] / 1e6:,.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def format_tables(rows: list[Row], growth: dict[str, Row]) -> str:
    """Return the measurements and how they grow, as two Markdown tables."""
    lines = ["| what | images | seconds | µs an image beyond the start | peak MiB | read MB | written MB |"]
    lines += ["|" + " --- |" * 7]
    for row in rows:
        start = growth[row["what"]]["start"]
        lines.append(format_row(row, start if row["seconds"] != start else 0.0))
    lines += ["", f"| what | start | exponent | at {FULL:,} | at {RAW:,} |", "|" + " --- |" * 5]
    for name, fit in growth.items():
        if fit["exponent"] is not None:
            cells = f"{fit['start']:.2f} s | {fit['exponent']:.2f} | {fit['at_full']:,.0f} s | {fit['at_raw']:,.0f} s"
            lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def measure_all(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    """Make each measurement's data, measure, and remove the data again."""
    jobs = [(measure_merge, count, arguments.width) for count in arguments.merge]
    jobs += [(measure_search, count) for count in arguments.search]
    jobs += [(measure_tars, count, 64, ("stage 1", "stage 2", "stage 4")) for count in arguments.tars]
    jobs += [(measure_tars, arguments.members // 2, 8, (TINY,))] if arguments.members else []
    rows = []
    for measurement, *options in jobs:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            rows += measurement(Path(scratch), *options)
    return rows


def main() -> None:
    """Measure from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--merge", type=int, nargs="*", default=[1_000, 100_000, 300_000, 1_000_000], help="stage 3: images"
    )
    parser.add_argument("--width", type=int, default=256, help="stage 3: numbers of an embedding")
    parser.add_argument(
        "--search", type=int, nargs="*", default=[1_000, 10_000, 20_000, 40_000], help="stage 5: images"
    )
    parser.add_argument(
        "--tars", type=int, nargs="*", default=[100, 1_000, 3_000, 10_000], help="stages 1, 2, 4: images"
    )
    parser.add_argument("--members", type=int, default=0, help="stage 1 on a tar of so many members of 8 pixels")
    parser.add_argument("--folder", type=Path, default=None, help="where the data go (default: the temporary folder)")
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments.child, arguments.folder)
        return
    rows = measure_all(arguments, arguments.folder)
    names = dict.fromkeys(row["what"] for row in rows)
    growth = {name: fit_growth([row for row in rows if row["what"] == name]) for name in names}
    print(format_tables(rows, growth))
    if arguments.output:
        machine = {"cores": count_cores(), "load": os.getloadavg()[0], "processor": platform.machine()}
        machine |= {name: installed_version(name) for name in ("pyarrow", "numpy", "torch")}
        content = {"width": arguments.width, "rows": rows, "growth": growth, "machine": machine}
        arguments.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
