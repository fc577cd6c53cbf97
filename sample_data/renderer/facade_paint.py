"""Paints a designed front flat, as a texture, with a mask that says where glass mirrors the sky."""

from dataclasses import dataclass

import numpy as np
from numpy.random import PCG64, Generator
from PIL import Image, ImageDraw, ImageFont

from sample_data.renderer.building_styles import Rgb
from sample_data.renderer.buildings import Builder, pick
from sample_data.renderer.facade_parts import Facade, Opening, darken
from sample_data.renderer.materials import lay_wall, weather_wall
from sample_data.renderer.street_geometry import Array

GOODS: tuple[Rgb, ...] = ((196, 60, 50), (226, 190, 80), (70, 120, 90), (235, 230, 220), (80, 110, 170), (190, 130, 90))
CLOTHS: tuple[Rgb, ...] = (
    (222, 216, 204), (176, 148, 120), (140, 60, 60), (110, 130, 120), (236, 232, 226), (96, 104, 130),
)  # fmt: skip


@dataclass
class Sheet:
    """A facade texture being painted: metres in, texels out, z = 0 on the bottom row."""

    image: Image.Image
    glass: Image.Image
    density: float
    height_m: float

    def __post_init__(self) -> None:
        self.brush, self.glass_brush = ImageDraw.Draw(self.image), ImageDraw.Draw(self.glass)

    def texels(self, points: Array) -> list[tuple[float, float]]:
        """Turn facade metres (N, 2) into texel positions."""
        return [(float(x) * self.density, (self.height_m - float(z)) * self.density) for x, z in points]

    def box(self, x0: float, x1: float, z0: float, z1: float) -> tuple[int, int, int, int]:
        """Turn facade metres into Pillow's inclusive box, never empty."""
        left, right = round(x0 * self.density), round(x1 * self.density) - 1
        top, bottom = round((self.height_m - z1) * self.density), round((self.height_m - z0) * self.density) - 1
        return left, top, max(left, right), max(top, bottom)

    def rect(self, x0: float, x1: float, z0: float, z1: float, rgb: Rgb) -> None:
        """Fill a rectangle with paint, which does not mirror."""
        self.brush.rectangle(self.box(x0, x1, z0, z1), rgb)
        self.glass_brush.rectangle(self.box(x0, x1, z0, z1), 0)

    def polygon(self, points: Array, rgb: Rgb, mirror: int = 0) -> None:
        """Fill a polygon with paint, or with glass when `mirror` (0..255) is given."""
        self.brush.polygon(self.texels(points), rgb)
        self.glass_brush.polygon(self.texels(points), mirror)

    def write(self, x: float, z: float, height_m: float, text: str, rgb: Rgb) -> None:
        """Letter a text centred on (x, z) in Pillow's own font."""
        font = ImageFont.load_default(size=max(4.0, height_m * self.density * 1.25))
        self.brush.text(self.texels(np.array([(x, z)]))[0], text, rgb, font=font, anchor="mm")


def paint_facade(facade: Facade, density: float) -> tuple[Image.Image, Image.Image]:
    """Return a front's colours (RGB) and its mirror mask (L) at `density` texels a metre."""
    house, builder = facade.house, facade.house.builder
    rng = Generator(PCG64([house.seed, 1]))
    size = (max(8, round(facade.top_m * density)), max(8, round(house.width_m * density)))
    wall = lay_wall(rng, builder.wall, house.wall_rgb, size, density)
    if builder.base:
        base_m = builder.ground_m - 0.1
        base = (max(2, round(base_m * density)), size[1])
        rgb = house.wall_rgb if builder.base == builder.wall else builder.trim_rgb
        wall.paste(lay_wall(rng, builder.base, rgb, base, density), (0, size[0] - base[0]))
    sheet = Sheet(weather_wall(rng, wall, density), Image.new("L", wall.size, 0), density, size[0] / density)
    paint_wall_parts(sheet, facade)
    for opening in facade.openings:
        paint_opening(sheet, facade, opening, rng)
    for block in facade.blocks:
        sheet.rect(block.x0, block.x1, block.z0, block.z1, block.rgb)
    paint_gable(sheet, facade)
    paint_fascia(sheet, facade)
    return sheet.image, sheet.glass


def paint_wall_parts(sheet: Sheet, facade: Facade) -> None:
    """Paint plinth, bay fronts and the board behind a shop."""
    house, builder = facade.house, facade.house.builder
    sheet.rect(0.0, house.width_m, 0.0, 0.4, darken(builder.trim_rgb, 0.72))
    for panel in facade.panels:
        sheet.rect(panel.x0, panel.x1, 0.0, panel.z1, darken(builder.trim_rgb, 0.97))
        z = 0.0
        while z < panel.z1 - 1:
            sheet.rect(panel.x0, panel.x1, z, z + 0.6, darken(house.wall_rgb, 0.95))
            z = builder.ground_m if z == 0.0 else z + builder.upper_m
    if facade.fascia:
        x0, x1, z0, z1 = facade.fascia
        sheet.rect(x0, x1, 0.0, z1, house.shop_rgb)


