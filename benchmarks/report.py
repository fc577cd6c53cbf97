"""Measure how long stage 9 takes for its numbers and for its page, and its memory, on a synthetic test split.

    taskset -c 0,1 python benchmarks/report.py [--images 20000] [--width 256] [--photos 2000] [--output FILE]

Makes a split with cameras, a tar of drawn photographs that its rows point into, difficulty metadata and a checkpoint,
then runs what stage 9 runs: load and embed, score (every search, bootstrap and breakdown), page (pairs of images,
drawings, thumbnails by their offsets). Prints a table; the peak memory is that of this process up to the end of a part.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

import numpy as np
import pyarrow as pa
import torch

from benchmarks import synthetic
from evaluate_embeddings.evaluate import describe_inputs, embed_split, score_split
from evaluate_embeddings.page.report import write_report
from evaluate_embeddings.scores.ignore_pairs import resolve_pairs
from pipeline.config import Config, count_cores, load_config
from pipeline.files import tables
from pipeline.files.archive import stream_members
from pipeline.retrieval.checkpoint import save_checkpoint
from pipeline.retrieval.projector import Projector

NUM_NEIGHBORS = 150
PHOTO_SIDE = 448


def make_split(folder: Path, name: str, count: int, width: int, places: list[tuple[int, int]]) -> None:
    """Write a merged split whose rows point at the photographs by turns; the train split may have no place."""
    generator = np.random.default_rng(len(name))
    buildings = synthetic.draw_buildings(generator, count)
    table = pa.table(synthetic.draw_ids(generator, 1, buildings), schema=tables.INTERMEDIATE_SCHEMA)
    for column, values in zip(("image_offset", "image_size"), zip(*places, strict=True), strict=True):
        index = table.schema.get_field_index(column)
        table = table.set_column(index, column, pa.array(np.resize(np.array(values, np.int64), count)))
    values = pa.array(synthetic.draw_values(generator, buildings, width).reshape(-1))
    table = table.append_column("embedding", pa.FixedSizeListArray.from_arrays(values, width))
    tables.write_parquet(folder / "merged" / f"{name}.parquet", table.drop_columns(["image_path", "tar_file"]), {})


def make_difficulty(folder: Path, count: int) -> None:
    """Write metadata with random neighbours in bands of their order."""
    generator = np.random.default_rng(0)
    buildings = synthetic.draw_buildings(np.random.default_rng(len("test")), count)
    names = pa.array([f"0001_{building}" for building in range(int(buildings[-1]) + 1)])
    offsets = pa.array(np.arange(0, NUM_NEIGHBORS * count + 1, NUM_NEIGHBORS), pa.int32())
    neighbors = names.take(pa.array(generator.integers(0, len(names), NUM_NEIGHBORS * count)))
    bands = np.tile(np.arange(NUM_NEIGHBORS) * 7 // NUM_NEIGHBORS, count)
    columns = {
        "target_coord_hash": pa.array([f"0001_{patch}" for patch in range(count)]),
        "neighbor_building_ids": pa.ListArray.from_arrays(offsets, neighbors),
        "neighbor_bands": pa.ListArray.from_arrays(offsets, pa.array(bands, pa.int32())),
    }
    tables.write_parquet(folder / "difficulty.parquet", pa.table(columns), {})


def make_workplace(folder: Path, count: int, width: int, num_photos: int) -> Config:
    """Write all that stage 9 reads, and return its configuration."""
    synthetic.make_tar(folder, num_photos, PHOTO_SIDE)
    members = stream_members(folder / "raw" / "0001.tar")
    places = [(member.offset, member.size) for member in members if member.is_image_name]
    make_split(folder, "train", min(count, 20_000), width, places)
    make_split(folder, "test", count, width, places)
    make_difficulty(folder, count)
    torch.manual_seed(0)
    projector = Projector(width, output_dim=min(256, width), hidden_dim=64)
    content = {"architecture": projector.architecture, "projector": projector.state_dict(), "metrics": {}}
    save_checkpoint(folder / "checkpoint" / "checkpoint_best.pt", content)
    paths = {
        "raw_dir": "raw",
        "merged_dir": "merged",
        "checkpoint_dir": "checkpoint",
        "report_dir": "report",
        "difficulty_metadata_path": "difficulty.parquet",
    }
    sections = {"paths": paths, "training_model": {"output_dim": min(256, width)}}
    return load_config(synthetic.make_config(folder, **sections))


def measure(folder: Path, count: int, width: int, num_photos: int) -> list[dict[str, float | str]]:
    """Return a row for each part: its seconds and the peak memory so far, in MB."""
    begun = time.monotonic()
    config = make_workplace(folder, count, width, num_photos)
    rows: list[dict[str, float | str]] = []

    def note(part: str, started: float) -> float:
        now = time.monotonic()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        rows.append({"part": part, "seconds": round(now - started, 1), "peak_mb": round(peak)})
        return time.monotonic()

    started = note("the benchmark's own data", begun)
    features, embeddings, checkpoint = embed_split(config)
    started = note("load and embed", started)
    evaluation, metrics = score_split(features, embeddings, resolve_pairs(None, features.building_ids), config)
    started = note("score", started)
    metrics["provenance"] = describe_inputs(config, None) | {"training_settings": {}}
    path = config.path("report_dir") / "report.html"
    write_report(path, evaluation, metrics, checkpoint.metrics, config)
    note("page", started)
    rows.append({"part": "page, MB", "seconds": round(path.stat().st_size / 1e6, 1), "peak_mb": 0})
    return rows


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000, metavar="N", help="images of the test split (20000)")
    parser.add_argument("--width", type=int, default=256, metavar="N", help="numbers of a backbone embedding (256)")
    parser.add_argument("--photos", type=int, default=2_000, metavar="N", help="photographs in the tar (2000)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), arguments.images, arguments.width, arguments.photos)
    print(f"{arguments.images:,} images of {arguments.width} numbers, {count_cores()} cores")
    print("| part | seconds | peak MB |\n| --- | --- | --- |")
    for row in rows[:-1]:
        print(f"| {row['part']} | {row['seconds']} | {row['peak_mb']} |")
    print(f"\nreport.html: {rows[-1]['seconds']} MB")
    if arguments.output:
        content = {"images": arguments.images, "width": arguments.width, "cores": count_cores(), "rows": rows}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
