"""Side walls, roof slopes, dormers and chimneys of a house."""

import math
from dataclasses import dataclass

import numpy as np

from sample_data.renderer.buildings import House
from sample_data.renderer.facade_parts import Facade, darken
from sample_data.renderer.relief import FaceList, Faces, Quad, box, upright
from sample_data.renderer.street_geometry import Array

PITCH = math.tan(math.radians(38))
MANSARD_RISE_M, MANSARD_RUN_M = 2.7, 1.3


@dataclass(frozen=True)
class Plane:
    """A textured polygon (N, 3); its top left texel lies at `origin`, its axes are unit vectors right and down."""

    kind: str
    polygon: Array
    origin: Array
    right: Array
    down: Array
    normal: Array


def make_plane(kind: str, corners: list[tuple[float, float, float]], right: tuple[float, float, float]) -> Plane:
    """Span a plane by its corners, u along `right` and v down the surface, which gives the normal its outward side."""
    polygon, along = np.array(corners, float), np.array(right, float)
    across = polygon[-1] - polygon[0] - np.dot(polygon[-1] - polygon[0], along) * along
    down = -across / np.linalg.norm(across)
    normal = np.cross(along, -down)
    shift = (polygon - polygon[0]) @ np.stack([along, down], axis=1)
    low = shift.min(axis=0)
    return Plane(kind, polygon, polygon[0] + low[0] * along + low[1] * down, along, down, normal)


def raise_walls(facade: Facade) -> list[Plane]:
    """Return the two side walls, up to the roof's profile."""
    house, height, depth = facade.house, facade.height_m, facade.house.depth_m
    roof = house.builder.roof
    profile = {
        "side": [(depth / 2, height + depth / 2 * PITCH)],
        "mansard": [(depth - MANSARD_RUN_M, height + MANSARD_RISE_M), (MANSARD_RUN_M, height + MANSARD_RISE_M)],
    }.get(roof, [])
    planes = []
    for x, sign in ((0.0, -1.0), (house.width_m, 1.0)):
        # Seen from outside: the left wall runs from back to front, the right one from front to back.
        ring = [(x, 0.0, 0.0), (x, depth, 0.0), (x, depth, height), *[(x, y, z) for y, z in profile], (x, 0.0, height)]
        planes.append(make_plane("wall", ring, (0.0, sign, 0.0)))
    return planes


def raise_roof(facade: Facade) -> list[Plane]:
    """Return the roof's slopes; a flat roof has none that a street camera sees."""
    height, width, roof = facade.height_m, facade.house.width_m, facade.house.builder.roof
    if roof == "side":
        run, drop = facade.house.depth_m / 2, 0.3 * PITCH
        ridge = height + run * PITCH
        ring = [(0.0, -0.3, height - drop), (width, -0.3, height - drop), (width, run, ridge), (0.0, run, ridge)]
        return [make_plane("roof", ring, (1, 0, 0))]
    if roof == "mansard":
        top, run = height + MANSARD_RISE_M, MANSARD_RUN_M
        ring = [(0.0, 0.1, height), (width, 0.1, height), (width, run, top), (0.0, run, top)]
        return [make_plane("roof", ring, (1, 0, 0))]
    if roof == "hip":
        return raise_hip(width, facade.house.depth_m, height)
    if roof == "front":
        return raise_gable(facade, -0.25, width * 0.38)
    if roof in {"stepped", "bell"}:
        return raise_gable(facade, 0.3, min(width * 0.38, facade.top_m - height - 0.4))
    return []


def raise_hip(width: float, depth: float, height: float) -> list[Plane]:
    """Return a hipped roof's sides and front, which overhang the walls."""
    run = min(width / 2 - 0.2, depth / 2)
    top, low, high = height + run * 0.62, -0.3, width + 0.3
    front = [(low, -0.3, height), (high, -0.3, height), (width - run, run, top), (run, run, top)]
    left = [(low, depth, height), (low, -0.3, height), (run, run, top), (run, depth - run, top)]
    right = [(high, -0.3, height), (high, depth, height), (width - run, depth - run, top), (width - run, run, top)]
    sides = [make_plane("roof", left, (0, -1, 0)), make_plane("roof", right, (0, 1, 0))]
    return [*sides, make_plane("roof", front, (1, 0, 0))]


