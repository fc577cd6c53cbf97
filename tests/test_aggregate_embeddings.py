"""Means by id: against a loop, in bounded memory, with geometries."""

import json
import math
import struct
import tracemalloc
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded_datasets import WIDTH, unit_rows, write_dataset

from publish_model import aggregate_embeddings
from publish_model.derived.geometry import describe_shape

IDS = [f"{kind}/{number}" for number in range(7) for kind in ("way", "relation")]


@pytest.fixture
def aggregate(run_main):
    return lambda output, *arguments: run_main(aggregate_embeddings.main, output, *arguments)


@pytest.fixture
def rows():
    """Ids, years and embeddings of 60 images."""
    generator = np.random.default_rng(3)
    ids = [IDS[number] for number in generator.integers(0, len(IDS), 60)]
    return ids, [int(year) for year in generator.integers(2019, 2022, 60)], unit_rows(0, 60)


def loop_over(keys, embeddings):
    """Return by key: the number of images, the mean over all pairs, the normalised mean."""
    found = {}
    for key in set(keys):
        own = [embeddings[row].astype(np.float64) for row, one in enumerate(keys) if one == key]
        mean = np.mean(own, axis=0)
        pairs = [float(a @ b) for a, b in combinations(own, 2)]
        found[key] = (len(own), np.mean(pairs) if pairs else None, mean / np.linalg.norm(mean))
    return found


def check_equal(table, by, expected):
    assert table.num_rows == len(expected)
    for row in table.to_pylist():
        count, similarity, mean = expected[tuple(row[name] for name in by) if len(by) > 1 else row[by[0]]]
        assert row["num_images"] == count
        assert row["mean_pairwise_similarity"] == (None if similarity is None else pytest.approx(similarity, abs=1e-6))
        assert np.allclose(row["embedding"], mean, atol=1e-6)


@pytest.mark.parametrize("rows_per_pass", [1000, 13])
def test_the_means_are_those_of_a_loop_in_one_pass_or_in_several(aggregate, rows, tmp_path, monkeypatch, rows_per_pass):
    monkeypatch.setattr(aggregate_embeddings, "ROWS_PER_PASS", rows_per_pass)
    ids, years, embeddings = rows
    output = write_dataset(tmp_path / "out", pa.array(ids), embeddings, year=years)
    for by, keys in ((["OSMID"], ids), (["OSMID", "year"], list(zip(ids, years, strict=True)))):
        outcome = aggregate(output, "--by", ",".join(by))
        path = output / "_aggregated" / f"{'_'.join(by)}.parquet"
        assert (outcome.code, outcome.stdout) == (0, f"{path}\n")
        assert "60 in = 60 out" in outcome.stderr
        table = pq.read_table(path)
        assert table.schema.field("embedding").type == pa.list_(pa.float32(), WIDTH)
        check_equal(table, by, loop_over(keys, embeddings))
        assert [one.name for one in path.parent.iterdir() if one.name.startswith(".")] == []


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([3, 1, 3, 2**62] * 5),
        pa.array(["a", "b"] * 10).dictionary_encode(),
        pa.array([b"x", b"y"] * 10, pa.large_binary()),
    ],
)
def test_ids_keep_their_type(aggregate, tmp_path, ids):
    output = write_dataset(tmp_path / "out", ids, unit_rows(1, 20), rows_of_part=3)
    assert aggregate(output).code == 0
    column = pq.read_table(output / "_aggregated" / "OSMID.parquet")["OSMID"]
    assert column.type == ids.type
    assert column.to_pylist() == list(dict.fromkeys(ids.to_pylist()))


def test_images_without_an_id_are_dropped_and_counted(aggregate, tmp_path):
    output = write_dataset(
        tmp_path / "out", pa.array(["a", None, "a"]), unit_rows(1, 3), year=[2020.0, 1.0, float("nan")]
    )
    assert "3 in = 2 out + 0 rejected + 1 dropped" in aggregate(output).stderr
    assert "3 in = 2 out" in aggregate(output).stderr
    assert aggregate(output, "--by", "OSMID,year").code == 0
    assert pq.read_table(output / "_aggregated" / "OSMID_year.parquet")["num_images"].to_pylist() == [1, 1]


