"""Time stages 1, 2 and 4 on a CPU beside the loops that a user would write.

    python benchmarks/inference.py [--images 512] [--cores 2] [--output inference.json]

Draws JPEGs of 640 px, about 109 KB each, into two tars; stage 2 embeds them with EfficientNet-Lite0. Each figure stands
beside a plain loop and beside its limit: the model alone, or libjpeg's entropy decoder alone. GPUs are measured by
gpu_acceptance.py.
"""

import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by path: import from the project, not this folder

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import plain_loops
from benchmarks.harness import make_parser, run_child, take_turns, time_steady, write_results
from benchmarks.synthetic import draw_pictures, make_config, make_tars
from generate_embeddings import generate_embeddings
from pipeline import cli
from pipeline.config import load_config
from pipeline.inference.backbone import Embedder, Staged
from pipeline.inference.engine import use_one_thread
from pipeline.inference.images import check_image
from pipeline.log import logger
from pipeline.threads import map_in_order
from preprocess_raw_data import compute_fingerprints, process_tar
from sample_data import convert_lite0

Row = dict[str, Any]


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Run the block, and its threads and processes, on `count` cores."""
    everything = os.sched_getaffinity(0)
    threads = torch.get_num_threads()
    os.sched_setaffinity(0, sorted(everything)[:count])
    torch.set_num_threads(count)
    try:
        yield
    finally:
        os.sched_setaffinity(0, everything)
        torch.set_num_threads(threads)


def run_stage(stage: Any, config_path: Path, *overrides: str) -> cli.StageResult:
    """Run a stage in this process, anew."""
    config = load_config(config_path, [f"infrastructure.num_workers={len(os.sched_getaffinity(0))}", *overrides])
    result: cli.StageResult = stage.run(config, cli.Options(overwrite=True))
    assert result.counts["rejected"] == 0
    return result


def make_row(what: str, rate: float, beside: str, plain_rate: float, limit: str, limit_rate: float) -> Row:
    """Return a line of the table; rates in images/s."""
    return {
        "what": what, "img/s": rate, "beside": beside, "its img/s": plain_rate, "ratio": rate / plain_rate,
        "limit": limit, "limit img/s": limit_rate, "share of the limit": rate / limit_rate,
    }  # fmt: skip


def time_decoding(work_dir: Path, config_path: Path, num_images: int, rounds: int) -> list[Row]:
    """Time stages 1 and 4 on one core beside their plain loops and limits."""
    tars = sorted((work_dir / "raw").iterdir())
    extracted = plain_loops.extract(tars, work_dir / "extracted")
    files = [path.read_bytes() for path in extracted]

    def extract_and_validate() -> None:
        with tempfile.TemporaryDirectory(dir=work_dir) as folder:
            plain_loops.validate(plain_loops.extract(tars, Path(folder)))

    calls = {
        "stage 1": lambda: run_stage(process_tar, config_path),
        "plain 1": extract_and_validate,
        "checks": lambda: [check_image(data) for data in files],
        "stage 4": lambda: run_stage(compute_fingerprints, config_path),
        "plain 4": lambda: plain_loops.fingerprint(extracted),
        "entropy": lambda: [decode_entropy(data) for data in files],
    }
    with on_cores(1):
        rates = {name: num_images / seconds for name, seconds in take_turns(calls, rounds).items()}
    return [
        make_row("stage 1, one core", rates["stage 1"], "extract, Pillow open + load", rates["plain 1"],
                 "the checks alone", rates["checks"]),
        make_row("stage 4, one core", rates["stage 4"], "full decode + resize, files extracted", rates["plain 4"],
                 "libjpeg's entropy decoder alone", rates["entropy"]),
    ]  # fmt: skip


def decode_entropy(data: bytes) -> None:
    """Decode a JPEG to one grey pixel a block: hardly more than the entropy decoder, which no scale spares."""
    image = Image.open(io.BytesIO(data))
    image.draft("L", (image.width // 8, image.height // 8))
    image.load()


def time_embedding(folder: Path, work_dir: Path, config_path: Path, num_images: int, rounds: int, cores: int) -> Row:
    """Time stage 2 with a backbone beside the plain loop and the model alone."""
    settings = [f'embedding_model.model_name="{folder}"', 'infrastructure.device="cpu"']
    plain, engine = [], []
    with on_cores(cores):
        for _ in range(rounds):
            with tempfile.TemporaryDirectory(dir=work_dir) as unpacked:
                # In a process of its own: our allocator is tuned.
                plain.append(run_child(plain_loops.__file__, folder, unpacked, *sorted((work_dir / "raw").iterdir())))
            started = time.perf_counter()
            result = run_stage(generate_embeddings, config_path, *settings)
            engine.append(time.perf_counter() - started - result.watch.seconds["load"])
        alone = time_model(generate_embeddings.load_embedder(folder, load_config(config_path, settings)), 16)
    return make_row(
        f"stage 2, {folder.name}, {cores} cores", num_images / min(engine),
        "extract, 4-worker DataLoader, float32, batch 16", num_images / min(plain), "the model alone", alone,
    )  # fmt: skip


def time_model(embedder: Embedder, passes: int) -> float:
    """Return the images/s of an embedder's model alone, on inputs that lie on its device."""
    inputs = torch.rand((embedder.micro_batch, *_input_shape(embedder)))
    batches = [Staged([inputs.to(embedder.device, embedder.dtype)]) for _ in range(passes)]
    threads = torch.get_num_threads()

    def run_all() -> None:
        if embedder.on_gpu:
            [embedder.launch(batch) for batch in batches][-1].result()
        else:
            list(map_in_order(embedder.launch, batches, threads, initializer=use_one_thread))

    seconds = time_steady(run_all)
    torch.set_num_threads(threads)
    return passes * len(inputs) / seconds


def count_operations(embedder: Embedder) -> int:
    """Return the multiplications and additions of an embedder's model for one image.

    Counted on a model without weights: the one that runs may be compiled.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.inference_mode():
        model: Any = type(embedder.model)(embedder.model.config)
        model.eval()(pixel_values=torch.empty((1, *_input_shape(embedder))))
    return counter.get_total_flops()


def _input_shape(embedder: Embedder) -> torch.Size:
    return embedder.prepare(torch.zeros((3, 640, 640), dtype=torch.uint8)).shape


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=512, help="4 times as many for stages 1 and 4")
    parser.add_argument("--side", type=int, default=640, help="of the pictures, in pixels")
    parser.add_argument("--cores", type=int, default=2, help="for stage 2")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest counts")
    parser.add_argument("--backbone", type=Path, help="model folder (default: EfficientNet-Lite0)")
    arguments = parser.parse_args(argv)
    logger.setLevel("WARNING")
    pictures = draw_pictures(arguments.side)
    with tempfile.TemporaryDirectory() as name:
        work_dir = Path(name)
        make_tars(work_dir / "raw", pictures, arguments.images, 2)
        config_path = make_config(work_dir)
        # Stages 1 and 4 are fast: fewer images would time the opening and closing of files.
        make_tars(work_dir / "many" / "raw", pictures, 4 * arguments.images, 2)
        many = make_config(work_dir / "many")
        rows = time_decoding(work_dir / "many", many, 4 * arguments.images, arguments.rounds)
        run_stage(process_tar, config_path)
        folder = arguments.backbone.resolve() if arguments.backbone else convert_lite0.run(work_dir / "lite0")
        rows.append(time_embedding(folder, work_dir, config_path, arguments.images, arguments.rounds, arguments.cores))
    write_results(rows, arguments.output, images=arguments.images, side=arguments.side)


if __name__ == "__main__":
    main()
