"""Measure what training is worth by the number of buildings it is given, on fixed test buildings of other streets.

    python benchmarks/scaling.py --config train.toml --test-merged-dir other/merged [--sizes 100 300 1000 3000]
        [--seeds 3] [--expand 4096] [--set training.loss=triplet] [--plot curve.svg] [--output curve.json]

Reads merged_dir and difficulty_metadata_path of the configuration (stages 1 to 5), and the merged splits of other
buildings to test on. For each size and seed it draws that many training buildings, and validation buildings in the
pipeline's ratio beside them, and trains as stage 6 does. `--expand` maps the features by a fixed random matrix to more
numbers, which are positive and negative alike, and adds noise: another backbone, as far as training can tell.
Prints a table and a straight line through the gains over the logarithm of the size, which is not to be trusted far out.
"""

import argparse
import json
import multiprocessing
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.accuracy import KINDS, SCORES, embed_kinds, fit_projector, read_all, score, take_buildings
from pipeline.config import Config, load_config
from pipeline.retrieval.features import Features

# The noise of an expansion, as a share of the expanded features' root mean square.
EXPANSION_NOISE = 0.1
FAR_OUT = 1_000_000
LABELS = {
    "raw": "raw", "pca_whitened": "PCA-whitened", "whitening": "whitening", "start": "start",
    "projector": "trained projector",
}  # fmt: skip

Result = dict[str, Any]


def expand(embeddings: NDArray[Any], center: NDArray[np.float32], width: int, seed: int) -> NDArray[np.float32]:
    """Return rows (N, width): those around a centre times a fixed random matrix, plus noise drawn from `seed`."""
    matrix = np.random.default_rng(width).standard_normal((len(center), width), dtype=np.float32)
    rows: NDArray[np.float32] = (np.asarray(embeddings, np.float32) - center) @ matrix / np.sqrt(np.float32(width))
    noise = np.random.default_rng(seed).standard_normal(rows.shape, dtype=np.float32)
    rows += noise * np.float32(EXPANSION_NOISE * np.sqrt(np.square(rows).mean()))
    return rows