def test_opposite_images_have_no_mean(aggregate, tmp_path):
    one = unit_rows(1, 1)
    output = write_dataset(tmp_path / "out", pa.array(["a", "a"]), np.concatenate([one, -one]))
    assert aggregate(output).code == 0
    assert pq.read_table(output / "_aggregated" / "OSMID.parquet").to_pylist() == [
        {"OSMID": "a", "num_images": 2, "mean_pairwise_similarity": pytest.approx(-1), "embedding": None}
    ]


def test_a_rerun_keeps_the_file_and_another_dataset_is_refused(aggregate, rows, tmp_path):
    output = write_dataset(tmp_path / "out", pa.array(rows[0]), rows[2])
    path = output / "_aggregated" / "OSMID.parquet"
    assert aggregate(output).code == 0
    before = path.read_bytes(), path.stat().st_mtime_ns
    outcome = aggregate(output)
    assert (outcome.code, outcome.stdout) == (0, "")
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    write_dataset(output, pa.array(rows[0]), rows[2][::-1].copy())
    outcome = aggregate(output)
    assert outcome.code == 1
    assert "made from other inputs or settings" in outcome.stderr.splitlines()[-1]
    assert aggregate(output, "--overwrite").code == 0


def test_an_interrupted_run_leaves_nothing(aggregate, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(aggregate_embeddings, "ROWS_PER_PASS", 4)
    output = write_dataset(tmp_path / "out", pa.array(rows[0]), rows[2])
    plain, done = aggregate_embeddings.average_pass, []

    def stop_at_the_third(*arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments[2])
        return plain(*arguments)

    monkeypatch.setattr(aggregate_embeddings, "average_pass", stop_at_the_third)
    assert aggregate(output).code == 130
    assert list((output / "_aggregated").iterdir()) == []
    monkeypatch.setattr(aggregate_embeddings, "average_pass", plain)
    assert aggregate(output).code == 0
    check_equal(pq.read_table(output / "_aggregated" / "OSMID.parquet"), ["OSMID"], loop_over(rows[0], rows[2]))


def test_a_kept_column_never_meets_one_that_is_made_here(aggregate, tmp_path):
    columns = {"num_images": [1, 2, 3], "mean_pairwise_similarity": [0.5] * 3, "scale": [2.0, 3.0, 4.0]}
    output = write_dataset(tmp_path / "out", pa.array(["a", "b", "a"]), unit_rows(0, 3), **columns)
    for name in ("num_images", "mean_pairwise_similarity", "embedding", "geometry"):
        outcome = aggregate(output, "--by", f"OSMID,{name}")
        assert (outcome.code, "Traceback" in outcome.stderr) == (2, False)
        assert f"there would be two columns {name}" in outcome.stderr.splitlines()[-1]
    assert not (output / "_aggregated").exists()
    assert aggregate(output, "--by", "OSMID,scale").code == 0


def test_a_column_whose_name_is_a_path_does_not_leave_the_folder(aggregate, tmp_path):
    names = ["../../x", "x", "y", "x_y", "x y"]
    output = write_dataset(tmp_path / "out", pa.array(["a"]), unit_rows(0, 1), **dict.fromkeys(names, [1]))
    for by in (*names, "x,y"):
        assert aggregate(output, "--by", f"OSMID,{by}").code == 0
    found = sorted(path.name.removesuffix(".parquet") for path in (output / "_aggregated").iterdir())
    assert found == ["OSMID_%2E%2E%2F%2E%2E%2Fx", "OSMID_x", "OSMID_x%20y", "OSMID_x%5Fy", "OSMID_x_y", "OSMID_y"]


def test_memory_does_not_grow_with_the_images(aggregate, tmp_path, monkeypatch):
    monkeypatch.setattr(aggregate_embeddings, "ROWS_PER_PASS", 1_000)
    peaks = []
    for num_rows in (2_000, 20_000):
        output = write_dataset(
            tmp_path / str(num_rows), pa.array(np.arange(num_rows) // 2), unit_rows(0, num_rows, 64), rows_of_part=500
        )
        tracemalloc.start()
        assert aggregate(output).code == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] + 200_000


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--by", "year"], 2, "--by year: give OSMID"),
        (["--by", "OSMID,OSMID"], 2, "once each"),
        (["--by", "OSMID,"], 2, "--by OSMID,: give OSMID"),
        (["--by", "OSMID,year"], 1, "run stage 8 with --keep-columns year"),
        (["--geometry", "none.parquet"], 1, "none.parquet: no such file"),
    ],
)
def test_what_cannot_be_done_is_one_line(aggregate, rows, tmp_path, arguments, code, text):
    output = write_dataset(tmp_path / "out", pa.array(rows[0]), rows[2])
    outcome = aggregate(output, *arguments)
    assert outcome.code == code
    assert text in outcome.stderr.splitlines()[-1]


