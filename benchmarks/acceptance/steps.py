"""Phases 3 and 3-start: stage 6's steps on a table beyond 2^31 numbers, resuming from a checkpoint, and the start."""

import time
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile

from benchmarks.acceptance.findings import Findings
from benchmarks.harness import time_call, time_steady
from benchmarks.synthetic import make_features, make_neighbors
from pipeline.config import TrainingSection
from pipeline.log import Progress
from pipeline.retrieval.checkpoint import load_checkpoint, save_checkpoint
from pipeline.retrieval.projector import Projector
from pipeline.retrieval.whitening import Scatter, collect_scatters
from train_specialized_embeddings.sampling.band_sampler import BandSampler
from train_specialized_embeddings.training import starts
from train_specialized_embeddings.training.starts import NUM_COORDINATES
from train_specialized_embeddings.training.step_graph import LEAST_STEPS
from train_specialized_embeddings.training.trainer import Trainer, choose_batch_size, move_features
from train_specialized_embeddings.training.validation import choose_validation_set

# The first columns hold the row's number, in digits that bfloat16 represents exactly.
DIGITS, BASE = 3, 128
STEPS, TOY_STEPS = 64, 8  # of an epoch
LONGEST = 10  # operators of a profile
TRAINING_IMAGES = 4_060_000  # of the first city


class Bench:
    """A table on the device, a sampler of its rows, and trainers on them."""

    def __init__(self, findings: Findings) -> None:
        self.is_toy, self.device = findings.is_toy, findings.device
        self.steps = TOY_STEPS if self.is_toy else STEPS
        self.count, width = (600, 48) if self.is_toy else (2**20, 4_096)
        self.features = make_features(self.count, width)
        for digit in range(DIGITS):
            self.features.embeddings[:, digit] = np.arange(self.count) // BASE**digit % BASE
        numbers = {"table_gb": 2 * self.count * width / 1e9}
        started = time_call(self._fill)
        findings.note(**numbers, upload_gb_per_s=4 * self.count * width / 1e9 / started)
        self.sampler = BandSampler(self.features, make_neighbors(self.features), 0, 25.0, self.device)

    def _fill(self) -> None:
        self.wide = move_features(self.features.embeddings, self.device)

    def make_trainer(self, store: torch.Tensor, width: int, section: TrainingSection) -> Trainer:
        """Return a trainer at its start, the same each time."""
        torch.manual_seed(0)
        self.sampler.generator.manual_seed(0)
        projector = Projector(width, 256, 512, 1, 0.1, "gelu").to(self.device)
        return Trainer(projector, store, self.sampler, section, torch.ones(width))


def train_steps(findings: Findings) -> None:
    """Draw the last rows, time steps at two sizes of batch, and save and take up a run."""
    with findings.part("the table"):
        bench = Bench(findings)
    with findings.part("draws"):
        _check_last_rows(findings, bench)
    batches = (32, 64) if bench.is_toy else (4_096, 16_384)
    for batch_size in batches:
        with findings.part(f"triplets at {batch_size}"):
            rate = _time_triplets(bench, batch_size)
            findings.note(**{f"triplets_per_s_at_{batch_size}": rate})
            if batch_size == batches[-1]:
                findings.aim(f"triplets/s at batch {batch_size:,}, resident", rate, at_least=1.5e6)
    for batch_size in (choose_batch_size(TRAINING_IMAGES), batches[0]):
        with findings.part(f"the default objective at {batch_size}"):
            _time_default(findings, bench, batch_size)
    with findings.part("save and resume"):
        _check_resume(findings, bench, batches[0])


