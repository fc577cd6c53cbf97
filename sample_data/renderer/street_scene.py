"""Photographs one planned street: models its houses once, lights them once a drive, then paints each picture."""

import io
import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.random import PCG64, Generator
from PIL import Image, ImageChops, ImageDraw

from sample_data.renderer.canvas import Canvas, Texture
from sample_data.renderer.city import Lot, Photo, Street
from sample_data.renderer.house_model import HouseModel
from sample_data.renderer.lighting import crop_sky, expose, paint_sky, to_rgb
from sample_data.renderer.materials import lay_ground
from sample_data.renderer.street_furniture import grow_sprite, is_ahead, paint_car, paint_lamp, paint_tree
from sample_data.renderer.street_geometry import Array, Camera, X, Y

SUPERSAMPLE = 2
JPEG_QUALITY = 85
FULL_SIZE_PX = 448
GROUND_DENSITY = 22.0  # texels a metre at FULL_SIZE_PX
REACH_M = 90.0
GROUND_TILE_M = 48.0


def photograph_street(street: Street) -> list[tuple[str, bytes, bytes]]:
    """Take every photograph of a street; return (stem, JPEG bytes, metadata bytes) for each."""
    if not street.photos:
        return []
    scale = max(0.3, street.photos[0].camera.size / FULL_SIZE_PX)
    scene = Scene(street, scale)
    return [(photo.stem, encode(scene.take(photo)), f"{photo.d_line}\n".encode()) for photo in street.photos]


def encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


