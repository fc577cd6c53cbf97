"""Measure stage 6 on a CPU: anchors a second beside a plain trainer, peak memory, start, start-up, validation.

    taskset -c 0,1 python benchmarks/training.py [--widths 384 1024 1280 4096] [--seconds 4] [--output result.json]

Every case runs in a process of its own, so that its peak memory is its own. `plain` is a PyTorch DataLoader (batch
256, one `__getitem__` a sample, dictionaries of Python lists, a reward for each sample's band), with the better of no
workers and one a core; it works on all the features, and its triplets are counted. The others are stage 6's losses,
whose anchors are counted; they work in coordinates (512 at most). Prints a table to stderr and JSON. GPUs are measured
by gpu_acceptance.py.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

import numpy as np
import pyarrow as pa
import torch

from pipeline.cli import installed_version
from pipeline.config import TrainingSection, count_cores
from pipeline.files import tables
from pipeline.log import Progress
from pipeline.retrieval.features import Features
from pipeline.retrieval.projector import Projector
from pipeline.retrieval.scores import normalise_rows, score_queries
from pipeline.retrieval.whitening import INPUT_POWER, collect_scatter, collect_scatters
from train_specialized_embeddings.sampling.band_sampler import BandSampler
from train_specialized_embeddings.sampling.feature_store import FeatureStore
from train_specialized_embeddings.sampling.neighbor_table import NUM_BANDS, Neighbors, load_neighbors
from train_specialized_embeddings.training.coordinates import NUM_COORDINATES
from train_specialized_embeddings.training.losses import LOSSES
from train_specialized_embeddings.training.trainer import Trainer

NEIGHBORS, FULL_IMAGES, FULL_BUILDINGS = 150, 5_800_000, 1_000_000
CASES = ["plain", *LOSSES]
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------ synthetic data


def make_features(num_images: int, width: int) -> Features:
    """Return images of buildings with 2 to 5 each, in a row 50 m apart."""
    generator = np.random.default_rng(0)
    codes = np.repeat(np.arange(num_images), generator.integers(2, 6, num_images))[:num_images].astype(np.int32)
    block = generator.standard_normal((min(num_images, 4096), width), dtype=np.float32)
    rows = np.resize(block, (num_images, width))
    lat = codes * 50 / 111_195.0
    return Features(
        rows, codes, name_buildings(int(codes[-1]) + 1), name_images(num_images),
        np.ones(num_images, np.int64), np.arange(num_images), lat, np.zeros(num_images),
    )  # fmt: skip


def name_buildings(count: int) -> pa.StringArray:
    """Return building ids of the usual form."""
    return pa.array([f"{number // 1000:04d}_{number * 7919 % 10**7}" for number in range(count)])


def name_images(count: int) -> pa.StringArray:
    """Return image ids of the usual form."""
    return pa.array([f"{number // 5800:04d}_{number}" for number in range(count)])


def make_neighbors(features: Features) -> Neighbors:
    """Give each image random neighbours in all bands."""
    count = len(features)
    ends = np.array([8, 15, 30, 60, 90, 130, NEIGHBORS], np.int32)
    codes = np.random.default_rng(1).integers(0, len(features.building_ids), count * NEIGHBORS, dtype=np.int32)
    return Neighbors(codes, np.arange(count) * NEIGHBORS, np.tile(ends, (count, 1)))


# ------------------------------------------------------------------------------------------------ trainers


def time_trainer(loss: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Return anchors and images projected a second of the project's trainer, which works in coordinates."""
    width = min(arguments.width, NUM_COORDINATES)
    features = make_features(arguments.images, width)
    section = TrainingSection().model_copy(
        update={"loss": loss, "batch_size": arguments.batch_size, "anchors_per_epoch": 16 * arguments.batch_size}
    )
    store = FeatureStore(features.embeddings, CPU)
    sampler = BandSampler(features, make_neighbors(features), 0, section.min_negative_distance_m)
    trainer = Trainer(make_projector(width), store, sampler, section, torch.ones(width))
    bar = Progress("train", None, interval_seconds=1e9)
    trainer.run_epoch(bar)
    anchors, negatives, started = 0, 0, time.perf_counter()
    while anchors == 0 or time.perf_counter() - started < arguments.seconds:
        negatives += trainer.run_epoch(bar).num_negatives
        anchors += trainer.num_anchors
    seconds = time.perf_counter() - started
    return {"anchors": anchors / seconds, "images": (anchors + negatives) / seconds}


def make_projector(width: int) -> Projector:
    """Return the projector that both trainers train: width -> 512 -> 256; the project's own of coordinates."""
    torch.manual_seed(0)
    return Projector(width, 256, 512, 1, 0.1, "gelu")


