"""The styles that builders of the invented city work in, and their palettes."""

from typing import Any

# fmt: off
Rgb = tuple[int, int, int]

BRICK: tuple[Rgb, ...] = (
    (158, 82, 62), (176, 104, 76), (190, 152, 108), (132, 72, 60), (204, 172, 132), (146, 92, 74), (112, 74, 66),
)
STUCCO: tuple[Rgb, ...] = (
    (238, 230, 212), (228, 206, 160), (216, 172, 134), (190, 206, 200), (232, 192, 178), (168, 186, 204),
    (236, 216, 142), (206, 124, 98), (242, 240, 234), (150, 172, 140), (196, 160, 182), (120, 136, 150),
)
STONE: tuple[Rgb, ...] = ((216, 204, 178), (200, 186, 158), (190, 182, 170), (224, 216, 198), (172, 158, 138))
BOARDS: tuple[Rgb, ...] = (
    (236, 236, 228), (150, 66, 54), (92, 112, 124), (124, 94, 66), (194, 180, 146), (84, 106, 90), (216, 190, 110),
)
CONCRETE: tuple[Rgb, ...] = ((176, 174, 168), (152, 150, 146), (196, 192, 184), (140, 130, 120))
CLADDING: tuple[Rgb, ...] = ((84, 94, 104), (210, 212, 214), (70, 62, 58), (160, 110, 70), (60, 84, 96))
WHITES: tuple[Rgb, ...] = ((240, 238, 230), (226, 222, 212), (232, 228, 220))
DARKS: tuple[Rgb, ...] = ((44, 46, 50), (58, 52, 46), (40, 56, 52))
DOORS: tuple[Rgb, ...] = (
    (40, 64, 110), (128, 30, 34), (26, 76, 56), (30, 30, 34), (214, 178, 60), (110, 60, 110), (90, 140, 150),
    (200, 96, 40), (230, 226, 216), (100, 66, 44),
)
SHOPS: tuple[Rgb, ...] = (
    (34, 66, 58), (120, 28, 36), (32, 44, 80), (230, 224, 210), (40, 40, 42), (196, 140, 40), (70, 110, 130),
    (150, 74, 110), (86, 60, 44), (204, 84, 52),
)
TILES: tuple[Rgb, ...] = ((160, 88, 66), (128, 76, 64), (176, 112, 84))
SLATE: tuple[Rgb, ...] = ((92, 96, 106), (76, 78, 86), (104, 104, 104))
ZINC: tuple[Rgb, ...] = ((128, 138, 146), (104, 150, 136), (110, 112, 118))


Style = dict[str, tuple[Any, ...]]

# What a style builds with unless it says otherwise.
COMMON: Style = {
    "wall": ("brick",), "wall_rgb": BRICK, "trim_rgb": WHITES, "frame_rgb": WHITES, "window_top": ("flat", "segment"),
    "rhythm": ("even",), "balcony": ("none",), "bay": ("none",), "string_course": (True, False), "quoins": (False,),
    "shutters": (False,), "dormers": (False,), "garden_m": (0.0,), "gap_m": (0.0,),
}


def style(**choices: tuple[Any, ...]) -> Style:
    """Return the choices open to a builder, by field of Builder."""
    return COMMON | choices


