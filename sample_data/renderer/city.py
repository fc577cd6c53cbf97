"""Lays out an invented city: datasets, streets, houses, drives past them, targets and the photographs of each."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence

from sample_data.renderer.buildings import Builder, House, build_house, choose_builder, pick
from sample_data.renderer.facade_design import design_facade
from sample_data.renderer.lighting import Drive, choose_drive
from sample_data.renderer.street_furniture import Car, Tree, park_cars, plant_trees
from sample_data.renderer.street_geometry import METRES_PER_DEGREE, Camera, StreetFrame

NUM_DATASETS = 4
SINGLETONS = 3
STREET_TARGETS = 10
ORIGIN_LAT, ORIGIN_LON = 47.2, 7.9  # no city of this shape stands there
DATASET_SPACING_M = 12_000.0
STREET_SPACING_M = 110.0
CAMERA_HEIGHT_M = 2.5
MAX_ANGLE_DEG = 55.0
MIN_DISTANCE_M, MAX_DISTANCE_M = 6.0, 30.0
MIN_VIEWS, MAX_VIEWS = 2, 7
VIEW_SHARES = (0.18, 0.24, 0.22, 0.16, 0.1, 0.1)  # of targets with 2, 3, ... images: about four on average
STREETS_PER_TOWN = 100  # more streets would run one dataset into the next, so that another town begins
TOWN_SPACING_M = 2 * DATASET_SPACING_M
MAX_BUILDINGS = 20_000  # five towns
PARKING_M = 2.2


@dataclass(frozen=True)
class Lot:
    """A house where it stands: its left corner at `x_m`, its front `setback_m` behind the pavement."""

    house: House
    x_m: float
    setback_m: float


@dataclass(frozen=True)
class Panorama:
    """One camera stand of one drive."""

    view_id: int
    position: tuple[float, float, float]
    drive: int


@dataclass(frozen=True)
class Photo:
    """One image of a target, with its metadata line."""

    stem: str
    d_line: str
    camera: Camera
    drive: int
    seed: int


@dataclass(frozen=True)
class Street:
    """Everything a worker needs to photograph one street."""

    dataset_id: int
    frame: StreetFrame
    lots: tuple[Lot, ...]
    pavement_m: float
    trees: tuple[Tree, ...]
    lamps: tuple[float, ...]
    drives: tuple[Drive, ...]
    cars: tuple[tuple[Car, ...], ...]
    photos: tuple[Photo, ...]
    seed: int


@dataclass
class Dataset:
    """A dataset in the planning: its number, its images' size and the next free identifiers."""

    dataset_id: int
    size: int
    patch: int = 1
    view: int = 1
    target: int = 1


