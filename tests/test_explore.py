"""Exploring a dataset: the table with thumbnails that embedding-atlas opens, and the page that it serves."""

import importlib.util
import io
import json
import os
import socket
import time
import urllib.error
import urllib.request

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import Watched, open_browser
from package_fixtures import run as run_package
from PIL import Image
from published_models import read_dataset, write_packaged
from raw_tars import encode

from evaluate_embeddings import explore
from evaluate_embeddings.explore import main, write_atlas_table
from pipeline.errors import InputError
from publish_model import delete_ids

NUM_ROWS = 12
REJECTED, INVALID = 4, (2, 9)
EMBEDDED = [row for row in range(NUM_ROWS) if row != REJECTED and row not in INVALID]


def color_of(row):
    return (20 * row, 255 - 20 * row, 90)


def make_photo(row):
    return encode(Image.new("RGB", (320, 200), color_of(row)))


@pytest.fixture
def dataset(embed, tmp_path):
    """A dataset in parts of 4, of a package with invalid rows and a rejected one."""
    images = [b"broken" if row == REJECTED else make_photo(row) for row in range(NUM_ROWS)]
    is_valid = pa.array([None if row == 0 else row not in INVALID for row in range(NUM_ROWS)])
    package = write_packaged(
        tmp_path / "package.parquet", images, 5, OSMID=pa.array(range(NUM_ROWS)), is_valid=is_valid
    )
    assert embed(package, tmp_path / "output").code == 0
    return tmp_path / "output"


def read_table(path):
    table = pq.read_table(path)
    photos = [cell and cell["bytes"] for cell in table["image"].to_pylist()] if "image" in table.column_names else None
    return table["OSMID"].to_pylist(), np.array(table["embedding"].to_pylist(), np.float32), photos


def assert_photo_of(data, row):
    image = Image.open(io.BytesIO(data))
    assert max(image.size) == explore.THUMBNAIL_SIDE
    np.testing.assert_allclose(np.asarray(image).reshape(-1, 3).mean(axis=0), color_of(row), atol=4)


def assert_shown(dataset, path, rows):
    """Assert that the table has these rows of the package, each with its own embedding and thumbnail."""
    ids, embeddings, photos = read_table(path)
    assert ids == [str(row) for row in rows]
    stored = read_dataset(dataset)
    expected = dict(zip(stored["OSMID"].to_pylist(), stored["embedding"].to_pylist(), strict=True))
    np.testing.assert_array_equal(embeddings, np.array([expected[row] for row in rows], np.float32))
    for row, photo in zip(rows, photos, strict=True):
        assert_photo_of(photo, row)


def test_each_row_has_its_id_embedding_and_the_thumbnail_of_its_own_image(dataset, tmp_path):
    assert write_atlas_table(dataset, tmp_path / "package.parquet", tmp_path / "a.parquet") == len(EMBEDDED)
    assert_shown(dataset, tmp_path / "a.parquet", EMBEDDED)


def test_after_a_deletion_the_other_rows_keep_their_own_thumbnails(dataset, tmp_path, run_main):
    deleted = (1, REJECTED, 7)
    (tmp_path / "ids.txt").write_text("".join(f"{row}\n" for row in deleted))
    assert run_main(delete_ids.main, dataset, "--delete-ids", tmp_path / "ids.txt").code == 0
    write_atlas_table(dataset, tmp_path / "package.parquet", tmp_path / "a.parquet")
    assert_shown(dataset, tmp_path / "a.parquet", [row for row in EMBEDDED if row not in deleted])