def paint_gable(sheet: Sheet, facade: Facade) -> None:
    """Edge a gable with its boards or its coping, and put an attic window into it."""
    house, builder = facade.house, facade.house.builder
    if facade.top_m < facade.height_m + 0.5:
        return
    middle, base = house.width_m / 2, facade.height_m
    half = min(0.55, house.width_m * 0.09)
    top = "round" if builder.roof != "front" or house.seed % 2 else "flat"
    attic = Opening(middle - half, middle + half, base + 0.15, base + 1.35, "window", top)
    paint_window(sheet, attic, builder, (60, 66, 74), 90)
    edge = sheet.texels(facade.outline[2:])
    sheet.brush.line(edge, darken(builder.trim_rgb, 0.98), width=max(1, round(0.22 * sheet.density)))


def paint_fascia(sheet: Sheet, facade: Facade) -> None:
    """Letter the shop's signboard, or put the house number beside the door."""
    house = facade.house
    light = sum(house.shop_rgb) < 420
    if facade.fascia:
        x0, x1, z0, z1 = facade.fascia
        sheet.rect(x0, x1, z0, z1, house.shop_rgb)
        sheet.rect(x0, x1, z0, z0 + 0.04, darken(house.shop_rgb, 0.7))
        middle = x0 + (x1 - x0) * (0.5 if house.seed % 2 else 0.35)
        sheet.write(middle, (z0 + z1) / 2, 0.34, house.sign, (240, 234, 214) if light else (40, 40, 44))
    for door in facade.openings:
        if door.kind == "door" and not facade.fascia:
            sheet.rect(door.x1 + 0.12, door.x1 + 0.42, 1.7, 1.95, (236, 236, 230))
            sheet.write(door.x1 + 0.27, 1.82, 0.17, str(house.number), (30, 34, 60))


def paint_opening(sheet: Sheet, facade: Facade, opening: Opening, rng: Generator) -> None:
    """Paint one opening and what dresses the wall around it."""
    house, builder = facade.house, facade.house.builder
    if opening.kind == "blind":
        sheet.polygon(opening.outline(), darken(house.wall_rgb, 0.86))
    elif opening.kind == "door":
        paint_door(sheet, opening, facade, rng)
    elif opening.kind == "garage":
        paint_garage(sheet, opening, darken(house.door_rgb, 1.1))
    elif opening.kind in {"shop", "hall", "entrance"}:
        paint_shop_glass(sheet, opening, house.shop_rgb if house.ground == "shop" else builder.frame_rgb, rng)
    else:
        if opening.kind == "window":
            paint_surround(sheet, opening, builder)
        room = darken(pick(rng, ((46, 50, 56), (62, 60, 58), (38, 42, 48), (74, 70, 64))), rng.uniform(0.8, 1.1))
        paint_window(sheet, opening, builder, room, int(rng.integers(70, 190)), rng)
        if builder.shutters and opening.kind == "window":
            paint_shutters(sheet, opening, house.door_rgb)


def paint_surround(sheet: Sheet, opening: Opening, builder: Builder) -> None:
    """Frame a window on the wall: an architrave, or a soldier course of bricks over it."""
    if builder.head in {"surround", "pediment", "keystone"}:
        sheet.polygon(opening.outline(-0.13), darken(builder.trim_rgb, 0.97))
    elif builder.head == "soldier":
        head = Opening(opening.x0 - 0.1, opening.x1 + 0.1, opening.z0, opening.z1 + 0.24, "", opening.top)
        upper = head.outline()[2:]
        sheet.polygon(np.concatenate([upper, opening.outline()[2:][::-1]]), darken(builder.wall_rgb, 0.8))
    elif opening.top != "flat":
        sheet.polygon(opening.outline(-0.1), darken(builder.trim_rgb, 0.95))


