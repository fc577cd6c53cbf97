"""The coordinates that training works in: the backbone's features, whitened by their variation within buildings.

In them a rate, a weight's length and noise mean the same for any backbone, whatever its scale, width or signs; and they
are few: a step on 4,096 numbers costs what one on 512 does. They are an affine map of the features, so that `fold`
turns a projector of coordinates into one of features.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.retrieval.projector import Projector
from pipeline.retrieval.whitening import LinearMap, Scatter

# On 2,114 rendered buildings (Lite0, 1,280 numbers) 1,024 gave 0.6108 test mAP where 512 gave 0.612.
NUM_COORDINATES = 512


@dataclass(frozen=True)
class Coordinates:
    """An affine map of the features (D) to K coordinates, and the variation of those."""

    linear_map: LinearMap
    spread: NDArray[np.float32]  # (K,) standard deviation within buildings
    length: float  # root mean square norm of the mapped rows

    def fold(self, projector: Projector) -> Projector:
        """Return the projector of features that equals this projector of coordinates, up to rounding; on the CPU."""
        own = self.linear_map
        architecture = projector.architecture | {
            "input_dim": own.weight.shape[1], "input_power": own.input_power,
        }  # fmt: skip
        state = {name: value.detach().cpu() for name, value in projector.state_dict().items()}
        weight, bias = (torch.from_numpy(part).double() for part in (own.weight, own.bias))
        for layer in ("shortcut", "hidden.0"):
            if f"{layer}.weight" in state:
                inner = state[f"{layer}.weight"].double()
                state[f"{layer}.weight"] = (inner @ weight).float()
                state[f"{layer}.bias"] = (inner @ bias + state[f"{layer}.bias"]).float()
        with torch.random.fork_rng(devices=[]):  # the layers' first weights are drawn, and thrown away
            folded = Projector(**architecture)
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
    """Return the coordinates of a checkpoint."""
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
    scaled = replace(
        linear_map, weight=(weight * scale).astype(np.float32), bias=(linear_map.bias * scale).astype(np.float32)
    )
    length = float(np.sqrt((within + between).sum()) * scale)
    return Coordinates(scaled, (np.sqrt(within) * scale).astype(np.float32), length)
