"""Geometries by id, and the metadata that make a parquet a GeoParquet 1.1 (https://geoparquet.org/releases/v1.1.0)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import shapely

from pipeline.embeddings_dataset.columns import plain_values
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN
from pipeline.errors import InputError, one_line
from pipeline.files.column_types import plain_type
from pipeline.files.tables import open_parquet, read_batches
from pipeline.log import logger
from pipeline.workspace import parse_json

GEO_KEY = b"geo"
VERSION = "1.1.0"
GEOMETRY_COLUMN = "geometry"
BATCH_ROWS = 65_536
WGS_84 = 4326


def describe_shape(value: bytes, *, in_degrees: bool) -> str:
    """Return the type of a geometry as GeoParquet names it, ` Z` for three dimensions.

    Raises ValueError if it is not well-known binary, names another reference system than WGS 84 in itself, or is to be
    `in_degrees` and has points that are no longitude and latitude.
    """
    if value[:1] == b"0":  # shapely reads hexadecimal text too, but no reader of the output will
        raise ValueError("not well-known binary but its hexadecimal text")
    try:
        shape = shapely.from_wkb(value)
    except (shapely.errors.GEOSException, NotImplementedError) as error:  # the second for curves
        raise ValueError(f"not well-known binary ({one_line(error)})") from None
    if (system := shapely.get_srid(shape)) not in (0, WGS_84):  # PostGIS's kind of it
        raise ValueError(f"in the reference system EPSG:{system}, not in EPSG:{WGS_84} (longitude, latitude)")
    points = shapely.get_coordinates(shape)  # (N, 2), an empty point is left out or NaN
    outside = points[(np.abs(points) > (180, 90)).any(axis=1)]
    if in_degrees and len(outside):
        raise ValueError(f"at {tuple(outside[0].tolist())}, no longitude and latitude in degrees")
    return f"{shape.geom_type} Z" if shape.has_z else str(shape.geom_type)


class GeometryFile:
    """A parquet of ids and geometries in well-known binary, GeoParquet or plain."""

    def __init__(self, path: Path, id_type: pa.DataType) -> None:
        """Read its footer; raise InputError without such columns, or where the ids are of another type than these."""
        self.path = path
        with open_parquet(path) as file:
            schema, metadata = file.schema_arrow, file.metadata.metadata or {}
        try:
            geo: Any = parse_json(metadata.get(GEO_KEY, b"{}"))
            has_own = GEOMETRY_COLUMN in schema.names
            self.column = GEOMETRY_COLUMN if has_own else str(geo.get("primary_column", GEOMETRY_COLUMN))
            described = dict(geo.get("columns", {}).get(self.column, {}))
        except (ValueError, AttributeError, TypeError):
            raise InputError(f"{path}: its geo metadata are damaged: write the file again") from None
        self._types: set[str] = set()
        self._num_missing = 0
        self._kept = {key: described[key] for key in ("crs", "edges", "orientation", "epoch") if key in described}
        for name in (ID_COLUMN, self.column):
            if name not in schema.names:
                raise InputError(f"{path}: column {name} is missing: --geometry takes {ID_COLUMN} and geometry")
        is_binary = str(schema.field(self.column).type) in ("binary", "large_binary")
        if not is_binary or described.get("encoding", "WKB") != "WKB":
            raise InputError(f"{path}: column {self.column} is not well-known binary (WKB): write it so")
        own_type = schema.field(ID_COLUMN).type
        if plain_type(own_type) != plain_type(id_type):
            raise InputError(
                f"{path}: its {ID_COLUMN} is {own_type}, that of the dataset {id_type}: write both in one type"
            )

    def join(self, table: pa.Table) -> pa.Table:
        """Add the geometry of each id to a table, null where the file has none.

        Raises InputError where the file has two geometries for one id, or one that is not WKB of longitudes and
        latitudes.
        """
        ids = plain_values(table[ID_COLUMN])
        wanted = set(ids)
        shapes: dict[object, bytes] = {}
        for batch in read_batches(self.path, [ID_COLUMN, self.column], BATCH_ROWS):
            for one, shape in zip(
                plain_values(batch.column(ID_COLUMN)), batch.column(self.column).to_pylist(), strict=True
            ):
                if one in wanted and shape is not None and shapes.setdefault(one, shape) != shape:
                    raise InputError(f"{self.path}: two geometries for {one}: leave one")
        for one, shape in shapes.items():
            try:
                self._types.add(describe_shape(shape, in_degrees="crs" not in self._kept))
            except ValueError as error:
                raise InputError(
                    f"{self.path}: the geometry of {one} is {error}: write the file again, in EPSG:{WGS_84} (in "
                    f"geopandas to_crs({WGS_84}))"
                ) from None
        joined = [shapes.get(one) for one in ids]
        self._num_missing += joined.count(None)
        return table.append_column(GEOMETRY_COLUMN, pa.array(joined, pa.binary()))

    def describe(self) -> bytes:
        """Return the `geo` metadata of a file that holds the joined tables."""
        if self._num_missing and not self._types:
            raise InputError(f"{self.path}: names none of the ids: give their geometries")
        log = logger.warning if self._num_missing else logger.info
        log("%d ids have no geometry in %s", self._num_missing, self.path)
        column = {"encoding": "WKB", "geometry_types": sorted(self._types), **self._kept}
        geo = {"version": VERSION, "primary_column": GEOMETRY_COLUMN, "columns": {GEOMETRY_COLUMN: column}}
        return json.dumps(geo, sort_keys=True).encode()
