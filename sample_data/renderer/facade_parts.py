"""The parts of a house's front: what each carries is what painting, shadow and relief need.

Facade metres: x from the house's left corner, z up from the pavement. Parts say how far they stand out or lie back.
"""

from dataclasses import dataclass, field

import numpy as np

from sample_data.renderer.building_styles import Rgb
from sample_data.renderer.buildings import House
from sample_data.renderer.street_geometry import Array


@dataclass(frozen=True)
class Part:
    """A rectangle of the front."""

    x0: float
    x1: float
    z0: float
    z1: float

    def corners(self, inset: float = 0.0) -> Array:
        """Return the corners (4, 2) as (x, z), counter-clockwise from the lower left, drawn in by `inset`."""
        x0, x1, z0, z1 = self.x0 + inset, self.x1 - inset, self.z0 + inset, self.z1 - inset
        return np.array([(x0, z0), (x1, z0), (x1, z1), (x0, z1)])


@dataclass(frozen=True)
class Opening(Part):
    """A hole in the wall: a window, a door, a shop's glass or a garage."""

    kind: str
    top: str = "flat"
    reveal_m: float = 0.18
    panes: tuple[int, int] = (1, 1)

    def outline(self, inset: float = 0.0) -> Array:
        """Return the corners (N, 2) as `corners` does, with those of an arch at the top."""
        corners = self.corners(inset)
        if self.top == "flat":
            return corners
        (x0, _), (x1, _), (_, z1) = corners[:3]
        rise = (x1 - x0) * (0.5 if self.top == "round" else 0.16)
        turn = np.linspace(0.0, np.pi, 9)
        arch = np.stack([(x0 + x1) / 2 + (x1 - x0) / 2 * np.cos(turn), z1 - rise + rise * np.sin(turn)], axis=1)
        return np.concatenate([corners[:2], arch])


@dataclass(frozen=True)
class Block(Part):
    """A box standing out of the wall by `depth_m`: a sill, a cornice, a slab, a step."""

    depth_m: float
    rgb: Rgb


@dataclass(frozen=True)
class Rail(Block):
    """A balcony's railing of upright bars (or a glass or solid front) at `depth_m` before the wall."""

    step_m: float = 0.13


@dataclass(frozen=True)
class Awning(Block):
    """A striped cloth that slopes out over a shop."""

    other_rgb: Rgb


@dataclass(frozen=True)
class Panel(Part):
    """A strip of the front that stands out by `y0` at its left and `y1` at its right edge: one face of a bay."""

    y0: float
    y1: float


@dataclass
class Facade:
    """A house's front; `height_m` is where the wall ends at the eaves, the outline may rise above it."""

    house: House
    height_m: float
    outline: Array
    openings: list[Opening] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    rails: list[Rail] = field(default_factory=list)
    awnings: list[Awning] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    fascia: tuple[float, float, float, float] | None = None

    def add(self, x: tuple[float, float], z: tuple[float, float], depth_m: float, rgb: Rgb) -> None:
        """Add a block between two x and two z."""
        self.blocks.append(Block(*x, *z, depth_m, rgb))

    @property
    def top_m(self) -> float:
        return float(self.outline[:, 1].max())


def darken(rgb: Rgb, factor: float) -> Rgb:
    red, green, blue = (min(255, max(0, round(v * factor))) for v in rgb)
    return red, green, blue
