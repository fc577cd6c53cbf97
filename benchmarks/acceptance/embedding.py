"""Phases 4 to 7 and 2-on-1: stage 2's engine on every path, and backbones of every size from tar to parquet."""

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from numpy.typing import NDArray
from transformers import DINOv3ViTConfig, DINOv3ViTModel
from transformers.utils import logging as transformers_logging

from benchmarks import plain_loops, synthetic
from benchmarks.acceptance.findings import Findings
from benchmarks.fidelity import LEAST_COSINE, check_paths, embed_plainly, smallest_cosine
from benchmarks.harness import ROUNDS, measure_product, read_peak, time_call, time_steady
from benchmarks.inference import count_operations, run_stage, time_model
from benchmarks.synthetic import draw_picture, draw_pictures
from generate_embeddings import generate_embeddings
from pipeline.config import count_cores, load_config
from pipeline.inference.backbone import Embedder
from pipeline.inference.devices import full_precision, uncompile
from pipeline.inference.engine import embed_stream, use_one_thread
from pipeline.inference.images import decode_rgb
from pipeline.inference.pixels import decode_pixels, to_pixels
from pipeline.inference.precision import (
    MODES,
    NUM_PICTURES,
    Precision,
    choose_precision,
    measure_cosines,
    release,
    summarize,
)
from pipeline.log import Stopwatch
from pipeline.threads import map_in_order
from preprocess_raw_data import process_tar

# Sizes of pictures, one of them too large to be resized on the GPU, and JPEG's chroma subsamplings.
SIZES = ((448, 448), (640, 640), (131, 97), (97, 131), (1001, 301), (33, 47), (1300, 900))
SUBSAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}
# A random model's embeddings of two pictures may be this similar at most, or a cosine could not tell them apart.
MOST_ALIKE = 0.998
# 128 and 256 were fastest in earlier measurements; finding that out takes 2,000 images.
LARGEST_BATCH = 128
# As fast as the limit: the model alone, or the cores that decode.
SHARE_OF_LIMIT = 0.95
# hidden size, blocks, heads, MLP width (DINOv3's model cards); the 7B's MLP is gated.
SHAPES = {
    "vit-s": (384, 12, 6, 1536),
    "vit-b": (768, 12, 12, 3072),
    "vit-l": (1024, 24, 16, 4096),
    "vit-7b": (4096, 40, 32, 8192),
}
TOY_SHAPE = (96, 2, 4, 192)
# Standard deviation of a ViT-B's weights; narrower inputs take larger ones, so that a sum of products keeps its size.
DEVIATION, DEVIATION_WIDTH = 0.02, 768
PIXELS, TOY_PIXELS = 224, 64
SHARD_SIZE, TOY_SHARD_SIZE = "5GB", "200KB"


def write_backbone(name: str, folder: Path, device: torch.device, *, is_toy: bool) -> Path:
    """Write a model's folder as published: settings, processor, weights in bfloat16 and shards."""
    transformers_logging.disable_progress_bar()
    pixels = TOY_PIXELS if is_toy else PIXELS
    model = _make_vit(name, device, is_toy=is_toy)
    model.save_pretrained(folder, max_shard_size=TOY_SHARD_SIZE if is_toy else SHARD_SIZE)
    _make_processor(pixels).save_pretrained(folder)
    return folder


def _make_vit(name: str, device: torch.device, *, is_toy: bool) -> Any:
    """Return a DINOv3 in bfloat16 on the device; on a CPU the largest would take 92 s of a core."""
    width, blocks, heads, mlp = TOY_SHAPE if is_toy else SHAPES[name]
    config = DINOv3ViTConfig(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, intermediate_size=mlp,
        use_gated_mlp=name == "vit-7b", num_register_tokens=4, patch_size=16,
        image_size=TOY_PIXELS if is_toy else PIXELS,
    )  # fmt: skip
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = DINOv3ViTModel(config).eval()
            draw_weights(model, DEVIATION * (DEVIATION_WIDTH / width) ** 0.5)
            return model
    finally:
        torch.set_default_dtype(previous)


def draw_weights(model: torch.nn.Module, deviation: float) -> None:
    """Draw every matrix and token anew from a normal distribution.

    transformers takes trunc_normal_, which torch 2.11 gets wrong in bfloat16: 0.4 % of the weights become 2 or -2, and
    embeddings in bfloat16 then lie far from those in float32.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=deviation)


def _make_processor(pixels: int) -> Any:
    """Return DINOv3's image processor, whose name depends on the version of transformers."""
    kind = getattr(transformers, "DINOv3ViTImageProcessor", None) or transformers.DINOv3ViTImageProcessorFast
    return kind(size={"height": pixels, "width": pixels})


