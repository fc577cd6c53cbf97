"""The start of training: a closed-form map or another run's checkpoint, as coordinates and a projector of these.

Training works in coordinates: the backbone's features, whitened by their variation within buildings. In them a rate, a
weight's length and noise mean the same for any backbone, whatever its scale, width or signs; and they are few: a step
on 4,096 numbers costs what one on 512 does. They are an affine map of the features, so `fold` turns a projector of
coordinates into one of features. At the start a shortcut keeps the first of them, and the MLP branch adds nothing yet.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import TrainingModelSection, TrainingSection
from pipeline.log import logger
from pipeline.retrieval.checkpoint import Checkpoint, build_projector, going_on_from
from pipeline.retrieval.features import Features
from pipeline.retrieval.projector import Projector
from pipeline.retrieval.scores import QueryScores, normalise_rows
from pipeline.retrieval.whitening import (
    INPUT_POWER,
    SHRINKAGES,
    LinearMap,
    Scatter,
    collect_scatters,
    sharpen_whitening,
    whiten_by_pca,
    whiten_within_class,
)
from train_specialized_embeddings.training.validation import Scores, ValidationSet

# On 2,114 rendered buildings (Lite0, 1,280 numbers) 1,024 gave 0.6108 test mAP where 512 gave 0.612.
NUM_COORDINATES = 512
# Rows that are looked at to tell whether a backbone's features are rectified.
_SIGN_ROWS = 4096


@dataclass(frozen=True)
class Coordinates:
    """An affine map of the features (D) to K coordinates, and the variation of those."""

    linear_map: LinearMap
    spread: NDArray[np.float32]  # (K,) standard deviation within buildings
    length: float  # root mean square norm of the mapped rows

    def fold(self, projector: Projector) -> Projector:
        """Return the projector of features that equals this projector of coordinates, up to rounding; on the CPU."""
        own = self.linear_map
        power = own.input_power * projector.architecture["input_power"]
        state = {name: value.detach().cpu() for name, value in projector.state_dict().items()}
        weight, bias = (torch.from_numpy(part).double() for part in (own.weight, own.bias))
        for layer in ("shortcut", "hidden.0"):
            if f"{layer}.weight" in state:
                inner = state[f"{layer}.weight"].double()
                state[f"{layer}.weight"] = (inner @ weight).float()
                state[f"{layer}.bias"] = (inner @ bias + state[f"{layer}.bias"]).float()
        with torch.random.fork_rng(devices=[]):  # the layers' first weights are drawn, and thrown away
            folded = Projector(**projector.architecture | {"input_dim": weight.shape[1], "input_power": power})
        folded.load_state_dict(state)
        return folded.eval()

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values, for the checkpoint."""
        own = self.linear_map
        return {
            "weight": torch.from_numpy(own.weight), "bias": torch.from_numpy(own.bias),
            "input_power": own.input_power,
            "spread": torch.from_numpy(self.spread), "length": self.length,
        }  # fmt: skip


def restore_coordinates(state: dict[str, Any]) -> Coordinates:
    linear_map = LinearMap(state["weight"].numpy(), state["bias"].numpy(), state["input_power"])
    return Coordinates(linear_map, state["spread"].numpy(), state["length"])


def make_coordinates(linear_map: LinearMap, scatter: Scatter, output_dim: int) -> Coordinates:
    """Scale a map so that its first `output_dim` rows have mean square 1 each, and measure how the rows vary.

    The scatter is of the features raised to the map's power.
    """
    weight = linear_map.weight.astype(np.float64)
    within, between = (
        np.einsum("kd,de,ke->k", weight, matrix, weight, optimize=True).clip(min=0.0)
        for matrix in (scatter.within, scatter.between)
    )
    mean_square = float((within + between)[:output_dim].mean())
    scale = mean_square**-0.5 if mean_square > 0 else 1.0
    scaled, bias, spread = (
        (part * scale).astype(np.float32) for part in (weight, linear_map.bias, np.sqrt(within))
    )  # fmt: skip
    length = float(np.sqrt((within + between).sum()) * scale)
    return Coordinates(replace(linear_map, weight=scaled, bias=bias), spread, length)


