"""The street's frame on the map and the pinhole camera every photograph is taken with.

Street-local metres everywhere: x along the street, y away from the road (facades stand near y = 0 and face -y), z up.
Right-handed, so looking straight at a facade x grows to the right.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FOV_DEG = 60.0
NEAR_M = 0.3
X, Y, DOWN = np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0]), np.array([0.0, 0.0, -1.0])
# A sphere, as every haversine on the reading side assumes; WGS84 would differ by 0.3 %.
EARTH_RADIUS_M = 6_371_008.8
METRES_PER_DEGREE = math.pi * EARTH_RADIUS_M / 180.0


@dataclass(frozen=True)
class StreetFrame:
    """Where a street's origin lies and which way its x axis points (compass degrees)."""

    lat: float
    lon: float
    azimuth_deg: float
    ground_m: float

    def to_east_north(self, dx: float, dy: float) -> tuple[float, float]:
        """Turn a street-local displacement into metres east and north."""
        along = math.radians(self.azimuth_deg)
        across = math.radians(self.azimuth_deg - 90.0)
        east = dx * math.sin(along) + dy * math.sin(across)
        north = dx * math.cos(along) + dy * math.cos(across)
        return east, north

    def to_lat_lon(self, x: float, y: float) -> tuple[float, float]:
        """Place a street-local point on the map, in degrees."""
        east, north = self.to_east_north(x, y)
        lat = self.lat + north / METRES_PER_DEGREE
        lon = self.lon + east / (METRES_PER_DEGREE * math.cos(math.radians(self.lat)))
        return lat, lon

    def to_heading_deg(self, dx: float, dy: float) -> float:
        """Return the compass bearing of a street-local displacement, in [0, 360)."""
        east, north = self.to_east_north(dx, dy)
        return math.degrees(math.atan2(east, north)) % 360.0

    @property
    def facade_normal(self) -> tuple[float, float, float]:
        """Return the facades' outward unit normal in east, north, up."""
        east, north = self.to_east_north(0.0, -1.0)
        return east, north, 0.0


@dataclass(frozen=True)
class Camera:
    """A pinhole without roll that looks at `target`; pixels run right and down from the top left corner."""

    position: tuple[float, float, float]
    target: tuple[float, float, float]
    size: int

    @cached_property
    def focal_px(self) -> float:
        return self.size / 2.0 / math.tan(math.radians(FOV_DEG / 2.0))

    @cached_property
    def azimuth_rad(self) -> float:
        """Return the viewing direction in the ground plane: 0 looks along +y, positive turns to +x."""
        return math.atan2(self.target[0] - self.position[0], self.target[1] - self.position[1])

    @cached_property
    def distance_m(self) -> float:
        return math.dist(self.position, self.target)

    @cached_property
    def pitch_rad(self) -> float:
        """Return the elevation of the viewing direction, positive up."""
        return math.asin((self.target[2] - self.position[2]) / self.distance_m)

    @cached_property
    def matrix(self) -> Array:
        """Return the (3, 3) map from a displacement to homogeneous pixels; the last row gives the depth."""
        turn, tilt = self.azimuth_rad, self.pitch_rad
        right = np.array([math.cos(turn), -math.sin(turn), 0.0])
        ahead = np.array([math.sin(turn) * math.cos(tilt), math.cos(turn) * math.cos(tilt), math.sin(tilt)])
        up = np.cross(right, ahead)
        half = self.size / 2.0
        return np.stack([self.focal_px * right + half * ahead, half * ahead - self.focal_px * up, ahead])

    def project(self, points: Array) -> tuple[Array, Array]:
        """Map points (..., 3) to pixels (..., 2) and depths (...); pixels mean nothing behind the camera."""
        homogeneous = (points - np.asarray(self.position)) @ self.matrix.T
        depth = homogeneous[..., 2]
        return homogeneous[..., :2] / np.where(np.abs(depth) < 1e-6, 1e-6, depth)[..., None], depth

    def clip_near(self, polygon: Array) -> Array:
        """Cut a planar polygon (N, 3) at the near plane, so that what remains can be projected."""
        depth = (polygon - np.asarray(self.position)) @ self.matrix[2]
        if bool((depth >= NEAR_M).all()):
            return polygon
        kept: list[Array] = []
        for i, (point, d) in enumerate(zip(polygon, depth, strict=True)):
            following, e = polygon[(i + 1) % len(polygon)], depth[(i + 1) % len(polygon)]
            if d >= NEAR_M:
                kept.append(point)
            if (d >= NEAR_M) != (e >= NEAR_M):
                kept.append(point + (following - point) * ((NEAR_M - d) / (e - d)))
        return np.array(kept).reshape(-1, 3)

    def texture_coefficients(self, origin: Array, axis_u: Array, axis_v: Array, corner: tuple[int, int]) -> list[float]:
        """Return Pillow's eight PERSPECTIVE numbers for a plane; axes in metres a texel, `corner` in pixels."""
        plane = np.stack([axis_u, axis_v, origin - np.asarray(self.position)], axis=1)
        to_texel = np.linalg.inv(self.matrix @ plane)
        shift = np.array([[1.0, 0.0, corner[0]], [0.0, 1.0, corner[1]], [0.0, 0.0, 1.0]])
        to_texel = to_texel @ shift
        return [float(v) for v in (to_texel / to_texel[2, 2]).ravel()[:8]]
