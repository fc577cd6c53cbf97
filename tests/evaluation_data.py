"""A small finished pipeline to evaluate: tars, splits and a checkpoint, made up in a folder."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from pipeline.files import tables
from pipeline.retrieval.checkpoint import hash_buildings, save_checkpoint
from pipeline.retrieval.projector import Projector

WIDTH = 16
NUM_BUILDINGS = 24
IMAGES_PER_BUILDING = 3
SPLIT_FILE = None  # hash of the file that gave the splits


def building_color(building):
    """Return the colour that all pictures of a building have."""
    return (10 * building % 256, 255 - 10 * building % 256, 40)


def write_tar(path, buildings):
    """Write one flat JPEG an image and return where each lies, as (offset, size)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, building in enumerate(buildings):
            buffer = io.BytesIO()
            Image.new("RGB", (320, 240), building_color(building)).save(buffer, "JPEG")
            info = tarfile.TarInfo(f"{path.stem}/{number}.jpg")
            info.size = buffer.tell()
            tar.addfile(info, io.BytesIO(buffer.getvalue()))
    with tarfile.open(path) as tar:
        return [(member.offset_data, member.size) for member in tar]


def make_table(seed, *, num_buildings=NUM_BUILDINGS, width=WIDTH, places=None, prefix="", images=IMAGES_PER_BUILDING):
    """Return a split: buildings of two datasets by turns, embeddings near each building's own direction."""
    generator = np.random.default_rng(seed)
    building = np.repeat(np.arange(num_buildings), images)
    centres = generator.normal(size=(num_buildings, width))
    embeddings = centres[building] + 0.8 * generator.normal(size=(len(building), width)) + 0.5
    dataset = 1 + building % 2
    columns = {
        "dataset_id": pa.array(dataset, pa.int64()),
        "street_view_id": pa.array(np.arange(len(building)) % 7, pa.int64()),
        "target_lat": pa.array(52.2 + building * 1e-4, pa.float64()),
        "target_lon": pa.array(0.12 + building * 1e-4, pa.float64()),
        "building_id": pa.array([f"{prefix}{d:04d}_{b}" for d, b in zip(dataset, building, strict=True)]),
        "streetview_image_id": pa.array([f"{prefix}{d:04d}_{i}" for i, d in enumerate(dataset)]),
    }
    if places is not None:
        columns["image_offset"] = pa.array([place[0] for place in places], pa.int64())
        columns["image_size"] = pa.array([place[1] for place in places], pa.int64())
    values = pa.array(embeddings.astype(np.float32).reshape(-1))
    return pa.table(columns | {"embedding": pa.FixedSizeListArray.from_arrays(values, width)})


def write_split(folder, name, table):
    """Write a split as stage 3 does."""
    provenance = {
        "stage": "merge_and_split",
        "split_hash": "feedbeef",
        "settings": {"split_file": SPLIT_FILE},
        "inputs": [],
    }
    tables.write_parquet(folder / "merged" / f"{name}.parquet", table, provenance)


def write_checkpoint(path, *, seed=0, width=WIDTH, history=True, trained_on=()):
    """Write a checkpoint of a projector with random weights, which names the buildings that it was trained on."""
    torch.manual_seed(seed)
    projector = Projector(width, output_dim=8, hidden_dim=8)
    scores = [{"epoch": epoch, "val": {"map": 0.4 + 0.01 * epoch}} for epoch in range(4)]
    rows = {"raw": 0.35, "pca_whitened": 0.38, "whitening": 0.4, "projector": 0.43}
    val = {name: {"map": value} for name, value in rows.items()}
    metrics = {"epoch": 3, "val": val, "history": scores} if history else {}
    content = {
        "architecture": projector.architecture,
        "projector": projector.state_dict(),
        "metrics": metrics,
        "settings": {"seed": 42, "training": {"margin": 0.2}},
        "trained_on": None if trained_on is None else hash_buildings(trained_on),
    }
    save_checkpoint(path, content)


def make_workplace(folder, *, photos=True):
    """Make tars, splits, a checkpoint and a configuration below `folder`; return the configuration's path."""
    folder = Path(folder)
    places = None
    if photos:
        buildings = [b for b in range(NUM_BUILDINGS) for _ in range(IMAGES_PER_BUILDING)]
        found = {
            d: iter(write_tar(folder / "raw" / f"{d:04d}.tar", [b for b in buildings if 1 + b % 2 == d]))
            for d in (1, 2)
        }
        places = [next(found[1 + building % 2]) for building in buildings]
    write_split(folder, "train", make_table(1, num_buildings=40, prefix="t"))
    test = make_table(2, places=places)
    write_split(folder, "test", test)
    counts = {"in": len(test), "out": len(test)}
    tables.write_parquet(folder / "difficulty.parquet", test.select(["streetview_image_id"]), {"counts": counts})
    write_checkpoint(folder / "checkpoints" / "checkpoint_best.pt")
    config_path = folder / "config.toml"
    config_path.write_text(
        "[paths]\n"
        + ('raw_dir = "raw"\n' if photos else "")
        + 'merged_dir = "merged"\ncheckpoint_dir = "checkpoints"\nreport_dir = "report"\n'
        + 'difficulty_metadata_path = "difficulty.parquet"\n'
        + "[training_model]\noutput_dim = 8\n"
    )
    return config_path