def paint_window(
    sheet: Sheet, opening: Opening, builder: Builder, room: Rgb, mirror: int, rng: Generator | None = None
) -> None:
    """Paint a frame, the dim room behind its glass, curtains or blinds, and the glazing bars."""
    frame = builder.frame_rgb
    sheet.polygon(opening.outline(), frame)
    sheet.polygon(opening.outline(0.075), room, mirror)
    x0, x1, z0, z1 = opening.x0 + 0.075, opening.x1 - 0.075, opening.z0 + 0.075, opening.z1 - 0.075
    if opening.top != "flat":
        z1 = float(opening.outline(0.075)[2, 1])
    if rng is not None and rng.random() < 0.62:
        cloth = darken(pick(rng, CLOTHS), 0.72)
        if rng.random() < 0.5:
            drop = float(rng.uniform(0.15, 0.8)) * (z1 - z0)
            sheet.brush.rectangle(sheet.box(x0, x1, z1 - drop, z1), cloth)
        else:
            part = float(rng.uniform(0.14, 0.3)) * (x1 - x0)
            sheet.brush.rectangle(sheet.box(x0, x0 + part, z0, z1), cloth)
            sheet.brush.rectangle(sheet.box(x1 - part, x1, z0, z1), cloth)
    bar = 0.045
    columns, rows = opening.panes
    for i in range(1, columns):
        x = x0 + (x1 - x0) * i / columns
        sheet.rect(x - bar / 2, x + bar / 2, z0, opening.z1 - 0.05, frame)
    for i in range(1, rows):
        z = z0 + (z1 - z0) * i / rows
        thick = bar * (1.8 if i == rows // 2 and rows > 1 else 1.0)
        sheet.rect(x0, x1, z - thick / 2, z + thick / 2, frame)


def paint_shutters(sheet: Sheet, opening: Opening, rgb: Rgb) -> None:
    leaf = min(0.5, (opening.x1 - opening.x0) / 2)
    for x0 in (opening.x0 - leaf - 0.02, opening.x1 + 0.02):
        sheet.rect(x0, x0 + leaf, opening.z0, opening.z1, rgb)
        for z in np.arange(opening.z0 + 0.12, opening.z1 - 0.1, 0.13):
            sheet.rect(x0 + 0.07, x0 + leaf - 0.07, float(z), float(z) + 0.05, darken(rgb, 0.72))


def paint_door(sheet: Sheet, door: Opening, facade: Facade, rng: Generator) -> None:
    """Paint a panelled door under a fanlight, or a shop's glass door."""
    house, builder = facade.house, facade.house.builder
    if facade.fascia:
        paint_shop_glass(sheet, door, house.shop_rgb, rng)
        return
    sheet.polygon(door.outline(-0.14), builder.trim_rgb)
    sheet.polygon(door.outline(), darken(builder.frame_rgb, 0.95))
    sheet.polygon(door.outline(0.08), (52, 56, 62), 110)
    leaf_top = door.z0 + min(2.1, (door.z1 - door.z0) * 0.82)
    sheet.rect(door.x0 + 0.06, door.x1 - 0.06, door.z0, leaf_top, house.door_rgb)
    sheet.rect(door.x0, door.x1, leaf_top, leaf_top + 0.07, builder.frame_rgb)
    width = (door.x1 - door.x0 - 0.12) / 2
    for x in (door.x0 + 0.06, door.x0 + 0.06 + width):
        for low, high in ((0.12, 0.42), (0.5, 0.92)):
            z0, z1 = (door.z0 + (leaf_top - door.z0) * part for part in (low, high))
            sheet.rect(x + 0.1, x + width - 0.1, z0, z1, darken(house.door_rgb, 0.74))
    sheet.rect(door.x1 - 0.2, door.x1 - 0.13, door.z0 + 0.95, door.z0 + 1.07, (214, 190, 110))


def paint_garage(sheet: Sheet, door: Opening, rgb: Rgb) -> None:
    sheet.polygon(door.outline(-0.1), darken(rgb, 0.6))
    sheet.polygon(door.outline(), rgb)
    for z in np.arange(door.z0 + 0.4, door.z1 - 0.1, 0.42):
        sheet.rect(door.x0, door.x1, float(z), float(z) + 0.04, darken(rgb, 0.72))


def paint_shop_glass(sheet: Sheet, opening: Opening, frame: Rgb, rng: Generator) -> None:
    """Paint large panes with goods, shelves or a lit hall behind them."""
    sheet.rect(opening.x0, opening.x1, opening.z0, opening.z1, frame)
    x0, x1, z0, z1 = opening.x0 + 0.06, opening.x1 - 0.06, opening.z0 + 0.08, opening.z1 - 0.06
    room = np.array([(x0, z0), (x1, z0), (x1, z1), (x0, z1)])
    sheet.polygon(room, darken((92, 84, 72), rng.uniform(0.6, 1.2)), 100)
    if opening.kind == "shop":
        for _ in range(int((x1 - x0) * 4)):
            wide, tall = rng.uniform(0.12, 0.45), rng.uniform(0.15, 0.7)
            x, z = rng.uniform(x0, max(x0, x1 - wide)), z0 + rng.choice([0.0, 0.0, 0.75])
            tone = darken(pick(rng, GOODS), rng.uniform(0.5, 0.85))
            sheet.brush.rectangle(sheet.box(x, min(x + wide, x1), z, min(z + tall, z1)), tone)
    columns, rows = opening.panes
    for i in range(1, columns):
        x = x0 + (x1 - x0) * i / columns
        sheet.rect(x - 0.03, x + 0.03, z0, z1, frame)
    if rows > 1 or opening.kind == "entrance":
        sheet.rect(x0, x1, z0 + (z1 - z0) * 0.72, z0 + (z1 - z0) * 0.72 + 0.07, frame)