# ------------------------------------------------------------------------------------------------ geometry


def point(x, y):
    return struct.pack("<BIdd", 1, 1, x, y)


def ewkb_point(srid, x, y, order="<"):
    """Return a point as PostGIS writes it, with its reference system."""
    return struct.pack(f"{order}BIIdd", order == "<", 1 | 0x20000000, srid, x, y)


def write_geometry(path, ids, shapes, metadata=None):
    table = pa.table({"OSMID": ids, "geometry": pa.array(shapes, pa.binary())})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def test_geometries_are_joined_by_id_into_a_geoparquet(aggregate, rows, tmp_path):
    output = write_dataset(tmp_path / "out", pa.array(rows[0]), rows[2])
    crs = {"type": "GeographicCRS", "name": "WGS 84"}
    geo = {"version": "1.0.0", "primary_column": "geometry", "columns": {"geometry": {"encoding": "WKB", "crs": crs}}}
    shapes = {name: point(number, 1.5) for number, name in enumerate(IDS[1:])} | {"way/999": point(0, 0)}
    line = struct.pack("<BII4d", 1, 2, 2, 0, 0, 1, 1)
    shapes["relation/1"] = line
    source = write_geometry(tmp_path / "g.parquet", list(shapes), list(shapes.values()), {"geo": json.dumps(geo)})
    outcome = aggregate(output, "--geometry", source)
    assert outcome.code == 0, outcome.stderr
    assert "WARNING 1 ids have no geometry" in outcome.stderr
    path = output / "_aggregated" / "OSMID.geo.parquet"
    table = pq.read_table(path)
    assert {row["OSMID"]: row["geometry"] for row in table.to_pylist()} == {
        one: shapes.get(one) for one in set(rows[0])
    }
    assert json.loads(pq.read_metadata(path).metadata[b"geo"]) == {
        "version": "1.1.0",
        "primary_column": "geometry",
        "columns": {"geometry": {"encoding": "WKB", "geometry_types": ["LineString", "Point"], "crs": crs}},
    }
    check_equal(table, ["OSMID"], loop_over(rows[0], rows[2]))


def test_the_column_geometry_wins_over_another_one_that_is_primary(aggregate, tmp_path):
    output = write_dataset(tmp_path / "out", pa.array(["a"]), unit_rows(0, 1))
    table = pa.table({"OSMID": ["a"], "geometry": [point(7, 48)], "utm": [point(300_000, 5_300_000)]})
    columns = {"geometry": {"encoding": "WKB"}, "utm": {"encoding": "WKB", "crs": {"name": "UTM"}}}
    geo = json.dumps({"version": "1.1.0", "primary_column": "utm", "columns": columns})
    pq.write_table(table.replace_schema_metadata({"geo": geo}), tmp_path / "g.parquet")
    assert aggregate(output, "--geometry", tmp_path / "g.parquet").code == 0
    path = output / "_aggregated" / "OSMID.geo.parquet"
    assert pq.read_table(path)["geometry"].to_pylist() == [point(7, 48)]
    assert "UTM" not in pq.read_metadata(path).metadata[b"geo"].decode()


def test_a_folder_that_is_no_dataset_is_left_as_it_is(aggregate, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    outcome = aggregate(tmp_path / "model")
    assert (outcome.code, "holds no embeddings" in outcome.stderr) == (1, True)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("ids", "shapes", "text"),
    [
        ([1, 2], [point(0, 0)] * 2, "its OSMID is int64, that of the dataset string"),
        (["way/1", "way/1"], [point(0, 0), point(1, 1)], "two geometries for way/1"),
        (["way/0001"], [point(0, 0)], "g.parquet: names none of the ids: give their geometries"),
        (["way/1"], [b"POINT (1 2)"], "not well-known binary"),
        (["way/1"], [ewkb_point(25832, 691000.0, 5334000.0)], "in the reference system EPSG:25832, not in EPSG:4326"),
        (["way/1"], [point(500000, 5200000)], "of way/1 is at (500000.0, 5200000.0), no longitude and latitude"),
        (["way/1"], [point(7, -200)], "in degrees: write the file again, in EPSG:4326 (in geopandas to_crs(4326))"),
        (["way/1"], [point(1, 2)[:-1]], "not well-known binary"),
    ],
)
def test_geometries_that_cannot_be_joined_are_one_line(aggregate, rows, tmp_path, ids, shapes, text):
    output = write_dataset(tmp_path / "out", pa.array(rows[0]), rows[2])
    outcome = aggregate(output, "--geometry", write_geometry(tmp_path / "g.parquet", ids, shapes))
    assert outcome.code == 1
    assert text in outcome.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("code", "order", "name"),
    [(1, "<", "Point"), (6, ">", "MultiPolygon"), (1003, "<", "Polygon Z"), (0x80000002, "<", "LineString Z")],
)
def test_a_geometry_has_the_type_that_its_head_names(code, order, name):
    empty = (math.nan, math.nan) if code == 1 else ()
    assert describe_shape(shape(code, empty, count=0, order=order), in_degrees=True) == name


