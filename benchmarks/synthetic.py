"""Make tables and tars of the real ones' shapes, from a seed."""

import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.config import count_cores
from pipeline.files import tables
from pipeline.retrieval.features import Features
from train_specialized_embeddings.sampling.neighbor_table import Neighbors

# Number of buildings by their number of images, counted in 320 real ones.
BUILDINGS_BY_IMAGES = {2: 126, 3: 71, 4: 39, 5: 38, 6: 17, 7: 29}
IMAGES_PER_TAR = 5_800
# Independent directions behind the embeddings, and behind the fingerprints.
RANK = 64
CITY = (52.2, 0.12)  # degrees
METRES_PER_DEGREE = 111_195.0
NUM_DISTINCT = 32  # pictures, which a tar repeats
# Noise in grey levels: with it a picture of 640 px takes 109 KB at quality 85.
NOISE = 12
DIMENSIONS, NEIGHBORS = 32, 150  # of stage 5's search


def make_config(folder: Path, **sections: dict[str, object]) -> Path:
    """Write a configuration with every path below `folder`."""
    names = ("raw", "intermediates", "embeddings", "merged", "fingerprints")
    paths = {f"{name}_dir": name for name in names} | {"difficulty_metadata_path": "difficulty.parquet"}
    paths |= sections.pop("paths", {})
    content = {"global": {"log_dir": "logs"}, "paths": paths, **sections}
    lines = []
    for section, keys in content.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items()), ""]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text("\n".join(lines), encoding="utf-8")
    return folder / "config.toml"


def draw_buildings(generator: np.random.Generator, count: int) -> np.ndarray:
    """Return the building of each of `count` images, (N,), ascending."""
    weights = np.array(list(BUILDINGS_BY_IMAGES.values()))
    images = generator.choice(list(BUILDINGS_BY_IMAGES), size=count // 2 + 1, p=weights / weights.sum())
    return np.repeat(np.arange(len(images)), images)[:count]


def draw_ids(generator: np.random.Generator, dataset_id: int, buildings: np.ndarray) -> dict[str, object]:
    """Return the ids of a tar's fingerprints; its buildings stand about 15 m apart."""
    count, num_buildings = len(buildings), int(buildings[-1]) + 1
    side = 15.0 * np.sqrt(num_buildings) / METRES_PER_DEGREE
    places = generator.uniform(0, side, (num_buildings, 2))
    return {
        "target_lat": CITY[0] + dataset_id % 100 / 10 + places[buildings, 0],
        "target_lon": CITY[1] + dataset_id // 100 / 10 + places[buildings, 1],
        "building_id": [f"{dataset_id:04d}_{building}" for building in buildings],
        "streetview_image_id": [f"{dataset_id:04d}_{patch}" for patch in range(count)],
    }


def draw_values(generator: np.random.Generator, buildings: np.ndarray, width: int) -> np.ndarray:
    """Return correlated features (N, width) float32: a building's images lie around its own centre."""
    spectrum = 1.0 / np.sqrt(np.arange(1, RANK + 1, dtype=np.float32))
    basis = np.random.default_rng(0).standard_normal((RANK, width), np.float32) * spectrum[:, None]
    centres = generator.standard_normal((int(buildings[-1]) + 1, RANK), np.float32)
    factors = centres[buildings] + 0.5 * generator.standard_normal((len(buildings), RANK), np.float32)
    return factors @ basis


def make_fingerprints(folder: Path, count: int) -> None:
    """Write `count` fingerprints as stage 4 does, several files at a time."""
    with ThreadPoolExecutor(count_cores()) as pool:
        list(pool.map(lambda start: _make_fingerprint_file(folder, start, count), range(0, count, IMAGES_PER_TAR)))


def _make_fingerprint_file(folder: Path, start: int, count: int, image_size: int = 16) -> None:
    width, dataset_id = image_size * image_size * 3, 1 + start // IMAGES_PER_TAR
    generator = np.random.default_rng(dataset_id)
    buildings = draw_buildings(generator, min(IMAGES_PER_TAR, count - start))
    values = (128 + 24 * draw_values(generator, buildings, width)).clip(0, 255).astype(np.uint8)
    ids = draw_ids(generator, dataset_id, buildings)
    table = pa.table(ids).select(tables.FINGERPRINT_ID_SCHEMA.names).cast(tables.FINGERPRINT_ID_SCHEMA)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)
    path = folder / "fingerprints" / f"{dataset_id:04d}_fingerprints.parquet"
    provenance = tables.make_provenance("compute_fingerprints", [], {"image_size": image_size})
    tables.write_parquet(path, table.append_column("fingerprint", column), provenance)


