"""Who is in the embedding files: all ids and positions, without the embeddings."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.files.listing import list_outputs
from pipeline.files.tables import (
    FILE_COLUMNS,
    ID_COLUMNS,
    check_columns,
    embedding_width,
    log_missing_provenance,
    open_parquet,
    read_provenance,
    reading,
)
from preprocess_raw_data.merging.splits import Buildings

INVENTORY_COLUMNS = [
    "building_id", "dataset_id", "street_view_id", "streetview_image_id", "target_lat", "target_lon",
]  # fmt: skip
# What a row takes beside its embedding, roughly: ids, names, positions.
BYTES_BESIDE_EMBEDDING = 300


@dataclass(frozen=True)
class Inventory:
    """All ids of all files, without the embeddings: for each file the building code of each row."""

    paths: list[Path]
    codes: list[NDArray[np.int32]]
    panoramas: NDArray[np.int32]  # (N,) one code per panorama, in the order of the files
    buildings: Buildings
    row_bytes: int
    schema: pa.Schema  # of what is merged: the columns that speak of the tar are left out

    @property
    def images_per_building(self) -> NDArray[np.int64]:
        """The number of images of each building, (B,)."""
        return np.bincount(np.concatenate(self.codes), minlength=len(self.buildings))

    def find_groups(self) -> list[list[int]]:
        """Return the files that must be merged together: each alone, but those together that share buildings."""
        held = [np.unique(codes) for codes in self.codes]
        num_files = np.bincount(np.concatenate(held), minlength=len(self.buildings))
        sharing = [number for number, codes in enumerate(held) if (num_files[codes] > 1).any()]
        alone = [[number] for number in range(len(held)) if number not in set(sharing)]
        return sorted([*alone, sharing] if sharing else alone)


def list_embeddings(embeddings_dir: Path) -> list[Path]:
    """Return the embedding files by name; see `list_outputs`."""
    return list_outputs(embeddings_dir, 2, "_embeddings")


def take_inventory(paths: list[Path]) -> Inventory:
    """Read the ids of all files.

    Raises InputError if a file is damaged, of another shape or model than the first, or repeats an image.
    """
    schema = check_files(paths)
    tables = [read_ids(path) for path in paths]
    if not any(map(len, tables)):
        raise InputError(f"{paths[0].parent}: its {len(paths)} files hold no rows: see the rejects of stages 1 and 2")
    check_unique(paths, [table["streetview_image_id"] for table in tables])
    ids = pa.concat_tables(tables)
    building_ids, codes = encode(ids["building_id"])
    rows = {name: ids[name].to_numpy() for name in ("dataset_id", "street_view_id", "target_lat", "target_lon")}
    counts = np.bincount(codes)
    dataset_ids = np.empty(len(building_ids), np.int64)
    dataset_ids[codes[::-1]] = rows["dataset_id"][::-1]  # the first row's, should they differ
    kind = schema.field("embedding").type
    dropped = {name for name, _ in FILE_COLUMNS}
    return Inventory(
        paths,
        np.split(codes, np.cumsum([len(table) for table in tables])[:-1]),
        code_panoramas(rows["dataset_id"], rows["street_view_id"]),
        Buildings(
            building_ids,
            dataset_ids,
            np.bincount(codes, rows["target_lat"]) / counts,
            np.bincount(codes, rows["target_lon"]) / counts,
        ),
        kind.list_size * kind.value_type.bit_width // 8 + BYTES_BESIDE_EMBEDDING,
        pa.schema([field for field in schema if field.name not in dropped]),
    )


def encode(column: pa.ChunkedArray) -> tuple[pa.StringArray, NDArray[np.int32]]:
    """Return the distinct values in order of first appearance, and each row's place among them, (N,)."""
    encoded = pc.dictionary_encode(column.cast(pa.string())).combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):  # of one chunk, by some versions
        encoded = encoded.chunk(0)
    return encoded.dictionary, encoded.indices.to_numpy()


def code_panoramas(dataset_ids: NDArray[np.int64], street_view_ids: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return one code per panorama, (N,): a street_view_id is unique only within its dataset."""
    _, datasets = np.unique(dataset_ids, return_inverse=True)
    labels, views = np.unique(street_view_ids, return_inverse=True)
    pairs = datasets.reshape(-1) * len(labels) + views.reshape(-1)
    codes: NDArray[np.int32] = np.unique(pairs, return_inverse=True)[1].reshape(-1).astype(np.int32)
    return codes


def read_ids(path: Path) -> pa.Table:
    """Return the columns by which images, buildings and panoramas are told apart and placed.

    Raises InputError if the file is damaged or a value is missing.
    """
    with reading(path):
        table = open_parquet(path).read(columns=INVENTORY_COLUMNS).replace_schema_metadata(None)
    for name in INVENTORY_COLUMNS:
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
