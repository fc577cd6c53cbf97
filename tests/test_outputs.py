"""Output options: what another program wrote is never replaced, and a dataset's folders stay its own."""

import os
import threading

import numpy as np
import pyarrow as pa
import pytest
from embedded_datasets import unit_rows, write_dataset

from pipeline.errors import ConfigError
from pipeline.files.outputs import check_outside_datasets, check_replaceable
from pipeline.files.tables import write_parquet
from pipeline.files.text_tables import reading_text
from publish_model import aggregate_embeddings, embed_images, search_embeddings
from publish_model.new_data.embed_options import check_places
from sample_data.render_streets import render_streets


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "ds", pa.array([f"way/{row}" for row in range(20)]), unit_rows(0, 20))


def read_all(folder):
    logs = {path.parent for path in folder.rglob("*.log")}
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.parent not in logs}


def test_a_file_with_the_tools_mark_is_replaced_and_no_other(tmp_path):
    path = tmp_path / "page.html"
    check_replaceable(path, search_embeddings.PAGE_MARK)
    path.write_text(f"<head>{search_embeddings.PAGE_MARK}")
    check_replaceable(path, search_embeddings.PAGE_MARK)
    np.save(tmp_path / "a.npy", np.zeros((3, 256), np.float32))
    check_replaceable(tmp_path / "a.npy", embed_images.NPY_MARK)
    np.save(tmp_path / "labels.npy", np.arange(3))
    write_parquet(tmp_path / "a.parquet", pa.table({"a": [1]}), {"stage": "one"})
    check_replaceable(tmp_path / "a.parquet", "one")
    for name, mark in (("page.html", "one"), ("a.npy", "one"), ("a.parquet", "two"), ("", "one"),
                       ("labels.npy", embed_images.NPY_MARK)):  # fmt: skip
        with pytest.raises(ConfigError, match="not written by this tool.*another path"):
            check_replaceable(tmp_path / name, mark)
    with pytest.raises(ConfigError, match=r"page\.html: an input"):
        check_replaceable(path, search_embeddings.PAGE_MARK, [None, path])


@pytest.mark.parametrize("name", ["parts/x", "state.json/x", "_exports/x", "parts/a/b", "means.parquet"])
def test_a_dataset_holds_no_output_that_the_user_chose(dataset, tmp_path, name):
    for check in (check_outside_datasets, lambda path: check_places(tmp_path / "in", path)):
        with pytest.raises(ConfigError, match="is an embeddings dataset: give another path"):
            check(dataset / name)
    (dataset / "state.json").unlink()
    with pytest.raises(ConfigError):
        check_outside_datasets(dataset / name)
    check_outside_datasets(dataset)


def test_a_tool_replaces_no_other_file_in_its_own_folder(run_main, dataset):
    mine = dataset / "_aggregated" / "OSMID.parquet"
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    outcome = run_main(aggregate_embeddings.main, dataset, "--overwrite")
    assert (outcome.code, "not written by this tool, so it stays" in outcome.stderr) == (2, True)
    assert mine.read_text() == "{}"
    mine.unlink()
    for _ in range(2):
        assert run_main(aggregate_embeddings.main, dataset, "--overwrite").code == 0


def test_a_page_and_vectors_replace_no_photograph(run_main, dataset, tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"\xff\xd8 a photograph")
    before = read_all(tmp_path)
    part = next((dataset / "parts").iterdir())
    for target in (tmp_path / "a.jpg", tmp_path / "b.jpg", dataset / "state.json", part, dataset / "new"):
        query = ("--query", tmp_path / "b.jpg", "--model-id", "none")
        assert run_main(search_embeddings.main, dataset, *query, "--html", target).code == 2
        assert run_main(embed_images.main, "--model-id", "none", "--npy", target, tmp_path / "b.jpg").code == 2
    assert read_all(tmp_path) == before


def test_tars_that_were_not_rendered_stay(tmp_path):
    (tmp_path / "0001.tar").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"0001\.tar: not rendered here"):
        render_streets(tmp_path, 1, seed=0, buildings=10, size=48)
    assert [path.name for path in tmp_path.iterdir()] == ["0001.tar"]


def test_a_list_from_a_pipe_is_read_whole(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"\xef\xbb\xbfway/1\nway/2\n",))
    writer.start()
    with reading_text(pipe) as file:
        assert file.read() == "way/1\nway/2\n"
    writer.join()
