"""One drive past a street: its sun, sky, season and the camera's way of exposing for them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.random import PCG64, Generator
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw

from sample_data.renderer.facade_parts import Facade
from sample_data.renderer.materials import blotches
from sample_data.renderer.street_geometry import FOV_DEG, Array, Camera

SKY_DENSITY = 4  # pixels a degree
SKY_AZIMUTH_DEG = 110  # to each side; facades are never seen from further round
SKY_LOW_DEG, SKY_HIGH_DEG = -12, 84
Fill = Callable[[Array, int], None]  # paint a polygon (N, 2), in facade metres, as sun (0) or shade (255)
SEASONS = ("spring", "summer", "autumn", "winter")


@dataclass(frozen=True)
class Drive:
    """The conditions of one drive; directions are street-local, `sun` points towards the sun."""

    season: str
    sun: tuple[float, float, float]
    sun_rgb: tuple[float, float, float]
    ambient_rgb: tuple[float, float, float]
    cloud: float
    opposite_m: float
    seed: int

    def shade(self, normals: Array) -> Array:
        """Return the light (..., 3) that surfaces of these unit normals (..., 3) receive, 1 being full."""
        facing = np.clip(normals @ np.array(self.sun), 0.0, 1.0)[..., None]
        open_sky = (0.82 + 0.18 * normals[..., 2])[..., None]
        light: Array = np.array(self.ambient_rgb) * open_sky + np.array(self.sun_rgb) * facing
        return light

    @property
    def facade_light(self) -> float:
        """Return how bright a facade of the street is, for the exposure."""
        return float(self.shade(np.array([0.0, -1.0, 0.0])).mean())


def choose_drive(rng: Generator, street_azimuth_deg: float) -> Drive:
    """Draw the conditions of a drive: the sun stands in the southern half of the sky, cloud decides how much counts."""
    compass = math.radians(rng.uniform(95, 265) - (street_azimuth_deg - 90.0))
    height = math.radians(rng.uniform(22, 58))
    sun = (math.sin(compass) * math.cos(height), math.cos(compass) * math.cos(height), math.sin(height))
    cloud = float(rng.choice([0.05, 0.2, 0.4, 0.85, 1.0]))
    direct = 0.72 * (1.0 - cloud) ** 0.5 if cloud < 0.8 else 0.04
    warm = float(rng.uniform(0.0, 1.0)) * (1.0 - math.sin(height))
    sun_rgb = (direct, direct * (0.96 - 0.1 * warm), direct * (0.88 - 0.25 * warm))
    base = 0.4 + 0.42 * cloud
    blue = 0.12 * (1.0 - cloud)
    ambient = (base * (1 - blue * 0.6), base * (1 - blue * 0.1), base * (1 + blue))
    season = SEASONS[int(rng.integers(4))]
    return Drive(season, sun, sun_rgb, ambient, cloud, float(rng.uniform(6, 14)), int(rng.integers(2**31)))


@lru_cache(maxsize=16)
def paint_sky(drive: Drive) -> Image.Image:
    """Paint the sky by azimuth and elevation, with clouds and the far roofs and trees on the horizon."""
    rng = Generator(PCG64([drive.seed, 1]))
    width, height = 2 * SKY_AZIMUTH_DEG * SKY_DENSITY, (SKY_HIGH_DEG - SKY_LOW_DEG) * SKY_DENSITY
    up = np.linspace(SKY_HIGH_DEG, SKY_LOW_DEG, height, dtype=np.float32)[:, None, None].clip(0) / 84
    zenith = np.array([70, 122, 196], np.float32) + drive.cloud * np.array([96, 56, 0], np.float32)
    horizon = np.array([206, 218, 228], np.float32)
    sky = horizon + (zenith - horizon) * up**0.55
    grain = 34 * SKY_DENSITY
    noise = blotches(rng, height, width, grain / 2) + 0.5 * blotches(rng, height, width, grain / 9)
    veil = np.clip((noise + (drive.cloud - 0.45) * 1.7) * 1.5, 0, 1)[..., None]
    shadow = 1 - 0.1 * np.roll(noise, 12, axis=0).clip(-1, 1)[..., None]
    light = (np.array([246, 246, 248], np.float32) - 30 * drive.cloud) * shadow
    sky = np.broadcast_to(sky, (height, width, 3)) * (1 - veil) + light * veil
    image = Image.fromarray(np.clip(sky, 0, 255).astype(np.uint8))
    draw_skyline(image, rng, drive)
    return image


def draw_skyline(image: Image.Image, rng: Generator, drive: Drive) -> None:
    brush, level = ImageDraw.Draw(image), SKY_HIGH_DEG * SKY_DENSITY
    leaves = {"spring": (138, 158, 116), "summer": (104, 130, 92), "autumn": (164, 132, 88), "winter": (138, 130, 124)}
    x = 0.0
    while x < image.width:
        wide, tall = rng.uniform(10, 44), rng.uniform(8, 26)
        if rng.random() < 0.5:
            grey = int(rng.integers(128, 176))
            brush.rectangle((x, level - tall, x + wide, image.height), (grey + 14, grey + 6, grey))
            gable = [(x - 1, level - tall), (x + wide / 2, level - tall - 6), (x + wide + 1, level - tall)]
            brush.polygon(gable, (grey - 18,) * 3)
        else:
            brush.ellipse((x - 6, level - tall, x + wide + 6, level + tall), leaves[drive.season])
        x += wide * 0.85
    brush.rectangle((0, level + 1, image.width, image.height), (130, 128, 120))


def crop_sky(sky: Image.Image, camera: Camera, size: int) -> Image.Image:
    """Cut the part of the sky that a camera sees; angles stand in for tangents, which nobody can tell in clouds."""
    half = FOV_DEG / 2 + 2
    x = (math.degrees(camera.azimuth_rad) + SKY_AZIMUTH_DEG) * SKY_DENSITY
    y = (SKY_HIGH_DEG - math.degrees(camera.pitch_rad)) * SKY_DENSITY
    box = (x - half * SKY_DENSITY, y - half * SKY_DENSITY, x + half * SKY_DENSITY, y + half * SKY_DENSITY)
    inside = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(sky.width)), min(box[3], float(sky.height)))
    # Half the size smoothly, the rest by doubling: the sky is the largest and the softest thing in a picture.
    half_size = (size + 1) // 2
    soft = sky.resize((half_size, half_size), Image.Resampling.BILINEAR, box=inside)
    return soft.resize((size, size), Image.Resampling.NEAREST)


def light_facade(drive: Drive, facade: Facade, colours: Image.Image, glass: Image.Image, density: float) -> Image.Image:
    """Light a painted front for a drive: sun or shade with the shadows its parts cast, then the sky in its glass."""
    normal = np.array([0.0, -1.0, 0.0])
    ambient = drive.shade(normal) - np.array(drive.sun_rgb) * max(0.0, -drive.sun[1])
    mask = cast_shadows(drive, facade, colours.size, density)
    lit = Image.new("RGB", colours.size, to_rgb(drive.shade(normal)))
    lit.paste(to_rgb(ambient), mask=mask)
    shaded = ImageChops.multiply(colours, lit)
    mirrored = paint_reflection(drive).resize(colours.size, Image.Resampling.BILINEAR)
    return Image.composite(mirrored, shaded, glass)


def to_rgb(light: Array) -> tuple[int, int, int]:
    """Turn light (3,) into a colour."""
    red, green, blue = (int(min(255, max(0, v * 255))) for v in light)
    return red, green, blue


@lru_cache(maxsize=16)
def paint_reflection(drive: Drive) -> Image.Image:
    """Paint what glass mirrors: the sky above the houses opposite, whose skyline differs from drive to drive."""
    rng = Generator(PCG64([drive.seed, 2]))
    size = 96
    up = np.linspace(1, 0, size, dtype=np.float32)[:, None, None]
    sky = np.array([196, 212, 232], np.float32) * (0.75 + 0.25 * up) + 22 * blotches(rng, size, size, 20)[..., None]
    image = Image.fromarray(np.clip(sky * (0.72 + 0.2 * (drive.cloud > 0.4)), 0, 255).astype(np.uint8))
    brush, x = ImageDraw.Draw(image), 0.0
    while x < size:
        wide, top = rng.uniform(8, 22), size * (1 - rng.uniform(0.25, 0.6))
        grey = int(rng.integers(56, 104))
        brush.rectangle((x, top, x + wide, size), (grey + 8, grey, grey - 6))
        x += wide
    return image


def cast_shadows(drive: Drive, facade: Facade, size: tuple[int, int], density: float) -> Image.Image:
    """Return where the front lies in shadow (L, 255 = shade), drawn at half the density to soften its edges."""
    if drive.sun[1] >= -0.05 or drive.sun_rgb[0] < 0.1:
        return Image.new("L", size, 255)
    half = density / 2
    mask = Image.new("L", (max(1, size[0] // 2), max(1, size[1] // 2)), 0)
    brush = ImageDraw.Draw(mask)
    # Metres that a shadow moves along the wall for each metre that its part stands out.
    slide = np.clip([drive.sun[0] / drive.sun[1], drive.sun[2] / drive.sun[1]], -3.0, 3.0)

    def fill(points: Array, value: int) -> None:
        brush.polygon([(float(x) * half, mask.height - float(z) * half) for x, z in points], value)

    for opening in facade.openings:
        hole = opening.outline()
        fill(hole, 255)
        moved = hole + slide * opening.reveal_m
        fill(np.stack([moved[:, 0].clip(opening.x0, opening.x1), moved[:, 1].clip(opening.z0, opening.z1)], axis=1), 0)
    for part in (*facade.blocks, *facade.awnings):
        rect, shift = part.corners(), slide * part.depth_m
        fill(rect + shift, 255)
        for a, b in zip(rect, np.roll(rect, -1, axis=0), strict=True):  # what it covers on its way
            fill(np.array([a, b, b + shift, a + shift]), 255)
    shade_foot(drive, facade, fill)
    return mask.resize(size, Image.Resampling.BILINEAR)


def shade_foot(drive: Drive, facade: Facade, fill: Fill) -> None:
    """Shade the foot of the wall with the jagged skyline of the houses opposite, 20 m away."""
    level = drive.opposite_m - 20.0 * drive.sun[2] / -drive.sun[1]
    rng = Generator(PCG64([drive.seed, facade.house.seed]))
    x = 0.0
    while level > -2.0 and x < facade.house.width_m:
        wide, top = rng.uniform(4, 9), level + rng.uniform(-1.5, 1.5)
        fill(np.array([(x, 0.0), (x + wide, 0.0), (x + wide, top), (x, top)]), 255 if top > 0 else 0)
        x += wide


def expose(photo: Image.Image, drive: Drive, rng: Generator, noise: NDArray[np.int16]) -> Image.Image:
    """Develop a photograph: exposure for the facades, white balance, contrast and the sensor's noise."""
    gain = float(np.clip((1.0 / drive.facade_light) ** 0.7, 0.9, 1.8)) * rng.uniform(0.92, 1.12)
    balance = rng.normal(0, 0.025)
    contrast = rng.uniform(0.02, 0.2)
    tables: list[int] = []
    for tint in (1 + balance, 1.0, 1 - balance):
        level = np.clip(np.arange(256) / 255 * gain * tint, 0, 1.6)
        level = level / (1 + np.clip(level - 0.82, 0, None) * 0.75)
        level = level + contrast * (level - 0.5) * level.clip(0, 1) * (1 - level.clip(0, 1)) * 4
        tables += [int(v) for v in np.clip(level * 255, 0, 255)]
    # Lighting multiplies display values, which oversaturates what is dark; a real sensor's picture is duller.
    red, green, blue, keep = 0.299, 0.587, 0.114, rng.uniform(0.66, 0.8)
    weights = [(1 - keep) * w for w in (red, green, blue)]
    matrix = [v + (keep if i == j else 0.0) for i in range(3) for j, v in enumerate((*weights, 0.0))]
    pixels = np.asarray(photo.convert("RGB", matrix).point(tables)).astype(np.int16)
    size = photo.size[0]
    y, x = (int(v) for v in rng.integers(0, noise.shape[0] - size, 2))
    pixels += noise[y : y + size, x : x + size]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
