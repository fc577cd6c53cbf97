"""Small coloured faces in 3-D: everything that stands out of, or lies back from, a textured plane."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sample_data.renderer.building_styles import Rgb
from sample_data.renderer.facade_parts import Awning, Facade, Opening, Rail, darken
from sample_data.renderer.street_geometry import Array


@dataclass
class Faces:
    """Quads (M, 4, 3) with unit normals (M, 3), colours (M, 3), anchors (M, 3) to sort by, and whether each is fine."""

    points: Array
    normals: Array
    rgb: Array
    anchors: Array
    fine: Array

    def moved(self, x: float, y: float) -> "Faces":
        offset = np.array([x, y, 0.0])
        return Faces(self.points + offset, self.normals, self.rgb, self.anchors + offset, self.fine)


Quad = tuple[list[tuple[float, float, float]], tuple[float, float, float], Rgb]


class FaceList:
    """Collects faces part by part; the faces of a part share the anchor that decides when it is drawn."""

    def __init__(self) -> None:
        self.quads: list[Quad] = []
        self.anchors: list[Array] = []
        self.fine: list[bool] = []

    def add(self, quads: Iterable[Quad], fine: bool = False, forward_m: float = 0.0) -> None:
        """Add one part; a fine part is left out at a distance, a forward one drawn over what it overhangs."""
        part = list(quads)
        anchor = np.mean([np.mean(points, axis=0) for points, _, _ in part], axis=0)
        anchor[1] -= forward_m
        self.quads += part
        self.anchors += [anchor] * len(part)
        self.fine += [fine] * len(part)

    def faces(self) -> Faces:
        if not self.quads:
            return Faces(np.zeros((0, 4, 3)), np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0, bool))
        points, normals, colours = (np.array(column, float) for column in zip(*self.quads, strict=True))
        return Faces(points, normals, colours, np.array(self.anchors), np.array(self.fine))


def box(x: tuple[float, float], y: tuple[float, float], z: tuple[float, float], rgb: Rgb) -> list[Quad]:
    """Return a box's five faces that a street camera may see (the back is against a wall)."""
    (x0, x1), (y0, y1), (z0, z1) = x, y, z
    return [
        (upright(x0, x1, y0, z0, z1), (0, -1, 0), rgb),
        ([(x0, y0, z0), (x0, y1, z0), (x0, y1, z1), (x0, y0, z1)], (-1, 0, 0), rgb),
        ([(x1, y0, z0), (x1, y1, z0), (x1, y1, z1), (x1, y0, z1)], (1, 0, 0), rgb),
        ([(x0, y0, z1), (x1, y0, z1), (x1, y1, z1), (x0, y1, z1)], (0, 0, 1), rgb),
        ([(x0, y0, z0), (x1, y0, z0), (x1, y1, z0), (x0, y1, z0)], (0, 0, -1), darken(rgb, 0.72)),
    ]


def raise_relief(facade: Facade) -> Faces:
    """Return the faces of everything that stands out of a front or lies back in it, in facade metres."""
    parts = FaceList()
    for opening in facade.openings:
        if opening.reveal_m > 0:
            parts.add(reveal(opening, darken(facade.house.wall_rgb, 0.86)))
    for panel in facade.panels:
        if panel.y0 == panel.y1:
            rgb = darken(facade.house.wall_rgb, 0.95)
            parts.add(box((panel.x0, panel.x1), (-panel.y0, 0.0), (0.0, panel.z1), rgb)[1:3])
    for block in facade.blocks:
        small = (block.x1 - block.x0) * (block.z1 - block.z0) < 0.4 and block.depth_m < 0.15
        parts.add(box((block.x0, block.x1), (-block.depth_m, 0.0), (block.z0, block.z1), block.rgb), fine=small)
    for awning in facade.awnings:
        parts.add(stretch_awning(awning), forward_m=3.0 * awning.depth_m)
    for rail in facade.rails:
        parts.add(fence(rail), forward_m=rail.depth_m)
    return parts.faces()


def reveal(opening: Opening, rgb: Rgb) -> list[Quad]:
    """Return the cheeks of a hole in the wall, facing into the hole."""
    outline = opening.outline()
    quads: list[Quad] = []
    for i in range(len(outline)):
        (ax, az), (bx, bz) = outline[i].tolist(), outline[(i + 1) % len(outline)].tolist()
        length = max(1e-6, float(np.hypot(bx - ax, bz - az)))
        normal = (-(bz - az) / length, 0.0, (bx - ax) / length)
        deep = opening.reveal_m
        shade = darken(rgb, 0.7) if normal[2] < -0.5 else rgb
        quads.append(([(ax, 0.0, az), (bx, 0.0, bz), (bx, deep, bz), (ax, deep, az)], normal, shade))
    return quads


def stretch_awning(awning: Awning) -> list[Quad]:
    """Return an awning's stripes, its cheeks and its valance."""
    slope = float(np.hypot(awning.depth_m, awning.z1 - awning.z0))
    up = (0.0, -(awning.z1 - awning.z0) / slope, awning.depth_m / slope)
    down = (0.0, -up[1], -up[2])
    stripes = max(4, round((awning.x1 - awning.x0) / 0.42))
    edges = np.linspace(awning.x0, awning.x1, stripes + 1).tolist()
    quads: list[Quad] = []
    for i in range(stripes):
        a, b, rgb = edges[i], edges[i + 1], awning.rgb if i % 2 else awning.other_rgb
        front, low = -awning.depth_m, awning.z0 - 0.22
        cloth = [(a, front, awning.z0), (b, front, awning.z0), (b, 0.0, awning.z1), (a, 0.0, awning.z1)]
        valance = upright(a, b, front, low, awning.z0)
        quads += [(cloth, up, rgb), (cloth, down, darken(rgb, 0.6)), (valance, (0.0, -1.0, 0.0), rgb)]
    return quads


def fence(rail: Rail) -> list[Quad]:
    """Return a railing: upright bars between two rails, with the sides of a deep balcony."""
    front = -rail.depth_m
    if rail.step_m > rail.x1 - rail.x0 or rail.step_m > 1.0:
        return box((rail.x0, rail.x1), (front, 0.0), (rail.z0, rail.z1), rail.rgb)[:4]

    z = rail.z0, rail.z1
    bars = [upright(x, x + 0.025, front, *z) for x in np.arange(rail.x0, rail.x1, rail.step_m).tolist()]
    sides = [(x, y) for x in (rail.x0, rail.x1) for y in np.arange(front, 0.0, rail.step_m).tolist()]
    bars += [upright(x, x + 0.03, y, *z) for x, y in sides]
    levels = (rail.z1 - 0.05, rail.z0 + 0.06, rail.z0 + 0.7)
    bars += [upright(rail.x0, rail.x1, front, level, level + 0.05) for level in levels]
    return [(bar, (0.0, -1.0, 0.0), rail.rgb) for bar in bars]


def upright(x0: float, x1: float, y: float, z0: float, z1: float) -> list[tuple[float, float, float]]:
    """Return the corners of a rectangle that faces the street."""
    return [(x0, y, z0), (x1, y, z0), (x1, y, z1), (x0, y, z1)]
