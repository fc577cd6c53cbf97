"""Renders synthetic raw tars: invented buildings along invented streets, in the layout of the 3D Street View data.

    python sample_data/render_streets.py --output DIR [--seed 0] [--buildings 150] [--size 448] [--workers N]

Writes DIR/0001.tar to DIR/0004.tar and DIR/.render.json, which records the parameters, the renderer's own code and the
tars' sizes. A rerun with the same parameters and code keeps the tars if all are there; otherwise it renders all again.
The same seed gives the same bytes on one machine, whatever the number of workers.
"""

import argparse
import hashlib
import io
import os
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.random import PCG64, Generator, SeedSequence

if __package__ in (None, ""):  # run by path: Python put this folder, not the one above it, on sys.path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import cli
from pipeline.errors import ConfigError, PipelineError
from pipeline.workspace import read_json_object, write_json, writing_to
from sample_data.renderer.city import MAX_BUILDINGS, NUM_DATASETS, SINGLETONS, Street, plan_city
from sample_data.renderer.street_scene import photograph_street

MARKER_NAME = ".render.json"
SIZES_PX = 48, 1024
RENDERER_DIR = Path(__file__).with_name("renderer")

Photograph = tuple[str, bytes, bytes]  # stem, JPEG, metadata


def describe_making(city: dict[str, int]) -> dict[str, Any]:
    """Return all that determines the bytes: the city's parameters, the code and the versions of its libraries."""
    code = hashlib.sha256()
    for path in (Path(__file__), *sorted(RENDERER_DIR.glob("*.py"))):
        code.update(path.read_bytes())
    return {**city, "code": code.hexdigest()[:16], "numpy": np.__version__, "pillow": PIL.__version__}


def render_streets(output_dir: Path, workers: int, **city: int) -> list[Path]:
    """Render the tars of a city (`seed`, `buildings`, `size`) unless all are finished; return their paths."""
    started = time.monotonic()
    making, marker_path = describe_making(city), output_dir / MARKER_NAME
    log(f"render_streets workers={workers} {making}")
    marker = read_json_object(marker_path)
    sizes: dict[str, int] = marker["sizes"] if marker.get("parameters") == making else {}
    paths = [output_dir / f"{i + 1:04d}.tar" for i in range(NUM_DATASETS)]
    if not marker and (others := [path for path in paths if path.exists()]):
        raise ConfigError(f"{others[0]}: not rendered here, so it stays: give another --output")
    if all(path.is_file() and path.stat().st_size == sizes.get(path.name) for path in paths):
        log(f"kept the tars of {output_dir}: complete, same parameters")
        return paths
    write_json(marker_path, {"parameters": making, "sizes": {}})
    streets = plan_city(city["seed"], city["buildings"], city["size"])
    for dataset_id, photographs in photograph_datasets(streets, workers):
        path = paths[dataset_id - 1]
        write_tar(path, dataset_id, photographs, city["seed"])
        log(f"wrote {path}: {len(photographs)} images")
    write_json(marker_path, {"parameters": making, "sizes": {path.name: path.stat().st_size for path in paths}})
    log(f"done: {time.monotonic() - started:.1f} s")
    return paths


def photograph_datasets(streets: list[Street], workers: int) -> Iterator[tuple[int, list[Photograph]]]:
    """Photograph streets in parallel and yield each dataset's photographs; a single worker is this process."""
    with ExitStack() as stack:
        found: Iterator[list[Photograph]] = map(photograph_street, streets)
        if workers > 1:  # spawned, so that no state of this process (threads, in tests) leaks into the children
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
            found = pool.map(photograph_street, streets)
        together = zip(streets, found, strict=True)
        for dataset_id, group in groupby(together, lambda pair: pair[0].dataset_id):
            yield dataset_id, sorted(photograph for _, photographs in group for photograph in photographs)


def write_tar(path: Path, dataset_id: int, photographs: list[Photograph], seed: int) -> None:
    """Write one dataset with its members shuffled."""
    folder = f"{dataset_id:04d}/{dataset_id:04d}"
    members: list[tuple[str, bytes]] = []
    for stem, jpeg, metadata in photographs:
        members += [(f"{folder}/{stem}.jpg", jpeg), (f"{folder}/{stem}.txt", metadata)]
    order = Generator(PCG64(SeedSequence(seed, spawn_key=(dataset_id - 1,)))).permutation(len(members))
    with writing_to(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in (members[i] for i in order.tolist()):
            member = tarfile.TarInfo(name)  # without time and owner
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def log(line: str) -> None:
    """Print a line to stderr; stdout is for paths."""
    print(line, file=sys.stderr, flush=True)


def bounded(low: int, high: int) -> Any:
    """Return an argparse type for whole numbers within bounds."""

    def whole_number(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not within {low} to {high}")
        return value

    return whole_number


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(__doc__, config=False)
    parser.add_argument("--output", type=Path, required=True, help="folder for the tars")
    parser.add_argument("--seed", type=bounded(0, 2**31 - 1), default=0)
    help_text = f"targets with 2 to 7 images; {SINGLETONS} more get a single one"
    parser.add_argument("--buildings", type=bounded(NUM_DATASETS, MAX_BUILDINGS), default=150, help=help_text)
    parser.add_argument("--size", type=bounded(*SIZES_PX), default=448, help="side of the images in pixels")
    parser.add_argument("--workers", type=bounded(1, 256), default=len(os.sched_getaffinity(0)), help="processes")
    arguments = parser.parse_args(argv)
    city = {"seed": arguments.seed, "buildings": arguments.buildings, "size": arguments.size}
    try:
        paths = render_streets(arguments.output, arguments.workers, **city)
    except BrokenProcessPool:
        raise PipelineError(
            f"{arguments.output}: a rendering process was killed: run again with fewer --workers or more memory"
        ) from None
    for path in paths:
        print(path)


if __name__ == "__main__":
    cli.run_guarded(main)
