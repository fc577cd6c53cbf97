"""What stands between the camera and the houses: trees, parked cars, lamp posts."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.random import PCG64, Generator
from PIL import Image, ImageDraw

from sample_data.renderer.building_styles import Rgb
from sample_data.renderer.buildings import pick
from sample_data.renderer.canvas import Canvas
from sample_data.renderer.facade_parts import darken
from sample_data.renderer.lighting import Drive
from sample_data.renderer.relief import FaceList, Faces, Quad, box
from sample_data.renderer.street_geometry import NEAR_M, Camera

PAINTS: tuple[Rgb, ...] = (
    (30, 32, 36), (200, 202, 204), (236, 236, 234), (120, 124, 130), (150, 28, 32), (36, 62, 116),
    (70, 96, 84), (206, 186, 140),
)  # fmt: skip
LEAVES: dict[str, tuple[Rgb, ...]] = {
    "spring": ((112, 142, 70), (134, 156, 88), (214, 188, 198)),
    "summer": ((64, 98, 48), (84, 116, 58), (72, 100, 66)),
    "autumn": ((172, 122, 52), (150, 84, 46), (138, 122, 62)),
    "winter": (),
}
SPRITE_PX = 320
# Along the length and up, as shares of length and metres: (body, glass house, inset of the glass house's top).
SHAPES: dict[str, tuple[float, tuple[tuple[float, float], ...], tuple[tuple[float, float], ...]]] = {
    "hatch": (4.1, ((0.0, 0.32), (0.0, 0.78), (0.05, 0.9), (0.27, 0.98), (0.98, 1.0), (1.0, 0.8), (1.0, 0.32)),
              ((0.27, 0.97), (0.43, 1.46), (0.85, 1.46), (0.97, 0.99))),
    "saloon": (4.6, ((0.0, 0.32), (0.0, 0.74), (0.04, 0.86), (0.28, 0.94), (0.8, 0.98), (0.99, 0.96), (1.0, 0.7),
                     (1.0, 0.32)),
               ((0.28, 0.93), (0.42, 1.42), (0.68, 1.42), (0.84, 0.97))),
    "van": (5.0, ((0.0, 0.34), (0.0, 0.9), (0.04, 1.06), (0.16, 1.14), (1.0, 1.16), (1.0, 0.34)),
            ((0.16, 1.13), (0.26, 2.0), (0.99, 2.05), (1.0, 1.15))),
}  # fmt: skip


class Limb(NamedTuple):
    """A branch: its direction in radians, its length and its thickness in pixels."""

    angle: float
    length: float
    thick: float


@dataclass(frozen=True)
class Tree:
    """A street tree: its foot, its height and its kind."""

    x_m: float
    y_m: float
    height_m: float
    kind: int

    def hides(self, camera: Camera) -> bool:
        """Tell whether the tree stands squarely between a camera and its target."""
        (sx, sy, sz), (tx, ty, tz) = camera.position, camera.target
        along = (self.y_m - sy) / (ty - sy)
        x, z = sx + along * (tx - sx), sz + along * (tz - sz)
        reach = 0.2 * self.height_m if z > 0.3 * self.height_m else 0.4
        return 0.0 < along < 1.0 and abs(x - self.x_m) < reach and z < self.height_m


@dataclass(frozen=True)
class Car:
    """A parked car: where its rear or front begins, its shape and paint."""

    x_m: float
    y_m: float
    shape: str
    rgb: Rgb
    reversed: bool

    @property
    def length_m(self) -> float:
        return SHAPES[self.shape][0]


def plant_trees(rng: Generator, start: float, end: float, pavement_m: float) -> tuple[Tree, ...]:
    """Plant a street's trees along its kerb, or none, and a clump beyond each end of the row."""
    kind, trees = int(rng.integers(3)), []
    spacing = float(rng.choice([0.0, 13.0, 17.0, 24.0]))
    if spacing:
        for x in np.arange(start + rng.uniform(2, spacing), end, spacing):
            height = float(rng.uniform(4.5, 7.5))
            trees.append(Tree(float(x + rng.uniform(-1.5, 1.5)), -pavement_m + 0.6, height, kind))
    for x in (start - 5, start - 12, end + 5, end + 12):
        trees.append(Tree(x, float(rng.uniform(1, 6)), float(rng.uniform(7, 11)), (kind + 1) % 3))
    return tuple(trees)


def park_cars(rng: Generator, start: float, end: float, pavement_m: float) -> tuple[Car, ...]:
    """Park cars along the kerb with gaps, differently for each drive."""
    cars, x, crowd = [], start + float(rng.uniform(0, 10)), float(rng.uniform(2, 14))
    while x < end:
        shape = pick(rng, ("hatch", "hatch", "saloon", "van"))
        cars.append(Car(x, -pavement_m - 0.35, shape, pick(rng, PAINTS), bool(rng.random() < 0.5)))
        x += cars[-1].length_m + 0.8 + float(rng.exponential(crowd))
    return tuple(cars)


