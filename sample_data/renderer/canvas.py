"""The picture while it is painted, far things first: textured planes, flat faces, sprites."""

import numpy as np
from PIL import Image, ImageDraw

from sample_data.renderer.lighting import Drive
from sample_data.renderer.relief import Faces
from sample_data.renderer.street_geometry import NEAR_M, Array, Camera

FINE_REACH_M = 28.0


class Texture:
    """An image with its halved copies, so that a distant plane is sampled without shimmer."""

    def __init__(self, image: Image.Image, density: float) -> None:
        # Pillow fills what lies off the texture: with black, every edge would get a dark seam.
        self.fill = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
        self.levels = [(image, density)]
        while min(self.levels[-1][0].size) > 24 and len(self.levels) < 5:
            smaller = self.levels[-1][0].reduce(2)
            # Measured, not halved: reduce() rounds an odd number of texels up.
            self.levels.append((smaller, density * smaller.width / image.width))

    def at(self, pixels_per_m: float) -> tuple[Image.Image, float]:
        """Return the coarsest level (and its texels a metre) that still has a texel for about every pixel."""
        for image, density in reversed(self.levels):
            if density >= 0.75 * pixels_per_m:
                return image, density
        return self.levels[0]


class Canvas:
    """A square picture seen through one camera and lit by one drive."""

    def __init__(self, camera: Camera, drive: Drive, backdrop: Image.Image) -> None:
        self.camera, self.drive, self.image = camera, drive, backdrop
        self.brush = ImageDraw.Draw(backdrop)
        self.place = np.array(camera.position)

    def shows(self, polygon: Array, normal: Array) -> bool:
        """Tell whether a polygon (N, 3) turns its front to the camera and lies in the picture."""
        return float(np.dot(self.place - polygon[0], normal)) > 1e-3 and self.outline(polygon) is not None

    def shows_box(self, low: Array, high: Array) -> bool:
        """Tell whether an upright box may be in the picture."""
        corners = np.stack(np.meshgrid(*np.stack([low, high], axis=1)), axis=-1).reshape(8, 3)
        pixels, depth = self.camera.project(corners)
        if bool((depth <= NEAR_M).all()):
            return False
        inside = (pixels.max(axis=0) > 0).all() and (pixels.min(axis=0) < self.camera.size).all()
        return bool((depth <= NEAR_M).any() or inside)

    def outline(self, polygon: Array) -> Array | None:
        """Return a polygon's corners (N, 2) in pixels, or None where nothing of it is in the picture."""
        clipped = self.camera.clip_near(polygon)
        if len(clipped) < 3:
            return None
        corners, _ = self.camera.project(clipped)
        low, high = corners.min(axis=0), corners.max(axis=0)
        inside = bool((high > 0).all() and (low < self.camera.size).all() and (high - low > 0.5).all())
        return corners if inside else None

    def paint_plane(self, texture: Texture, polygon: Array, origin: Array, right: Array, down: Array) -> None:
        """Paint a polygon (N, 3) of a plane whose texture starts at `origin` and runs along two unit vectors."""
        corners = self.outline(polygon)
        if corners is None:
            return
        size = self.camera.size
        x0, y0 = (int(v) for v in np.floor(corners.min(axis=0)).clip(0, size - 1))
        x1, y1 = (int(v) + 1 for v in np.ceil(corners.max(axis=0)).clip(1, size))
        nearest = max(NEAR_M * 4, float(np.min(np.linalg.norm(polygon - self.place, axis=1))))
        middle = max(nearest, 0.6 * float(np.linalg.norm(polygon.mean(axis=0) - self.place)))
        needed = self.camera.focal_px / middle * 0.6
        image, density = texture.at(needed)
        # The picture is supersampled: nearest texels do, at a fifth of the cost, unless the texture is magnified.
        sampling = Image.Resampling.NEAREST if density > 0.75 * needed else Image.Resampling.BILINEAR
        coefficients = self.camera.texture_coefficients(origin, right / density, down / density, (x0, y0))
        patch = image.transform(
            (x1 - x0, y1 - y0), Image.Transform.PERSPECTIVE, coefficients, sampling, fillcolor=texture.fill
        )
        mask = Image.new("L", patch.size, 0)
        ImageDraw.Draw(mask).polygon([(float(x) - x0, float(y) - y0) for x, y in corners], 255)
        self.image.paste(patch, (x0, y0), mask)

    def paint_polygon(self, polygon: Array, rgb: Array | tuple[int, int, int]) -> None:
        """Fill a polygon (N, 3) with one colour as it is."""
        corners = self.outline(polygon)
        if corners is not None:
            self.brush.polygon([(float(x), float(y)) for x, y in corners], tuple(int(v) for v in rgb))

    def paint_faces(self, faces: Faces) -> None:
        """Paint lit faces, far parts first, leaving out what looks away, is tiny, or is fine and distant."""
        if not len(faces.points):
            return
        ahead = np.einsum("ij,ij->i", self.place - faces.points[:, 0], faces.normals) > 1e-3
        distance = np.linalg.norm(faces.anchors - self.place, axis=1)
        chosen = np.flatnonzero(ahead & ~(faces.fine & (distance > FINE_REACH_M)))
        corners, depth = self.camera.project(faces.points[chosen])
        low, high = corners.min(axis=1), corners.max(axis=1)
        seen = (depth.min(axis=1) > NEAR_M) & (high > 0).all(axis=1) & (low < self.camera.size).all(axis=1)
        seen &= (high - low).max(axis=1) > 1.5
        chosen, corners = chosen[seen], corners[seen]
        light = np.clip(faces.rgb[chosen] * self.drive.shade(faces.normals[chosen]), 0, 255).astype(np.int64).tolist()
        order = np.argsort(-distance[chosen], kind="stable")
        flat = corners.reshape(-1, 8).tolist()
        for i in order.tolist():
            self.brush.polygon(flat[i], tuple(light[i]))
