"""The dataset as other libraries read it: `OUTPUT/parts/*.parquet`, and the means as a GeoParquet.

Each test needs its library (pip install '.[interop]') and skips where it is not there.
"""

import json
import struct
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded_datasets import unit_rows, write_dataset

from publish_model import aggregate_embeddings

IDS = [f"way/{row // 2}" for row in range(25)]
EMBEDDINGS = unit_rows(0, 25)


@pytest.fixture
def output(tmp_path):
    """A dataset of 25 images in three parts, beside the files that are not data."""
    folder = write_dataset(tmp_path / "out", pa.array(IDS), EMBEDDINGS, year=list(range(25)))
    (folder / "_logs").mkdir()
    (folder / "_logs" / "a.log").write_text("a log")
    return folder


def test_duckdb_reads_parts_and_compares_embeddings(output):
    duckdb = pytest.importorskip("duckdb")
    found = duckdb.execute(
        "SELECT OSMID, year, list_inner_product(embedding::FLOAT[], $query::FLOAT[]) AS similarity "
        f"FROM read_parquet('{output}/parts/*.parquet') ORDER BY similarity DESC LIMIT 3",
        {"query": EMBEDDINGS[7].tolist()},
    ).fetchall()
    expected = np.sort(EMBEDDINGS @ EMBEDDINGS[7])[::-1][:3]
    assert found[0][:2] == (IDS[7], 7)
    assert [row[2] for row in found] == pytest.approx(expected.tolist(), abs=1e-5)


def test_polars_reads_parts_as_arrays(output):
    polars = pytest.importorskip("polars")
    frame = polars.read_parquet(output / "parts" / "*.parquet")
    assert frame.columns == ["OSMID", "embedding", "year"]
    assert frame.schema["embedding"] == polars.Array(polars.Float32, 8)
    assert np.array_equal(frame["embedding"].to_numpy(), EMBEDDINGS)
    assert frame["OSMID"].to_list() == IDS
    lazy = polars.scan_parquet(output / "parts" / "*.parquet").filter(polars.col("year") == 9).collect()
    assert lazy["OSMID"].to_list() == [IDS[9]]


def test_pandas_reads_the_folder(output):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(output / "parts")
    assert frame["OSMID"].tolist() == IDS
    assert np.array_equal(np.stack(frame["embedding"]), EMBEDDINGS)


def test_datasets_reads_parts_with_their_features(output, tmp_path):
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(
        "parquet", data_files=str(output / "parts" / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.features["embedding"].length == 8
    assert loaded["OSMID"][:] == IDS
    assert np.array_equal(np.array(loaded["embedding"][:], dtype=np.float32), EMBEDDINGS)


def test_faiss_takes_the_embeddings_as_they_are(output):
    faiss = pytest.importorskip("faiss")
    table = pq.read_table(output / "parts")
    matrix = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, 8)
    index = faiss.IndexFlatIP(8)
    index.add(matrix)
    _, rows = index.search(matrix, 1)
    assert rows[:, 0].tolist() == list(range(25))


def test_pyarrow_reads_the_whole_output_as_the_data_alone(output, run_main):
    """Side tables and logs begin with `_`, which readers of datasets pass over."""
    import pyarrow.dataset

    assert run_main(aggregate_embeddings.main, output).code == 0
    (output / "state.json").rename(output / "_state.json")  # JSON is no parquet, whatever it is called
    found = pyarrow.dataset.dataset(output, format="parquet")
    assert found.count_rows() == 25


def test_geopandas_reads_the_means_as_a_geoparquet(output, run_main, tmp_path):
    geopandas = pytest.importorskip("geopandas")
    shapes = [struct.pack("<BIdd", 1, 1, row, row / 2) for row in range(13)]
    table = pa.table({"OSMID": [f"way/{row}" for row in range(13)], "geometry": pa.array(shapes, pa.binary())})
    pq.write_table(table, tmp_path / "g.parquet")
    assert run_main(aggregate_embeddings.main, output, "--geometry", tmp_path / "g.parquet").code == 0
    path = output / "_aggregated" / "OSMID.geo.parquet"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own dependencies
        frame = geopandas.read_parquet(path)
    assert frame.crs.to_string() == "OGC:CRS84"
    assert [(point.x, point.y) for point in frame.geometry] == [(row, row / 2) for row in range(13)]
    assert json.loads(pq.read_metadata(path).metadata[b"geo"])["version"] == "1.1.0"