@lru_cache(maxsize=32)
def grow_sprite(kind: int, drive: Drive, seed: int) -> Image.Image:
    """Paint a tree (RGBA, foot at the bottom centre): branches, then leaves from the dark inside to the lit top."""
    rng = Generator(PCG64([seed, kind, drive.seed % 7]))
    image = Image.new("RGBA", (SPRITE_PX, SPRITE_PX), (0, 0, 0, 0))
    brush = ImageDraw.Draw(image)
    level = float(np.mean(drive.ambient_rgb) + 0.5 * drive.sun_rgb[0])
    bark = darken((104, 90, 76), level)
    branch(brush, rng, (SPRITE_PX / 2, SPRITE_PX), Limb(-math.pi / 2, SPRITE_PX * 0.3, 11.0), bark)
    if not LEAVES[drive.season]:
        return image
    rgb = LEAVES[drive.season][kind]
    count = {"summer": 3000, "autumn": 2000, "spring": 1700}[drive.season]
    turn, reach = rng.uniform(0, 2 * math.pi, count), np.sqrt(rng.uniform(0, 1, count))
    wide, tall = ((0.4, 0.36), (0.34, 0.38), (0.45, 0.32))[kind]
    reach *= 1 + 0.13 * np.sin(3 * turn + rng.uniform(0, 6)) + 0.09 * np.sin(7 * turn + rng.uniform(0, 6))
    x, y = 0.5 + wide * reach * np.cos(turn), 0.39 - tall * reach * np.sin(turn)
    sunny = np.clip(0.6 - 0.55 * (y - 0.39) / tall + 0.35 * drive.sun[0] * (x - 0.5) / wide, 0, 1.3)
    sunny += rng.normal(0, 0.16, count)
    radius = rng.uniform(1.2, 4.2, count)
    for i in np.argsort(sunny + rng.normal(0, 0.25, count)).tolist():
        tone = darken(rgb, level * (0.5 + 0.62 * float(sunny[i].clip(0, 1.4))))
        cx, cy, r = float(x[i]) * SPRITE_PX, float(y[i]) * SPRITE_PX, float(radius[i])
        brush.ellipse((cx - r, cy - r * 0.8, cx + r, cy + r * 0.8), (*tone, 255))
    return image


def branch(brush: ImageDraw.ImageDraw, rng: Generator, foot: tuple[float, float], limb: Limb, rgb: Rgb) -> None:
    tip = (foot[0] + limb.length * math.cos(limb.angle), foot[1] + limb.length * math.sin(limb.angle))
    brush.line([foot, tip], (*rgb, 255), width=max(1, round(limb.thick)))
    if limb.thick < 1.2:
        return
    for _ in range(3 if limb.thick < 9 else 4):
        angle = limb.angle + float(rng.normal(0, 0.5))
        branch(brush, rng, tip, Limb(angle, limb.length * float(rng.uniform(0.55, 0.8)), limb.thick * 0.56), rgb)


def paint_tree(canvas: Canvas, tree: Tree, sprite: Image.Image) -> None:
    """Put a tree's sprite into the picture, as tall as its distance makes it."""
    feet = np.array([(tree.x_m, tree.y_m, 0.0), (tree.x_m, tree.y_m, tree.height_m)])
    ends, depth = canvas.camera.project(feet)
    if depth.min() < 1.5:
        return
    tall = float(np.hypot(*(ends[0] - ends[1])))
    left, top = float(ends[0, 0] - tall / 2), float(ends[1, 1])
    size, scale = canvas.camera.size, SPRITE_PX / tall
    x0, x1 = max(0, round(left)), min(size, round(left + tall))
    y0, y1 = max(0, round(top)), min(size, round(top + tall))
    if x1 <= x0 or y1 <= y0 or tall < 4:
        return
    low = max(0.0, (x0 - left) * scale), max(0.0, (y0 - top) * scale)
    inside = (*low, min(float(SPRITE_PX), (x1 - left) * scale), min(float(SPRITE_PX), (y1 - top) * scale))
    sampling = Image.Resampling.BILINEAR if tall < SPRITE_PX else Image.Resampling.NEAREST
    patch = sprite.resize((x1 - x0, y1 - y0), sampling, box=inside)
    canvas.image.paste(patch, (x0, y0), patch)