def _check_last_rows(findings: Findings, bench: Bench) -> None:
    """Check that the sampler returns the requested rows, up to the table's end."""
    rows = torch.arange(bench.count - 256, bench.count, device=bench.device)
    rows = torch.cat([rows, rows[:1] // 2, rows[:1] * 0]).flip(0)
    digits = bench.wide[rows, :DIGITS].double().cpu()
    numbers = (digits * torch.tensor([float(BASE**digit) for digit in range(DIGITS)])).sum(dim=1)
    findings.check("last rows drawn that are others", int((numbers != rows.cpu()).sum()), at_most=0)


def _make_section(bench: Bench, batch_size: int) -> TrainingSection:
    return TrainingSection(
        batch_size=batch_size, anchors_per_epoch=bench.steps * batch_size, loss="triplet", band_sampling="ucb",
    )  # fmt: skip


def _time_triplets(bench: Bench, batch_size: int) -> float:
    """Return the triplets a second of an epoch with bands and bandit, on all the features."""
    trainer = bench.make_trainer(bench.wide, bench.features.width, _make_section(bench, batch_size))
    seconds = time_steady(lambda: trainer.run_epoch(Progress("train", None)))
    return trainer.num_anchors / seconds


def _time_default(findings: Findings, bench: Bench, batch_size: int) -> None:
    """Note the anchors a second of stage 6's own objective, in coordinates, and where the time of a step goes."""
    width = min(NUM_COORDINATES, bench.features.width)
    store = move_features(np.ascontiguousarray(bench.features.embeddings[:, :width]), bench.device)
    section = TrainingSection(batch_size=batch_size, anchors_per_epoch=bench.steps * batch_size, num_epochs=LEAST_STEPS)
    trainer = bench.make_trainer(store, width, section)
    seconds = time_steady(lambda: trainer.run_epoch(Progress("train", None)))
    findings.note(**{f"default_anchors_per_s_at_{batch_size}": trainer.num_anchors / seconds,
                     f"seconds_a_step_at_{batch_size}": seconds / bench.steps,
                     f"captured_at_{batch_size}": trainer.graph is not None,
                     f"profile_at_{batch_size}": profile_epoch(trainer, bench.steps)})  # fmt: skip


def profile_epoch(trainer: Trainer, num_steps: int) -> dict[str, Any]:
    """Return the operators and launches of a step, and the ten operators or kernels that take longest in an epoch."""
    on_gpu = trainer.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        trainer.run_epoch(Progress("train", None))
    events: list[Any] = list(profiler.key_averages())
    kind = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    longest = sorted(events, key=lambda event: -getattr(event, kind))[:LONGEST]
    counts = {
        "operators": sum(event.count for event in events if event.key.startswith("aten::")),
        "launches": sum(event.count for event in events if "LaunchKernel" in event.key or "GraphLaunch" in event.key),
        "waits": sum(event.count for event in events if "Synchronize" in event.key),
    }
    return {
        **{f"{name} a step": count / num_steps for name, count in counts.items()},
        "longest": {event.key[:80]: f"{event.count} x, {getattr(event, kind) / 1e3:.3f} ms" for event in longest},
    }


def _check_resume(findings: Findings, bench: Bench, batch_size: int) -> None:
    """Check that a resumed run draws the same and ends with the same weights; on a GPU sums differ in their order."""
    width, section = bench.features.width, _make_section(bench, batch_size)
    first = bench.make_trainer(bench.wide, width, section)
    first.run_epoch(Progress("train", None))
    path = findings.work_dir / "checkpoint.pt"
    saved = first.state()
    content = {"architecture": first.projector.architecture, "projector": saved["weights"], "trainer": saved}
    save_checkpoint(path, content)
    first.run_epoch(Progress("train", None))
    expected = first.state()
    second = bench.make_trainer(bench.wide, width, section)
    second.restore(load_checkpoint(path).rest["trainer"])
    second.run_epoch(Progress("train", None))
    found = second.state()
    same = torch.equal(expected["sampler"]["random"], found["sampler"]["random"])
    findings.check("a run taken up has drawn the same", float(same), at_least=1)
    one, other, before = (torch.cat([weight.flatten() for weight in state["weights"].values()])
                          for state in (expected, found, saved))  # fmt: skip
    difference = float((one - other).norm() / (one - before).norm())
    findings.check("its weights: difference, of an epoch's way", difference, at_most=0.0 if bench.is_toy else 0.05)


def measure_start(findings: Findings) -> None:
    """Time the start of training at full width, and scale what grows with the images to the first city's."""
    count, width = (600, 48) if findings.is_toy else (2**20, 4_096)
    section, seconds = TrainingSection(), {"scatter": 0.0}
    with findings.part("the phase's own data"):
        features = make_features(count, width)
        validation = choose_validation_set(make_features(count // 64, width), section.validation_images, 0)

    def collect(*arguments: Any) -> list[Scatter]:
        started = time.perf_counter()
        found = collect_scatters(*arguments)
        seconds["scatter"] += time.perf_counter() - started
        return found

    with findings.part("the start"), patch.object(starts, "collect_scatters", collect):
        begun = time.perf_counter()
        start = starts.fit_start(features, validation, min(256, width), section, findings.device)
        seconds["maps"] = time.perf_counter() - begun - seconds["scatter"]
        seconds["coordinates"] = time_call(lambda: store_coordinates(start, features.embeddings, findings.device))
        growing = seconds["scatter"] + seconds["coordinates"]
        findings.note(start_s=seconds, start_s_of_all_images=growing * TRAINING_IMAGES / count + seconds["maps"])
    with findings.part("coordinates"):
        store = store_coordinates(start, features.embeddings[:1_000], findings.device)
        found = store[:1_000].float().cpu().numpy()
        expected = start.coordinates.linear_map.map_rows(features.embeddings[:1_000])
        error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        findings.check("coordinates, relative difference", error, at_most=1e-2)  # of bfloat16


def store_coordinates(start: starts.Start, embeddings: NDArray[np.float32], device: torch.device) -> torch.Tensor:
    """Return the store of rows in the start's coordinates, as stage 6 makes it."""
    return move_features(start.coordinates.linear_map.map_rows(embeddings, device), device)