class Scene:
    """A street's models, textures and skies."""

    def __init__(self, street: Street, scale: float) -> None:
        self.street = street
        self.houses = [HouseModel(lot, scale) for lot in street.lots]
        rng = Generator(PCG64([street.seed, 4]))
        density = GROUND_DENSITY * scale
        size = (int((street.pavement_m + 16.0) * density), int(GROUND_TILE_M * density))
        self.ground = lay_ground(rng, street.pavement_m, size, density)
        self.ground_density = density
        largest = max(p.camera.size for p in street.photos)
        self.noise = rng.normal(0, 2.6, (largest + 64, largest + 64, 3)).astype(np.int16)
        self.grounds: dict[int, Texture] = {}

    def take(self, photo: Photo) -> Image.Image:
        """Paint one photograph and develop it."""
        drive = self.street.drives[photo.drive]
        large = Camera(photo.camera.position, photo.camera.target, photo.camera.size * SUPERSAMPLE)
        canvas = Canvas(large, drive, crop_sky(paint_sky(drive), large, large.size))
        self.paint_ground(canvas)
        for tree in self.street.trees:  # those beyond the row's ends stand behind everything else
            if tree.y_m > 0 and is_ahead(large, tree.x_m, tree.y_m):
                paint_tree(canvas, tree, grow_sprite(tree.kind, drive, self.street.seed))
        self.paint_houses(canvas)
        self.paint_furniture(canvas, photo.drive)
        return expose(canvas.image.reduce(SUPERSAMPLE), drive, Generator(PCG64([photo.seed])), self.noise)

    def paint_ground(self, canvas: Canvas) -> None:
        """Paint what lies around the street, the street itself and the shadows on it."""
        drive, camera = canvas.drive, canvas.camera
        light = drive.shade(np.array([0.0, 0.0, 1.0]))
        x = camera.position[0]
        around = np.array([(x - 400, -60, 0), (x + 400, -60, 0), (x + 400, 400, 0), (x - 400, 400, 0)], float)
        lawn = {"winter": (150, 146, 128), "autumn": (142, 138, 92)}.get(drive.season, (112, 132, 84))
        canvas.paint_polygon(around, (np.array(lawn) * light * 0.9).clip(0, 255))
        if drive.seed not in self.grounds:
            lit = ImageChops.multiply(self.ground, Image.new("RGB", self.ground.size, to_rgb(light)))
            self.grounds[drive.seed] = Texture(lit, self.ground_density)
        depth = self.ground.height / self.ground_density
        first = int((x - REACH_M) // GROUND_TILE_M)
        for i in range(first, first + int(2 * REACH_M / GROUND_TILE_M) + 2):
            left, right = i * GROUND_TILE_M, (i + 1) * GROUND_TILE_M
            ring = np.array([(left, -depth, 0), (right, -depth, 0), (right, 0, 0), (left, 0, 0)], float)
            canvas.paint_plane(self.grounds[drive.seed], ring, np.array([left, 0.0, 0.0]), X, -Y)
        self.paint_ground_shadows(canvas)

    def paint_ground_shadows(self, canvas: Canvas) -> None:
        """Darken the ground where houses and trees keep the sun away."""
        drive = canvas.drive
        if drive.sun_rgb[0] < 0.1:
            return
        mask = Image.new("L", canvas.image.size, 0)
        brush = ImageDraw.Draw(mask)
        cast = -np.array(drive.sun[:2]) / max(drive.sun[2], 0.25)
        for ring in self.shadows(cast):
            corners = canvas.outline(np.insert(ring, 2, 0.0, axis=1))
            if corners is not None:
                brush.polygon([(float(x), float(y)) for x, y in corners], 255)
        ambient = drive.shade(np.array([0.0, 0.0, 1.0]))
        share = 1.0 - drive.sun_rgb[1] * drive.sun[2] / float(ambient[1])
        region = mask.getbbox()
        if region:
            dark = canvas.image.crop(region).point(lambda v: int(v * share))
            canvas.image.paste(dark, region, mask.crop(region))

    def shadows(self, cast: Array) -> Iterator[Array]:
        """Yield the ground outlines (N, 2) of shadows, `cast` being metres along the ground a metre of height."""
        for model in self.houses:
            left, right, y = model.lot.x_m, model.lot.x_m + model.house.width_m, model.lot.setback_m
            reach = cast * model.facade.height_m
            if cast[1] < 0:
                end = y + reach[1]
                yield np.array([(left, y), (right, y), (right + reach[0], end), (left + reach[0], end)])
            else:
                yield np.array([(left - 0.2, y), (right + 0.2, y), (right + 0.2, y - 0.4), (left - 0.2, y - 0.4)])
        turn = np.linspace(0, 2 * np.pi, 16, endpoint=False)
        for tree in self.street.trees:
            centre = np.array([tree.x_m, tree.y_m]) + cast * tree.height_m * 0.6
            spread = tree.height_m * 0.33
            yield centre + spread * np.stack([np.cos(turn) * (1 + 0.2 * np.cos(5 * turn)), np.sin(turn)], axis=1)

    def paint_houses(self, canvas: Canvas) -> None:
        """Paint the row from both ends towards the camera: houses beside each other cannot hide a nearer one."""
        x = canvas.camera.position[0]
        for model in sorted(self.houses, key=lambda m: -distance_along(m.lot, x)):
            if distance_along(model.lot, x) < REACH_M:
                model.paint(canvas)

    def paint_furniture(self, canvas: Canvas, drive: int) -> None:
        """Paint trees, lamps and cars, the farthest first."""
        street, (x, y, _) = self.street, canvas.camera.position
        things: list[tuple[float, float, Callable[[], None]]] = []
        for tree in street.trees:
            if tree.y_m < 0:
                sprite = grow_sprite(tree.kind, canvas.drive, street.seed)
                things.append((tree.x_m, tree.y_m, partial(paint_tree, canvas, tree, sprite)))
        kerb = -street.pavement_m + 0.4
        things += [(lamp, kerb, partial(paint_lamp, canvas, lamp, kerb)) for lamp in street.lamps]
        for car in street.cars[drive]:
            things.append((car.x_m + car.length_m / 2, car.y_m - 0.9, partial(paint_car, canvas, car)))
        ahead = [t for t in things if is_ahead(canvas.camera, t[0], t[1]) and abs(t[0] - x) < REACH_M]
        for _, _, paint in sorted(ahead, key=lambda t: -math.dist(t[:2], (x, y))):
            paint()


def distance_along(lot: Lot, x: float) -> float:
    """Return how far along the street a lot begins from x; 0 where x lies before it."""
    return max(lot.x_m - x, x - lot.x_m - lot.house.width_m, 0.0)