def test_of_too_many_images_a_random_sample_is_shown_with_its_own_thumbnails(dataset, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(explore, "MAX_ROWS", 4)
    monkeypatch.setattr(explore.logger, "propagate", True)
    write_atlas_table(dataset, tmp_path / "package.parquet", tmp_path / "a.parquet")
    assert f"a random sample of 4 of {len(EMBEDDED)} images is shown" in caplog.text
    rows = [int(name) for name in read_table(tmp_path / "a.parquet")[0]]
    assert len(rows) == 4
    assert_shown(dataset, tmp_path / "a.parquet", sorted(rows))


def test_packaged_photographs_are_read_by_name_and_gaps_stay_gaps(embed, run_main, tmp_path):
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for row, name in enumerate(("a/1.jpg", "a/2.jpg", "broken.jpg")):
        (tmp_path / "photos" / name).write_bytes(make_photo(row) if row < 2 else b"\xff\xd8")
    assert run_package(run_main, tmp_path / "photos", tmp_path / "packaged", "--max-reject-fraction", 1).code == 0
    assert embed(tmp_path / "packaged", tmp_path / "o").code == 0
    write_atlas_table(tmp_path / "o", tmp_path / "packaged", tmp_path / "a.parquet")
    ids, _, photos = read_table(tmp_path / "a.parquet")
    assert ids == ["a/1.jpg", "a/2.jpg"]
    for row, photo in enumerate(photos):
        assert_photo_of(photo, row)
    assert explore.make_thumbnail(b"\xff\xd8") is None


@pytest.mark.parametrize("named", ["package.parquet", "pipe", "../pipe", "photos"])
def test_no_path_that_the_dataset_names_is_opened(dataset, tmp_path, monkeypatch, caplog, named):
    monkeypatch.setattr(explore.logger, "propagate", True)
    os.mkfifo(tmp_path / "pipe")  # reading it would never end
    state = json.loads((dataset / "state.json").read_text())
    (dataset / "state.json").write_text(json.dumps(state | {"input_path": str(tmp_path / "output" / ".." / named)}))
    assert write_atlas_table(dataset, None, tmp_path / "a.parquet") == len(EMBEDDED)
    assert "no thumbnails: give --images" in caplog.text
    assert read_table(tmp_path / "a.parquet")[2] is None


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret.jpg", "pipe.jpg", "link.jpg"])
def test_ids_are_not_opened_as_files(embed, tmp_path, name):
    photos = tmp_path / "photos"
    write_packaged(photos / "1.parquet", [make_photo(1)])
    (tmp_path / "secret.jpg").write_bytes(make_photo(9))
    if name.startswith(("pipe", "link")):
        (photos / name).symlink_to(tmp_path / "secret.jpg") if name[0] == "l" else os.mkfifo(photos / name)
    assert embed(photos, tmp_path / "o").code == 0
    part = next((tmp_path / "o" / "parts").glob("*.parquet"))
    table = pq.read_table(part)
    pq.write_table(table.set_column(0, "OSMID", pa.array([name])).replace_schema_metadata(table.schema.metadata), part)
    write_atlas_table(tmp_path / "o", photos, tmp_path / "a.parquet")
    ids, _, thumbnails = read_table(tmp_path / "a.parquet")
    assert ids == [name]
    assert_photo_of(thumbnails[0], 1)


def test_a_pipe_among_the_parts_or_the_packages_is_an_error_that_names_it(dataset, tmp_path):
    (tmp_path / "packages").mkdir()
    for folder in (tmp_path / "packages", dataset / "parts"):
        os.mkfifo(folder / "pipe.parquet")
        with pytest.raises(InputError, match=r"pipe\.parquet: a pipe, not a parquet file"):
            write_atlas_table(dataset, tmp_path / "packages", tmp_path / "a.parquet")


def test_what_cannot_be_explored_is_exit_code_1_with_one_line(dataset, tmp_path, run_main, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "embedding_atlas" else found(name))
    assert "embedding-atlas is not installed: pip install" in run_main(main, dataset).stderr
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    write_packaged(tmp_path / "other.parquet", [b"x"] * 3)
    for arguments, words in (
        ([tmp_path / "nowhere"], "nowhere: holds no embeddings (parts/*.parquet)"),
        ([dataset, "--images", tmp_path / "no.parquet"], "no.parquet: no such file"),
        ([dataset, "--images", tmp_path / "other.parquet"], "other.parquet: not the input that"),
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
def test_the_page_opens_with_thumbnails_and_neighbours_and_asks_only_this_machine(embed, start_script, tmp_path):
    if importlib.util.find_spec("embedding_atlas") is None:
        pytest.skip("embedding-atlas is not installed: the extra explore has it")
    photos = [make_photo(row % 12) for row in range(40)]  # a map needs some points
    dataset = tmp_path / "output"
    assert embed(write_packaged(tmp_path / "package.parquet", photos), dataset).code == 0
    with open_browser() as browser:
        port = find_free_port()
        process = start_script(
            "evaluate_embeddings/explore.py",
            dataset,
            "--images",
            tmp_path / "package.parquet",
            "--port",
            port,
            XDG_CACHE_HOME=str(tmp_path / "cache"),
        )
        metadata = wait_for(f"http://localhost:{port}/data/metadata.json", process)
        assert "neighbors" in json.dumps(metadata)
        watched = Watched(browser, 1280)
        watched.page.goto(f"http://localhost:{port}")
        watched.page.get_by_text(f"{len(photos)} points").first.wait_for(timeout=60_000)
        watched.page.locator("img[src^='data:image/jpeg'], img[src^='blob:']").first.wait_for(timeout=60_000)
        watched.page.screenshot(path=tmp_path / "explore.png")
        urls = [url for url in watched.requests if not url.startswith(("data:", "blob:"))]
        assert all(url.startswith(f"http://localhost:{port}/") for url in urls)
        process.terminate()
        assert process.wait(60) == 143
