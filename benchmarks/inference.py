"""Time stages 1, 2 and 4 on a CPU beside the loops that a user would write, and print their ratios.

    python benchmarks/inference.py [--images 512] [--cores 2] [--output inference.json]

Draws JPEGs of 640 px, about 109 KB each, into two tars; stage 2 embeds them with EfficientNet-Lite0. Beside each
figure stands the share of its limit: the model alone, or the entropy decoder alone. Prints a table to stderr, and JSON.
GPUs are measured by gpu_acceptance.py.
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by path: import from the project, not this folder

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import plain_loops
from benchmarks.synthetic import make_config
from benchmarks.timing import describe_machine, least, measure_product, time_steady
from generate_embeddings import generate_embeddings
from pipeline import cli
from pipeline.config import load_config
from pipeline.inference.backbone import Embedder
from pipeline.inference.engine import use_one_thread
from pipeline.inference.images import check_image
from pipeline.inference.passes import Staged
from pipeline.log import logger
from pipeline.threads import map_in_order
from preprocess_raw_data import compute_fingerprints, process_tar
from sample_data import convert_lite0

NUM_DISTINCT = 32
# Grey levels of noise on the drawn pictures, with which 640 px take 109 KB at quality 85.
NOISE = 12
Row = dict[str, Any]


def draw_pictures(side: int) -> list[bytes]:
    """Return encoded pictures of blurred blocks and noise."""
    generator = np.random.default_rng(0)
    pictures = []
    for _ in range(NUM_DISTINCT):
        cells = generator.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC), np.int16)
        noisy = (smooth + generator.integers(-NOISE, NOISE + 1, smooth.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=85)
        pictures.append(buffer.getvalue())
    return pictures


def write_tars(folder: Path, pictures: list[bytes], num_images: int, num_tars: int = 2) -> None:
    """Write tars of so many images together, each with its metadata."""
    folder.mkdir(parents=True)
    for dataset_id in range(1, num_tars + 1):
        with tarfile.open(folder / f"{dataset_id:04d}.tar", "w") as tar:
            for patch in range(dataset_id, num_images + 1, num_tars):
                line = f"d {dataset_id} {patch // 4} {patch} {patch} 52.2 0.1 7 0 0 0 52.2 0.1 1 9 9 1 0\n".encode()
                for suffix, data in (("jpg", pictures[patch % len(pictures)]), ("txt", line)):
                    info = tarfile.TarInfo(f"{dataset_id:04d}/{patch:07d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Run the block, and the threads and processes that it starts, on so many cores."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
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
    assert result.rejected == 0
    return result


# ------------------------------------------------------------------------------------------------ stages 1 and 4


def time_decoding(work_dir: Path, config_path: Path, num_images: int, rounds: int) -> list[Row]:
    """Time stages 1 and 4 on one core beside their plain loops, and what limits them."""
    tars = sorted((work_dir / "raw").iterdir())
    files = [data for tar in tars for data in read_images(tar)]

    def extract_and_validate() -> None:
        with tempfile.TemporaryDirectory(dir=work_dir) as folder:
            for tar in tars:
                plain_loops.validate(plain_loops.extract(tar, Path(folder) / tar.stem))

    extracted = [path for tar in tars for path in plain_loops.extract(tar, work_dir / "extracted" / tar.stem)]
    with on_cores(1):
        seconds = least(
            {
                "stage 1": lambda: run_stage(process_tar, config_path),
                "plain 1": extract_and_validate,
                "checks": lambda: [check_image(data) for data in files],
                "stage 4": lambda: run_stage(compute_fingerprints, config_path),
                "plain 4": lambda: plain_loops.fingerprint(extracted),
                "entropy": lambda: [decode_entropy(data) for data in files],
            },
            rounds,
        )
    rates = {name: num_images / value for name, value in seconds.items()}
    return [
        make_row("stage 1, one core", rates["stage 1"], "extract, Pillow open + load", rates["plain 1"], 2.0,
                 "the checks alone", rates["checks"]),
        make_row("stage 4, one core", rates["stage 4"], "full decode + resize, files extracted", rates["plain 4"], 5.0,
                 "libjpeg's entropy decoder alone", rates["entropy"]),
    ]  # fmt: skip


def read_images(tar_path: Path) -> list[bytes]:
    """Return the JPEGs of a tar."""
    with tarfile.open(tar_path) as tar:
        return [tar.extractfile(info).read() for info in tar if info.name.endswith(".jpg")]  # type: ignore[union-attr]


def decode_entropy(data: bytes) -> None:
    """Decode a JPEG to one grey pixel a block: beside the entropy decoder, which no scale spares, next to nothing."""
    image = Image.open(io.BytesIO(data))
    image.draft("L", (image.width // 8, image.height // 8))
    image.load()


# ------------------------------------------------------------------------------------------------ stage 2


def time_embedding(folder: Path, work_dir: Path, config_path: Path, num_images: int, rounds: int, cores: int) -> Row:
    """Time stage 2 with a backbone beside the plain loop and the model alone."""
    settings = [f'embedding_model.model_name="{folder}"', 'infrastructure.device="cpu"']
    tars = sorted((work_dir / "raw").iterdir())
    paths = [path for tar in tars for path in plain_loops.extract(tar, work_dir / "extracted" / tar.stem)]
    with on_cores(cores):
        plain, engine, results = [], [], []
        for _ in range(rounds):
            started = time.perf_counter()
            with tempfile.TemporaryDirectory(dir=work_dir) as unpacked:
                for tar in tars:
                    plain_loops.extract(tar, Path(unpacked) / tar.stem)
            plain.append(time.perf_counter() - started + time_plain_loop(folder, paths))
            started = time.perf_counter()
            results.append(run_stage(generate_embeddings, config_path, *settings))
            engine.append(time.perf_counter() - started - results[-1].watch.seconds["load"])
        embedder = generate_embeddings.load_embedder(folder, load_config(config_path, settings))
        alone, operations = time_model(embedder, 16), count_operations(embedder)
        ceiling = measure_product(embedder.device, embedder.dtype, 1536)
    rate = num_images / min(engine)
    row = make_row(f"stage 2, {folder.name}, {cores} cores", rate, "extract, 4-worker DataLoader, float32, batch 16",
                   num_images / min(plain), 1.5, "the model alone", alone)  # fmt: skip
    row["matrix_units_share"] = rate * operations / ceiling
    row["last_line"] = results[int(np.argmin(engine))].watch.describe_parts()
    return row


def time_plain_loop(folder: Path, paths: list[Path]) -> float:
    """Return the seconds of the plain loop in a process of its own: in ours the allocator is tuned."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, plain_loops.__file__, str(folder)]
    names = "\n".join(map(str, paths))
    run = subprocess.run(command, check=True, capture_output=True, text=True, input=names, env=environment)
    return float(run.stdout)


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
    """Return the operations that an embedder's model takes for an image, multiplications and additions counted apart.

    Counted on a model without weights: the one that runs may be compiled.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.inference_mode():
        model: Any = type(embedder.model)(embedder.model.config)
        model.eval()(pixel_values=torch.empty((1, *_input_shape(embedder))))
    return counter.get_total_flops()


def _input_shape(embedder: Embedder) -> torch.Size:
    return embedder.prepare(Image.new("RGB", (640, 640), "grey")).shape


def time_shards(folder: Path, config_path: Path, num_images: int, rounds: int) -> Row:
    """Time two processes by --shard on two cores beside one single-threaded process on one."""
    rates = []
    for cores in (1, 2):
        command = [
            sys.executable, str(ROOT / "generate_embeddings" / "generate_embeddings.py"), "--config", str(config_path),
            "--overwrite", "--set", f'embedding_model.model_name="{folder}"', "--processes", str(cores),
            "--set", "infrastructure.device=cpu",
        ]  # fmt: skip
        seconds = []
        with on_cores(cores):
            for _ in range(rounds):
                log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
                walls = [float(wall) for wall in re.findall(r"computed \d+% of ([\d.]+) s", log)]
                assert len(walls) == cores, log
                seconds.append(max(walls))
        rates.append(num_images / min(seconds))
    return make_row(
        "stage 2, 2 processes on 2 cores", rates[1], "1 process, 1 thread, 1 core", rates[0], 1.8,
        "twice the one process", 2 * rates[0],
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ the table


def make_row(
    what: str, rate: float, beside: str, plain_rate: float, target: float | None, limit: str, limit_rate: float
) -> Row:
    """Return a line of the table; rates in images/s."""
    return {
        "what": what, "images_per_s": rate, "beside": beside, "beside_images_per_s": plain_rate,
        "ratio": rate / plain_rate, "target_ratio": target, "limit": limit, "limit_images_per_s": limit_rate,
        "share_of_limit": rate / limit_rate, "limit_ratio": limit_rate / plain_rate,
    }  # fmt: skip


def format_table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| what | img/s | beside | img/s | ratio | target | limit | img/s | share |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        target = f"{row['target_ratio']:.1f}" if row["target_ratio"] else ""
        lines.append(
            f"| {row['what']} | {row['images_per_s']:,.0f} | {row['beside']} | {row['beside_images_per_s']:,.0f} "
            f"| {row['ratio']:.2f} | {target} | {row['limit']} | {row['limit_images_per_s']:,.0f} "
            f"| {row['share_of_limit']:.0%} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Time everything from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="4 times as many for stages 1 and 4")
    parser.add_argument("--side", type=int, default=640, help="of the pictures, in pixels")
    parser.add_argument("--cores", type=int, default=2, help="for stage 2")
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts")
    parser.add_argument("--backbone", type=Path, help="model folder (default: EfficientNet-Lite0)")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    arguments = parser.parse_args(argv)
    logger.setLevel("WARNING")
    machine, rows, pictures = describe_machine(), [], draw_pictures(arguments.side)
    with tempfile.TemporaryDirectory() as name:
        work_dir = Path(name)
        write_tars(work_dir / "raw", pictures, arguments.images)
        config_path = make_config(work_dir)
        # They are fast: fewer images would time the opening and closing of files.
        write_tars(work_dir / "many" / "raw", pictures, 4 * arguments.images)
        many = make_config(work_dir / "many")
        rows += time_decoding(work_dir / "many", many, 4 * arguments.images, arguments.rounds)
        run_stage(process_tar, config_path)
        folder = arguments.backbone.resolve() if arguments.backbone else convert_lite0.run(work_dir / "lite0")
        rows.append(time_embedding(folder, work_dir, config_path, arguments.images, arguments.rounds, arguments.cores))
        rows.append(time_shards(folder, config_path, arguments.images, arguments.rounds))
    print(format_table(rows), file=sys.stderr)
    text = json.dumps({"rows": rows, "machine": machine, "images": arguments.images, "side": arguments.side}, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