def draw_buildings(
    features: Features, size: int, val_share: float, seed: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which buildings train, `size` of them, and which validate, as many more as the pipeline's ratio says."""
    num_buildings, num_val = len(features.building_ids), max(2, round(size * val_share))
    if size + num_val > num_buildings:
        raise SystemExit(f"error: {size} training buildings need {num_val} more to validate: {num_buildings} are there")
    rank = np.random.default_rng(seed).permutation(num_buildings)
    return rank < size, (rank >= size) & (rank < size + num_val)


def run_case(config: Config, features: Features, test: Features, size: int, seed: int) -> Result:
    """Train on some of the buildings and score every kind of embedding of the test buildings."""
    started, cpu = time.monotonic(), time.process_time()
    is_train, is_val = draw_buildings(features, size, config.data.val_ratio / config.data.train_ratio, seed)
    train = take_buildings(features, is_train)
    run = fit_projector(config, train, take_buildings(features, is_val), seed)
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu
    rows = embed_kinds(config, run, train, test.embeddings)
    return {
        "size": size, "seed": seed, "images": len(train), "best_epoch": run.best["epoch"], "epochs": run.epoch,
        "collapses": sum(record["collapsed"] for record in run.history), "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "start": {key: value for key, value in run.start.items() if key != "weights"},
        "scores": {kind: score(embedded, test, None) for kind, embedded in rows.items()},
    }  # fmt: skip


def extrapolate(results: list[Result]) -> dict[str, float]:
    """Return the line through the gains in mAP over log10 of the size, and what it says of a million buildings.

    `low` and `high` are two standard errors of a new measurement around the line, which takes for granted that it
    stays a line.
    """
    places = np.log10([result["size"] for result in results])
    gains = np.array([gain_of(result) for result in results])
    slope, level = np.polyfit(places, gains, 1)
    residuals = gains - (level + slope * places)
    variance = np.square(residuals).sum() / max(1, len(gains) - 2)
    around = places - places.mean()
    far = np.log10(FAR_OUT)
    error = np.sqrt(variance * (1 + 1 / len(gains) + (far - places.mean()) ** 2 / np.square(around).sum()))
    value = level + slope * far
    return {"slope_per_decade": float(slope), "value": float(value),
            "low": float(value - 2 * error), "high": float(value + 2 * error)}  # fmt: skip


def gain_of(result: Result) -> float:
    """Return the trained projector's mAP beside the whitening's."""
    return float(result["scores"]["projector"]["map"] - result["scores"]["whitening"]["map"])


def format_table(results: list[Result]) -> list[str]:
    """Return the lines of a Markdown table: means over the seeds, and the smallest gain."""
    kinds = [LABELS[kind] for kind in KINDS]
    lines = ["| buildings | " + " | ".join(kinds) + " | projector - whitening (least) | collapses |",
             "| --- " * (len(KINDS) + 3) + "|"]  # fmt: skip
    for size in dict.fromkeys(result["size"] for result in results):
        own = [result for result in results if result["size"] == size]
        cells = [
            " / ".join(f"{np.mean([result['scores'][kind][key] for result in own]):.4f}" for key in reversed(SCORES))
            for kind in KINDS
        ]
        gains = [gain_of(result) for result in own]
        num_collapses = sum(result["collapses"] for result in own)
        cells += [f"{np.mean(gains):+.4f} ({min(gains):+.4f})", str(num_collapses)]
        lines.append(f"| {size:,} ({len(own)}) | " + " | ".join(cells) + " |")
    return lines


def plot(results: list[Result], path: Path) -> None:
    """Draw the mAP of each kind over the number of training buildings, every seed as a dot."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axis = figure.subplots()
    sizes = list(dict.fromkeys(result["size"] for result in results))
    for number, kind in enumerate(KINDS):
        values = [[result["scores"][kind]["map"] for result in results if result["size"] == size] for size in sizes]
        colour = f"C{number}"
        axis.plot(sizes, [np.mean(own) for own in values], color=colour, label=LABELS[kind])
        for size, own in zip(sizes, values, strict=True):
            axis.plot([size] * len(own), own, ".", color=colour, markersize=4)
    axis.set(xscale="log", xlabel="training buildings", ylabel="test mAP")
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
    with rc_context({"svg.hashsalt": "scaling"}):  # the same curve is the same file
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)


_shared: list[Any] = []


def _share(*values: Any) -> None:
    torch.set_num_threads(1)  # the workers share the cores
    _shared[:] = values


def _run_shared(case: tuple[int, int]) -> Result:
    return run_case(*_shared, *case)


def main() -> None:
    """Measure the curve from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--test-merged-dir", type=Path, required=True, help="merged splits of other streets")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 300, 1000, 3000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test-buildings", type=int, default=1000, help="at most, drawn once")
    parser.add_argument("--expand", type=int, help="numbers of a random expansion, positive and negative")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--plot", type=Path, help="SVG or PNG")
    parser.add_argument("--output", type=Path, help="every score as JSON")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.set)
    features, test = read_all(config.path("merged_dir")), read_all(arguments.test_merged_dir)
    drawn = np.random.default_rng(0).permutation(len(test.building_ids)) < arguments.test_buildings
    test = take_buildings(test, drawn)
    if arguments.expand:
        center = np.asarray(features.embeddings, np.float32).mean(axis=0)
        features, test = (
            replace(part, embeddings=expand(part.embeddings, center, arguments.expand, seed))
            for seed, part in enumerate((features, test))
        )
    results: list[Result] = []
    cases = [(size, seed) for size in arguments.sizes for seed in range(arguments.seeds)]
    shared = (config, features, test)
    with multiprocessing.get_context("spawn").Pool(arguments.workers, _share, shared) as pool:
        for result in pool.imap(_run_shared, cases):
            results.append(result)
            print(f"{result['size']} buildings, seed {result['seed']}: {gain_of(result):+.4f} mAP over whitening, "
                  f"epoch {result['best_epoch']} of {result['epochs']}, {result['cpu_seconds']:.0f} s of one core",
                  file=sys.stderr)  # fmt: skip
            if arguments.output:
                settings = {key: getattr(config, key).model_dump() for key in ("training", "training_model")}
                arguments.output.write_text(json.dumps({"settings": settings, "results": results}, indent=1))
    print("\n".join(format_table(results)))
    if len(arguments.sizes) > 1:
        line = extrapolate(results)
        print(f"gain over whitening: {line['slope_per_decade']:+.4f} for ten times the buildings; as a line "
              f"{line['value']:+.3f} at a million ({line['low']:+.3f} to {line['high']:+.3f})")  # fmt: skip
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
