"""Exploring a dataset: the table with thumbnails that embedding-atlas opens, and the page that it serves."""

import importlib.util
import io
import json
import socket
import time
import urllib.error
import urllib.request

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import Watched, open_browser
from PIL import Image
from raw_tars import encode

from evaluate_embeddings.explore import main
from evaluate_embeddings.page import atlas_table
from evaluate_embeddings.page.atlas_table import write_atlas_table
from pipeline.files import tables

NUM_ROWS = 12
REJECTED, INVALID = 4, (2, 9)
EMBEDDED = [row for row in range(NUM_ROWS) if row != REJECTED and row not in INVALID]


def color_of(row):
    return (20 * row, 255 - 20 * row, 90)


def make_photo(row):
    return encode(Image.new("RGB", (320, 200), color_of(row)))


def make_vectors(rows):
    return np.random.default_rng(0).normal(size=(NUM_ROWS, 6)).astype(np.float32)[rows]


def write_part(folder, number, rows, first_row, num_rows, **columns):
    values = pa.FixedSizeListArray.from_arrays(pa.array(make_vectors(rows).reshape(-1)), 6)
    table = pa.table({"OSMID": pa.array(rows, pa.int64()), "embedding": values, **columns})
    place = {"row_group": 0, "read_batch": number, "first_row": first_row, "num_rows": num_rows}
    provenance = {"part": place, "settings": {"filter_valid": True}}
    tables.write_parquet(folder / "parts" / f"rg00000_rb{number:05d}.parquet", table, provenance)


@pytest.fixture
def dataset(tmp_path):
    """A dataset in two parts, of a package with an invalid row in each and a rejected one."""
    package = pa.table(
        {
            "image_bytes": pa.array([b"broken" if row == REJECTED else make_photo(row) for row in range(NUM_ROWS)]),
            "is_valid": [None if row == 0 else row not in INVALID for row in range(NUM_ROWS)],
        }
    )
    pq.write_table(package, tmp_path / "package.parquet", row_group_size=5)
    folder = tmp_path / "output"
    write_part(folder, 0, [row for row in EMBEDDED if row < 7], 0, 7)
    write_part(folder, 1, [row for row in EMBEDDED if row >= 7], 7, 5)
    rejects = pa.table({"row": pa.array([REJECTED], pa.int64())})
    tables.write_parquet(folder / "_rejects" / "rg00000_rb00000.parquet", rejects, {})
    (folder / "state.json").write_text(json.dumps({"input_path": str(tmp_path / "package.parquet")}))
    return folder


def read_table(path):
    table = pq.read_table(path)
    photos = [cell and cell["bytes"] for cell in table["image"].to_pylist()] if "image" in table.column_names else None
    return table["OSMID"].to_pylist(), np.array(table["embedding"].to_pylist(), np.float32), photos


def assert_photo_of(data, row):
    image = Image.open(io.BytesIO(data))
    assert max(image.size) == atlas_table.THUMBNAIL_SIDE
    np.testing.assert_allclose(np.asarray(image).reshape(-1, 3).mean(axis=0), color_of(row), atol=4)


def test_each_row_has_its_id_embedding_and_the_thumbnail_of_its_own_image(dataset, tmp_path):
    assert write_atlas_table(dataset, None, tmp_path / "a.parquet", seed=0) == (len(EMBEDDED), True)
    ids, embeddings, photos = read_table(tmp_path / "a.parquet")
    assert ids == [str(row) for row in EMBEDDED]
    np.testing.assert_array_equal(embeddings, make_vectors(EMBEDDED))
    for row, photo in zip(EMBEDDED, photos, strict=True):
        assert_photo_of(photo, row)


