"""A house as the camera needs it: textures, planes, relief and front garden, lit once for every drive that sees it."""

import numpy as np
from numpy.random import PCG64, Generator
from PIL import Image, ImageChops

from sample_data.renderer.canvas import Canvas, Texture
from sample_data.renderer.city import Lot
from sample_data.renderer.facade_design import design_facade
from sample_data.renderer.facade_paint import paint_facade
from sample_data.renderer.facade_parts import Facade, darken
from sample_data.renderer.lighting import Drive, light_facade, to_rgb
from sample_data.renderer.materials import lay_roof, lay_wall
from sample_data.renderer.relief import FaceList, Faces, box, raise_relief
from sample_data.renderer.roofs import Plane, raise_chimneys, raise_dormers, raise_roof, raise_walls
from sample_data.renderer.street_geometry import DOWN, Array, X, Y

FACADE_DENSITY, COARSE_DENSITY = 44.0, 26.0  # texels a metre in a picture of full size: about its pixels 9 m away


class HouseModel:
    """A house ready to be painted: its front's texture, its planes and its relief; lit textures are kept by drive."""

    def __init__(self, lot: Lot, scale: float) -> None:
        self.lot, self.house = lot, lot.house
        self.facade: Facade = design_facade(lot.house)
        self.density = FACADE_DENSITY * scale
        self.colours, self.glass = paint_facade(self.facade, self.density)
        self.offset = np.array([lot.x_m, lot.setback_m, 0.0])
        relief = (raise_chimneys(self.facade), raise_dormers(self.facade), raise_relief(self.facade))
        self.chimneys, self.dormers, self.relief = (faces.moved(lot.x_m, lot.setback_m) for faces in relief)
        self.walls, self.roofs = raise_walls(self.facade), raise_roof(self.facade)
        self.garden = fence_garden(lot)
        self.coarse = COARSE_DENSITY * scale
        rng = Generator(PCG64([lot.house.seed, 2]))
        self.wall_texture = self.lay(rng, self.walls, False)
        self.roof_texture = self.lay(rng, self.roofs, True) if self.roofs else self.wall_texture
        self.lit: dict[tuple[int, str], Texture] = {}

    def lay(self, rng: Generator, planes: list[Plane], roof: bool) -> Image.Image:
        """Render a material large enough for all the planes that share it."""
        spans = [(p.polygon - p.origin) @ np.stack([p.right, p.down], axis=1) for p in planes]
        wide, tall = np.max([s.max(axis=0) for s in spans], axis=0) * self.coarse
        size = (int(tall) + 2, int(wide) + 2)
        builder = self.house.builder
        if roof:
            return lay_roof(rng, builder.roof_rgb, size, self.coarse)
        return lay_wall(rng, builder.wall, darken(self.house.wall_rgb, 0.94), size, self.coarse)

    def texture(self, drive: Drive, kind: str, normal: Array) -> Texture:
        """Return a surface lit for a drive, lighting it on the first request."""
        key = (drive.seed, f"{kind}{np.round(normal, 2)}")
        if key not in self.lit:
            if kind == "facade":
                lit, density = light_facade(drive, self.facade, self.colours, self.glass, self.density), self.density
            else:
                image, density = self.roof_texture if kind == "roof" else self.wall_texture, self.coarse
                lit = ImageChops.multiply(image, Image.new("RGB", image.size, to_rgb(drive.shade(normal))))
            self.lit[key] = Texture(lit, density)
        return self.lit[key]

    def paint(self, canvas: Canvas) -> None:
        """Paint the house, from its chimneys to the wall of its front garden."""
        size = np.array([self.house.width_m + 2.0, self.house.depth_m, self.facade.top_m + 6.0])
        if not canvas.shows_box(self.offset - 2.0, self.offset + size):
            return
        canvas.paint_faces(self.chimneys)
        for plane in (*self.walls, *self.roofs):
            polygon = plane.polygon + self.offset
            if canvas.shows(polygon, plane.normal):
                texture = self.texture(canvas.drive, plane.kind, plane.normal)
                canvas.paint_plane(texture, polygon, plane.origin + self.offset, plane.right, plane.down)
        canvas.paint_faces(self.dormers)
        self.paint_front(canvas)
        canvas.paint_faces(self.relief)
        canvas.paint_faces(self.garden)

    def paint_front(self, canvas: Canvas) -> None:
        """Paint the front wall and the faces of its bays."""
        flat = np.insert(self.facade.outline, 1, 0.0, axis=1) + self.offset
        if not canvas.shows(flat, -Y):
            return
        texture = self.texture(canvas.drive, "facade", -Y)
        top_left = self.offset + np.array([0.0, 0.0, self.colours.height / self.density])
        canvas.paint_plane(texture, flat, top_left, X, DOWN)
        for panel in self.facade.panels:
            span = np.array([panel.x1 - panel.x0, panel.y0 - panel.y1, 0.0])
            # The texture is painted flat: one metre of it covers this much of the slanting bay.
            right = span / (panel.x1 - panel.x0)
            left = self.offset + np.array([panel.x0, -panel.y0, 0.0])
            corners = np.array([left, left + span, left + span - panel.z1 * DOWN, left - panel.z1 * DOWN])
            if canvas.shows(corners, np.cross(right, -DOWN)):
                origin = left - panel.x0 * right
                origin[2] = top_left[2]
                canvas.paint_plane(texture, corners, origin, right, DOWN)


def fence_garden(lot: Lot) -> Faces:
    """Return the low wall, hedge or fence between a front garden and the pavement, with a gap for the gate."""
    parts, width = FaceList(), lot.house.width_m
    if lot.house.builder.garden_m >= 0.8 and lot.house.ground in {"home", "garage"}:
        rng = Generator(PCG64([lot.house.seed, 3]))
        gate = float(rng.uniform(0.2, 0.7)) * width
        kind = int(rng.integers(3))
        height, thick = ((0.8, 0.25), (1.15, 0.6), (0.95, 0.08))[kind]
        rgb = (darken(lot.house.wall_rgb, 0.85), (70, 96, 52), (232, 230, 222))[kind]
        for x0, x1 in ((0.0, gate), (gate + 1.2, width)):
            if kind == 2:
                for x in np.arange(x0, x1 - 0.1, 0.16):
                    parts.add(box((float(x), float(x) + 0.1), (0.0, thick), (0.05, height), rgb)[:3], fine=True)
                parts.add(box((x0, x1), (0.05, 0.1), (0.55, 0.65), rgb))
            else:
                parts.add(box((x0, x1), (0.0, thick), (0.0, height), rgb))
                if kind == 0:
                    y, z = (-0.04, thick + 0.04), (height, height + 0.08)
                    parts.add(box((x0 - 0.02, x1 + 0.02), y, z, (186, 180, 168)))
    return parts.faces().moved(lot.x_m, 0.0)
