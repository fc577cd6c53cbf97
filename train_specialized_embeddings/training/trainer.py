"""Train a projector by triplets, an epoch at a time, from a state that can be saved and taken up again exactly."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from pipeline.config import TrainingSection
from pipeline.errors import PipelineError
from pipeline.log import Progress, logger
from pipeline.retrieval.projector import Projector
from train_specialized_embeddings.sampling.band_sampler import MAX_GROUP, RANDOM_BAND, BandSampler, Triplets
from train_specialized_embeddings.sampling.bandit import BandBandit
from train_specialized_embeddings.sampling.feature_store import FeatureStore
from train_specialized_embeddings.training.collapse import ShapeSums, is_collapsed
from train_specialized_embeddings.training.in_batch import group_losses, mined_triplet_losses
from train_specialized_embeddings.training.losses import DISTANCES, relative_drift

# Triplets are drawn for this many steps at once, and at least this many: the host waits for the device once a draw,
# and the bandit learns from one draw for the next.
_STEPS_PER_DRAW, _MIN_ANCHORS_PER_DRAW = 16, 4096

_MIN_STEPS_PER_EPOCH = 16
# What the averaged weights keep of themselves each epoch: they are the mean of about the last five.
_AVERAGE_DECAY = 0.8


@dataclass(frozen=True)
class EpochReport:
    """What an epoch's training was like."""

    loss: float  # mean over triplets
    active_share: float  # triplets whose loss is not zero
    band_shares: list[float]
    learning_rates: dict[str, float]  # at the epoch's last step
    num_triplets: int
    has_collapsed: bool  # and so was given up before its end