class Backbone:
    """A model folder with random weights, tars of pictures, and the configuration of stages 1 and 2."""

    def __init__(self, name: str, findings: Findings, num_images: int = 0, **settings: Any) -> None:
        """Write it all, for so many images; the settings are of `[embedding_model]`."""
        self.findings, self.name, self.num_images = findings, name, num_images
        work_dir = findings.work_dir / name
        with findings.part(f"{name}, random weights"):
            self.folder = write_backbone(name, work_dir / "model", findings.device, is_toy=findings.is_toy)
        self.pictures = draw_pictures(64 if findings.is_toy else 640)
        self.raw_dir = work_dir / "raw"
        self.config_path = synthetic.make_config(
            work_dir,
            embedding_model={"model_name": str(self.folder), "compile": not findings.is_toy} | settings,
            infrastructure={"device": findings.device.type},
        )
        if num_images:
            synthetic.make_tars(self.raw_dir, self.pictures, num_images, 2)
            run_stage(process_tar, self.config_path)
        release()

    def load(self, mode: str, **settings: Any) -> Embedder:
        """Load the model as stage 2 does, to compute in a mode, with other settings of `[embedding_model]`."""
        overrides = [f"embedding_model.{key}={json.dumps(value)}" for key, value in settings.items()]
        embedder = generate_embeddings.load_embedder(self.folder, load_config(self.config_path, overrides), mode)
        if self.findings.is_toy:  # the CPU does what is left to a GPU
            embedder.resizes_on_device = True
        return embedder

    def choose_mode(self, pictures: Sequence[bytes]) -> str:
        """Return the mode that stage 2 chooses by these pictures; note how near each that it tries comes to float32."""
        chosen = choose_precision(partial(self.load, compile=False, batch_size=NUM_PICTURES), pictures)
        name = self.name
        self.findings.note(**{f"{name}, chosen mode": chosen.mode, f"{name}, cosines of modes tried": chosen.cosines})
        return chosen.mode

    def embed_plainly(
        self, pictures: Sequence[bytes], loaded: tuple[object, torch.nn.Module] | None = None
    ) -> NDArray[np.float64]:
        """Return what transformers makes of pictures, one at a time, in float32; (N, D).

        `loaded` holds the processor and the model, if they are there. Checks that the random weights tell the pictures
        apart, or nearly everything would be near enough.
        """
        torch.backends.cudnn.allow_tf32 = False  # which is torch's default for convolutions
        with full_precision():
            expected = embed_plainly(*(loaded or plain_loops.load(self.folder, self.findings.device)), pictures)
        release()
        unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        alike = float((unit @ unit.T - 2 * np.eye(len(unit))).max())
        self.findings.check(f"{self.name}: cosine of the two pictures most alike", alike, at_most=MOST_ALIKE)
        return expected

    def run_stage_2(self, embedder: Embedder, precision: Precision) -> tuple[float, str]:
        """Run stage 2 from tars to parquet, the model being chosen and loaded.

        Returns the images/s while the engine runs, the better of two rounds behind a warm-up, and where the time of the
        last round went.
        """
        rates = []
        with (
            patch.object(generate_embeddings, "settle_precision", lambda *_: precision),
            patch.object(generate_embeddings, "load_embedder", lambda *_: embedder),
        ):
            for _ in range(1 + ROUNDS):
                watch: Any = run_stage(generate_embeddings, self.config_path).watch
                rates.append(watch.images / watch.wall_seconds)
        return max(rates[1:]), watch.describe_parts()

    def run_script(self, num_processes: int) -> None:
        """Run stage 2's script anew by so many processes."""
        command = [sys.executable, generate_embeddings.__file__, "--config", str(self.config_path), "--overwrite"]
        shards = [[*command, "--shard", f"{index}/{num_processes}"] for index in range(num_processes)]
        running = [subprocess.Popen(words, stdout=sys.stderr) for words in shards]
        for process in running:
            if process.wait():
                raise subprocess.CalledProcessError(process.returncode, process.args)

    def read_output(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the embeddings (N, D) that stage 2 wrote, and which of the pictures each is of (N,)."""
        table = pq.read_table(load_config(self.config_path).path("embeddings_dir"), columns=["patch_id", "embedding"])
        rows = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
        return rows, table["patch_id"].to_numpy() % len(self.pictures)


def check_engine(findings: Findings) -> None:
    """Hold every path through the engine to libjpeg and the float32 loop, also under stress."""
    backbone = Backbone("vit-s", findings)
    drawn = {
        name: [draw_picture(100 * code + seed, size, subsampling=code) for seed, size in enumerate(SIZES)]
        for name, code in SUBSAMPLINGS.items()
    }
    pictures = [data for group in drawn.values() for data in group]
    with findings.part("decoding"):
        wrong = [not torch.equal(decode_pixels(data), to_pixels(decode_rgb(data))) for data in pictures]
        findings.check(f"pictures decoded otherwise than by libjpeg, of {len(wrong)}", sum(wrong), at_most=0)
    with findings.part("the float32 loop"):
        expected = backbone.embed_plainly(pictures)
    for dtype in ("float32", "bfloat16"):
        with findings.part(f"paths in {dtype}"):
            embedder = backbone.load(dtype, batch_size=32, compile=dtype == "bfloat16" and not findings.is_toy)
            for place, (subsampling, group) in enumerate(drawn.items()):
                rows = expected[place * len(SIZES) : (place + 1) * len(SIZES)]
                for path, cosine in check_paths(embedder, group, rows).items():
                    what = f"{dtype}, {subsampling}, {path}: least cosine"
                    findings.check(what, cosine, at_least=LEAST_COSINE[embedder.dtype])
    with findings.part("the ladder of modes"):
        backbone.choose_mode(pictures)
    with findings.part("stream under stress"):
        _stress_stream(findings, embedder, pictures, expected)


def _stress_stream(
    findings: Findings, embedder: Embedder, pictures: Sequence[bytes], expected: NDArray[np.float64]
) -> None:
    """Send pictures of all sizes through the engine in any order: each has to come out as itself."""
    chosen = np.random.default_rng(0).integers(0, len(pictures), 100 if findings.is_toy else 8_192)
    stream = embed_stream(
        embedder, chosen.tolist(), lambda index: embedder.decode(pictures[index]), count_cores(), Stopwatch()
    )
    rows = np.concatenate([done.embeddings for done in stream if done.embeddings is not None])
    _check_rows(findings, "the stream", rows, chosen, expected)


def _check_rows(
    findings: Findings, what: str, rows: NDArray[Any], chosen: NDArray[np.int64], expected: NDArray[np.float64]
) -> None:
    """Check embeddings (N, D) against what is expected of the pictures (P, D) that they are of (N,)."""
    findings.check(f"{what}: least cosine", smallest_cosine(rows, expected[chosen]), at_least=0.999)
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    wrong = (rows.astype(np.float64) @ unit.T).argmax(axis=1) != chosen
    findings.check(f"{what}: rows nearer to another picture, of {len(rows)}", int(wrong.sum()), at_most=0)


def measure_large(findings: Findings) -> None:
    backbone = Backbone("vit-l", findings, 40 if findings.is_toy else 8_192)
    measure(backbone, {"ViT-L from tar to parquet, img/s": 2_700})


def measure_largest(findings: Findings) -> None:
    """Measure ViT-7B, loaded once, and how near each way to compute it comes to float32."""
    backbone = Backbone("vit-7b", findings, 40 if findings.is_toy else 1_024, batch_size=LARGEST_BATCH)
    measure(backbone, {"ViT-7B from tar to parquet, img/s": 205}, SHARE_OF_LIMIT)


def measure_small(findings: Findings) -> None:
    """Measure what the cores decode, ViT-B, and the plain loop."""
    with findings.part("decoding"):
        ceiling = _measure_decoding(draw_pictures(64 if findings.is_toy else 640))
        findings.note(decoding_ceiling_per_s=ceiling)
    backbone = Backbone("vit-b", findings, 40 if findings.is_toy else 8_192)
    measure(backbone, {"ViT-B from tar to parquet, img/s": min(6_000, SHARE_OF_LIMIT * ceiling)})
    with findings.part("the plain loop"):
        plain = _time_plain_loop(backbone, 8 if findings.is_toy else 512)
        ours = findings.figures["vit-b, tar to parquet, img/s"]
        findings.note(**{"vit-b, plain loop, img/s": plain, "vit-b, of the plain loop": ours / plain})


def measure(backbone: Backbone, targets: dict[str, float], share: float | None = None) -> None:
    """Load a backbone once, and embed its tars as stage 2 does; then judge what it wrote.

    `share` is the least of the model alone that stage 2 has to reach. The loop in float32 that judges runs the same
    weights, widened.
    """
    findings, name = backbone.findings, backbone.name
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew (proc(5))
    with findings.part(f"{name}, loading"):  # and compiling
        embedder = backbone.load("bfloat16")
    path = "the GPU" if embedder.resizes_on_device else "the CPU"
    findings.note(**{
        f"{name}, mode": "bfloat16", f"{name}, compiled graphs": embedder.num_graphs,
        f"{name}, pictures resized on": path, f"{name}, images a pass": embedder.micro_batch,
        f"{name}, attention": str(getattr(embedder.model.config, "_attn_implementation", None)),
        f"{name}, peak_host_gb": read_peak() / 1e9,
    })  # fmt: skip
    findings.check(f"{name}: compiled", float(embedder.compile_model or findings.is_toy), at_least=1)
    with findings.part(f"{name}, from tar to parquet"):
        rate, parts = backbone.run_stage_2(embedder, Precision("bfloat16"))
        findings.note(**{f"{name}, tar to parquet, img/s": rate, f"{name}, where the time went": parts})
        for what, least in targets.items():
            findings.aim(what, rate, at_least=least)
    with findings.part(f"{name}, the model alone"):
        alone = time_model(embedder, max(2, backbone.num_images // embedder.micro_batch // 2))
        product = measure_product(findings.device, torch.bfloat16, 128 if findings.is_toy else 8_192)
        operations = count_operations(embedder)
        findings.note(**{
            f"{name}, model alone, img/s": alone, f"{name}, tflop an image": operations / 1e12,
            f"{name}, model alone, share of the product": alone * operations / product,
        })  # fmt: skip
        if share is not None:
            findings.aim(f"{name}, share of the model alone", rate / alone, at_least=share)
    with findings.part(f"{name}, beside float32"):
        _compare_modes(backbone, embedder)


def _compare_modes(backbone: Backbone, embedder: Embedder) -> None:
    """Judge the parquet by a loop in float32, and note how near each mode comes to that; the weights end in float32."""
    findings, name = backbone.findings, backbone.name
    decoded = [embedder.decode(data) for data in backbone.pictures]
    uncompile(embedder.model)
    embedder.compile_model = False
    found = {"bfloat16": embedder.embed(decoded)}
    embedder.model.float()
    embedder.dtype = torch.float32
    expected = backbone.embed_plainly(backbone.pictures, (embedder.processor, embedder.model))
    _check_rows(findings, f"{name}, parquet", *backbone.read_output(), expected)
    for mode in MODES:
        if mode != "bfloat16":
            embedder.mode = mode
            found[mode] = embedder.embed(decoded)
    cosines = {mode: summarize(measure_cosines(rows, expected)) for mode, rows in found.items()}
    findings.note(**{f"{name}, cosines to the float32 loop": cosines})


def share_one_gpu(findings: Findings) -> None:
    """Run stage 2 by two processes at once on one GPU: both have to end, with what one process writes."""
    backbone = Backbone("vit-s", findings, 40 if findings.is_toy else 4_096, compile=False, dtype="bfloat16")
    alone = time_call(lambda: backbone.run_script(1))
    expected, _ = backbone.read_output()
    both = time_call(lambda: backbone.run_script(2))
    found, _ = backbone.read_output()
    findings.note(one_process_s=alone, two_processes_s=both)
    findings.check("two processes: least cosine", smallest_cosine(found, expected.astype(np.float64)), at_least=0.999)


def _time_plain_loop(backbone: Backbone, count: int) -> float:
    """Return the images/s of the loop that a user would write, from files that are extracted already."""
    folder = backbone.raw_dir.with_name("files")
    folder.mkdir()
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(backbone.pictures[number % len(backbone.pictures)])
    inputs = paths, *plain_loops.load(backbone.folder, backbone.findings.device)
    return count / time_steady(lambda: plain_loops.embed(*inputs))


def _measure_decoding(pictures: list[bytes]) -> float:
    """Return the images/s that all cores decode."""
    many, threads = 64 * pictures, torch.get_num_threads()

    def decode_all() -> None:
        for _ in map_in_order(decode_pixels, many, count_cores(), initializer=use_one_thread):
            pass

    seconds = time_steady(decode_all)
    torch.set_num_threads(threads)  # for threads yet to come, behind `use_one_thread`
    return len(many) / seconds