def test_of_too_many_images_a_random_sample_is_shown_with_its_own_thumbnails(dataset, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(atlas_table, "MAX_ROWS", 4)
    monkeypatch.setattr(atlas_table.logger, "propagate", True)
    write_atlas_table(dataset, None, tmp_path / "a.parquet", seed=0)
    assert f"a random sample of 4 of {len(EMBEDDED)} images is shown" in caplog.text
    ids, embeddings, photos = read_table(tmp_path / "a.parquet")
    rows = [int(name) for name in ids]
    assert len(rows) == 4
    assert rows == sorted(rows)
    np.testing.assert_array_equal(embeddings, make_vectors(rows))
    for row, photo in zip(rows, photos, strict=True):
        assert_photo_of(photo, row)


def test_a_folder_of_photographs_is_read_by_name_and_gaps_stay_gaps(tmp_path):
    names = ["a/1.jpg", "a/2.jpg", "gone.jpg"]
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for row, name in enumerate(names[:2]):
        (tmp_path / "photos" / name).write_bytes(make_photo(row))
    values = pa.FixedSizeListArray.from_arrays(pa.array(make_vectors([0, 1, 2]).reshape(-1)), 6)
    tables.write_parquet(tmp_path / "o" / "parts" / "p.parquet", pa.table({"OSMID": names, "embedding": values}), {})
    write_atlas_table(tmp_path / "o", tmp_path / "photos", tmp_path / "a.parquet", seed=0)
    _, _, photos = read_table(tmp_path / "a.parquet")
    assert_photo_of(photos[0], 0)
    assert_photo_of(photos[1], 1)
    assert photos[2] is None


def test_images_that_the_dataset_carries_itself_are_taken(tmp_path):
    write_part(tmp_path / "o", 0, [3, 5], 0, 2, image_bytes=[make_photo(3), make_photo(5)])
    write_atlas_table(tmp_path / "o", None, tmp_path / "a.parquet", seed=0)
    _, _, photos = read_table(tmp_path / "a.parquet")
    assert_photo_of(photos[1], 5)


def test_without_the_images_there_are_no_thumbnails_and_it_says_so(dataset, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(atlas_table.logger, "propagate", True)
    (tmp_path / "package.parquet").unlink()
    assert write_atlas_table(dataset, None, tmp_path / "a.parquet", seed=0) == (len(EMBEDDED), False)
    assert "no thumbnails: what was embedded is not here" in caplog.text
    assert read_table(tmp_path / "a.parquet")[2] is None


def test_what_cannot_be_explored_is_exit_code_1_with_one_line(dataset, tmp_path, run_main, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "embedding_atlas" else found(name))
    assert "embedding-atlas is not installed: pip install" in run_main(main, dataset).stderr
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    pq.write_table(pa.table({"image_bytes": [b"x"] * 3}), tmp_path / "other.parquet")
    for arguments, words in (
        ([tmp_path / "nowhere"], "nowhere: no parts/*.parquet"),
        ([dataset, "--images", tmp_path / "no.parquet"], "no.parquet: no such file or folder"),
        ([dataset, "--images", tmp_path / "other.parquet"], "other.parquet: is not what rg00000_rb00000.parquet"),
    ):
        outcome = run_main(main, *arguments)
        assert outcome.code == 1
        assert outcome.stderr.splitlines()[-1].startswith("error: ")
        assert words in outcome.stderr


# ------------------------------------------------------------------------------------------------ in the browser


def find_free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def wait_for(url, process, seconds=240):
    """Return once the page is served; the first start compiles for half a minute."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return json.load(answer)
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    raise AssertionError(f"{url} was not served within {seconds} s")


@pytest.mark.slow
def test_the_page_opens_with_thumbnails_and_neighbours_and_asks_only_this_machine(dataset, start_script, tmp_path):
    if importlib.util.find_spec("embedding_atlas") is None:
        pytest.skip("embedding-atlas is not installed: the extra explore has it")
    write_part(dataset, 2, [1] * 30, 12, 30, image_bytes=[make_photo(1)] * 30)  # a map needs some points
    for number in (0, 1):
        path = dataset / "parts" / f"rg00000_rb{number:05d}.parquet"
        table = pq.read_table(path)
        photos = [make_photo(row) for row in table["OSMID"].to_pylist()]
        tables.write_parquet(path, table.append_column("image_bytes", pa.array(photos)), {})
    with open_browser() as browser:
        port = find_free_port()
        process = start_script(
            "evaluate_embeddings/explore.py", dataset, "--port", port, XDG_CACHE_HOME=str(tmp_path / "cache")
        )
        metadata = wait_for(f"http://localhost:{port}/data/metadata.json", process)
        assert "neighbors" in json.dumps(metadata)
        watched = Watched(browser, 1280)
        watched.page.goto(f"http://localhost:{port}")
        watched.page.get_by_text(f"{len(EMBEDDED) + 30} points").first.wait_for(timeout=60_000)
        watched.page.locator("img[src^='data:image/jpeg'], img[src^='blob:']").first.wait_for(timeout=60_000)
        watched.page.screenshot(path=tmp_path / "explore.png")
        urls = [url for url in watched.requests if not url.startswith(("data:", "blob:"))]
        assert all(url.startswith(f"http://localhost:{port}/") for url in urls)
        process.terminate()
        assert process.wait(60) == 143
