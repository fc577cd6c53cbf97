"""Read the ids and positions of all embedding files, without the embeddings."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import InputError, one_line
from pipeline.files.column_types import check_columns, plain_type, stored_fields
from pipeline.files.list_columns import ListColumn, find_embedding
from pipeline.files.tables import FILE_COLUMNS, ID_COLUMNS, open_parquet, read_ids, read_provenance
from pipeline.log import logger
from pipeline.retrieval.geography import mean_positions
from preprocess_raw_data.merging.splits import Buildings

INVENTORY_COLUMNS = {"building_id", "streetview_image_id", "target_lat", "target_lon"}
# Ids, names and positions, roughly.
BYTES_BESIDE_EMBEDDING = 300


@dataclass(frozen=True)
class Inventory:
    """All ids of all files, without the embeddings."""

    embeddings: list[ListColumn]  # of each file
    file_rows: list[int]  # of each file
    codes: NDArray[np.int32]  # of each row of all files: its building, as a row of `buildings`
    buildings: Buildings  # as they first appear
    row_bytes: int
    schema: pa.Schema  # of the merged rows, without the columns about the tar


def take_inventory(paths: list[Path]) -> Inventory:
    """Read the ids of all files.

    Raises InputError if a file is damaged, of another shape or model than the first, or repeats an image.
    """
    schema, columns = check_files(paths)
    fields = [field for field in pa.schema(ID_COLUMNS) if field.name in INVENTORY_COLUMNS]
    tables = read_ids(paths, fields, "make the file again with stage 2")
    if not any(map(len, tables)):
        raise InputError(f"{paths[0].parent}: its {len(paths)} files hold no rows: see the rejects of stages 1 and 2")
    ids = pa.concat_tables(tables)
    encoded = ids["building_id"].cast(pa.string()).combine_chunks().dictionary_encode()
    building_ids, codes = encoded.dictionary, encoded.indices.to_numpy()
    lat, lon = ids["target_lat"].to_numpy(), ids["target_lon"].to_numpy()
    kind = schema.field("embedding").type
    dropped = {name for name, _ in FILE_COLUMNS}
    return Inventory(
        columns,
        [len(table) for table in tables],
        codes,
        Buildings(building_ids, *mean_positions(codes, lat, lon, len(building_ids))),
        kind.list_size * kind.value_type.bit_width // 8 + BYTES_BESIDE_EMBEDDING,
        pa.schema([field for field in schema if field.name not in dropped]),
    )


def check_files(paths: list[Path]) -> tuple[pa.Schema, list[ListColumn]]:
    """Return the merged schema, with the columns of all files and the embedding last, and each file's embeddings.

    Raises InputError naming the first file that lacks an id, or differs from an earlier one in a type, the width or the
    model.
    """
    ids = pa.schema(ID_COLUMNS)
    schemas = [open_parquet(path).schema_arrow.remove_metadata() for path in paths]
    merged, columns, model, tars = ids, list[ListColumn](), None, dict[str, Path]()
    for path, found in zip(paths, schemas, strict=True):
        check_columns(path, found, stored_fields(found, ids))
        column = find_embedding(path)
        columns.append(column)
        kinds = {field.name: plain_type(field.type) for field in found if field.name not in {*ids.names, column.name}}
        kinds |= {column.name: column.arrow_type} if column.width else {}
        try:
            merged = pa.unify_schemas([merged, pa.schema(kinds)], promote_options="permissive")
            if column.width and not pa.types.is_fixed_size_list(merged.field(column.name).type):
                raise pa.ArrowTypeError(f"embeddings of {column.width} numbers")
        except pa.ArrowTypeError as error:
            problem = f"{path}: not the columns of the files before it ({one_line(error)})"
            raise InputError(f"{problem}: make one of them again") from None
        provenance = read_provenance(path, warn=True) or {}
        for digest in filter(None, (one.get("digest") for one in provenance.get("inputs", []))):
            if (first := tars.setdefault(str(digest), path)) != path:
                logger.warning("%s, %s: made from one tar under two numbers: remove one", first.name, path.name)
        settings = provenance.get("settings")
        model = model or settings
        if settings and settings != model:
            raise InputError(f"{path}: embedded with {settings}, {paths[0].name} with {model}: make one of them again")
    for path, schema in zip(paths, schemas, strict=True):
        if missing := set(merged.names) - {name for name, _ in ID_COLUMNS + FILE_COLUMNS} - set(schema.names):
            logger.warning("%s has no %s: null in its rows", path.name, ", ".join(sorted(missing)))
    kind = merged.field("embedding").type if "embedding" in merged.names else columns[0].arrow_type
    return pa.schema([*(field for field in merged if field.name != "embedding"), ("embedding", kind)]), columns