def test_what_is_no_geometry_is_said_so():
    curve = shape(8, (0.0, 0.0), (1.0, 1.0), (2.0, 0.0))
    hexadecimal = point(1, 2).hex().encode()
    for value in (b"", b"\x01\x00", struct.pack("<BI", 1, 99), b"POINT (0 0)", curve, hexadecimal, hexadecimal.upper()):
        with pytest.raises(ValueError, match="not well-known binary"):
            describe_shape(value, in_degrees=False)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_geometry_in_another_reference_system_is_refused_by_name(order):
    assert describe_shape(ewkb_point(4326, 11.5, 48.1, order), in_degrees=True) == "Point"
    with pytest.raises(ValueError, match="EPSG:3857"):
        describe_shape(ewkb_point(3857, 1.0, 2.0, order), in_degrees=True)


def shape(kind, *members, count=None, order="<"):
    """Return a geometry of WKB members, or of points; those of a polygon are rings."""
    body = b"".join(one if isinstance(one, bytes) else struct.pack(f"{order}{len(one)}d", *one) for one in members)
    num = b"" if (kind & 0xFFFF) % 1000 == 1 else struct.pack(f"{order}I", len(members) if count is None else count)
    return struct.pack(f"{order}BI", order == "<", kind) + num + body


def ring(*points):
    return struct.pack("<I", len(points)) + b"".join(struct.pack(f"<{len(one)}d", *one) for one in points)


FAR, INSIDE = (7.0, 91.0), [(1.0, 2.0), (3.0, 4.0)]


@pytest.mark.parametrize("last", [(180.0, -90.0), FAR])
@pytest.mark.parametrize(
    "make",
    [
        lambda last: shape(1, last),
        lambda last: shape(2, (0.0, 0.0), last, order=">"),
        lambda last: shape(3, ring((1.0, 2.0), (3.0, 4.0), (5.0, 4.0), (1.0, 2.0)), ring(), ring(last, *INSIDE, last)),
        lambda last: shape(1003, ring((*last, 9.0), (1.0, 2.0, 9.0), (3.0, 2.0, 9.0), (*last, 9.0))),
        lambda last: shape(0xC0000001, (*last, 999.0, -999.0)),
        lambda last: shape(7, shape(6, shape(3)), shape(4), shape(5, shape(3002, *([(*last, 5e5, 5e5)] * 2)))),
        lambda last: shape(4, shape(1, (math.nan, math.nan)), ewkb_point(4326, *last, ">")),
    ],
)  # fmt: skip
def test_every_point_of_a_geometry_has_to_be_on_earth(make, last):
    if last is not FAR:
        describe_shape(make(last), in_degrees=True)
        for end in range(len(make(last))):
            with pytest.raises(ValueError, match="not well-known binary"):
                describe_shape(make(last)[:end], in_degrees=True)
        return
    with pytest.raises(ValueError, match=r"at \(7\.0, 91\.0\), no longitude and latitude"):
        describe_shape(make(last), in_degrees=True)


def test_a_geometry_of_a_named_reference_system_may_be_in_metres(aggregate, rows, tmp_path):
    output = write_dataset(tmp_path / "out", pa.array(rows[0]), rows[2])
    described = {"encoding": "WKB", "crs": {"type": "ProjectedCRS", "name": "ETRS89 / UTM zone 32N"}}
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": described}}
    source = write_geometry(tmp_path / "g.parquet", ["way/1"], [point(5e5, 5.2e6)], {"geo": json.dumps(geo)})
    assert aggregate(output, "--geometry", source).code == 0
