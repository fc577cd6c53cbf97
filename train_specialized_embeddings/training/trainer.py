"""Train a projector, an epoch at a time, from a state that can be saved and resumed exactly."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.config import TrainingSection
from pipeline.errors import PipelineError
from pipeline.inference.devices import full_precision
from pipeline.log import Progress, logger
from pipeline.retrieval.projector import Linear, Norm, Projector
from train_specialized_embeddings.sampling.band_sampler import RANDOM_BAND, BandSampler, Batch, Groups, Places
from train_specialized_embeddings.sampling.bandit import BandBandit
from train_specialized_embeddings.training.losses import DISTANCES, Pairs, make_loss
from train_specialized_embeddings.training.step_graph import Judged, StepGraph, may_capture

# Negatives are drawn for this many steps and anchors at once: the host waits for the device once a draw.
_STEPS_PER_DRAW, _MIN_ANCHORS_PER_DRAW = 16, 4096
# Steps in a pass over the images where the batch follows the data, and the batches allowed.
_STEPS_PER_PASS, _MIN_BATCH, _MAX_BATCH = 50, 32, 512
# Anchors that are compared with each other at a time: a batch of 16,384 would need billions of cosines.
TILE = 1024
# The averaged weights keep this share of themselves each epoch: they are the mean of about the last five.
_AVERAGE_DECAY = 0.8


# An epoch's figures: the mean loss over anchors; of the banded negatives the share within the margin of a positive,
# the shares by band and the number; the rates at the last step; the bandit's rewards by band; each step's mean loss.
UNTRAINED: dict[str, Any] = {
    "train_loss": None, "active_share": None, "band_shares": None, "learning_rates": None, "num_negatives": 0,
    "bandit_rewards": None, "step_losses": None,
}  # fmt: skip


class Trainer:
    """A projector with its loss, optimiser, schedule, sampler and bandit."""

    def __init__(
        self, projector: Projector, features: torch.Tensor, sampler: BandSampler, section: TrainingSection,
        spread: torch.Tensor,
    ) -> None:  # fmt: skip
        """Take a projector of features (N, D), and their deviation within buildings (D,), for the noise."""
        self.projector, self.features, self.sampler, self.section = projector, features, sampler, section
        self.device = features.device
        # The averaged weights are validated and published: one epoch's are the luck of its batches.
        self.average = copy.deepcopy(projector).eval()
        self.origin = copy.deepcopy(projector).eval()  # the start; the published weights keep a part of it
        self.loss = make_loss(section, sampler.num_buildings, projector.architecture["output_dim"]).to(features.device)
        self.bandit = BandBandit() if section.band_sampling == "ucb" else None
        self.noise = section.input_noise * spread.to(features.device)
        self.epoch = 0
        num_images = len(sampler.anchors)
        self.num_anchors = num_images if section.anchors_per_epoch == "auto" else section.anchors_per_epoch
        self.batch_size = choose_batch_size(num_images) if section.batch_size == "auto" else section.batch_size
        # Fewer images than that have less to teach: steps are smaller, so that a plateau is seen in time.
        share = min(1.0, num_images / (_STEPS_PER_PASS * _MIN_BATCH))
        self.optimizer = torch.optim.AdamW(group_parameters(projector, self.loss, section, share), fused=True)
        num_steps = section.num_epochs * math.ceil(self.num_anchors / self.batch_size)
        has_graph = may_capture(features.device, section.loss, self.batch_size, num_steps)
        self.graph = StepGraph(self.judge, self.batch_size, mode="reduce-overhead") if has_graph else None
        self._parts: dict[str, Any] = {
            "weights": projector, "average": self.average, "origin": self.origin, "loss": self.loss,
            "optimizer": self.optimizer,
        }  # fmt: skip

    @full_precision()  # of what autocast leaves in float32, whatever the environment says: the shortcut centres
    def run_epoch(self, progress: Progress) -> dict[str, Any]:
        """Train on one epoch's anchors; raise PipelineError where there is no negative or the loss is not a number."""
        self.projector.train()
        parts = self.sampler.draw_groups(self.num_anchors, self.batch_size)
        steps_per_draw = max(_STEPS_PER_DRAW, -(-_MIN_ANCHORS_PER_DRAW // self.batch_size))
        sums: list[torch.Tensor] = []  # of each step's losses; they stay on the device
        totals = torch.zeros(2, RANDOM_BAND + 1, dtype=torch.float64, device=self.device)  # of Judged.counts
        for first in range(0, len(parts), steps_per_draw):
            drawn = parts[first : first + steps_per_draw]
            preference = torch.tensor(self.bandit.rank_bands(), device=self.device) if self.bandit else None
            batches = self.sampler.add_negatives(drawn, preference)
            if self.graph is not None:
                batches = self._pad(self.graph, batches)
            counts = torch.zeros_like(totals)
            for number, (part, batch) in enumerate(zip(drawn, batches, strict=True), first + 1):
                self._set_rates(self.epoch + number / len(parts))
                judged = self._take_step(batch, part)
                sums.append(judged.loss_sum.clone())  # a graph's next run writes over its outputs
                counts += judged.counts
            if self.bandit:
                self.bandit.learn(*counts[:, :RANDOM_BAND].tolist())
            totals += counts
            progress.advance(sum(len(part.rows) for part in drawn))
        self.epoch += 1
        with torch.no_grad():
            for mean, weight in zip(self.average.parameters(), self.projector.parameters(), strict=True):
                mean.lerp_(weight, 1 - _AVERAGE_DECAY)
        return self._report(torch.stack(sums).tolist(), [len(part.rows) for part in parts], totals.tolist())

    def _report(self, losses: list[float], sizes: list[int], totals: list[list[float]]) -> dict[str, Any]:
        by_band, active_by_band = totals
        total = sum(by_band)
        if not total:
            raise PipelineError(
                "no negative can be drawn: every image is of the anchor's building, its panorama, or nearer than "
                f"[training].min_negative_distance_m = {self.section.min_negative_distance_m:g}: lower it"
            )
        loss = sum(losses) / sum(sizes)
        if not math.isfinite(loss):
            raise PipelineError("training diverged (the loss is not a number): lower [training].learning_rate")
        return {
            "train_loss": loss,
            "active_share": sum(active_by_band) / total,
            "band_shares": [count / total for count in by_band],
            "learning_rates": {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups},
            "num_negatives": int(total),
            "bandit_rewards": self.bandit.list_means() if self.bandit else None,
            "step_losses": [loss / size for loss, size in zip(losses, sizes, strict=True)],
        }

    def _set_rates(self, place: float) -> None:
        """Set the learning rates for the step that ends so many epochs after the start: constant after a warm-up."""
        warmup = self.section.warmup_epochs
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * (place / warmup if place < warmup else 1.0)

    def _pad(self, graph: StepGraph, batches: list[Batch]) -> list[Batch]:
        """Return the batches padded for the graph; give it up and return them unchanged where it cannot be captured."""
        padded = graph.pad(batches)
        if not graph.works:
            weights = [*self.projector.parameters(), *self.loss.parameters()]
            graph.try_out(self.features[padded[0].places.rows], padded[0], weights)
            self.graph = graph if graph.works else None
        return padded if graph.works else batches

    def _take_step(self, batch: Batch, part: Groups) -> Judged:
        features = self.features[batch.places.rows]
        if self.graph is None:
            judged = self.judge(features, batch, list_tiles(part) if len(part.rows) > TILE else ())
        else:
            torch.compiler.cudagraph_mark_step_begin()
            judged = self.graph.judge(features, batch)
        self.optimizer.zero_grad(set_to_none=True)
        judged.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.projector.parameters(), self.section.grad_clip)
        self.optimizer.step()
        return judged

    def judge(self, features: torch.Tensor, batch: Batch, tiles: Sequence[tuple[slice, slice]] = ()) -> Judged:
        """Compare the anchors of each tile with its negatives; without tiles, all with all."""
        features = features + self.noise * torch.randn(features.shape, device=features.device)
        with torch.autocast(features.device.type, torch.bfloat16, enabled=features.device.type == "cuda"):
            embeddings = self.projector(features)
        num_anchors = len(batch.places.rows) - len(batch.firsts)
        own, banded = slice(0, num_anchors), slice(num_anchors, None)
        losses = torch.cat([self._compare(batch, embeddings, *tile) for tile in tiles or [(own, banded)]])
        counts = torch.zeros(2, RANDOM_BAND + 1, dtype=torch.float64, device=features.device)
        with torch.no_grad():  # a banded negative is active that is nearer to its anchor than a positive and the margin
            others = torch.stack([embeddings[batch.firsts + 1], embeddings[banded]])
            to_positive, to_negative = DISTANCES[self.section.triplet_distance](embeddings[batch.firsts], others)
            is_active = batch.found & (to_positive - to_negative + self.section.margin > 0)
            for line, mask in zip(counts, (batch.found, is_active), strict=True):
                line.index_add_(0, batch.bands, mask.double())
        if batch.is_real is None:
            return Judged(losses.mean(), losses.detach().sum().double(), counts)
        loss_sum = torch.where(batch.is_real[own], losses, 0.0).sum()
        return Judged(loss_sum / batch.is_real[own].sum(), loss_sum.detach().double(), counts)

    def _compare(self, batch: Batch, embeddings: torch.Tensor, own: slice, banded: slice) -> torch.Tensor:
        """Return the losses of the anchors at `own`, compared with each other and the negatives at `banded`."""
        places = Places(*(values[own] for values in batch.places))
        others = Places(*(torch.cat([values[own], values[banded]]) for values in batch.places))
        masks = self.sampler.compare(places, others)
        if batch.is_real is not None:
            are_real = batch.is_real[own, None] & torch.cat([batch.is_real[own], batch.is_real[banded]])
            masks = masks[0] & are_real, masks[1] & are_real
        candidates = torch.cat([embeddings[own], embeddings[banded]])
        losses: torch.Tensor = self.loss(Pairs(embeddings[own], candidates, *masks, places.buildings.long()))
        return losses

    def state(self) -> dict[str, Any]:
        """Return copies of everything that the next step depends on, as tensors and plain values on the CPU."""
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return {
            **{name: _copy(part.state_dict()) for name, part in self._parts.items()},
            "epoch": self.epoch,
            "sampler": {
                "random": self.sampler.generator.get_state(),
                "bandit": self.bandit and _copy(vars(self.bandit)),
            },
            "random": {"torch": torch.get_rng_state(), "cuda": cuda},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from a saved state; on another kind of device random numbers begin anew from the seed."""
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self.epoch = state["epoch"]
        if self.bandit:
            vars(self.bandit).update(copy.deepcopy(state["sampler"]["bandit"]))
        cuda, device = state["random"]["cuda"], self.device
        if bool(cuda) != (device.type == "cuda"):
            logger.warning("the checkpoint is of a run on a %s, this one is on a %s: random numbers begin anew, so "
                           "that the weights differ from those of an uninterrupted run",
                           *(("GPU", "CPU") if cuda else ("CPU", "GPU")))  # fmt: skip
            return
        self.sampler.generator.set_state(state["sampler"]["random"])
        torch.set_rng_state(state["random"]["torch"])
        if cuda:
            torch.cuda.set_rng_state(cuda[0], device)


def move_features(features: NDArray[np.float32], device: torch.device) -> torch.Tensor:
    """Return rows (N, D) where the steps need them; a GPU keeps them as bfloat16, in half the memory."""
    table = torch.from_numpy(features)
    return table.to(device, torch.bfloat16) if device.type == "cuda" else table


def choose_batch_size(num_images: int) -> int:
    """Return the number of anchors in a step: the more images, the more of them tell a step something new."""
    return min(max(num_images // _STEPS_PER_PASS, _MIN_BATCH), _MAX_BATCH)


def list_tiles(part: Groups) -> list[tuple[slice, slice]]:
    """Return the anchors of each tile, and the banded negatives of its groups, as places among the batch's rows."""
    tiles, anchor, negative = [], 0, len(part.rows)
    for tile in part.split(TILE):
        tiles.append((slice(anchor, anchor + len(tile.rows)), slice(negative, negative + len(tile.ends))))
        anchor, negative = anchor + len(tile.rows), negative + len(tile.ends)
    return tiles


def group_parameters(
    projector: Projector, loss: nn.Module, section: TrainingSection, share: float
) -> list[dict[str, Any]]:
    """Return the optimiser's groups of weights, with `share` of the configured rates at their peak.

    A layer's rate is divided by the root of its inputs, so that one rate serves every width. The shortcut, the
    norms and the loss have no weight decay: it would only shrink vectors that are normalised.
    """
    groups: list[dict[str, Any]] = []
    for name, layer in projector.named_modules():
        if not isinstance(layer, (Linear, Norm)):
            continue
        rate = section.shortcut_learning_rate if name == "shortcut" else section.learning_rate
        decay = 0.0 if name.startswith(("shortcut", "norms")) else section.weight_decay
        peak = share * rate / layer.weight.shape[-1] ** 0.5
        groups.append({"name": name, "params": list(layer.parameters()), "peak_lr": peak, "weight_decay": decay})
    if own := list(loss.parameters()):
        groups.append({"name": "loss", "params": own, "peak_lr": share * section.learning_rate, "weight_decay": 0.0})
    return groups


def _copy(value: Any) -> Any:
    """Copy nested dictionaries and lists with their tensors, on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, (list, tuple)) else value