def raise_gable(facade: Facade, near: float, rise: float) -> list[Plane]:
    """Return the two slopes behind a gable that faces the street."""
    width, depth, height = facade.house.width_m, facade.house.depth_m, facade.height_m
    middle, top = width / 2, height + rise
    left = [(0.0, depth, height), (0.0, near, height), (middle, near, top), (middle, depth, top)]
    right = [(width, near, height), (width, depth, height), (middle, depth, top), (middle, near, top)]
    return [make_plane("roof", left, (0, -1, 0)), make_plane("roof", right, (0, 1, 0))]


def raise_chimneys(facade: Facade) -> Faces:
    house, parts = facade.house, FaceList()
    rises = {"side": house.depth_m / 2 * PITCH, "mansard": MANSARD_RISE_M, "hip": 2.5, "flat": 0.0}
    rise = rises.get(house.builder.roof, 1.0)
    brick = house.builder.wall_rgb if house.builder.wall == "brick" else (150, 96, 76)
    if house.builder.style["floors"][-1] > 5 and house.builder.roof == "flat":
        x, z = house.width_m * 0.3, facade.height_m
        parts.add(box((x, x + 3.0), (3.0, 6.0), (z, z + 1.6), (140, 142, 144)))
        return parts.faces()
    for i in range(house.chimneys):
        x = (0.15, house.width_m - 1.15)[(i + house.mirrored) % 2]
        y, top = house.depth_m / 2, facade.height_m + rise + 1.1
        parts.add(box((x, x + 1.0), (y - 0.3, y + 0.3), (facade.height_m, top), darken(brick, 0.9)))
        for pot in (0.15, 0.6):
            parts.add(box((x + pot, x + pot + 0.24), (y - 0.12, y + 0.12), (top, top + 0.45), (176, 110, 80)))
    return parts.faces()


def raise_dormers(facade: Facade) -> Faces:
    house, builder, parts = facade.house, facade.house.builder, FaceList()
    if not builder.dormers or builder.roof not in {"side", "mansard"}:
        return parts.faces()
    count = max(1, round(house.width_m / (builder.column_m * (1.0 if builder.roof == "mansard" else 1.7))))
    for i in range(count):
        x = house.width_m * (i + 0.5) / count
        base = facade.height_m + (0.45 if builder.roof == "mansard" else 0.9)
        slope = MANSARD_RISE_M / MANSARD_RUN_M if builder.roof == "mansard" else PITCH
        parts.add(dormer(house, x, base, (base - facade.height_m) / slope, slope))
    return parts.faces()


def dormer(house: House, x: float, base: float, y: float, slope: float) -> list[Quad]:
    """Return one dormer: cheeks that meet the slope, a front with a window, a small gable."""
    half, tall = 0.62, 1.45
    left, right, top, back = x - half, x + half, base + tall, y + tall / slope
    ridge, front = top + 0.4, (0.0, -1.0, 0.0)
    lead, trim, frame = darken(house.builder.roof_rgb, 0.8), house.builder.trim_rgb, house.builder.frame_rgb

    over, far = 0.12, back + 0.4 / slope
    cheeks, roofs = list[Quad](), list[Quad]()
    for side, eave, sign in ((left, left - over, -1.0), (right, right + over, 1.0)):
        cheeks.append(([(side, y, base), (side, y, top), (side, back, top), (side, back, top)], (sign, 0, 0), lead))
        slab = [(eave, y - over, top - 0.05), (x, y - over, ridge), (x, far, ridge), (eave, far, top)]
        roofs.append((slab, (0.54 * sign, 0.0, 0.84), lead))
    window: list[Quad] = [
        (upright(left, right, y, base, top), front, trim),
        (upright(left + 0.16, right - 0.16, y, base + 0.12, top - 0.1), front, frame),
        (upright(left + 0.23, x - 0.03, y, base + 0.2, top - 0.17), front, (88, 98, 110)),
        (upright(x + 0.03, right - 0.23, y, base + 0.2, top - 0.17), front, (78, 88, 100)),
    ]
    gable = [(left - over, y, top - 0.05), (right + over, y, top - 0.05), (x, y, ridge), (x, y, ridge)]
    return [*cheeks, *roofs, *window, (gable, front, trim)]
