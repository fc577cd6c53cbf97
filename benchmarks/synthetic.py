"""Tables, tars and a backbone that look like the real ones in shape, and are made from a seed."""

import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.config import count_cores
from pipeline.files import tables

# Buildings by their number of images, as counted in the 320 of the development set.
BUILDINGS_BY_IMAGES = {2: 126, 3: 71, 4: 39, 5: 38, 6: 17, 7: 29}
IMAGES_PER_TAR = 5_800
# Independent directions behind the embeddings, and behind the fingerprints.
RANK = 64
CITY = (52.2, 0.12)  # degrees
METRES_PER_DEGREE = 111_195.0


def make_config(folder: Path, **sections: dict[str, object]) -> Path:
    """Write a configuration with every path below `folder`."""
    names = ("raw", "intermediates", "embeddings", "merged", "fingerprints")
    paths = {f"{name}_dir": name for name in names} | {"difficulty_metadata_path": "difficulty.parquet"}
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
    """Return stage 1's columns of a tar whose buildings stand about 15 m apart; one panorama shows three buildings."""
    count, num_buildings = len(buildings), int(buildings[-1]) + 1
    side = 15.0 * np.sqrt(num_buildings) / METRES_PER_DEGREE
    places = generator.uniform(0, side, (num_buildings, 2))
    views = np.arange(count) - np.searchsorted(buildings, buildings)
    return {
        "dataset_id": np.full(count, dataset_id),
        "target_id": buildings,
        "patch_id": np.arange(count),
        "street_view_id": buildings // 3 * 7 + views,
        "target_lat": CITY[0] + dataset_id % 100 / 10 + places[buildings, 0],
        "target_lon": CITY[1] + dataset_id // 100 / 10 + places[buildings, 1],
        "building_id": [f"{dataset_id:04d}_{building}" for building in buildings],
        "streetview_image_id": [f"{dataset_id:04d}_{patch}" for patch in range(count)],
        "image_path": [f"{dataset_id:04d}/{patch:07d}.jpg" for patch in range(count)],
        "tar_file": [f"{dataset_id:04d}.tar"] * count,
        "street_lat": generator.uniform(52, 53, count),
        "street_lon": generator.uniform(0, 1, count),
        "distance_m": generator.uniform(5, 40, count),
        "heading": generator.uniform(-180, 180, count),
        "pitch": generator.uniform(-20, 20, count),
        "image_offset": np.arange(count) * 110_000,
        "image_size": np.full(count, 109_000),
    }


def draw_values(generator: np.random.Generator, buildings: np.ndarray, width: int) -> np.ndarray:
    """Return correlated features (N, width) float32: a building's images lie around its own centre."""
    spectrum = 1.0 / np.sqrt(np.arange(1, RANK + 1, dtype=np.float32))
    basis = np.random.default_rng(0).standard_normal((RANK, width), np.float32) * spectrum[:, None]
    centres = generator.standard_normal((int(buildings[-1]) + 1, RANK), np.float32)
    factors = centres[buildings] + 0.5 * generator.standard_normal((len(buildings), RANK), np.float32)
    return factors @ basis


def make_embeddings(folder: Path, count: int, width: int) -> None:
    """Write `count` images as stage 2 does, one file a tar; the values are bfloat16-born, as of a GPU."""
    for dataset_id, start in enumerate(range(0, count, IMAGES_PER_TAR), start=1):
        generator = np.random.default_rng(dataset_id)
        buildings = draw_buildings(generator, min(IMAGES_PER_TAR, count - start))
        table = pa.table(draw_ids(generator, dataset_id, buildings), schema=tables.INTERMEDIATE_SCHEMA)
        values = (draw_values(generator, buildings, width).view(np.uint32) & 0xFFFF0000).view(np.float32)
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)
        table = table.append_column("embedding", embedding)
        provenance = tables.make_provenance("generate_embeddings", [], {"model": "synthetic"})
        path = folder / "embeddings" / f"{dataset_id:04d}_embeddings.parquet"
        with tables.parquet_writer(path, table.schema, provenance) as writer:
            writer.write_table(table, row_group_size=1024)


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
    table = pa.table({name: ids[name] for name in tables.FINGERPRINT_ID_SCHEMA.names})
    table = table.cast(tables.FINGERPRINT_ID_SCHEMA)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)
    path = folder / "fingerprints" / f"{dataset_id:04d}_fingerprints.parquet"
    provenance = tables.make_provenance("compute_fingerprints", [], {"image_size": image_size})
    tables.write_parquet(path, table.append_column("fingerprint", column), provenance)


def make_tar(folder: Path, num_images: int, side: int) -> None:
    """Write one tar of `num_images` JPEGs of `side` pixels and as many metadata texts, as few distinct pictures."""
    generator = np.random.default_rng(0)
    pictures = []
    for _ in range(64):
        cells = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        pictures.append(buffer.getvalue())
    buildings = draw_buildings(generator, num_images)
    (folder / "raw").mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "raw" / "0001.tar", "w") as tar:
        for patch, building in enumerate(buildings.tolist()):
            line = f"d 1 {building} {patch} {patch // 3} 52.2 {0.1 + 1e-4 * building:.6f} 7 0 0 0 52.2 0.1 1 9 9 1 0\n"
            for suffix, data in (("jpg", pictures[patch % len(pictures)]), ("txt", line.encode())):
                info = tarfile.TarInfo(f"0001/{patch:07d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def make_backbone(folder: Path) -> Path:
    """Write a DINOv2 of toy size with random weights."""
    import torch
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder / "backbone")
    BitImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(
        folder / "backbone"
    )
    return folder / "backbone"