def model_car(car: Car) -> Faces:
    """Return a car's faces: the strips around its profile, then its side towards the road."""
    length, body, house = SHAPES[car.shape]
    parts, quads = FaceList(), list[Quad]()
    near, far = car.y_m - 1.75, car.y_m

    def along(share: float) -> float:
        return car.x_m + length * (1 - share if car.reversed else share)

    glass, inset = (44, 50, 58), 0.16
    for ring, narrow in ((body, 0.0), (house, inset)):
        for i, ((u, z), (v, w)) in enumerate(zip(ring, ring[1:], strict=False)):
            low, high = (narrow if z > 1.2 else 0.0), (narrow if w > 1.2 else 0.0)
            a, b = along(u), along(v)
            strip = [(a, near + low, z), (b, near + high, w), (b, far - high, w), (a, far - low, z)]
            span = math.hypot(b - a, w - z) or 1.0
            flip = -1.0 if car.reversed else 1.0
            normal = (-(w - z) / span * flip, 0.0, abs(b - a) / span)
            pane = narrow > 0 and i != 1 and car.shape != "van" or (narrow > 0 and i == 0)
            quads.append((strip, normal, glass if pane else car.rgb))
    parts.add(quads)
    return parts.faces()


def paint_car(canvas: Canvas, car: Car) -> None:
    """Paint a parked car: its shadow, its far strips, its side, windows, lamps and wheels."""
    length, body, house = SHAPES[car.shape]
    near = car.y_m - 1.75
    direction = -1.0 if car.reversed else 1.0
    start = car.x_m + (length if car.reversed else 0.0)

    def side(points: list[tuple[float, float]], inset: float = 0.0) -> np.ndarray:
        return np.array([(start + direction * length * u, near + (inset if z > 1.2 else 0.0), z) for u, z in points])

    shadow = [(car.x_m - 0.1, near - 0.15, 0.02), (car.x_m + length + 0.1, near - 0.15, 0.02)]
    shadow += [(car.x_m + length + 0.1, car.y_m, 0.02), (car.x_m - 0.1, car.y_m, 0.02)]
    canvas.paint_polygon(np.array(shadow), (38, 38, 42))
    canvas.paint_faces(model_car(car))
    light = canvas.drive.shade(np.array([0.0, -0.94, 0.34]))
    paint, upper = np.array(car.rgb) * light, np.array(car.rgb) * canvas.drive.shade(np.array([0.0, -0.6, 0.8]))
    canvas.paint_polygon(side(list(body)), (paint * 0.86).clip(0, 255))
    belt = [(0.01, 0.66), (0.99, 0.66), *[p for p in reversed(body) if p[1] > 0.68]]
    canvas.paint_polygon(side(belt), paint.clip(0, 255))
    canvas.paint_polygon(side(list(house), 0.16), upper.clip(0, 255))
    (a, z0), (b, z1), (c, _), (d, _) = house
    middle = (b + c) / 2
    if car.shape == "van":
        panes = [[(a + 0.02, z0 + 0.06), (b + 0.02, z1 - 0.16), (b + 0.12, z1 - 0.16), (b + 0.12, z0 + 0.06)]]
    else:
        rear = [(middle + 0.01, z0 + 0.05), (middle + 0.01, z1 - 0.08), (c - 0.01, z1 - 0.08), (d - 0.04, z0 + 0.07)]
        fore = [(a + 0.05, z0 + 0.05), (b + 0.015, z1 - 0.08), (middle - 0.01, z1 - 0.08), (middle - 0.01, z0 + 0.05)]
        panes = [fore, rear]
    for pane in panes:
        canvas.paint_polygon(side(pane, 0.16), (np.array((66, 76, 86)) * light).clip(0, 255))
    for share in (0.19, 0.8):
        paint_wheel(canvas, start + direction * length * share, near - 0.01)


def paint_wheel(canvas: Canvas, x: float, y: float) -> None:
    turn = np.linspace(0, 2 * math.pi, 14, endpoint=False)
    for radius, grey in ((0.4, 26), (0.33, 30), (0.22, 150), (0.08, 70)):
        ring = np.stack([x + radius * np.cos(turn), np.full(14, y), 0.33 + radius * np.sin(turn)], axis=1)
        canvas.paint_polygon(ring, (grey, grey, grey + 3))


def paint_lamp(canvas: Canvas, x: float, y: float) -> None:
    parts = FaceList()
    parts.add(box((x - 0.06, x + 0.06), (y - 0.06, y + 0.06), (0.0, 6.2), (74, 80, 80)))
    parts.add(box((x - 0.04, x + 0.04), (y - 1.4, y), (6.1, 6.2), (74, 80, 80)))
    parts.add(box((x - 0.14, x + 0.14), (y - 1.9, y - 1.2), (6.05, 6.2), (120, 124, 124)))
    canvas.paint_faces(parts.faces())


def is_ahead(camera: Camera, x: float, y: float) -> bool:
    _, depth = camera.project(np.array([x, y, 1.0]))
    return float(depth) > NEAR_M