class PlainTriplets(torch.utils.data.Dataset[Any]):
    """Triplets as most projects write them: a sample at a time, from dictionaries."""

    def __init__(self, features: Features) -> None:
        neighbors = make_neighbors(features)
        self.rows, self.codes = features.embeddings, features.building_codes.tolist()
        self.images: dict[int, list[int]] = {}
        for row, code in enumerate(self.codes):
            self.images.setdefault(code, []).append(row)
        self.bands = [
            dict(enumerate(part.tolist() for part in np.split(neighbors.codes[start : start + ends[-1]], ends[:-1])))
            for start, ends in zip(neighbors.starts, neighbors.ends, strict=True)
        ]
        self.rewards = dict.fromkeys(range(NUM_BANDS), 0.0)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        generator = np.random.default_rng()
        own = self.images[self.codes[row]]
        others = [image for image in own if image != row] or own
        band = int(generator.integers(NUM_BANDS))
        candidates = [code for code in self.bands[row][band] if code != self.codes[row]] or [self.codes[row - 1]]
        images = self.images[candidates[int(generator.integers(len(candidates)))]]
        chosen = (row, others[int(generator.integers(len(others)))], images[int(generator.integers(len(images)))])
        anchor, positive, negative = (torch.from_numpy(self.rows[image].copy()) for image in chosen)
        return anchor, positive, negative, band


def time_plain(arguments: argparse.Namespace) -> dict[str, float]:
    """Return triplets and images projected a second of the plain trainer, the better of two numbers of workers."""
    data = PlainTriplets(make_features(arguments.images, arguments.width))
    rate = max(_time_plain(data, arguments, num_workers) for num_workers in (0, count_cores()))
    return {"anchors": rate, "images": 3 * rate}


def _time_plain(data: PlainTriplets, arguments: argparse.Namespace, num_workers: int) -> float:
    loader = torch.utils.data.DataLoader(data, 256, shuffle=True, num_workers=num_workers, drop_last=True)
    projector = make_projector(arguments.width)
    optimizer = torch.optim.AdamW(projector.parameters(), 1e-5)
    triplets, started = 0, 0.0
    for number, (*batch, bands) in enumerate(loader):
        if number == 2:  # the workers are warm
            triplets, started = 0, time.perf_counter()
        anchor, positive, negative = (projector(part) for part in batch)
        distances = torch.linalg.vector_norm(anchor - positive, dim=1) - torch.linalg.vector_norm(
            anchor - negative, dim=1
        )
        losses = torch.relu(distances + 0.1)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        for band, loss in zip(bands.tolist(), losses.tolist(), strict=True):
            data.rewards[band] = 0.99 * data.rewards[band] + 0.01 * (loss > 0)
        triplets += len(losses)
        if number > 2 and time.perf_counter() - started > arguments.seconds:
            break
    return triplets / (time.perf_counter() - started)


# ------------------------------------------------------------------------------------------------ start-up, validation


