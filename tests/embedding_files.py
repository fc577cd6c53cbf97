"""Embedding files as stage 2 writes them, and a look at what stage 3 makes of them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.files import tables
from preprocess_raw_data import merge_and_split
from preprocess_raw_data.merging.splits import SPLITS

SIZES = np.random.default_rng(3).integers(1, 6, 60).tolist()
SETTINGS = {"model": "abc", "pooling_type": "pooler_output"}


def make_rows(dataset, images_of_buildings, width=8, kind=None, mixed=False, heading=None):
    """Return a table as stage 2 writes it; `mixed` puts the buildings' images in turns."""
    buildings = np.repeat(np.arange(1, len(images_of_buildings) + 1), images_of_buildings)
    if mixed:
        buildings = np.random.default_rng(dataset).permutation(buildings)
    count = len(buildings)
    generator = np.random.default_rng(dataset)
    columns = {
        "dataset_id": np.full(count, dataset),
        "target_id": buildings,
        "patch_id": np.arange(count),
        "street_view_id": generator.integers(0, 50, count),
        "target_lat": 52.2 + 0.0003 * buildings + 1e-6 * generator.normal(size=count),
        "target_lon": 0.1 * dataset + 0.0003 * (buildings % 17),
        "building_id": [f"{dataset:04d}_{building}" for building in buildings],
        "streetview_image_id": [f"{dataset:04d}_{patch}" for patch in range(count)],
        "image_path": [f"{patch}.jpg" for patch in range(count)],
        "tar_file": [f"{dataset:04d}.tar"] * count,
        "heading": generator.uniform(-180, 180, count),
    }
    values = generator.normal(size=count * width).astype("f2" if kind == pa.float16() else "f4")
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(values), width)
    schema = pa.schema(tables.ID_COLUMNS + tables.FILE_COLUMNS + [("heading", heading or pa.float64())])
    return pa.table(columns, schema=schema).append_column("embedding", embedding)


def write(folder, dataset, table, settings=None, inputs=()):
    path = folder / "embeddings" / f"{dataset:04d}_embeddings.parquet"
    provenance = tables.make_provenance("generate_embeddings", inputs, settings or SETTINGS)
    with tables.parquet_writer(path, table.schema, provenance) as writer:
        writer.write_table(table, row_group_size=1024)
    return path


def read_splits(folder, name="merged"):
    return {split: pq.read_table(folder / name / f"{split}.parquet") for split in SPLITS}


def place_of(folder, name="merged"):
    """Return the split of every building."""
    splits = read_splits(folder, name)
    return {building: split for split, table in splits.items() for building in table["building_id"].to_pylist()}


def stage_3(run_main, config):
    """Return a function that runs stage 3 with options and with settings written SECTION.KEY=VALUE."""

    def run(*words):
        options = [word if word.startswith("--") else f"--set={word}" for word in words]
        return run_main(merge_and_split.main, "--config", config, *options)

    return run
