"""Measure how much of reading and decoding holds Python's interpreter lock, and what threads can do in spite of it.

    python benchmarks/decoding.py [--images 2048] [--rounds 5] [--output decoding.json]

Draws JPEGs of 640 px, about 109 KB each, into a tar, and runs stage 2's engine over it with everything but the model:
reading, decoding, gathering passes. One decoding thread on one core, two on two cores, and two processes of one thread
on two cores take turns; the fastest round of each counts. Beside them the processor seconds an image, without those
inside libjpeg, which computes without the lock: more than their inverse no number of threads decodes. Prints JSON.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by path: import from the project, not this folder

import torch

from benchmarks.inference import draw_pictures, on_cores, write_tars
from benchmarks.timing import describe_machine
from generate_embeddings.generate_embeddings import decode_image, read_wanted
from pipeline.files.archive import stream_members
from pipeline.inference import pixels
from pipeline.inference.engine import embed_stream
from pipeline.inference.passes import Launched, Staged
from pipeline.log import EngineWatch

PIXELS: Any = pixels  # whose decoder is another library's


class NoModel:
    """Stands for an Embedder on a GPU as far as the host's work goes: pictures leave it as pixels, in passes."""

    on_gpu = False
    micro_batch = 64

    def decode(self, data: bytes) -> torch.Tensor:
        """Decode an image."""
        return pixels.decode_pixels(data)

    def stage(self, images: Sequence[torch.Tensor]) -> Staged:
        """Keep how many there are."""
        return Staged([torch.zeros(len(images), 1)])

    def launch(self, staged: Staged) -> Launched:
        """Compute nothing."""
        return Launched(list(staged.batches), [])


def run_engine(tar_path: Path, num_threads: int) -> tuple[int, float, float]:
    """Run the engine without a model; return the images, their seconds, and the processor seconds of all threads."""
    left = {member.name: row for row, member in enumerate(stream_members(tar_path)) if member.is_image_name}
    num_images, model, watch = len(left), NoModel(), EngineWatch()
    images = read_wanted(tar_path, left, 0)
    started, processor_started = time.perf_counter(), time.process_time()
    stream = embed_stream(model, images, lambda image: decode_image(image, model), num_threads, watch)  # type: ignore
    with contextlib.closing(stream) as passes:
        done = sum(len(found.items) for found in passes)
    assert done == num_images
    return num_images, time.perf_counter() - started, time.process_time() - processor_started


def measure_rate(tar_path: Path, num_threads: int) -> float:
    """Return the images/s of the engine without a model."""
    num_images, seconds, _ = run_engine(tar_path, num_threads)
    return num_images / seconds


@contextlib.contextmanager
def timing_libjpeg() -> Iterator[list[float]]:
    """Yield a list to which the processor seconds of each call of torchvision's decoder are added."""
    assert PIXELS.decode_jpeg is not None, "torchvision has no decode_jpeg any more: Pillow decodes"
    decode, seconds, lock = PIXELS.decode_jpeg, list[float](), threading.Lock()

    def timed(*arguments: Any, **options: Any) -> torch.Tensor:
        started = time.thread_time()
        found: torch.Tensor = decode(*arguments, **options)
        with lock:
            seconds.append(time.thread_time() - started)
        return found

    PIXELS.decode_jpeg = timed
    try:
        yield seconds
    finally:
        PIXELS.decode_jpeg = decode


def measure_lock(tar_path: Path) -> tuple[float, float]:
    """Return the processor seconds an image, all threads together, and those of them outside libjpeg."""
    with timing_libjpeg() as inside:
        num_images, _, total = run_engine(tar_path, 1)
    return total / num_images, (total - sum(inside)) / num_images


class Processes:
    """Processes that each run the engine over a tar of their own when they are told to, all at once."""

    def __init__(self, tar_paths: Sequence[Path]) -> None:
        command = [sys.executable, __file__, "--one-process"]
        self._running = [
            subprocess.Popen([*command, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for path in tar_paths
        ]
        self._ask("")

    def run(self) -> float:
        """Return the images/s of all: those of the slowest times their number."""
        return len(self._running) * min(map(float, self._ask("go\n")))

    def _ask(self, order: str) -> list[str]:
        for process in self._running:
            assert process.stdin is not None
            process.stdin.write(order)
            process.stdin.flush()
        return [process.stdout.readline() for process in self._running if process.stdout is not None]

    def close(self) -> None:
        """End them."""
        for process in self._running:
            process.communicate()


def obey(tar_path: Path) -> None:
    """Be one of `Processes`."""
    measure_rate(tar_path, 1)  # the file into memory
    print("ready", flush=True)
    for _ in sys.stdin:
        print(measure_rate(tar_path, 1), flush=True)


def measure(work_dir: Path, num_images: int, side: int, rounds: int) -> dict[str, Any]:
    """Return the figures."""
    write_tars(work_dir / "raw", draw_pictures(side), num_images)
    halves = sorted((work_dir / "raw").iterdir())
    write_tars(work_dir / "whole", draw_pictures(side), num_images, num_tars=1)
    [whole] = (work_dir / "whole").iterdir()
    rates: dict[str, list[float]] = {"one thread": [], "two threads": [], "two processes": []}
    costs = []
    with on_cores(2), contextlib.closing(Processes(halves)) as processes:
        for _ in range(rounds):
            rates["two threads"].append(measure_rate(whole, 2))
            rates["two processes"].append(processes.run())
            with on_cores(1):
                rates["one thread"].append(measure_rate(whole, 1))
                costs.append(measure_lock(whole))
    total, outside = min(costs)
    best = {name: max(found) for name, found in rates.items()}
    return {
        "images_per_s": best,
        "two_threads_to_one": best["two threads"] / best["one thread"],
        "two_threads_to_two_processes": best["two threads"] / best["two processes"],
        "cpu_seconds_an_image": total,
        "outside_libjpeg": outside,
        "share_with_the_lock_at_most": outside / total,
        "threads_images_per_s_at_most": 1 / outside,
        "rounds": rates,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--side", type=int, default=640, help="of the pictures, in pixels")
    parser.add_argument("--rounds", type=int, default=5, help="of which the fastest counts")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    parser.add_argument("--one-process", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one_process:
        obey(arguments.one_process)
        return
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as name:
        figures = measure(Path(name), arguments.images, arguments.side, arguments.rounds)
    text = json.dumps(figures | {"machine": machine, "images": arguments.images, "side": arguments.side}, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