def time_start_up(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Return seconds and memory to read a difficulty table and build the sampler, and both scaled up to 5.8M rows.

    The neighbours are of a million buildings, as they are at full size: their hash table is what the time goes to.
    """
    num_images, buildings = arguments.images, name_buildings(FULL_BUILDINGS)
    path = folder / "difficulty.parquet"
    _write_difficulty(path, num_images, buildings)
    codes = np.random.default_rng(2).integers(0, FULL_BUILDINGS, num_images).astype(np.int32)
    codes[:2] = 0, FULL_BUILDINGS - 1
    count = np.arange(num_images)
    features = Features(
        np.zeros((num_images, 1), np.float32), codes, buildings, name_images(num_images), count, count,
        np.zeros(num_images), np.zeros(num_images),
    )  # fmt: skip
    before, started = _current_gb(), time.perf_counter()
    neighbors = load_neighbors(path, features)
    BandSampler(features, neighbors, 0, 25.0)
    seconds, peak = time.perf_counter() - started, _peak_gb() - before
    kept = (neighbors.codes.nbytes + neighbors.starts.nbytes + neighbors.ends.nbytes) / 1e9
    factor = FULL_IMAGES / num_images
    # What the threads hold for their row groups does not grow with the table; the rest does.
    return {"seconds": seconds, "peak_gb": peak, "seconds_5.8M": factor * seconds,
            "peak_gb_5.8M": max(0.0, peak - kept) + factor * kept}  # fmt: skip


def _write_difficulty(path: Path, num_images: int, buildings: pa.StringArray) -> None:
    generator = np.random.default_rng(1)
    schema = pa.schema({"target_coord_hash": pa.string(), "neighbor_building_ids": pa.list_(pa.string()),
                        "neighbor_bands": pa.list_(pa.int32())})  # fmt: skip
    bands = np.sort(generator.integers(0, NUM_BANDS, NEIGHBORS)).astype(np.int32)
    names = name_images(num_images)
    with tables.parquet_writer(path, schema, {}) as writer:
        for first in range(0, num_images, 20_000):  # as stage 5 does
            part = names[first : first + 20_000]
            offsets = pa.array(np.arange(len(part) + 1, dtype=np.int32) * NEIGHBORS)
            listed = buildings.take(pa.array(generator.integers(0, len(buildings), len(part) * NEIGHBORS)))
            columns = [part, pa.ListArray.from_arrays(offsets, listed),
                       pa.ListArray.from_arrays(offsets, pa.array(np.tile(bands, len(part))))]  # fmt: skip
            writer.write_table(pa.table(columns, schema=schema))


def time_validation(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the seconds that the retrieval of every image among all takes, 256 numbers each."""
    count = arguments.images
    rows = normalise_rows(np.random.default_rng(0).standard_normal((count, 256)))
    started = time.perf_counter()
    score_queries(rows, np.arange(count) // 4)
    return {"seconds": time.perf_counter() - started}


# ------------------------------------------------------------------------------------------------ the start


def time_start(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of the pass over the table that the start takes, and how far its sums are from float64's.

    Of features with and without negative values: the largest error of a covariance, in the deviations of its two
    channels, and of an eigenvalue, in the largest one.
    """
    drawn = make_features(arguments.images, arguments.width)
    generator = np.random.default_rng(3)
    own = generator.standard_normal((len(drawn.building_ids), arguments.width), np.float32)[drawn.building_codes]
    signed = (drawn.embeddings + own) * np.geomspace(1, 0.01, arguments.width, dtype=np.float32)
    started, processor_started = time.perf_counter(), time.process_time()
    collect_scatters(signed, drawn.building_codes, (1.0, INPUT_POWER))
    found = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - processor_started}
    for kind, rows in (("signed", signed), ("positive", np.maximum(signed, 0))):
        quick, exact = (
            each.within + each.between
            for each in (
                collect_scatter(rows, drawn.building_codes),
                collect_scatter(rows.astype(np.float64), drawn.building_codes),
            )
        )
        deviations = np.sqrt(np.diag(exact))
        values = np.linalg.eigvalsh(exact)
        found[f"{kind}_entry_error"] = float(np.abs((quick - exact) / np.outer(deviations, deviations)).max())
        found[f"{kind}_eigenvalue_error"] = float(np.abs(np.linalg.eigvalsh(quick) - values).max() / values[-1])
    return found


# ------------------------------------------------------------------------------------------------ cases, table


def run_case(arguments: argparse.Namespace) -> dict[str, float]:
    """Measure one case in this process."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        if arguments.case == "plain":
            result = time_plain(arguments)
        elif arguments.case == "start-up":
            result = time_start_up(arguments, Path(name))
        elif arguments.case == "start":
            result = time_start(arguments)
        elif arguments.case == "validation":
            result = time_validation(arguments)
        else:
            result = time_trainer(arguments.case, arguments)
    return {"rss_gb": _peak_gb()} | result


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 * 1.073741824


def _current_gb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


def spawn_case(case: str, arguments: argparse.Namespace, width: int, images: int) -> dict[str, float]:
    """Measure one case in a process of its own."""
    command = [sys.executable, __file__, "--case", case, "--width", width, "--images", images,
               "--batch-size", arguments.batch_size, "--seconds", arguments.seconds]  # fmt: skip
    command += ["--folder", arguments.folder] if arguments.folder else []
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def make_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="*", default=[384, 1024, 1280, 4096])
    parser.add_argument("--numbers", type=int, default=2**26, help="of the table: images x width")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=4.0, help="measured for each case, after a warm-up")
    parser.add_argument("--start-up-images", type=int, default=100_000)
    parser.add_argument("--validation-images", type=int, default=20_000)
    parser.add_argument("--folder", help="where the difficulty table is written (default: the temporary folder)")
    parser.add_argument("--output", type=Path, help="file for the JSON (default: stdout)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--width", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Measure all cases from a command line."""
    arguments = make_parser().parse_args()
    if arguments.case:
        print(json.dumps(run_case(arguments)))
        return
    results: dict[str, Any] = {"training": {}}
    print(
        f"{'width':>6}{'case':>18}{'anchors/s':>13}{'x plain':>9}{'images/s':>10}{'RSS GB':>8}",
        file=sys.stderr,
    )
    for width in arguments.widths:
        found = results["training"][width] = {}
        for case in CASES:
            row = found[case] = spawn_case(case, arguments, width, min(500_000, arguments.numbers // width))
            ratio = row["anchors"] / found["plain"]["anchors"]
            print(f"{width:>6}{case:>18}{row['anchors']:>13,.0f}{ratio:>9.1f}{row['images']:>10,.0f}"
                  f"{row['rss_gb']:>8.2f}", file=sys.stderr)  # fmt: skip
    results["start"] = {}
    for width in arguments.widths:
        found = results["start"][width] = spawn_case("start", arguments, width, 4 * width)
        print(f"start, {4 * width} x {width}:", ", ".join(f"{key} {value:.3g}" for key, value in found.items()),
              file=sys.stderr)  # fmt: skip
    for case, images in (("start-up", arguments.start_up_images), ("validation", arguments.validation_images)):
        results[case] = {"images": images} | spawn_case(case, arguments, 0, images)
        print(case, ", ".join(f"{key} {value:,.2f}" for key, value in results[case].items()), file=sys.stderr)
    versions = {name: installed_version(name) for name in ("torch", "pyarrow", "numpy")}
    machine = {"cores": count_cores(), "load": os.getloadavg()[0], "processor": platform.machine()}  # fmt: skip
    text = json.dumps(
        results | {"batch_size": arguments.batch_size, "versions": versions, "machine": machine}, indent=2
    )
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
