"""Clusters of an embeddings dataset: the tool, its threshold by validation, and what it writes."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import Watched, open_browser
from embedded_datasets import draw_buildings, unit_rows, write_dataset
from published_models import read_dataset

from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.retrieval import pair_table
from publish_model import cluster_embeddings, delete_ids
from publish_model.model_folder import published_model


@pytest.fixture
def cluster(run_main):
    return lambda output, *arguments: run_main(cluster_embeddings.main, output, *arguments)


@pytest.fixture
def dataset(tmp_path):
    """40 images of 10 buildings, 10 m apart within a street of 2 km."""
    embeddings, buildings = draw_buildings(3, 10, 4, 0.3)
    generator = np.random.default_rng(0)
    lat = 52.2 + buildings * 0.002 + generator.normal(size=40) * 1e-5
    ids = pa.array([f"image {row}" for row in range(40)])
    return write_dataset(
        tmp_path / "out", ids, embeddings, lat=lat, lon=np.full(40, 0.1), year=[2020] * 40, way=[2**60 + 1] * 40
    )


def read(output, name="clusters"):
    return pq.read_table(output / "_clusters" / f"{name}.parquet"), json.loads(
        (output / "_clusters" / f"{name}.json").read_text()
    )


def test_each_image_is_in_one_cluster_with_its_columns_and_the_likeness_to_a_medoid(cluster, dataset):
    outcome = cluster(dataset, "--threshold", "0.8")
    assert (outcome.code, outcome.stdout) == (0, f"{dataset / '_clusters' / 'clusters.parquet'}\n")
    assert "40 in = 40 out" in outcome.stderr
    table, summary = read(dataset)
    assert table.column_names == ["OSMID", "lat", "lon", "year", "way", "cluster", "similarity", "is_medoid", "row"]
    embedded = read_dataset(dataset)
    assert sorted(table["row"].to_pylist()) == list(range(40))
    assert table["OSMID"].to_pylist() == [f"image {row}" for row in table["row"].to_pylist()]
    clusters = table["cluster"].to_numpy()
    assert (np.diff(clusters) >= 0).all()
    assert table["cluster"].type == pa.int64()
    sizes = np.bincount(clusters)
    assert (np.diff(sizes) <= 0).all()
    vectors = np.array(embedded["embedding"].to_pylist(), np.float32)[table["row"].to_numpy()]
    for number in range(len(sizes)):
        own = np.flatnonzero(clusters == number)
        assert table["is_medoid"].to_numpy()[own].tolist() == [True] + [False] * (len(own) - 1)
        medoid = max(own, key=lambda row: sum(float(vectors[row] @ vectors[other]) for other in own))
        assert medoid == own[0]
        assert np.allclose(table["similarity"].to_numpy()[own], vectors[own] @ vectors[own[0]], atol=1e-6)
    assert summary["images"] == 40
    assert summary["clusters"] == len(sizes)
    assert summary["alone"] == int((sizes == 1).sum())
    assert sum(summary["clusters_by_size"].values()) == len(sizes)
    assert (summary["threshold"], summary["threshold_from"]) == (0.8, "given")


def test_a_rerun_keeps_the_clusters_and_another_threshold_is_refused(cluster, dataset):
    path = dataset / "_clusters" / "clusters.parquet"
    assert cluster(dataset, "--threshold", "0.8").code == 0
    before = path.stat().st_mtime_ns, (dataset / "_clusters" / "clusters.json").stat().st_mtime_ns
    outcome = cluster(dataset, "--threshold", "0.8")
    assert (outcome.code, outcome.stdout) == (0, "")
    assert "1 kept" in outcome.stderr
    assert (path.stat().st_mtime_ns, (dataset / "_clusters" / "clusters.json").stat().st_mtime_ns) == before
    outcome = cluster(dataset, "--threshold", "0.7")
    assert outcome.code == 1
    assert "threshold" in outcome.stderr.splitlines()[-1]
    assert cluster(dataset, "--threshold", "0.7", "--overwrite").code == 0


def test_what_is_not_ours_stays(cluster, dataset):
    path = dataset / "_clusters" / "clusters.parquet"
    path.parent.mkdir()
    path.write_text("mine")
    outcome = cluster(dataset, "--threshold", "0.8")
    assert outcome.code == 2
    assert "not written by this tool" in outcome.stderr
    assert path.read_text() == "mine"


def test_labels_measure_the_clusters(cluster, dataset, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("OSMID,building_id\n" + "".join(f"image {row},{row // 4}\n" for row in range(36)))
    assert cluster(dataset, "--threshold", "0.8", "--labels", labels).code == 0
    _, summary = read(dataset)
    assert summary["labelled_images"] == 36
    assert 0.5 < summary["measures"]["bcubed_f1"] <= 1
    labels.write_text("OSMID,building_id\n" + "".join(f"image {row},{row % 4}\n" for row in range(36)))
    assert cluster(dataset, "--threshold", "0.8", "--labels", labels).code == 0
    assert read(dataset)[1]["measures"]["bcubed_f1"] < 0.5


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ("OSMID,building_id\nimage 1,a\nimage 1,b\n", "OSMID image 1 has two buildings"),
        ("OSMID,building_id\nimage 99,a\n", "names none of the images"),
        ("OSMID\nimage 1\n", "no column building_id"),
    ],
)
def test_labels_that_cannot_be_used_are_refused_before_the_work(cluster, dataset, tmp_path, monkeypatch, lines, text):
    monkeypatch.setattr(cluster_embeddings, "group_images", None)
    (tmp_path / "labels.csv").write_text(lines)
    outcome = cluster(dataset, "--threshold", "0.8", "--labels", tmp_path / "labels.csv")
    assert outcome.code == 1
    assert text in outcome.stderr.splitlines()[-1]
    assert not (dataset / "_clusters").exists()


def test_the_function_returns_the_table_that_it_writes(dataset):
    options = cluster_embeddings.ClusterOptions(threshold=0.8)
    table, _ = cluster_embeddings.cluster(EmbeddingsDataset(dataset), options)
    assert table.equals(read(dataset)[0])


def test_positions_written_as_text_in_a_csv_are_numbers(cluster, tmp_path):
    lat, lon = ["52.2", "52.2", "10", None], ["0.1", "0.10001", "0.1", "0.1"]
    output = write_dataset(
        tmp_path / "out", pa.array(range(4)), np.repeat(unit_rows(0, 1), 4, axis=0), lat=lat, lon=lon
    )
    assert cluster(output, "--threshold", "0.8", "--positions", "lat,lon").code == 0
    table = read(output)[0]
    assert dict(zip(table["OSMID"].to_pylist(), table["cluster"].to_pylist(), strict=True)) == {0: 0, 1: 0, 2: 1, 3: 2}
    assert table["geometry"].null_count == 1


def test_with_positions_far_images_stay_apart_and_the_file_is_a_geoparquet(cluster, dataset):
    assert cluster(dataset, "--threshold", "-0.9", "--positions", "lat,lon").code == 0
    table, _ = read(dataset)
    for number in set(table["cluster"].to_pylist()):
        own = {row // 4 for row in table.filter(pa.compute.equal(table["cluster"], number))["row"].to_pylist()}
        assert len(own) == 1
    geo = json.loads(table.schema.metadata[b"geo"])
    assert geo["columns"]["geometry"] == {"encoding": "WKB", "geometry_types": ["Point"]}
    geopandas = pytest.importorskip("geopandas")
    read_back = geopandas.read_parquet(dataset / "_clusters" / "clusters.parquet")
    assert np.allclose(read_back.geometry.x, 0.1)
    assert np.allclose(read_back.geometry.y, read_back["lat"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--threshold", "0.8", "--positions", "lat,length"], "has no column length"),
        (["--threshold", "0.8", "--positions", "lat,OSMID"], "no degrees"),
        (["--threshold", "0.8", "--positions", "year,lon"], "beyond 90 degrees"),
        (["--threshold", "0.8", "--positions", "way,lon"], "beyond 90 degrees"),
    ],
)
def test_positions_that_cannot_be_used_are_refused(cluster, dataset, arguments, text):
    outcome = cluster(dataset, *arguments)
    assert outcome.code == 1
    assert text in outcome.stderr.splitlines()[-1]
    assert not (dataset / "_clusters").exists()


def test_true_and_false_are_no_degrees(cluster, tmp_path):
    output = write_dataset(tmp_path / "out", pa.array(range(2)), unit_rows(0, 2), lat=[True, False], lon=[0.1, 0.1])
    outcome = cluster(output, "--threshold", "0.8", "--positions", "lat,lon")
    assert (outcome.code, "column lat holds bool, no degrees" in outcome.stderr) == (1, True)


def test_radians_are_suspected(cluster, tmp_path):
    for lat, is_said in ((0.85, True), (48.85, False)):
        output = write_dataset(tmp_path / str(lat), pa.array(range(2)), unit_rows(0, 2), lat=[lat, lat], lon=[0.04, 0])
        outcome = cluster(output, "--threshold", "0.8", "--positions", "lat,lon")
        assert (outcome.code, "give degrees" in outcome.stderr) == (0, is_said)


@pytest.mark.parametrize(
    "arguments", [[], ["--threshold", "nan"], ["--threshold", "2"], ["--threshold", "0.5", "--false-pairs", "0.1"],
                  ["--threshold", "0.5", "--positions", "lat"], ["--threshold", "0.5", "--positions", "lon,lat"],
                  ["--threshold", "0.5", "--positions", "lat,lon", "--max-distance-m", "1e-11"]],
)  # fmt: skip
def test_bad_options_have_exit_code_2(cluster, dataset, arguments):
    outcome = cluster(dataset, *arguments)
    assert outcome.code == 2
    assert "Traceback" not in outcome.stderr


def test_a_damaged_embedding_is_refused(cluster, tmp_path):
    embeddings = unit_rows(0, 5)
    embeddings[3, 2] = np.nan
    output = write_dataset(tmp_path / "out", pa.array(range(5)), embeddings)
    outcome = cluster(output, "--threshold", "0.8")
    assert outcome.code == 1
    assert "not finite or not of unit length" in outcome.stderr.splitlines()[-1]


@pytest.mark.parametrize(("num_rows", "num_clusters"), [(1, 1), (300, 1)])
def test_one_image_and_copies_of_one_are_one_cluster_and_a_giant_is_named(cluster, tmp_path, num_rows, num_clusters):
    output = write_dataset(tmp_path / "out", pa.array(range(num_rows)), np.repeat(unit_rows(0, 1), num_rows, axis=0))
    outcome = cluster(output, "--threshold", "0.9")
    assert outcome.code == 0
    _, summary = read(output)
    assert summary["clusters"] == num_clusters
    assert ("giant" in summary) == (num_rows > 50) == ("cluster 0 holds 300 of 300 images" in outcome.stderr)


def test_a_takedown_removes_the_clusters(cluster, run_main, dataset, tmp_path):
    assert cluster(dataset, "--threshold", "0.8").code == 0
    (tmp_path / "ids.txt").write_text("image 7\n")
    outcome = run_main(delete_ids.main, dataset, "--delete-ids", tmp_path / "ids.txt")
    assert outcome.code == 0, outcome.stderr
    assert not (dataset / "_clusters").exists()
    assert cluster(dataset, "--threshold", "0.8").code == 0
    assert "image 7" not in read(dataset)[0]["OSMID"].to_pylist()


# ------------------------------------------------------------------------------------------------ by validation


@pytest.fixture
def calibrated(model_dir, tmp_path):
    """A model with a table of pairs that 200 images have given."""
    model = shutil.copytree(model_dir, tmp_path / "model")
    embeddings, buildings = draw_buildings(5, 50, 4, 0.6, 256)
    pairs = pair_table.describe_pairs(embeddings, buildings)
    (model / published_model.RATES_NAME).write_text(json.dumps(pairs))
    return model


def test_the_threshold_comes_from_the_models_validation_and_the_images(cluster, embed, packaged, calibrated, tmp_path):
    assert embed(packaged, tmp_path / "out", model=calibrated).code == 0
    outcome = cluster(tmp_path / "out", "--model-id", calibrated)
    assert outcome.code == 0, outcome.stderr
    _, summary = read(tmp_path / "out")
    table = published_model.read_pairs(calibrated, "all")
    centred = pair_table.centre(np.array(read_dataset(tmp_path / "out")["embedding"].to_pylist(), np.float32))
    shift = table.measure_shift(centred)
    threshold = table.choose_threshold(36, shift)
    assert (summary["threshold_from"], summary["threshold"]) == ("validation", pytest.approx(threshold, abs=1e-6))
    assert summary["shift"] == pytest.approx(shift, abs=1e-6)
    assert table.threshold_at(summary["false_pairs"]) + shift == pytest.approx(threshold, abs=1e-4)
    assert summary["expected_wrong_pair_share"] == pytest.approx(
        table.expect_wrong_share(threshold, 36, shift), abs=1e-3
    )
    outcome = cluster(tmp_path / "out", "--model-id", calibrated, "--false-pairs", "1e-3", "--overwrite")
    assert outcome.code == 0
    assert read(tmp_path / "out")[1]["threshold"] == pytest.approx(table.threshold_at(1e-3) + shift, abs=1e-6)
    outcome = cluster(tmp_path / "out", "--model-id", calibrated, "--positions", "lat,lon")
    assert outcome.code == 1


def test_a_model_without_the_table_needs_a_threshold(cluster, embed, packaged, model_dir, tmp_path):
    assert embed(packaged, tmp_path / "out").code == 0
    outcome = cluster(tmp_path / "out", "--model-id", model_dir)
    assert outcome.code == 1
    assert "or give --threshold" in outcome.stderr.splitlines()[-1]
    assert cluster(tmp_path / "out", "--model-id", model_dir, "--threshold", "0.5").code == 0


# ------------------------------------------------------------------------------------------------ look alike, the page


def test_ids_that_look_alike_are_grouped_by_their_means(cluster, tmp_path):
    embeddings, _ = draw_buildings(9, 3, 8, 0.2)
    ids = pa.array([f"way/{row // 2}" for row in range(24)])
    output = write_dataset(tmp_path / "out", ids, embeddings, lat=np.arange(24) * 1.0, lon=np.full(24, 0.5))
    outcome = cluster(output, "--look-alike", "3", "--positions", "lat,lon")
    assert outcome.code == 0, outcome.stderr
    table, summary = read(output, "look_alike")
    assert table.column_names == ["OSMID", "num_images", "cluster", "similarity", "is_medoid", "row", "geometry"]
    assert set(table["num_images"].to_pylist()) == {2}
    found = dict(zip(table["OSMID"].to_pylist(), table["cluster"].to_pylist(), strict=True))
    assert len(found) == 12
    assert [len({found[f"way/{number}"] for number in range(first, first + 4)}) for first in (0, 4, 8)] == [1, 1, 1]
    assert sorted(table["row"].to_pylist()) == list(range(0, 24, 2))
    assert summary["clusters"] == 3
    assert 0 < summary["adjusted_rand_between_starts"] <= 1
    assert cluster(output, "--look-alike", "3", "--threshold", "0").code == 2


def test_groups_that_look_alike_count_ids_and_none_is_a_giant(cluster, tmp_path):
    output = write_dataset(tmp_path / "out", pa.array(range(200)), unit_rows(1, 200))
    outcome = cluster(output, "--look-alike", "2")
    assert "threshold" not in outcome.stderr
    summary = read(output, "look_alike")[1]
    assert (summary["ids"], "images" in summary, "giant" in summary) == (200, False, False)


def test_there_are_no_more_groups_that_look_alike_than_ids_that_differ(cluster, tmp_path):
    output = write_dataset(tmp_path / "out", pa.array(range(9)), np.repeat(unit_rows(0, 2), [4, 5], axis=0))
    assert cluster(output, "--look-alike", "30").code == 0
    assert read(output, "look_alike")[1]["clusters_by_size"] == {"1": 0, "2-3": 0, "4-7": 2}


def test_a_page_of_replaced_groups_goes(cluster, dataset):
    page = dataset / "_clusters" / "clusters.html"
    assert cluster(dataset, "--threshold", "0.8", "--html").code == 0
    assert cluster(dataset, "--threshold", "0.8").code == 0
    assert page.exists()
    assert cluster(dataset, "--threshold", "0.7", "--overwrite").code == 0
    assert not page.exists()
    page.write_text("mine")
    assert cluster(dataset, "--threshold", "0.8", "--overwrite").code == 0
    assert page.read_text() == "mine"


def test_the_page_escapes_ids_and_shows_the_photographs_of_the_input(cluster, embed, packaged, tmp_path):
    assert embed(packaged, tmp_path / "out").code == 0
    arguments = [tmp_path / "out", "--threshold", "0.1", "--html", "--input", packaged]
    assert cluster(*arguments).code == 0
    path = tmp_path / "out" / "_clusters" / "clusters.html"
    page = path.read_text()
    assert page.count("data:image/jpeg;base64,") > 2
    assert "http" not in page.split("</style>")[1]
    assert "way/" in page
    table, summary = read(tmp_path / "out")
    hostile = table.set_column(0, "OSMID", pa.array(["<script>alert(1)</script>"] * table.num_rows))
    cluster_embeddings.write_page(path, hostile, summary, lambda _: {})
    assert "<script>" not in path.read_text()
    assert "&lt;script&gt;" in path.read_text()
    assert cluster(*arguments).code == 0  # it replaces its own page
    path.write_text("mine")
    assert cluster(*arguments).code == 2
    assert path.read_text() == "mine"


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_opens_from_disk_and_fits(cluster, embed, packaged, tmp_path, width):
    with open_browser() as browser:
        assert embed(packaged, tmp_path / "out").code == 0
        assert cluster(tmp_path / "out", "--threshold", "0.1", "--html", "--input", packaged).code == 0
        watched = Watched(browser, width)
        watched.page.goto((tmp_path / "out" / "_clusters" / "clusters.html").as_uri())
        assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
        assert watched.problems == []
        assert [url for url in watched.requests if not url.startswith(("file:", "data:"))] == []
