"""Who is in the embedding files: all ids and positions, without the embeddings."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.tables import (
    ID_COLUMNS,
    check_columns,
    embedding_width,
    log_missing_provenance,
    open_parquet,
    read_provenance,
    reading,
)

# What a row takes beside its embedding, roughly: ids, names, positions.
BYTES_BESIDE_EMBEDDING = 300


@dataclass(frozen=True)
class Inventory:
    """All ids of all files, without the embeddings: for each file the building code of each row."""

    paths: list[Path]
    codes: list[NDArray[np.int32]]
    building_ids: list[str]
    mean_lat: NDArray[np.float64]
    mean_lon: NDArray[np.float64]
    row_bytes: int
    schema: pa.Schema

    @property
    def images_per_building(self) -> NDArray[np.int64]:
        """The number of images of each building, (B,)."""
        return np.bincount(np.concatenate(self.codes), minlength=len(self.building_ids))

    def find_groups(self) -> list[list[int]]:
        """Return the files that must be merged together: each alone, unless a building lies in several."""
        buildings_of_files = sum(len(np.unique(codes)) for codes in self.codes)
        if buildings_of_files == len(self.building_ids):
            return [[number] for number in range(len(self.paths))]
        return [list(range(len(self.paths)))]


def list_embeddings(embeddings_dir: Path) -> list[Path]:
    """Return the embedding files by name.

    Raises InputError if there are none.
    """
    paths = sorted(path for path in embeddings_dir.glob("*_embeddings.parquet") if not path.name.startswith("."))
    if not paths:
        raise InputError(f"{embeddings_dir}: holds no *_embeddings.parquet: run stage 2, or correct the path")
    return paths


def take_inventory(paths: list[Path]) -> Inventory:
    """Read the ids of all files.

    Raises InputError if a file is damaged, of another shape or model than the first, or repeats an image.
    """
    schema = check_files(paths)
    tables = [read_ids(path) for path in paths]
    if not any(map(len, tables)):
        raise InputError(f"{paths[0].parent}: its {len(paths)} files hold no rows: see the rejects of stages 1 and 2")
    check_unique(paths, [table["streetview_image_id"] for table in tables])
    encoded = pc.dictionary_encode(
        pa.chunked_array(
            [chunk.cast(pa.string()) for table in tables for chunk in table["building_id"].chunks], pa.string()
        )
    ).combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):  # of no rows, or of one chunk by some versions
        encoded = encoded.chunk(0)
    codes = encoded.indices.to_numpy().astype(np.int32)
    num_buildings = len(encoded.dictionary)
    counts = np.maximum(np.bincount(codes, minlength=num_buildings), 1)
    lat, lon = (
        np.bincount(codes, np.concatenate([table[name].to_numpy() for table in tables]), num_buildings) / counts
        for name in ("target_lat", "target_lon")
    )
    width = embedding_width(paths[0], schema)
    return Inventory(
        paths,
        np.split(codes, np.cumsum([len(table) for table in tables])[:-1]),
        encoded.dictionary.to_pylist(),
        lat,
        lon,
        width * 4 + BYTES_BESIDE_EMBEDDING,
        schema,
    )


def read_ids(path: Path) -> pa.Table:
    """Return the columns by which images and buildings are told apart and placed.

    Raises InputError if the file is damaged or a value is missing.
    """
    names = ["building_id", "target_lat", "target_lon", "streetview_image_id"]
    with reading(path):
        table = open_parquet(path).read(columns=names)
    for name in names:
        if table[name].null_count:
            raise InputError(f"{path}: column {name} has empty values: make the file again with stage 2")
    return table


def check_files(paths: list[Path]) -> pa.Schema:
    """Return the schema that all files share.

    Raises InputError naming the first file that differs from the first in columns, width or model.
    """
    schema, model = None, None
    for path in paths:
        found = open_parquet(path).schema_arrow.remove_metadata()
        check_columns(path, found, pa.schema(ID_COLUMNS))
        embedding_width(path, found)
        log_missing_provenance(path)
        settings = (read_provenance(path) or {}).get("settings")
        schema, model = schema or found, model or settings
        if not found.equals(schema):
            differing = [field for field in found if field not in list(schema)]
            differing += [f"no {field}" for field in schema if field not in list(found)]
            what = differing[0] if differing else "another order"
            raise InputError(f"{path}: not the columns of {paths[0].name} ({what}): make one of them again")
        if settings and settings != model:
            raise InputError(f"{path}: embedded with {settings}, {paths[0].name} with {model}: make one of them again")
    assert schema is not None  # paths is never empty
    return schema


def check_unique(paths: list[Path], ids: list[pa.ChunkedArray]) -> None:
    """Raise InputError if an image is there twice, naming one and its files."""
    together = pa.chunked_array([chunk.cast(pa.string()) for column in ids for chunk in column.chunks], pa.string())
    if pc.count_distinct(together).as_py() == len(together):
        return
    counts = pc.value_counts(together)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0]
    names = [path.name for path, column in zip(paths, ids, strict=True) if pc.is_in(repeated, column).as_py()]
    raise InputError(f"{paths[0].parent}: image {repeated} is there more than once, in {', '.join(names)}: remove one")
