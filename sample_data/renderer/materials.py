"""Procedural wall, roof and ground surfaces as images, one texel grid per metre density."""

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.float32]
Rgb = tuple[int, int, int]


def blotches(rng: Generator, height: int, width: int, grain: float) -> Pixels:
    """Return smooth noise (H, W) of about -1..1 whose blotches are `grain` texels wide, with one finer octave."""
    total = np.zeros((height, width), np.float32)
    for octave, weight in ((grain, 0.7), (grain / 3, 0.3)):
        shape = (max(2, int(height / max(octave, 1)) + 1), max(2, int(width / max(octave, 1)) + 1))
        coarse = Image.fromarray(rng.uniform(-1, 1, shape).astype(np.float32))
        total += weight * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return total


def courses(rng: Generator, size: tuple[int, int], texels: tuple[float, float], spread: float) -> tuple[Pixels, Pixels]:
    """Lay bricks of `texels` (height, width) in running bond; return each texel's tone (H, W) and joint mask (H, W)."""
    height, width = size
    row_at = (np.arange(height) + 0.5) / texels[0]
    column_at = (np.arange(width) + 0.5) / texels[1]
    row = row_at.astype(np.int64)
    tones = rng.normal(0, spread, (row[-1] + 1, int(column_at[-1]) + 3)).astype(np.float32)
    tone, joint = np.empty((2, height, width), np.float32)
    for parity in (0, 1):
        shifted = column_at + 0.5 * parity
        rows = row % 2 == parity
        tone[rows] = tones[row[rows]][:, shifted.astype(np.int64)]
        # A joint of one texel whatever the density: thinner ones would shimmer.
        joint[rows] = (shifted % 1.0 < 1.0 / texels[1])[None]
    joint[row_at % 1.0 < 1.0 / texels[0]] = 1.0
    return tone, joint


def lay_wall(rng: Generator, material: str, rgb: Rgb, size: tuple[int, int], density: float) -> Image.Image:
    """Render `size` = (height, width) texels of a wall material at `density` texels a metre."""
    height, width = size
    tone = 0.035 * blotches(rng, height, width, 1.6 * density) + rng.normal(0, 0.018, size).astype(np.float32)
    joint, joint_tone = np.zeros(size, np.float32), 0.8
    if material == "brick":
        bricks, joint = courses(rng, size, (0.095 * density, 0.28 * density), 0.085)
        tone += bricks
        joint_tone = 1.22 if sum(rgb) < 380 else 0.82
        joint *= 0.55
    elif material in {"ashlar", "rustic"}:
        rows_m = 0.34 if material == "ashlar" else 0.48
        stones, joint = courses(rng, size, (rows_m * density, 2.4 * rows_m * density), 0.03)
        tone += stones
        joint *= 0.6 if material == "ashlar" else 1.0
        joint_tone = 0.78 if material == "ashlar" else 0.58
    elif material == "boards":
        board = ((np.arange(height) + 0.5) / density % 0.17) / 0.17
        tone += (0.05 - 0.26 * np.exp(-board * 9)).astype(np.float32)[:, None]
    elif material in {"panel", "cladding"}:
        tall_m, wide_m = (1.6, 2.9) if material == "panel" else (0.6, 1.3)
        plates, joint = courses(rng, size, (tall_m * density, wide_m * density), 0.022)
        tone += plates
        joint_tone = 0.62
    shade = (1 + tone) * (1 + joint * (joint_tone - 1))
    return tint(shade, rgb)


def lay_roof(rng: Generator, rgb: Rgb, size: tuple[int, int], density: float) -> Image.Image:
    """Render rows of tiles, each row shaded at its lower edge."""
    height, width = size
    tiles, joint = courses(rng, size, (0.3 * density, 0.24 * density), 0.075)
    row = ((np.arange(height) + 0.5) / density % 0.3) / 0.3
    edge = (0.06 - 0.3 * np.exp(-(1 - row) * 6)).astype(np.float32)[:, None]
    moss = 0.06 * blotches(rng, height, width, 2.0 * density)
    return tint((1 + tiles + edge + moss) * (1 - 0.22 * joint), rgb)


def lay_ground(rng: Generator, pavement_m: float, size: tuple[int, int], density: float) -> Image.Image:
    """Render a cross-section of street seen from above: v runs from the facades to the road, u along the street."""
    height, width = size
    out = np.empty((height, width, 3), np.float32)
    slabs, joint = courses(rng, size, (0.6 * density, 0.9 * density), 0.04)
    stone = 156 * (1 + slabs + 0.05 * blotches(rng, height, width, density)) * (1 - 0.25 * joint)
    out[:] = stone[..., None] * np.array([1.0, 0.98, 0.94], np.float32)
    kerb, gutter = int(pavement_m * density), int((pavement_m + 0.18) * density)
    asphalt = 88 * (1 + 0.09 * blotches(rng, height, width, 2.5 * density) + rng.normal(0, 0.07, size))
    asphalt *= (1 - 0.22 * np.exp(-((np.arange(height) / density - pavement_m - 0.4) ** 2) / 0.08))[:, None]
    out[gutter:] = asphalt[gutter:, :, None] * np.array([1.0, 1.0, 1.02], np.float32)
    out[kerb:gutter] = 178 * (1 - 0.3 * (np.arange(width) % int(density) == 0))[None, :, None]
    dashes = (np.arange(width) / density % 6.0) < 3.0
    lane = int((pavement_m + 5.6) * density)
    out[lane : lane + int(0.14 * density)][:, dashes] = 205
    patch = int(rng.uniform(0.1, 0.7) * width)
    out[gutter + int(density) : gutter + int(2.4 * density), patch : patch + int(5 * density)] *= 0.82
    return Image.fromarray(np.clip(out, 0, 255).astype(np.uint8))


def tint(shade: Pixels, rgb: Rgb) -> Image.Image:
    """Turn a tone (H, W) around 1 into an image of one colour."""
    pixels = shade[..., None] * np.array(rgb, np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def weather_wall(rng: Generator, image: Image.Image, density: float) -> Image.Image:
    """Add what years do to a painted facade: a dirty foot, streaks running down, large stains."""
    width, height = image.size
    foot = np.exp(-(np.arange(height, dtype=np.float32)[::-1] / density) / 0.7)[:, None]
    streaks = blotches(rng, max(4, height // 40), width, 0.35 * density)
    streaks = np.asarray(Image.fromarray(streaks).resize((width, height), Image.Resampling.BILINEAR))
    tone = 1.0 - 0.16 * foot + 0.035 * streaks + 0.03 * blotches(rng, height, width, 3.5 * density) - 0.02
    pixels = np.asarray(image).astype(np.float32) * tone[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