def keep_features(scatter: Scatter) -> Coordinates:
    """Return the features themselves as coordinates."""
    width = len(scatter.mean)
    same = LinearMap(np.eye(width, dtype=np.float32), np.zeros(width, np.float32))
    length = np.sqrt(np.trace(scatter.within) + np.trace(scatter.between) + scatter.mean @ scatter.mean)
    return Coordinates(same, np.sqrt(np.diag(scatter.within)).astype(np.float32), float(length))


@dataclass(frozen=True)
class Fitted:
    """A closed-form map with the validation score of each query."""

    linear_map: LinearMap
    scores: QueryScores

    @property
    def mean(self) -> float:
        return float(self.scores.average_precision.mean())


@dataclass(frozen=True)
class Start:
    """The start of training, and the validation scores of the closed-form maps and of the raw embeddings."""

    coordinates: Coordinates
    note: dict[str, Any]  # how the start and the whitening were chosen, for the checkpoint
    baselines: dict[str, Scores]  # raw, pca_whitened, whitening
    projector: Projector | None = None  # of the coordinates; None: to be made


def fit_start(
    train: Features, validation: ValidationSet, output_dim: int, section: TrainingSection,
    device: torch.device | None = None, warm: Checkpoint | None = None,
) -> Start:  # fmt: skip
    """Fit PCA-whitening, within-class whitening (with the shrinkage that validates best) and a start.

    The start is that of another run's checkpoint (`warm`), where there is one.
    """
    init = "checkpoint" if warm else section.init
    powers = (1.0, INPUT_POWER) if init == "sharpened" and is_rectified(train) else (1.0,)
    scatters = collect_scatters(train.embeddings, train.building_codes, powers, device)
    scatter, powered = scatters[0], scatters[-1]
    num_rows = max(output_dim, min(train.width, NUM_COORDINATES))

    def validate(fitted: LinearMap) -> QueryScores:
        return validation.score_each(fitted.take_leading(output_dim).apply(validation.embeddings))

    pca = whiten_by_pca(scatter, num_rows)
    tried = _try(whiten_within_class, scatter, num_rows, validate)
    shrinkage = max(tried, key=lambda key: tried[key].mean)
    whitening = tried[shrinkage]
    scores = {
        "raw": validation.summarize(validation.score_each(normalise_rows(validation.embeddings))),
        "pca_whitened": validation.summarize(validate(pca)),
        "whitening": validation.summarize(whitening.scores),
    }
    note: dict[str, Any] = {"init": init, "shrinkage": shrinkage}
    if warm:
        return restore_start(warm, note, scores, keep_features(scatter))
    start = pca if init == "pca" else whitening.linear_map
    if init == "sharpened":
        tried = _try(sharpen_whitening, powered, num_rows, validate)
        note["sharpened_shrinkage"] = chosen = _choose_shrinkage(tried, whitening, validation)
        if chosen is None:
            logger.info("sharpened whitening validates worse than the plain one, from which training starts then")
        else:
            start, scatter = tried[chosen].linear_map, powered
            scores["whitening"]["map_error"] = validation.measure_error(tried[chosen].scores, whitening.scores)
    return Start(make_coordinates(start, scatter, output_dim), note, scores)


def is_rectified(train: Features) -> bool:
    """Tell whether the features have no negative number, as after a ReLU.

    A power tames the few large ones. Signed features lose by it: docs/measurements.md has both.
    """
    return bool((np.asarray(train.embeddings[:_SIGN_ROWS]) >= 0).all())


def _try(
    fit: Callable[[Scatter, int, float], LinearMap], scatter: Scatter, num_rows: int,
    validate: Callable[[LinearMap], QueryScores],
) -> dict[float, Fitted]:  # fmt: skip
    """Fit a map of `num_rows` rows for each of SHRINKAGES, the largest first, and validate it.

    Stops at the first that validates worse than the best: the mAP has one peak, and more buildings want less.
    """
    tried: dict[float, Fitted] = {}
    for shrinkage in SHRINKAGES:
        fitted = fit(scatter, num_rows, shrinkage)
        best = max((one.mean for one in tried.values()), default=0.0)
        tried[shrinkage] = Fitted(fitted, validate(fitted))
        if tried[shrinkage].mean < best:
            break
    return tried


