"""Geometries by id, and the metadata that make a parquet a GeoParquet 1.1 (https://geoparquet.org/releases/v1.1.0)."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.embeddings_dataset.columns import plain_values
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN
from pipeline.errors import InputError
from pipeline.files.column_types import plain_type
from pipeline.files.tables import open_parquet, reading
from pipeline.log import logger
from publish_model.derived.embedding_groups import keys_of

GEO_KEY = b"geo"
VERSION = "1.1.0"
GEOMETRY_COLUMN = "geometry"
BATCH_ROWS = 65_536
# OGC's codes of well-known binary.
WKB_TYPES = {
    1: "Point", 2: "LineString", 3: "Polygon", 4: "MultiPoint", 5: "MultiLineString", 6: "MultiPolygon",
    7: "GeometryCollection",
}  # fmt: skip
EWKB_Z, EWKB_M, EWKB_SRID, EWKB_FLAGS = 0x80000000, 0x40000000, 0x20000000, 0xE0000000
WGS_84 = 4326


def wkb_type(value: bytes) -> str:
    """Return a geometry's type as GeoParquet names it, ` Z` for three dimensions.

    Raises ValueError if it is not well-known binary, or names another reference system than WGS 84 in itself.
    """
    order = "<" if value[:1] == b"\1" else ">"
    if len(value) < 5 or value[0] > 1:
        raise ValueError("not well-known binary")
    (code,) = struct.unpack_from(f"{order}I", value, 1)
    srid = struct.unpack_from(f"{order}I", value.ljust(9), 5)[0] if code & EWKB_SRID else WGS_84
    if srid != WGS_84:
        raise ValueError(f"in the reference system EPSG:{srid}, not in EPSG:{WGS_84} (longitude, latitude)")
    has_z = bool(code & EWKB_Z) or (code & ~EWKB_FLAGS) // 1000 in (1, 3)
    kind = WKB_TYPES.get((code & ~EWKB_FLAGS) % 1000)
    if kind is None:
        raise ValueError(f"not well-known binary (type {code})")
    return f"{kind} Z" if has_z else kind


def read_points(value: bytes) -> Iterator[NDArray[np.float64]]:
    """Yield the points of each line, ring and point of a geometry in well-known binary, (N, 2) x and y.

    Raises ValueError, IndexError or struct.error if it is damaged.
    """
    place, num_left = 0, 1
    while num_left:  # the members of a collection stand one after the other
        num_left -= 1
        order = "<" if value[place] else ">"
        (code,) = struct.unpack_from(f"{order}I", value, place + 1)
        place += 9 if code & EWKB_SRID else 5
        axes, kind = divmod(code & ~EWKB_FLAGS, 1000)
        width = 2 + (bool(code & EWKB_Z) or axes in (1, 3)) + (bool(code & EWKB_M) or axes in (2, 3))
        if kind not in WKB_TYPES:
            raise ValueError(f"type {code}")
        count = 1
        if WKB_TYPES[kind] not in ("Point", "LineString"):
            (count,) = struct.unpack_from(f"{order}I", value, place)
            place += 4
        if kind > 3:
            num_left += count
            continue
        for _ in range(count):
            num_points = 1
            if WKB_TYPES[kind] != "Point":
                (num_points,) = struct.unpack_from(f"{order}I", value, place)
                place += 4
            yield np.frombuffer(value, f"{order}f8", num_points * width, place).reshape(-1, width)[:, :2]
            place += 8 * width * num_points


def check_degrees(value: bytes) -> None:
    """Raise ValueError if a geometry is damaged or has points that are no longitude and latitude in degrees."""
    try:
        lines = list(read_points(value))
    except (ValueError, IndexError, struct.error):
        raise ValueError("not well-known binary") from None
    for points in lines:
        outside = (np.abs(points) > (180, 90)).any(axis=1)  # an empty point is NaN
        if outside.any():
            x, y = points[outside][0].tolist()
            raise ValueError(f"at ({x!r}, {y!r}), no longitude and latitude in degrees")


class GeometryFile:
    """A parquet of ids and geometries in well-known binary, GeoParquet or plain."""

    def __init__(self, path: Path, id_type: pa.DataType) -> None:
        """Read its footer.

        Raises InputError if it cannot be read, or has no such columns, or its ids are not of the dataset's kind.
        """
        self.path = path
        with open_parquet(path) as file:
            schema, metadata = file.schema_arrow, file.metadata.metadata or {}
        try:
            geo: Any = json.loads(metadata.get(GEO_KEY, b"{}"))
            self.column = str(geo.get("primary_column", GEOMETRY_COLUMN))
            described = dict(geo.get("columns", {}).get(self.column, {}))
        except (ValueError, AttributeError, TypeError):
            raise InputError(f"{path}: its geo metadata are damaged: write the file again") from None
        self._types: set[str] = set()
        self._num_missing = 0
        self._kept = {key: described[key] for key in ("crs", "edges", "orientation", "epoch") if key in described}
        for name in (ID_COLUMN, self.column):
            if name not in schema.names:
                raise InputError(f"{path}: column {name} is missing: --geometry takes {ID_COLUMN} and geometry")
        kind = schema.field(self.column).type
        is_binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
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
        ids = [key[0] for key in keys_of(table, [ID_COLUMN])]
        wanted = set(ids) - {None}
        shapes: dict[object, bytes] = {}
        with reading(self.path), open_parquet(self.path) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=[ID_COLUMN, self.column]):
                for one, shape in zip(
                    plain_values(batch.column(ID_COLUMN)), batch.column(self.column).to_pylist(), strict=True
                ):
                    if one in wanted and shape is not None and shapes.setdefault(one, shape) != shape:
                        raise InputError(f"{self.path}: two geometries for {one}: leave one")
        for one, shape in shapes.items():
            try:
                self._types.add(wkb_type(shape))
                if "crs" not in self._kept:  # which means degrees
                    check_degrees(shape)
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
        logger.info("%d ids have no geometry in %s", self._num_missing, self.path)
        column = {"encoding": "WKB", "geometry_types": sorted(self._types), **self._kept}
        geo = {"version": VERSION, "primary_column": GEOMETRY_COLUMN, "columns": {GEOMETRY_COLUMN: column}}
        return json.dumps(geo, sort_keys=True).encode()
