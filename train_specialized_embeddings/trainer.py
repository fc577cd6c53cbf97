"""Train a projector by triplets, an epoch at a time, from a state that can be saved and taken up again exactly."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import TrainingSection
from pipeline.errors import PipelineError
from pipeline.log import Progress, logger
from pipeline.projector import Projector
from train_specialized_embeddings.band_sampler import BandSampler, Triplets, band_shares
from train_specialized_embeddings.losses import relative_drift, triplet_losses
from train_specialized_embeddings.starts import relative_scale
from train_specialized_embeddings.triplets import Rows

# Triplets drawn at once: enough to make numpy's overhead vanish, a few megabytes of indexes.
DRAW_SIZE = 65_536
# The features go to the GPU where they leave it this share of its free memory.
_FREE_SHARE = 0.3


class FeatureStore:
    """The training features, on the device where they fit there."""

    def __init__(self, embeddings: NDArray[np.float32], device: torch.device) -> None:
        self.device = device
        self._table = torch.from_numpy(embeddings)  # (N, D)
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if embeddings.nbytes < (1 - _FREE_SHARE) * free:
                self._table = self._table.to(device)
            else:
                logger.info("the features do not fit on the GPU: they are gathered batch by batch")

    def gather(self, rows: Rows) -> torch.Tensor:
        """Return the features of some rows, (n, D), on the device."""
        index = torch.from_numpy(rows).to(self._table.device)
        return self._table.index_select(0, index).to(self.device)


@dataclass(frozen=True)
class EpochReport:
    """What an epoch's training was like."""

    loss: float  # mean over triplets
    active_share: float  # triplets whose loss is not zero
    band_shares: list[float]
    learning_rates: dict[str, float]  # at the epoch's last step
    num_triplets: int


def rate_factor(step: int, num_steps: int, num_warmup: int) -> float:
    """Return what step `step`, counted from 0, multiplies the learning rates by: linear warm-up, then a half cosine."""
    if step < num_warmup:
        return (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


class Trainer:
    """A projector with its optimiser, schedule and sampler."""

    def __init__(
        self, projector: Projector, store: FeatureStore, sampler: BandSampler, section: TrainingSection
    ) -> None:
        self.projector, self.store, self.sampler, self.section = projector, store, sampler, section
        self.start_weight = projector.shortcut.weight.detach().clone()
        self.step = 0
        auto = section.triplets_per_epoch == "auto"
        self.num_triplets = len(sampler.candidates) if auto else int(section.triplets_per_epoch)
        steps_per_epoch = math.ceil(self.num_triplets / section.batch_size)
        self.num_steps = section.num_epochs * steps_per_epoch
        self.num_warmup = round(section.warmup_epochs * steps_per_epoch)
        self.optimizer = torch.optim.AdamW(self._parameter_groups())

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Group the weights by learning rate; decay would only shrink a shortcut whose output is normalised."""
        section, projector = self.section, self.projector
        decay = section.weight_decay
        rate = section.shortcut_learning_rate * relative_scale(projector.shortcut)
        groups: list[dict[str, Any]] = [
            {"name": "shortcut", "params": list(projector.shortcut.parameters()), "peak_lr": rate, "weight_decay": 0.0}
        ]
        for number, layer in enumerate(projector.hidden):
            rate = section.learning_rate * (relative_scale(layer) if number == 0 else 1.0)
            groups.append(
                {"name": f"hidden.{number}", "params": list(layer.parameters()), "peak_lr": rate, "weight_decay": decay}
            )
        if projector.output is not None:
            rate = section.learning_rate
            groups.append(
                {
                    "name": "output",
                    "params": list(projector.output.parameters()),
                    "peak_lr": rate,
                    "weight_decay": decay,
                }
            )
        return [group | {"lr": 0.0} for group in groups]

    def run_epoch(self, progress: Progress) -> EpochReport:
        """Train on one epoch's triplets.

        Raises PipelineError where no triplet can be drawn, or the loss is no number any more.
        """
        self.projector.train()
        totals = torch.zeros(2, dtype=torch.float64, device=self.store.device)  # loss, active triplets
        bands = []
        anchors = self.sampler.draw_anchors(self.num_triplets)
        for first in range(0, len(anchors), DRAW_SIZE):
            drawn = self.sampler.draw(anchors[first : first + DRAW_SIZE])
            bands.append(drawn.bands)
            for start in range(0, len(drawn), self.section.batch_size):
                totals += self._take_step(drawn, slice(start, start + self.section.batch_size))
            progress.advance(len(anchors[first : first + DRAW_SIZE]))
        drawn_bands = np.concatenate(bands)
        if len(drawn_bands) == 0:
            raise PipelineError(
                "no triplet can be drawn: every image is of the anchor's building, its panorama, or nearer than "
                f"[training].min_negative_distance_m = {self.section.min_negative_distance_m:g}: lower it"
            )
        loss, active = (float(total) / len(drawn_bands) for total in totals.tolist())
        if not math.isfinite(loss):
            raise PipelineError("training diverged (the loss is not a number): lower [training].learning_rate")
        rates = {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups}
        return EpochReport(loss, active, band_shares(drawn_bands), rates, len(drawn_bands))

    def _take_step(self, drawn: Triplets, part: slice) -> torch.Tensor:
        """Move the weights by one batch; return the sum of its losses and its active triplets, (2,)."""
        rows = np.concatenate([drawn.anchors[part], drawn.positives[part], drawn.negatives[part]])
        anchor, positive, negative = self.projector(self.store.gather(rows)).chunk(3)
        losses = triplet_losses(anchor, positive, negative, self.section.margin)
        loss = losses.mean()
        if self.section.anchor_penalty > 0:
            drift = relative_drift(self.projector.shortcut.weight, self.start_weight)
            loss = loss + self.section.anchor_penalty * drift
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.projector.parameters(), self.section.grad_clip)
        factor = rate_factor(self.step, self.num_steps, self.num_warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            return torch.stack([losses.sum(), (losses > 0).sum()]).double()

    def state(self) -> dict[str, Any]:
        """Return copies of everything that the next step depends on, as tensors and plain values on the CPU."""
        cuda = torch.cuda.get_rng_state_all() if self.store.device.type == "cuda" else []
        return {
            "projector": _copy(self.projector.state_dict()),
            "start_weight": _copy(self.start_weight),
            "optimizer": _copy(self.optimizer.state_dict()),
            "step": self.step,
            "sampler": self.sampler.state,
            "random": {"torch": torch.get_rng_state(), "cuda": cuda},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.projector.load_state_dict(state["projector"])
        self.start_weight.copy_(state["start_weight"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.sampler.state = state["sampler"]
        torch.set_rng_state(state["random"]["torch"])
        if self.store.device.type == "cuda" and state["random"]["cuda"]:
            torch.cuda.set_rng_state_all(state["random"]["cuda"])


def _copy(value: Any) -> Any:
    """Copy nested dictionaries and lists with their tensors, on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(item) for item in value]
    return value
