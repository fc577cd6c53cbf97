"""Fingerprint files of look-alike buildings, and a configuration of stage 5 for them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

K, K0, COMPONENTS = 12, 5, 6
DIFFICULTY = {
    "neighbors": K, "k0_for_local_scale": K0, "pca_components": COMPONENTS, "sample_fraction_for_bands": 1.0,
}  # fmt: skip
WIDTH = 4 * 4 * 3


def draw_table(num_images: int, dataset_id: int = 1, images_per_building: int = 4, width: int = WIDTH) -> pa.Table:
    """Fingerprints of buildings that look alike to some degree; the second building repeats the first one's."""
    generator = np.random.default_rng(dataset_id)
    buildings = np.arange(num_images) // images_per_building
    looks = generator.normal(128, 40, (buildings.max(initial=0) + 1, width))
    pixels = (looks[buildings] + generator.normal(0, 15, (num_images, width))).clip(0, 255).astype(np.uint8)
    repeated = pixels[4:8]
    repeated[:] = pixels[: len(repeated)]
    return pa.table(
        {
            "streetview_image_id": [f"{dataset_id:04d}_{row}" for row in range(num_images)],
            "building_id": [f"{dataset_id:04d}_{building}" for building in buildings],
            "target_lat": 52.2 + buildings * 1e-4,
            "target_lon": np.full(num_images, 0.12),
            "fingerprint": pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), width),
        },
        schema=pa.schema(
            [
                ("streetview_image_id", pa.string()),
                ("building_id", pa.string()),
                ("target_lat", pa.float64()),
                ("target_lon", pa.float64()),
                ("fingerprint", pa.list_(pa.uint8(), width)),
            ]
        ),
    )


def write_run(
    folder: Path, write_config: Callable[..., Path], *tables: pa.Table, **difficulty: object
) -> tuple[Path, Path]:
    """Write fingerprint files and a configuration; return the configuration and where the output will be."""
    (folder / "fingerprints").mkdir(exist_ok=True)
    for number, table in enumerate(tables, start=1):
        pq.write_table(table, folder / "fingerprints" / f"{number:04d}_fingerprints.parquet")
    return write_config(folder, difficulty=DIFFICULTY | difficulty), folder / "difficulty.parquet"
