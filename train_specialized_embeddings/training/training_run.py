"""One training run in memory: its epochs, its best one, and the weights that it publishes."""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.log import Progress, Stopwatch, logger
from pipeline.retrieval.checkpoint import going_on_from, project
from pipeline.retrieval.projector import Projector
from pipeline.retrieval.scores import QueryScores
from train_specialized_embeddings.sampling.band_sampler import BandSampler
from train_specialized_embeddings.training.run_files import LATEST
from train_specialized_embeddings.training.starts import Start, make_projector
from train_specialized_embeddings.training.trainer import UNTRAINED, Trainer
from train_specialized_embeddings.training.validation import Scores, ValidationSet, measure_spread

# Embeddings have collapsed where their spread is below this share of the start's.
COLLAPSED_SHARE = 0.25
# Shares of the way from the start to the trained weights that may be published; of equal scores the smallest.
SHARES = (0.0, 0.5, 0.75, 1.0)

Content = dict[str, Any]


@dataclass(frozen=True)
class Material:
    """What all runs on the same splits share; the images are in the start's coordinates."""

    sampler: BandSampler
    features: torch.Tensor  # of the training images, on the device
    validation: ValidationSet
    start: Start
    num_images: int  # of train and val
    trained_on: torch.Tensor | None  # hashes of the training buildings, an earlier run's included


