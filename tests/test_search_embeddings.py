"""Searching a dataset for a photograph."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded_datasets import unit_rows, write_dataset
from published_models import list_parts, make_photographs, write_packaged

from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.parts import read_part
from publish_model import delete_ids, search_embeddings
from publish_model.new_data.id_lists import describe_id


@pytest.fixture
def search(run_main, model_dir):
    def run(output, *arguments, model=model_dir):
        return run_main(search_embeddings.main, output, "--device", "cpu", "--model-id", model, *arguments)

    return run


def test_blocks_cover_every_row_once_and_ids_are_found_by_row(tmp_path):
    embeddings = unit_rows(0, 25)
    dataset = EmbeddingsDataset(
        write_dataset(tmp_path / "out", pa.array([f"way/{row}" for row in range(25)]), embeddings)
    )
    assert np.array_equal(np.concatenate(list(dataset.read_blocks())), embeddings)
    assert {row: str(one) for row, one in dataset.read_ids_at([24, 0, 10]).items()} == {
        24: "way/24",
        0: "way/0",
        10: "way/10",
    }


@pytest.fixture
def photographs(embed, tmp_path):
    """A dataset of 20 photographs, some without bytes or marked invalid, and one of them as a file."""
    images = make_photographs(20)
    (tmp_path / "query.jpg").write_bytes(images[12])
    images[3] = None
    source = write_packaged(
        tmp_path / "in.parquet", images, row_group_size=10, is_valid=[row != 11 for row in range(20)]
    )
    assert embed(source, tmp_path / "out").code == 0
    return tmp_path / "out"


def test_a_photograph_of_the_dataset_is_found_first(search, photographs, tmp_path):
    outcome = search(photographs, "--query", tmp_path / "query.jpg", "--top", 3)
    lines = [line.split("\t") for line in outcome.stdout.splitlines()]
    assert outcome.code == 0
    assert [line[0] for line in lines] == ["1", "2", "3"]
    assert (float(lines[0][1]), lines[0][2]) == (pytest.approx(1, abs=1e-5), "way/6")
    assert float(lines[0][1]) >= float(lines[1][1]) >= float(lines[2][1])


def test_parts_that_another_model_makes_meanwhile_are_not_compared(search, photographs, tmp_path, monkeypatch):
    plain = search_embeddings.embed_photographs

    def embed_late(*arguments):
        part = read_part(list_parts(photographs)[2])
        replace(part, provenance=part.provenance | {"embedding_version": "0" * 16}).rewrite(part.read_content())
        return plain(*arguments)

    monkeypatch.setattr(search_embeddings, "embed_photographs", embed_late)
    outcome = search(photographs, "--query", tmp_path / "query.jpg")
    assert (outcome.code, outcome.stdout) == (1, "")
    assert f"{list_parts(photographs)[2]}: replaced while the dataset was read: run this again" in outcome.stderr


def test_the_page_shows_the_images_of_the_input(search, photographs, tmp_path, monkeypatch):
    shown = []
    plain = search_embeddings.make_thumbnail
    monkeypatch.setattr(search_embeddings, "make_thumbnail", lambda image: shown.append(image) or plain(image))
    query, page = tmp_path / "query.jpg", tmp_path / "page.html"
    page.symlink_to(tmp_path / "elsewhere.html")
    arguments = ["--query", query, "--html", page, "--input", tmp_path / "in.parquet", "--top", 18]
    outcome = search(photographs, *arguments)
    assert outcome.code == 0
    images = pq.read_table(tmp_path / "in.parquet").to_pylist()
    ids = [line.split("\t")[2] for line in outcome.stdout.splitlines()]
    assert (shown[-1], shown[0]) == (query.read_bytes(), images[12]["image_bytes"])
    assert sorted(shown[:-1]) == sorted(row["image_bytes"] for n, row in enumerate(images) if n not in (3, 11))
    for identifier, image in zip(ids, shown[:-1], strict=True):
        assert image in [row["image_bytes"] for row in images if row["OSMID"] == identifier]
    assert page.read_text().count("data:image/jpeg;base64,") == 19
    assert page.is_symlink()
    assert not (tmp_path / "elsewhere.html").is_symlink()


def test_after_a_deletion_the_other_rows_keep_their_own_images(run_main, photographs, tmp_path):
    (tmp_path / "ids.txt").write_text("way/1\nway/6\n")  # way/1 has the row without bytes
    assert run_main(delete_ids.main, photographs, "--delete-ids", tmp_path / "ids.txt").code == 0
    dataset = EmbeddingsDataset(photographs)
    rows = range(dataset.num_rows)
    found = dict(dataset.read_images(dataset.open_input(tmp_path / "in.parquet"), rows))
    images = make_photographs(20)
    assert list(found.values()) == [images[row] for row in range(20) if row not in (2, 3, 11, 12, 13)]
    assert [str(one) for one in dataset.read_ids_at(rows).values()] == [
        f"way/{row // 2}" for row in range(20) if row not in (2, 3, 11, 12, 13)
    ]


def test_ids_are_escaped_in_the_page(tmp_path):
    query = tmp_path / "q.jpg"
    query.write_bytes(make_photographs(1)[0])
    search_embeddings.write_page(tmp_path / "p.html", query, [(0.5, "<script>alert(1)</script>")], [None])
    page = (tmp_path / "p.html").read_text()
    assert "<script>" not in page
    assert "1. <code>&lt;script&gt;alert(1)&lt;/script&gt;</code><br>cosine 0.5000" in page
    assert "http" not in page


UUID_ID = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)], pa.binary(16)))[0]


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (pa.scalar("a\tb\nc\u2028d"), "a\\tb\\nc\\u2028d"),
        (pa.scalar("Straße 5"), "Straße 5"),
        (pa.scalar(b"way/1"), "way/1"),
        (pa.scalar(b"\xff\x00"), "0xff00"),
        (pa.scalar(7), "7"),
        (pa.scalar(2**50, pa.timestamp("ms")), "1125899906842624"),  # beyond the year 9999
        (UUID_ID, "00000000-0000-0000-0000-000000000000"),
    ],
)  # fmt: skip
def test_an_id_is_one_field_of_one_line_whatever_it_holds(one, text):
    assert describe_id(one) == text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--query", "none.jpg"], "none.jpg: not a file"),
        (["--query", "in.parquet"], "unreadable_image"),
        (["--query", "query.jpg", "--model-id", "nobody/nothing"], "is not on this machine"),
    ],
)
def test_what_cannot_be_searched_is_one_line(search, photographs, tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    outcome = search(photographs, *arguments)
    assert outcome.code == 1
    assert outcome.stderr.splitlines()[-1].startswith("error: ")
    assert text in outcome.stderr.splitlines()[-1]


def test_the_model_that_a_dataset_names_is_asked_for_and_not_loaded(run_main, photographs, model_dir, tmp_path):
    outcome = run_main(search_embeddings.main, photographs, "--query", tmp_path / "query.jpg")
    assert outcome.code == 2
    assert f"error: --model-id: give the model that made the embeddings ({model_dir.name!r} by" in outcome.stderr


def test_another_model_or_input_is_refused(search, photographs, packaged, toy_backbone, tmp_path):
    query = ["--query", tmp_path / "query.jpg"]
    assert "not the model that" in search(photographs, *query, model=toy_backbone).stderr.splitlines()[-1]
    assert "not the input that" in search(photographs, *query, "--input", packaged).stderr.splitlines()[-1]