def rate_factor(step: int, num_steps: int, num_warmup: int) -> float:
    """Return what step `step`, counted from 0, multiplies the learning rates by: linear warm-up, then a half cosine."""
    if step < num_warmup:
        return (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


class Trainer:
    """A projector with its optimiser, schedule, sampler and bandit."""

    def __init__(  # noqa: PLR0917
        self,
        projector: Projector,
        store: FeatureStore,
        sampler: BandSampler,
        section: TrainingSection,
        spread: torch.Tensor | None = None,
    ) -> None:
        """Take a projector of the store's rows, and how far those vary within a building (D,), for the noise."""
        self.projector, self.store, self.sampler, self.section = projector, store, sampler, section
        # Of its weights over the epochs, which is what is validated and published: one epoch's are the luck of its
        # batches, which few validation buildings cannot tell from a gain.
        self.average = copy.deepcopy(projector).eval()
        self.bandit = BandBandit() if section.band_sampling == "ucb" else None
        self.distance = DISTANCES[section.triplet_distance]
        self.noise = None if spread is None else section.input_noise * spread.to(store.device)
        self.origin = copy.deepcopy(projector).eval()  # where it starts, of which the published weights keep some
        self.epoch = self.step = 0
        self.rate_scale = 1.0  # lowered by a collapse
        self.first_shape: list[float] | None = None  # spread and norm of the first images that were trained on
        auto = section.triplets_per_epoch == "auto"
        # Few images are passed over several times an epoch: what training needs is steps.
        self.num_anchors = (
            max(len(sampler.candidates), _MIN_STEPS_PER_EPOCH * section.batch_size)
            if auto
            else int(section.triplets_per_epoch)
        )
        self.steps_per_epoch = math.ceil(self.num_anchors / section.batch_size)
        self.optimizer = torch.optim.AdamW(self._parameter_groups(), fused=True)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Group the weights by learning rate; decay would only shrink a shortcut whose output is normalised.

        Adam moves every weight by about its rate, and an output by what all its weights do: a layer's rate is divided
        by the root of its inputs, so that one rate serves every width.
        """
        section, projector = self.section, self.projector
        # An image that an epoch passes over k times moves the weights as far as one that it passes over once.
        share = min(1.0, len(self.sampler.candidates) / self.num_anchors)
        layers: dict[str, Any] = {"shortcut": projector.shortcut}
        layers |= {f"hidden.{number}": layer for number, layer in enumerate(projector.hidden)}
        if projector.output is not None:
            layers["output"] = projector.output
        groups = []
        for name, layer in layers.items():
            is_shortcut = name == "shortcut"
            rate = section.shortcut_learning_rate if is_shortcut else section.learning_rate
            groups.append(
                {
                    "name": name,
                    "params": list(layer.parameters()),
                    "peak_lr": share * rate / layer.weight.shape[1] ** 0.5,
                    "weight_decay": 0.0 if is_shortcut else section.weight_decay,
                    "lr": 0.0,
                }
            )
        return groups

    def run_epoch(self, progress: Progress) -> EpochReport:
        """Train on one epoch's triplets, or on as many as it takes to find that the embeddings have collapsed.

        Raises PipelineError where no triplet can be drawn, or the loss is no number any more.
        """
        self.projector.train()
        section, device = self.section, self.store.device
        draw = self.sampler.draw_groups if section.draws_groups else self.sampler.draw_anchors
        anchors = draw(self.num_anchors)
        edges = anchors.plan_batches(section.batch_size)
        loss_sum = torch.zeros(2, dtype=torch.float64, device=device)  # of losses, and how many
        totals = torch.zeros(2, RANDOM_BAND + 1, dtype=torch.float64, device=device)  # triplets and active ones by band
        steps_per_draw = max(_STEPS_PER_DRAW, -(-_MIN_ANCHORS_PER_DRAW // section.batch_size))
        has_collapsed = False
        for first in range(0, len(edges) - 1, steps_per_draw):
            part = edges[first : first + steps_per_draw + 1]
            preference = torch.tensor(self.bandit.rank_bands(), device=device) if self.bandit else None
            drawn = self.sampler.draw(anchors.cut(part[0], part[-1]), preference)
            batches = [drawn.cut(a - part[0], b - part[0]) for a, b in zip(part[:-1], part[1:], strict=True)]
            counts, shape = torch.zeros_like(totals), ShapeSums(self.projector.architecture["output_dim"], device)
            rows = [self._list_rows(batch) for batch in batches]
            for number, (features, places) in enumerate(self.store.stream(rows), first):
                self._set_rates(number / (len(edges) - 1))
                loss_sum += self._take_step(batches[number - first], features, places, counts, shape)
            if self.bandit:
                self.bandit.learn(*counts[:, :RANDOM_BAND].tolist())
            totals += counts
            progress.advance(part[-1] - part[0])
            has_collapsed = self._has_collapsed(shape)
            if has_collapsed:
                break
        self.epoch += 1
        with torch.no_grad():
            for mean, weight in zip(self.average.parameters(), self.projector.parameters(), strict=True):
                mean.lerp_(weight, 1 - _AVERAGE_DECAY)
        return self._report(loss_sum.tolist(), totals.tolist(), has_collapsed)

    def _has_collapsed(self, shape: ShapeSums) -> bool:
        """Whether a draw's images lie otherwise than those of the first draw; few images say nothing."""
        spread, norm, count = shape.measure()
        if count < min(_MIN_ANCHORS_PER_DRAW, self.num_anchors):
            return False
        if self.first_shape is None:
            self.first_shape = [spread, norm]
        return is_collapsed(spread, norm, *self.first_shape)

    def _report(self, losses: list[float], triplets: list[list[float]], has_collapsed: bool) -> EpochReport:  # noqa: FBT001
        loss_sum, num_losses = losses
        num_triplets, num_active = triplets
        total = sum(num_triplets)
        if not total:
            raise PipelineError(
                "no triplet can be drawn: every image is of the anchor's building, its panorama, or nearer than "
                f"[training].min_negative_distance_m = {self.section.min_negative_distance_m:g}: lower it"
            )
        if not math.isfinite(loss_sum):
            raise PipelineError("training diverged (the loss is not a number): lower [training].learning_rate")
        rates = {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups}
        shares = [count / total for count in num_triplets]
        return EpochReport(loss_sum / num_losses, sum(num_active) / total, shares, rates, int(total), has_collapsed)

    def _set_rates(self, done: float) -> None:
        """Set the learning rates for a step of this epoch; `done` is the share of its steps before it."""
        steps, section = self.steps_per_epoch, self.section
        place = self.epoch * steps + round(done * steps)
        factor = rate_factor(place, section.num_epochs * steps, round(section.warmup_epochs * steps))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor * self.rate_scale

    def _list_rows(self, batch: Triplets) -> torch.Tensor:
        """Return the images that a batch needs; where it is of whole buildings, its other anchors are the positives."""
        if self.section.loss != "triplet":
            firsts = torch.from_numpy(batch.anchors.firsts).to(batch.negatives.device)
            return torch.cat([batch.anchors.rows, batch.negatives[firsts]])
        shares = self.section.share_within_building
        return torch.cat([batch.anchors.rows, *([] if shares else [batch.positives]), batch.negatives])

    def _take_step(  # noqa: PLR0917
        self,
        batch: Triplets,
        features: torch.Tensor,
        places: torch.Tensor,
        counts: torch.Tensor,
        shape: ShapeSums,
    ) -> torch.Tensor:
        """Move the weights by one batch; return the sum and number of its losses.

        Adds its triplets by band to `counts`, and where its anchors lie to `shape`.
        """
        if self.noise is not None:
            features = features + self.noise * torch.randn(features.shape, device=features.device)
        with torch.autocast(features.device.type, torch.bfloat16, enabled=features.device.type == "cuda"):
            outputs = self.projector.map(features)
        outputs = outputs.index_select(0, places)
        embeddings = functional.normalize(outputs, dim=1)
        loss, sums = self._lose(batch, embeddings, counts)
        if self.section.anchor_penalty > 0:
            drift = relative_drift(self.projector.shortcut.weight, self.origin.shortcut.weight.detach())
            loss = loss + self.section.anchor_penalty * drift
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.projector.parameters(), self.section.grad_clip)
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            shape.add(outputs[: len(batch)], embeddings[: len(batch)])
        return sums

    def _lose(
        self, batch: Triplets, embeddings: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a batch's loss, and the sum and number of its losses; add its triplets by band to `counts`."""
        section = self.section
        if section.loss != "triplet":
            with torch.no_grad():
                banded, valid, bands = self._compare_firsts(batch, embeddings)
            losses = group_losses(self.sampler, batch, embeddings, section)
            loss, weights = losses.mean(), torch.ones_like(losses)
        else:
            banded, valid, bands = self._compare(batch, embeddings)
            losses, weights = banded, valid
            if section.compares_in_batch:
                losses = mined_triplet_losses(self.sampler, batch, embeddings, section)[:, None, None]
            per_anchor = (losses * valid).sum(dim=(1, 2)) / valid.sum(dim=(1, 2)).clamp_min(1)
            # Every image counts the same, however many triplets its building gives it.
            loss = per_anchor.sum() / valid.any(dim=2).any(dim=1).sum().clamp_min(1)
        with torch.no_grad():
            active = valid & (banded > 0)  # of the banded triplets, whatever is learned from
            for line, mask in zip(counts, (valid, active), strict=True):
                line.scatter_add_(0, bands.flatten(), mask.sum(dim=1).flatten().double())
            return loss, torch.stack([(losses * weights).sum().double(), weights.sum().double()])

    def _compare_firsts(
        self, batch: Triplets, embeddings: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what `_compare` does of one triplet a group: its first image, the next one, the banded negative."""
        firsts = torch.from_numpy(batch.anchors.firsts).to(embeddings.device)
        nexts = (firsts + 1).clamp_max(len(batch) - 1)
        distances = [
            self.distance(embeddings[firsts], others)[:, None]
            for others in (embeddings[nexts], embeddings[len(batch) :])
        ]
        valid = batch.found[firsts] & (batch.anchors.sizes[firsts] > 1)
        return self._hinge(*distances), valid[:, None, None], batch.bands[firsts][:, None]

    def _compare(self, batch: Triplets, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the losses of each anchor's triplets (B, P, Q), which of them are valid, and the bands (B, Q)."""
        parts = embeddings.chunk(2 if self.section.share_within_building else 3)
        anchors, negatives = parts[0], parts[-1]
        if not self.section.share_within_building:
            distances = [self.distance(anchors, other)[:, None] for other in parts[1:]]
            valid = batch.found[:, None, None]
            return self._hinge(*distances), valid, batch.bands[:, None]
        slots = torch.arange(MAX_GROUP, device=anchors.device)
        members = (batch.anchors.starts[:, None] + slots).clamp_max(len(anchors) - 1)  # (B, P) the group's anchors
        there = slots < batch.anchors.sizes[:, None]
        rows = batch.anchors.rows
        is_positive = there & (rows[members] != rows[:, None])
        is_negative = there & batch.found[members]
        is_negative &= self.sampler.allows(rows[:, None].expand_as(members), batch.negatives[members])
        distances = [
            self.distance(anchors[:, None], others.index_select(0, members.flatten()).view(*members.shape, -1))
            for others in (anchors, negatives)
        ]
        return self._hinge(*distances), is_positive[:, :, None] & is_negative[:, None], batch.bands[members]

    def _hinge(self, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """Return the triplet losses (B, P, Q) of distances (B, P) and (B, Q), as `triplet_losses` defines them."""
        return torch.relu(positive[:, :, None] - negative[:, None] + self.section.margin)

    def state(self) -> dict[str, Any]:
        """Return copies of everything that the next step depends on, as tensors and plain values on the CPU."""
        device = self.store.device
        cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return {
            "weights": _copy(self.projector.state_dict()),
            "average": _copy(self.average.state_dict()),
            "origin": _copy(self.origin.state_dict()),
            "optimizer": _copy(self.optimizer.state_dict()),
            "epoch": self.epoch,
            "step": self.step,
            "rate_scale": self.rate_scale,
            "first_shape": self.first_shape,
            "sampler": {"random": self.sampler.state, "bandit": self.bandit and self.bandit.state},
            "random": {"torch": torch.get_rng_state(), "cuda": cuda},
        }

    def go_back(self, state: dict[str, Any], rate_factor: float) -> None:
        """Take the averaged weights of a saved state, and go on with lower rates where schedule and draws are."""
        for projector in (self.projector, self.average):
            projector.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rate_scale *= rate_factor

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a saved state.

        Random numbers of a GPU cannot go on on a CPU, nor the other way: they begin anew then, from (seed, epoch).
        """
        self.projector.load_state_dict(state["weights"])
        self.average.load_state_dict(state["average"])
        self.origin.load_state_dict(state["origin"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.rate_scale, self.first_shape = state["rate_scale"], state["first_shape"]
        if self.bandit:
            self.bandit.state = state["sampler"]["bandit"]
        cuda, device = state["random"]["cuda"], self.store.device
        if bool(cuda) != (device.type == "cuda"):
            seed = int(np.random.SeedSequence((self.sampler.first_seed, self.epoch)).generate_state(1)[0])
            self.sampler.seed(seed)
            torch.manual_seed(seed)
            logger.warning(
                "the checkpoint is of a run on a %s, this one is on a %s: random numbers begin anew, so that the "
                "weights will not be those of a run that was never interrupted",
                *(("GPU", "CPU") if cuda else ("CPU", "GPU")),
            )  # fmt: skip
            return
        self.sampler.state = state["sampler"]["random"]
        torch.set_rng_state(state["random"]["torch"])
        if cuda:  # of this run's one device; an older checkpoint has every GPU's, of any number
            torch.cuda.set_rng_state(cuda[0], device)


def _copy(value: Any) -> Any:
    """Copy nested dictionaries and lists with their tensors, on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(item) for item in value]
    return value