def plan_city(seed: int, num_buildings: int, size: int) -> list[Street]:
    """Plan every street of the datasets; `num_buildings` targets get several photographs, SINGLETONS more get one."""
    shares = [num_buildings // NUM_DATASETS + (i < num_buildings % NUM_DATASETS) for i in range(NUM_DATASETS)]
    streets: list[Street] = []
    for i, share in enumerate(shares):
        singles = int(i < SINGLETONS)
        dataset = Dataset(i + 1, size)
        num_streets = max(1, math.ceil((share + singles) / STREET_TARGETS))
        for j in range(num_streets):
            targets = (share + singles) // num_streets + (j < (share + singles) % num_streets)
            rng = Generator(PCG64(SeedSequence(seed, spawn_key=(i, j))))
            lone = 0 if singles and j == 0 else None
            streets.append(plan_street(rng, dataset, place_street(rng, i, j), targets, lone))
    return streets


def place_street(rng: Generator, dataset: int, street: int) -> StreetFrame:
    """Put a street on the map: towns side by side, datasets on a coarse grid within one, streets parallel."""
    town, row = divmod(street, STREETS_PER_TOWN)
    north = DATASET_SPACING_M * (dataset // 2) + STREET_SPACING_M * row
    east = TOWN_SPACING_M * town + DATASET_SPACING_M * (dataset % 2) + float(rng.uniform(-20, 20))
    lat = ORIGIN_LAT + north / METRES_PER_DEGREE
    lon = ORIGIN_LON + east / (METRES_PER_DEGREE * math.cos(math.radians(lat)))
    # One side in four faces north, where the sun never reaches it.
    azimuth = (62.0, 97.0, 131.0, 78.0)[dataset] + 180.0 * (street % 4 == 2)
    return StreetFrame(lat, lon, azimuth % 360.0, 420.0 + 15.0 * dataset)


def plan_street(rng: Generator, dataset: Dataset, frame: StreetFrame, num_targets: int, lone: int | None) -> Street:
    """Plan one street; the target at index `lone` gets a single photograph."""
    lots = build_row(rng, num_targets)
    pavement = float(rng.choice([2.2, 2.8, 3.5, 5.0]))
    drives = tuple(choose_drive(rng, frame.azimuth_deg) for _ in range(5))
    trees = plant_trees(rng, lots[0].x_m, lots[-1].x_m + lots[-1].house.width_m, pavement)
    panoramas = drive_past(rng, lots, pavement, len(drives), dataset)
    photos: list[Photo] = []
    for i, lot in enumerate(lots[1:-1]):
        views = find_views(rng, lot, panoramas, trees, dataset.size)
        photos += photograph(rng, dataset, frame, views, i == lone)
    end = lots[-1].x_m + lots[-1].house.width_m
    cars = tuple(park_cars(rng, lots[0].x_m, end, pavement) for _ in drives)
    lamps = tuple(float(x) for x in np.arange(rng.uniform(0, 20), end, 27.0))
    seed = int(rng.integers(2**31))
    return Street(dataset.dataset_id, frame, lots, pavement, trees, lamps, drives, cars, tuple(photos), seed)


def build_row(rng: Generator, num_targets: int) -> tuple[Lot, ...]:
    """Build a row of houses with one that is no target at each end: a terrace of one builder, a mixture, or runs."""
    kind = pick(rng, ("terrace", "mixed", "mixed", "runs"))
    builders: list[Builder] = []
    while len(builders) < num_targets + 2:
        run = {"terrace": num_targets + 2, "mixed": 1, "runs": int(rng.integers(2, 5))}[kind]
        builders += [choose_builder(rng)] * run
    lots, x = [], 0.0
    for i, builder in enumerate(builders[: num_targets + 2]):
        house = build_house(rng, builder, 2 * i + 1)
        setback = builder.garden_m + (float(rng.uniform(0, 0.5)) if kind == "mixed" else 0.0)
        lots.append(Lot(house, x, setback))
        x += house.width_m + builder.gap_m
    return tuple(lots)


def drive_past(
    rng: Generator, lots: tuple[Lot, ...], pavement: float, num_drives: int, dataset: Dataset
) -> list[Panorama]:
    """Set the camera stands of every drive: some 8 m apart, on the near or the far lane."""
    panoramas = []
    end = lots[-1].x_m + lots[-1].house.width_m
    for drive in range(num_drives):
        y = -(pavement + PARKING_M + float(rng.choice([1.7, 2.2, 5.0, 6.5])))
        x = float(rng.uniform(0, 8)) - 6.0
        while x < end + 6.0:
            aside, above = float(rng.normal(0, 0.15)), float(rng.normal(0, 0.05))
            position = (round(x, 3), round(y + aside, 3), CAMERA_HEIGHT_M + round(above, 3))
            panoramas.append(Panorama(dataset.view, position, drive))
            dataset.view += 1
            x += float(rng.uniform(6.0, 10.0))
    return panoramas


def find_views(
    rng: Generator, lot: Lot, panoramas: list[Panorama], trees: tuple[Tree, ...], size: int
) -> list[tuple[Panorama, Camera]]:
    """Choose a target on a front and return the panoramas that see it, in random order, with their cameras."""
    top = design_facade(lot.house).height_m
    x = lot.x_m + lot.house.width_m * float(rng.uniform(0.36, 0.64))
    target = (x, lot.setback_m, float(rng.uniform(2.4, min(6.5, 0.62 * top))))
    cameras = [(p, Camera(p.position, target, size)) for p in panoramas]
    seen = [(p, c) for p, c in cameras if sees(c)]
    free = [(p, c) for p, c in seen if not any(tree.hides(c) for tree in trees)]
    views = free if len(free) >= MIN_VIEWS else seen
    return [views[i] for i in rng.permutation(len(views)).tolist()]


def photograph(
    rng: Generator, dataset: Dataset, frame: StreetFrame, views: list[tuple[Panorama, Camera]], lone: bool
) -> list[Photo]:
    """Photograph a target from the first one, or MIN_VIEWS to MAX_VIEWS, of its views."""
    wanted = 1 if lone else int(rng.choice(np.arange(MIN_VIEWS, MAX_VIEWS + 1), p=VIEW_SHARES))
    target_id, dataset.target = dataset.target, dataset.target + int(rng.integers(1, 4))
    photos = []
    for i, (panorama, camera) in enumerate(views[:wanted]):
        stem = f"{dataset.dataset_id:04d}_{dataset.patch:07d}_{i}_{target_id:07d}"
        line = describe((dataset.dataset_id, target_id, dataset.patch, panorama.view_id), frame, camera)
        photos.append(Photo(stem, line, camera, panorama.drive, int(rng.integers(2**31))))
        dataset.patch += 1
    return photos


def sees(camera: Camera) -> bool:
    """Tell whether a camera stands within the angle and the distances that the dataset allows."""
    angle = abs(math.degrees(camera.azimuth_rad))
    return angle <= MAX_ANGLE_DEG and MIN_DISTANCE_M <= camera.distance_m <= MAX_DISTANCE_M


def describe(identifiers: tuple[int, int, int, int], frame: StreetFrame, camera: Camera) -> str:
    """Write the `d` line; `identifiers` are the dataset's, target's, patch's and panorama's, in that order."""
    (sx, sy, sz), (tx, ty, tz) = camera.position, camera.target
    target, street = frame.to_lat_lon(tx, ty), frame.to_lat_lon(sx, sy)
    normal = frame.facade_normal
    heading = frame.to_heading_deg(tx - sx, ty - sy)
    fields = [
        "d", *(str(v) for v in identifiers),
        f"{target[0]:.9f}", f"{target[1]:.9f}", f"{frame.ground_m + tz:.4f}", *(f"{v:.6f}" for v in normal),
        f"{street[0]:.9f}", f"{street[1]:.9f}", f"{frame.ground_m + sz:.4f}",
        f"{camera.distance_m:.4f}", f"{heading:.4f}", f"{math.degrees(camera.pitch_rad):.4f}", "0",
    ]  # fmt: skip
    return " ".join(fields)