def _choose_shrinkage(tried: dict[float, Fitted], whitening: Fitted, validation: ValidationSet) -> float | None:
    """Return the largest shrinkage of a sharpened map within a standard error of the best one and of the whitening.

    Validation buildings are from where the training ones are, and other places want more shrinkage (the
    one-standard-error rule; Breiman et al. 1984, section 3.4.3). Returns None where every sharpened map is worse.
    """
    best = max(tried.values(), key=lambda one: one.mean)
    allowed = [
        key for key, one in tried.items()
        if not any(validation.is_better(other.scores, one.scores) for other in (best, whitening))
    ]  # fmt: skip
    return max(allowed, default=None)


def make_projector(start: Start, model: TrainingModelSection, section: TrainingSection) -> Projector:
    """Return the projector of the coordinates that training starts from; random weights come from torch's state.

    The branch's first layer mixes the coordinates at random, so that every hidden unit has inputs of variance 1.
    Without a shortcut, the branch carries the leading coordinates (see `carry_coordinates`).
    """
    if start.projector is not None:
        return start.projector
    projector = Projector(
        len(start.coordinates.spread), model.output_dim, model.hidden_dim, model.num_hidden_layers, model.dropout,
        model.activation, hidden_dims=model.hidden_dims, use_residual=section.use_residual,
    )  # fmt: skip
    if section.init == "random":
        return projector
    with torch.no_grad():
        if len(projector.hidden):
            first: Any = projector.hidden[0]
            first.weight.normal_(std=1 / max(start.coordinates.length, 1e-6))
            first.bias.zero_()
        if projector.shortcut is None:
            carry_coordinates(projector)
        else:
            torch.nn.init.eye_(projector.shortcut.weight)
            projector.shortcut.bias.zero_()
    return projector


def carry_coordinates(projector: Projector) -> None:
    """Make the branch map inputs to their leading numbers, as a shortcut would at the start.

    Two hidden units of opposite signs carry a number: f(x) - f(-x) = x for ReLU, GELU and SiLU. So half the narrowest
    layer's width are kept; the other outputs start at 0, the other units as they are.
    """
    layers: list[Any] = [*projector.hidden, projector.output]
    kept = min(len(layers[-1].weight), layers[0].weight.shape[1], *(len(layer.weight) // 2 for layer in layers[:-1]))
    if kept < len(layers[-1].weight):
        logger.warning(
            "without [training].use_residual the start keeps %d of %d numbers: hidden layers of at least %d keep all",
            kept, len(layers[-1].weight), 2 * len(layers[-1].weight),
        )  # fmt: skip
    one, pair = torch.eye(kept), torch.cat([torch.eye(kept), -torch.eye(kept)])
    for layer in layers:
        rows = one if layer is layers[-1] else pair
        block = rows if layer is layers[0] else rows @ pair.T
        layer.weight[: len(rows)] = 0.0
        layer.weight[: len(rows), : block.shape[1]] = block
        layer.bias[: len(rows)] = 0.0
    layers[-1].weight[kept:] = 0.0
    layers[-1].bias[kept:] = 0.0


def restore_start(
    checkpoint: Checkpoint, note: dict[str, Any], baselines: dict[str, Scores], features: Coordinates | None = None
) -> Start:
    """Return the start at a checkpoint's coordinates and averaged projector.

    The projector of one without coordinates takes the `features`.
    """
    architecture, weights, coordinates = checkpoint.architecture, checkpoint.projector, features
    if isinstance(state := checkpoint.rest.get("coordinates"), dict):
        with going_on_from(checkpoint.path):
            coordinates, weights = restore_coordinates(state), dict(checkpoint.rest["average"])
            power = architecture["input_power"] / coordinates.linear_map.input_power
            architecture = architecture | {"input_dim": len(coordinates.spread), "input_power": power}
    assert coordinates is not None
    projector = build_projector(Checkpoint(checkpoint.path, architecture, weights)).train()
    return Start(coordinates, note, baselines, projector)