STYLES: dict[str, Style] = {
    "georgian": style(
        base=("", "rustic", "render"), roof=("flat", "side"), roof_rgb=SLATE, floors=(3, 4), ground_m=(3.3, 3.8),
        upper_m=(2.8, 3.3), window_width_m=(0.95, 1.2), window_fill=(0.55, 0.66), panes=((2, 4), (3, 4), (2, 2)),
        column_m=(1.9, 2.5), head=("soldier", "lintel", "keystone"), balcony=("none", "iron"), cornice_m=(0.2, 0.45),
        dormers=(True, False), ground=("home", "home", "shop"), house_width_m=(5.5, 8.5), garden_m=(0.0, 1.2),
    ),
    "victorian": style(
        wall=("brick", "render"), base=("",), roof=("side", "front"), roof_rgb=SLATE + TILES, floors=(2, 3),
        ground_m=(3.0, 3.4), upper_m=(2.8, 3.1), window_width_m=(1.0, 1.3), window_fill=(0.52, 0.6),
        window_top=("flat", "segment", "round"), panes=((1, 2), (2, 2), (2, 1)), column_m=(2.2, 2.8),
        rhythm=("even", "paired"), head=("lintel", "keystone"), bay=("canted", "canted", "box"),
        cornice_m=(0.12, 0.25), quoins=(True, False), dormers=(False, True), ground=("home",),
        house_width_m=(5.5, 7.5), garden_m=(2.5, 3.5), gap_m=(0.0, 0.0, 1.2),
    ),
    "boulevard": style(
        wall=("ashlar",), wall_rgb=STONE, base=("rustic",), trim_rgb=STONE, frame_rgb=WHITES + DARKS,
        roof=("mansard",), roof_rgb=ZINC + SLATE, floors=(5, 6, 7), ground_m=(3.6, 4.2), upper_m=(2.8, 3.2),
        window_width_m=(1.05, 1.25), window_fill=(0.66, 0.74), panes=((2, 3), (2, 4)), column_m=(2.1, 2.7),
        head=("keystone", "pediment"), balcony=("iron", "french"), cornice_m=(0.35, 0.6), string_course=(True,),
        quoins=(True, False), shutters=(True, False), dormers=(True,), ground=("shop", "shop", "lobby"),
        house_width_m=(11.0, 20.0),
    ),
    "pastel": style(
        wall=("render",), wall_rgb=STUCCO, base=("", "", "ashlar"), trim_rgb=WHITES + STONE, frame_rgb=WHITES + DOORS,
        roof=("side", "hip", "flat"), roof_rgb=TILES, floors=(2, 3, 4), ground_m=(3.0, 3.6), upper_m=(2.7, 3.1),
        window_width_m=(0.9, 1.15), window_fill=(0.5, 0.62), window_top=("flat", "flat", "round"),
        panes=((2, 2), (2, 3), (2, 1)), column_m=(2.3, 3.2), rhythm=("even", "centre"),
        head=("none", "lintel", "surround"), balcony=("none", "french", "iron"), cornice_m=(0.15, 0.3),
        quoins=(True, False), shutters=(True, True, False), ground=("home", "shop"), house_width_m=(6.5, 12.0),
        garden_m=(0.0, 0.8), gap_m=(0.0, 0.0, 1.5),
    ),
    "canal": style(
        base=("", "render"), frame_rgb=WHITES + DARKS, roof=("stepped", "bell"), roof_rgb=TILES, floors=(3, 4, 5),
        ground_m=(3.3, 3.8), upper_m=(2.6, 3.0), window_width_m=(0.95, 1.25), window_fill=(0.62, 0.72),
        panes=((2, 3), (2, 2), (3, 4)), column_m=(1.5, 1.9), head=("lintel", "soldier"), cornice_m=(0.12, 0.2),
        string_course=(False, True), shutters=(True, False), ground=("home", "shop"), house_width_m=(5.0, 7.0),
    ),
    "modern": style(
        wall=("render", "panel", "cladding"), wall_rgb=STUCCO[:4] + CLADDING, base=("", "panel"),
        trim_rgb=CONCRETE + WHITES, frame_rgb=DARKS, roof=("flat",), roof_rgb=ZINC, floors=(3, 4, 5, 6),
        ground_m=(3.2, 4.0), upper_m=(2.8, 3.2), window_width_m=(1.6, 2.6), window_fill=(0.55, 0.76),
        window_top=("flat",), panes=((2, 1), (3, 1), (1, 1)), column_m=(2.8, 3.8), rhythm=("even", "shifted"),
        head=("none",), balcony=("glass", "slab", "none"), cornice_m=(0.02, 0.12), string_course=(False, True),
        ground=("lobby", "garage"), house_width_m=(12.0, 22.0), garden_m=(0.0, 2.0), gap_m=(0.0, 3.0),
    ),
    "office": style(
        wall=("panel", "cladding", "brick"), wall_rgb=CONCRETE + CLADDING + BRICK[:2], base=("", "rustic"),
        trim_rgb=CONCRETE, frame_rgb=DARKS, roof=("flat",), roof_rgb=ZINC, floors=(4, 5, 6, 7), ground_m=(3.8, 4.5),
        upper_m=(3.2, 3.6), window_width_m=(2.4, 3.6), window_fill=(0.55, 0.85), window_top=("flat",),
        panes=((3, 2), (4, 1), (2, 2)), column_m=(2.8, 4.0), head=("none", "lintel"), cornice_m=(0.05, 0.2),
        ground=("lobby", "shop"), house_width_m=(15.0, 25.0), gap_m=(0.0, 3.0),
    ),
    "cottage": style(
        wall=("boards", "boards", "render"), wall_rgb=BOARDS, base=("", "", "brick"), roof=("front", "side", "hip"),
        roof_rgb=SLATE + TILES, floors=(2,), ground_m=(2.7, 3.0), upper_m=(2.5, 2.8), window_width_m=(0.9, 1.3),
        window_fill=(0.45, 0.52), window_top=("flat",), panes=((2, 2), (3, 2), (1, 2)), column_m=(2.4, 3.2),
        rhythm=("even", "centre"), head=("surround", "none"), bay=("none", "box"), cornice_m=(0.1, 0.18),
        string_course=(False,), shutters=(True, False), dormers=(True, False), ground=("home", "garage"),
        house_width_m=(7.0, 12.0), garden_m=(2.5, 4.0), gap_m=(2.0, 3.5),
    ),
    "warehouse": style(
        base=("", "ashlar"), trim_rgb=BRICK[4:5] + STONE, frame_rgb=DARKS, roof=("flat", "front"), roof_rgb=SLATE,
        floors=(3, 4, 5), ground_m=(3.8, 4.4), upper_m=(3.2, 3.6), window_width_m=(1.7, 2.5), window_fill=(0.6, 0.7),
        window_top=("segment", "round", "flat"), panes=((4, 5), (3, 4), (5, 4)), column_m=(2.9, 3.8),
        rhythm=("even", "paired"), head=("soldier", "lintel"), cornice_m=(0.15, 0.4), quoins=(False, True),
        ground=("lobby", "garage", "shop"), house_width_m=(12.0, 22.0), gap_m=(0.0, 2.0),
    ),
}