def draw_picture(seed: int, size: tuple[int, int], mode: str = "RGB", quality: int = 85, **options: Any) -> bytes:
    """Return a JPEG (width, height) of blurred blocks and noise, stored with Pillow's options."""
    generator = np.random.default_rng(seed)
    cells = generator.integers(0, 256, (max(1, size[1] // 16), max(1, size[0] // 16), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC), np.int16)
    noisy = (smooth + generator.integers(-NOISE, NOISE + 1, smooth.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).convert(mode).save(file, "JPEG", quality=quality, **options)
    return file.getvalue()


def draw_pictures(side: int) -> list[bytes]:
    """Return square JPEGs, each another."""
    return [draw_picture(seed, (side, side)) for seed in range(NUM_DISTINCT)]


def make_tars(folder: Path, pictures: list[bytes], num_images: int, num_tars: int = 1) -> None:
    """Write tars of `num_images` together, each image with its metadata; the pictures take turns."""
    folder.mkdir(parents=True, exist_ok=True)
    buildings = draw_buildings(np.random.default_rng(0), num_images).tolist()
    for dataset_id in range(1, num_tars + 1):
        with tarfile.open(folder / f"{dataset_id:04d}.tar", "w") as tar:
            for patch in range(dataset_id - 1, num_images, num_tars):
                lon = 0.1 + 1e-4 * buildings[patch]
                ids = f"d {dataset_id} {buildings[patch]} {patch} {patch // 3}"
                line = f"{ids} 52.2 {lon:.6f} 7 0 0 0 52.2 0.1 1 9 9 1 0\n"
                for suffix, data in (("jpg", pictures[patch % len(pictures)]), ("txt", line.encode())):
                    info = tarfile.TarInfo(f"{dataset_id:04d}/{patch:07d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def make_points(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return points (N, 32) float32 whose variance falls by component, as of fingerprints, and their buildings (N,)."""
    generator = np.random.default_rng(seed)
    images = generator.integers(2, 8, count)
    codes = np.repeat(np.arange(count), images)[:count].astype(np.int32)
    scale = (1.0 / np.sqrt(np.arange(1, DIMENSIONS + 1))).astype(np.float32)
    points = generator.standard_normal((int(codes[-1]) + 1, DIMENSIONS), np.float32)[codes]
    points += 0.5 * generator.standard_normal((count, DIMENSIONS), np.float32)
    return points * scale, codes


def make_features(num_images: int, width: int) -> Features:
    """Return images of buildings with 2 to 5 each, in a row 50 m apart."""
    generator = np.random.default_rng(0)
    codes = np.repeat(np.arange(num_images), generator.integers(2, 6, num_images))[:num_images].astype(np.int32)
    block = generator.standard_normal((min(num_images, 4096), width), dtype=np.float32)
    rows = np.empty((num_images, width), np.float32)
    for first in range(0, num_images, len(block)):
        rows[first : first + len(block)] = block[: num_images - first]
    names = pa.array([f"{number // 1000:04d}_{number * 7919 % 10**7}" for number in range(int(codes[-1]) + 1)])
    images = pa.array([f"{number // IMAGES_PER_TAR:04d}_{number}" for number in range(num_images)])
    lat = codes * 50 / METRES_PER_DEGREE
    ones = np.ones(num_images, np.int64)
    return Features(rows, codes, names, images, ones, np.arange(num_images), lat, np.zeros(num_images))


def make_neighbors(features: Features) -> Neighbors:
    """Give each image random neighbours in all bands."""
    count = len(features)
    ends = np.array([8, 15, 30, 60, 90, 130, NEIGHBORS], np.int32)
    codes = np.random.default_rng(1).integers(0, len(features.building_ids), count * NEIGHBORS, dtype=np.int32)
    return Neighbors(codes, np.arange(count) * NEIGHBORS, np.tile(ends, (count, 1)))
