"""The builders who work in the city's styles, and the single houses they put up.

A builder fixes what a terrace shares (material, window type, roof); a house adds what a neighbour tells apart (width,
door, sign, curtains). A street of one builder is hard, a street of many is easy.
"""

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from numpy.random import Generator

from sample_data.renderer.building_styles import (
    BOARDS,
    BRICK,
    CLADDING,
    CONCRETE,
    DOORS,
    SHOPS,
    STUCCO,
    STYLES,
    Rgb,
    Style,
)

T = TypeVar("T")
# Whose two numbers in a style are bounds; the others' are alternatives.
RANGES = {"ground_m", "upper_m", "window_width_m", "window_fill", "column_m", "cornice_m", "house_width_m"}


@dataclass(frozen=True)
class Builder:
    """What the houses of one builder share, drawn field by field; a house still chooses some from its `style`."""

    style: Style
    wall: str
    wall_rgb: Rgb
    base: str
    trim_rgb: Rgb
    frame_rgb: Rgb
    roof: str
    roof_rgb: Rgb
    floors: int
    ground_m: float
    upper_m: float
    window_width_m: float
    window_fill: float
    window_top: str
    panes: tuple[int, int]
    column_m: float
    rhythm: str
    head: str
    balcony: str
    bay: str
    cornice_m: float
    string_course: bool
    quoins: bool
    shutters: bool
    dormers: bool
    ground: str
    house_width_m: float
    garden_m: float
    gap_m: float


@dataclass(frozen=True)
class House:
    """One building: its builder's habits and its own width, door, shop and seed."""

    builder: Builder
    width_m: float
    depth_m: float
    floors: int
    ground: str
    door_rgb: Rgb
    shop_rgb: Rgb
    sign: str
    number: int
    awning: bool
    mirrored: bool
    bay: bool
    wall_rgb: Rgb
    chimneys: int
    seed: int


def pick(rng: Generator, choices: tuple[T, ...]) -> T:
    """Choose one alternative, keeping its type (Generator.choice would turn tuples into arrays)."""
    return choices[int(rng.integers(len(choices)))]


def choose_builder(rng: Generator) -> Builder:
    style = STYLES[pick(rng, tuple(sorted(STYLES)))]
    wall = pick(rng, style["wall"])
    palettes = {"brick": BRICK, "boards": BOARDS, "panel": CONCRETE, "cladding": CLADDING, "render": STUCCO}
    drawn: dict[str, Any] = {"wall": wall, "wall_rgb": pick(rng, palettes.get(wall, style["wall_rgb"]))}
    for name in (field.name for field in fields(Builder)[3:]):
        drawn[name] = float(rng.uniform(*style[name])) if name in RANGES else pick(rng, style[name])
    return Builder(style, **drawn)


def build_house(rng: Generator, builder: Builder, number: int) -> House:
    """Draw one house of a builder: near the builder's usual width, with its own details."""
    width = min(max(builder.house_width_m * rng.uniform(0.88, 1.15), 5.0), 25.0)
    repaint = builder.wall in {"render", "boards"} and rng.random() < 0.6
    storeys = builder.floors + (int(rng.integers(-1, 2)) if builder.wall != "brick" and builder.floors > 2 else 0)
    return House(
        builder=builder, width_m=width, depth_m=float(rng.uniform(9.0, 13.0)), floors=min(max(storeys, 2), 7),
        ground=builder.ground if rng.random() < 0.7 else pick(rng, builder.style["ground"]), door_rgb=pick(rng, DOORS),
        shop_rgb=pick(rng, SHOPS), sign=invent_sign(rng), number=number, awning=bool(rng.random() < 0.6),
        mirrored=bool(rng.random() < 0.5), bay=bool(rng.random() < 0.85),
        wall_rgb=pick(rng, STUCCO if builder.wall == "render" else BOARDS) if repaint else builder.wall_rgb,
        chimneys=int(rng.integers(0, 3)), seed=int(rng.integers(2**31)),
    )  # fmt: skip


def invent_sign(rng: Generator) -> str:
    """Make up a shop's name that no shop bears."""
    trades = ("CAFE", "BOOKS", "BAKERY", "PHARMA", "OPTIK", "HAIR", "WINE", "TAILOR", "FLORIST", "BIKES", "DELI", "")
    start = pick(rng, ("BO", "MA", "LU", "TRE", "VI", "KO", "SA", "NE", "FA", "RI"))
    end = pick(rng, ("RELLO", "NIX", "DERA", "TTO", "LIN", "SKA"))
    return f"{start}{end} {pick(rng, trades)}".strip()