class TrainingRun:
    """A trainer with its history and its best epoch; all that it draws comes from the seed."""

    def __init__(
        self, config: Config, material: Material, watch: Stopwatch, provenance: Content, state: Content | None = None
    ) -> None:
        """Start from the material, or go on from the content of the file that a killed run resumes from."""
        self.config, self.material, self.watch, self.provenance = config, material, watch, provenance
        self.history: list[dict[str, Any]] = []  # one record an epoch, epoch 0 included
        self.best: Content = {}  # the checkpoint of the last epoch as good as the peak
        self.peak: QueryScores | None = None  # validation of the epoch with the best mAP
        torch.manual_seed(config.global_.seed)
        material.sampler.generator.manual_seed(config.global_.seed)
        projector = make_projector(material.start, config.training_model, config.training).to(material.features.device)
        spread = torch.from_numpy(material.start.coordinates.spread)
        self.trainer = Trainer(projector, material.features, material.sampler, config.training, spread)
        if state is not None:
            with going_on_from(config.path("checkpoint_dir") / LATEST):
                self.trainer.restore(state)
                self.history, self.best = list(state["history"]), state["best"]
                self.peak = QueryScores(**{name: values.numpy() for name, values in state["peak"].items()})
                logger.info("going on after epoch %d, the best is %d", self.epoch, self.best["epoch"])

    @property
    def epoch(self) -> int:
        return int(self.history[-1]["epoch"])

    @property
    def is_over(self) -> bool:
        """Whether the run has all its epochs, has not become better for `patience` of them, or has collapsed."""
        section, validated = self.config.training, [record for record in self.history if record["val"]]
        peak = max(validated, key=lambda record: record["val"]["map"])
        has_lost = validated[-1] is self.history[-1] and 0 < section.patience <= self.epoch - peak["epoch"]
        return self.epoch >= section.num_epochs or has_lost or self.has_collapsed

    @property
    def has_collapsed(self) -> bool:
        """Whether the last epoch's embeddings have drawn together."""
        spread = self.history[-1].get("embedding_spread")
        return spread is not None and spread < COLLAPSED_SHARE * self.history[0]["embedding_spread"]

    @property
    def is_periodic(self) -> bool:
        """Whether the last epoch leaves a checkpoint of its own."""
        return self.epoch > 0 and self.epoch % self.config.training.save_every_n_epochs == 0

    def run_epochs(self, label: str) -> Iterator[dict[str, Any]]:
        """Validate the start as epoch 0, then train and validate; yield each epoch's record, and save nothing."""
        if not self.history:
            yield self._add_epoch(UNTRAINED, time.monotonic())
        num_anchors = self.trainer.num_anchors
        with Progress(label, self.config.training.num_epochs * num_anchors, "anchor") as progress:
            progress.resume_at(self.epoch * num_anchors)
            while not self.is_over:
                started = time.monotonic()
                with self.watch.measure("train"):
                    report = self.trainer.run_epoch(progress)
                yield self._add_epoch(report, started)

    def settle(self) -> None:
        """Interpolate between the weights of the start and of the best epoch; publish what validates best.

        The start is published if none is better by a standard error: what few buildings teach holds less elsewhere
        (Wortsman et al. 2022, Robust fine-tuning of zero-shot models).
        """
        validation = self.material.validation
        start, trained = self.best["origin"], self.best["average"]
        mixed, scored, projector = {}, {}, copy.deepcopy(self.trainer.average)
        for share in SHARES:
            mixed[share] = {name: start[name].lerp(trained[name], share) for name in trained}
            projector.load_state_dict(mixed[share])
            scored[share] = self._score(projector)[1]
        tried = {share: validation.summarize(scores) for share, scores in scored.items()}
        chosen = max(tried, key=lambda share: tried[share]["map"])
        if not validation.is_better(scored[chosen], scored[0.0]):
            chosen = 0.0
        logger.info(
            "%g of the way from the start to epoch %d is published; validation mAP by that share: %s",
            chosen, self.best["epoch"], ", ".join(f"{share:g}: {row['map']:.4f}" for share, row in tried.items()),
        )  # fmt: skip
        projector.load_state_dict(mixed[chosen])
        self.best = self.best | {
            "average": mixed[chosen],
            "projector": dict(self.material.start.coordinates.fold(projector).state_dict()),
            "start": self.material.start.note | {"share": chosen},
            **self._describe_epoch(self.best["epoch"] if chosen else 0, tried[chosen]),
        }

    def _score(self, projector: Projector) -> tuple[NDArray[np.float32], QueryScores]:
        """Return the embeddings of the validation images (N, k), and the score of each as a query."""
        with self.watch.measure("validate"):
            embeddings = project(projector, self.material.validation.embeddings, self.trainer.device)
            return embeddings, self.material.validation.score_each(embeddings)

    def _add_epoch(self, report: dict[str, Any], started: float) -> dict[str, Any]:
        """Validate if it is time, add the epoch's record and return it; keep its checkpoint if none is better."""
        epoch, section, validation = len(self.history), self.config.training, self.material.validation
        record: dict[str, Any] = {"epoch": epoch, **report}
        if not self.config.logging.step_losses:
            del record["step_losses"]
        each = scores = None
        if epoch == section.num_epochs or 0 in (
            epoch % section.validate_every_n_epochs, epoch % section.save_every_n_epochs
        ):  # fmt: skip
            embeddings, each = self._score(self.trainer.average)
            record["embedding_spread"], scores = measure_spread(embeddings), validation.summarize(each)
        self.history.append(record | {"val": scores, "seconds": round(time.monotonic() - started, 3)})
        if each is not None and not self.has_collapsed:
            if self.peak is None or self.peak.average_precision.mean() < each.average_precision.mean():
                self.peak = each
            if not validation.is_better(self.peak, each):
                self.best = self.describe()
        return self.history[-1]

    def log_epoch(self, record: dict[str, Any]) -> None:
        """Log the last epoch, and a warning where it went wrong."""
        loss, scores, val = "the start", "not validated", record["val"]
        if record["train_loss"] is not None:
            loss = f"loss {record['train_loss']:.4f}, {record['active_share']:.1%} of banded negatives active"
        if val is not None:
            scores = f"validation mAP {val['map']:.4f}, R@1 {val['recall_at_1']:.4f}"
        best = ", as good as any so far" if self.best["epoch"] == self.epoch else ""
        logger.info("epoch %d: %s, %s%s", self.epoch, loss, scores, best)
        if self.has_collapsed:
            logger.warning("epoch %d: the embeddings have collapsed, training ends: lower [training].learning_rate",
                           self.epoch)  # fmt: skip
        elif record["train_loss"] == 0.0:  # only a loss with a margin comes to that
            logger.warning("epoch %d: no triplet was active: raise [training].margin", self.epoch)

    def _describe_epoch(self, epoch: int, scores: Scores | None) -> Content:
        """Return what the same training gives again, whatever else the machine did or the log gets."""
        history = [
            {key: value for key, value in record.items() if key not in ("seconds", "step_losses")}
            for record in self.history
        ]
        val = self.material.start.baselines | {"projector": scores}
        return {"epoch": epoch, "metrics": {"epoch": epoch, "val": val, "history": history}}

    def describe(self) -> Content:
        """Return the checkpoint of the last epoch, with all that its readers and the next epoch need."""
        config, start = self.config, self.material.start
        folded = start.coordinates.fold(self.trainer.average)
        return self.trainer.state() | {
            "architecture": dict(folded.architecture),
            "projector": dict(folded.state_dict()),
            "coordinates": start.coordinates.state(),
            "start": start.note,
            "trained_on": self.material.trained_on,
            **self._describe_epoch(self.epoch, self.history[-1]["val"]),
            "settings": {
                "seed": config.global_.seed,
                "training": config.training.model_dump(exclude={"init_checkpoint"}),
                "training_model": config.training_model.model_dump(),
            },
            "provenance": self.provenance,
        }

    def describe_rest(self) -> Content:
        """Return what a killed run needs beside the checkpoint of the last epoch."""
        peak = {name: torch.from_numpy(values) for name, values in vars(self.peak).items()}
        return {"best": self.best, "history": self.history, "peak": peak}
