"""Stage 9's page: self-contained, honest about what it lacks, right about what it shows."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from evaluation_data import (
    IMAGES_PER_BUILDING,
    NUM_BUILDINGS,
    building_color,
    make_table,
    make_workplace,
    write_split,
)
from PIL import Image

from evaluate_embeddings.evaluate import run
from evaluate_embeddings.page.gallery import describe_example, make_gallery, pick_failures
from evaluate_embeddings.page.photos import read_thumbnails
from evaluate_embeddings.page.report import format_distance
from evaluate_embeddings.scores.metrics import Evaluation
from evaluate_embeddings.scores.standalone import EvaluateOptions
from pipeline.config import load_config
from pipeline.retrieval.geography import distances_m
from pipeline.retrieval.scores import QueryScores, normalise_rows, score_queries

VOID_TAGS = {"meta", "br", "img", "link", "input", "hr"}
HOSTILE = "<script>alert(1)</script>\"'&<b>"


class PageReader(HTMLParser):
    """Collects what a browser would act on, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open_tags, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open_tags == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open_tags, f"</{tag}> closes nothing"
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def find(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def make_report(config_path, *overrides, ignore_pairs=None):
    options = EvaluateOptions(overwrite=True, ignore_pairs=ignore_pairs)
    run(load_config(config_path, list(overrides)), options)
    return (config_path.parent / "report" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """A workplace with photographs, and its page."""
    config_path = make_workplace(tmp_path_factory.mktemp("pictured"))
    return config_path, make_report(config_path)


@pytest.fixture
def workplace(tmp_path):
    return make_workplace(tmp_path, photos=False)


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_asks_nothing_of_the_network_and_runs_no_script(pictured):
    _, page = pictured
    reader = PageReader(page)
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio"}
    for tag, attributes in reader.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                assert value.startswith(("data:image/jpeg;base64,", "#")), (tag, name, value[:40])
    assert "http" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page


def test_the_page_has_its_sections_and_every_picture_has_an_alternative_text(pictured):
    _, page = pictured
    reader = PageReader(page)
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Scores", "Groups without labels", "Harder and fixed conditions", "By dataset",
        "Worst failures", "Provenance and settings",
    ]  # fmt: skip
    assert "viewport" in str(reader.find("meta"))
    assert all(len(image["alt"]) > 10 for image in reader.find("img"))
    links = re.findall(r'<a href="#([^"]+)">', page)
    assert links == [section["id"] for section in reader.find("section")]
    assert len(page.encode()) < 15_000_000
    assert "imagery © Google" in page
    assert "feedbeef" in page  # the split's hash, among the provenance


def test_whatever_the_data_say_is_text(workplace):
    table = make_table(2, prefix=HOSTILE)
    write_split(workplace.parent, "test", table)
    pairs_path = workplace.parent / "<b>pairs.csv"
    pairs_path.write_text("building_id_a,building_id_b\n")
    page = make_report(workplace, ignore_pairs=pairs_path)
    reader = PageReader(page)
    assert not reader.find("script")
    assert "<script>alert" not in page
    assert HOSTILE in "".join(reader.text)
    assert "<b>pairs.csv" in "".join(reader.text)


def test_the_page_says_what_the_verdict_is_in_words_and_numbers(pictured):
    config_path, page = pictured
    text = "".join(PageReader(page).text)
    assert re.search(r"Its gain in mAP, with the 95% interval of the difference: [+-]0\.\d{3} over raw \(", text)
    metrics = json.loads((config_path.parent / "report" / "metrics.json").read_text())
    assert f"<h1>{metrics['headline']}</h1>" in page


# ------------------------------------------------------------------------------------------------ photographs


def mean_color(data_uri):
    image = Image.open(io.BytesIO(base64.b64decode(data_uri.partition(",")[2])))
    return image.size, np.asarray(image).reshape(-1, 3).mean(axis=0)


def test_thumbnails_are_the_pictures_at_their_offsets(pictured):
    config_path, _ = pictured
    rows = [0, 5, 40, 71]
    found, note = read_thumbnails(config_path.parent / "merged" / "test.parquet", config_path.parent / "raw", rows)
    assert (sorted(found), note) == (rows, "")
    for row in rows:
        size, color = mean_color(found[row])
        assert size == (224, 168)
        np.testing.assert_allclose(color, building_color(row // IMAGES_PER_BUILDING), atol=4)


def test_the_gallery_shows_each_query_with_its_neighbours(pictured):
    _, page = pictured
    examples = re.findall(r'<article class="example".*?</article>', page, re.DOTALL)
    examples = [example for example in examples if "first right answer" in example]
    assert 1 <= len(examples) <= 12
    for example in examples:
        assert 6 <= example.count("<img ") <= 7
        assert "✗ wrong" in example or "✓ right" in example
        rank = int(re.search(r"first right answer at rank ([\d,]+)", example)[1].replace(",", ""))
        assert ("true match, rank" in example) == (rank > 5)
    assert "pictures are left out" not in page.lower()


def test_a_page_that_is_kept_without_its_tars_is_said_to_show_photographs(pictured, caplog):
    for raw_dir, is_said in (("raw", False), ("none", True)):
        run(load_config(pictured[0], [f"paths.raw_dir={raw_dir}"]), EvaluateOptions())
        assert ("report.html: shows photographs, though raw_dir is no folder" in caplog.text) == is_said


@pytest.mark.parametrize("case", ["not set", "no such folder", "undefined variable", "no offsets"])
def test_without_photographs_the_page_says_so(workplace, case):
    settings = {"no such folder": ["paths.raw_dir=nowhere"], "undefined variable": ["paths.raw_dir=$NO_SUCH_NAME/x"]}
    if case == "no offsets":
        (workplace.parent / "raw").mkdir()
        page = make_report(workplace, "paths.raw_dir=raw")
        assert "test.parquet does not say where the images lie" in page
    else:
        page = make_report(workplace, *settings.get(case, []))
        assert "The pictures are left out: [paths].raw_dir is not set to a folder that is here." in page
    assert not PageReader(page).find("img")
    assert "no picture" in page


def test_pictures_that_cannot_be_read_leave_gaps_that_are_counted(tmp_path):
    config_path = make_workplace(tmp_path)
    places = [(0, 100)] * (NUM_BUILDINGS * IMAGES_PER_BUILDING)
    places[0], places[1], places[2] = (-5, 100), (10**9, 100), (0, 10**12)
    write_split(tmp_path, "test", make_table(2, places=places))
    (tmp_path / "raw" / "0002.tar").unlink()
    found, note = read_thumbnails(tmp_path / "merged" / "test.parquet", tmp_path / "raw", range(8))
    assert (found, note) == ({}, "8 pictures are left out: their tars are gone or have changed.")
    assert "pictures are left out: their tars are gone or have changed" in make_report(config_path)


# ------------------------------------------------------------------------------------------------ the gallery's choice


def make_evaluation(seed=0, ignored=()):
    generator = np.random.default_rng(seed)
    codes = np.repeat(np.arange(20, dtype=np.int32), 3)
    embeddings = {
        "raw": normalise_rows(generator.normal(size=(60, 6))),
        "pca_whitened": normalise_rows(generator.normal(size=(60, 6))),
        "projector": normalise_rows(np.eye(20)[codes] + 0.45 * generator.normal(size=(60, 20))),
    }
    pairs = np.array(ignored, np.int64).reshape(-1, 2)
    scores = {kind: score_queries(rows, codes, ignored=pairs) for kind, rows in embeddings.items()}

    class Columns:
        building_codes = codes
        target_lat, target_lon = 52 + codes * 1e-3, codes * 0.0

    return Evaluation(Columns(), embeddings, pairs, scores)


def test_failures_come_worst_first_and_one_a_building():
    codes, ranks = np.array([0, 0, 1, 1, 2, 2], dtype=np.int32), np.array([9, 12, 30, 2, 1, 1])
    assert pick_failures(ranks, codes, limit=12) == [2, 1]
    assert pick_failures(ranks, codes, limit=1) == [2]


def test_a_query_that_is_answered_right_is_no_failure():
    evaluation = make_evaluation()
    ranks = np.ones(60, np.int64)
    ranks[4] = 2
    evaluation.scores["projector"] = QueryScores(np.arange(60), ranks, np.ones(60))
    assert [example.query for example in make_gallery(evaluation, Path("test.parquet"), None)["failures"]] == [4]


def test_answers_are_the_nearest_candidates_by_a_plain_sort():
    evaluation = make_evaluation(ignored=[[0, 7], [1, 3]])
    embeddings, scores = evaluation.embeddings["projector"], evaluation.scores["projector"]
    for place in range(60):
        example = describe_example(evaluation, place)
        query = example.query
        left_out = {0: 7, 7: 0, 1: 3, 3: 1}.get(int(evaluation.codes[query]))
        candidates = [row for row in range(60) if row != query and evaluation.codes[row] != left_out]
        candidates.sort(key=lambda row: -float(embeddings[row] @ embeddings[query]))
        assert [answer.row for answer in example.neighbors] == candidates[:5]
        assert [answer.rank for answer in example.neighbors] == [1, 2, 3, 4, 5]
        rank = next(n for n, row in enumerate(candidates, 1) if evaluation.codes[row] == evaluation.codes[query])
        assert (example.match.rank, example.match.row) == (rank, candidates[rank - 1])
        assert example.raw_rank == evaluation.scores["raw"].first_rank[place]
        for answer in (*example.neighbors, example.match):
            apart = abs(int(evaluation.codes[answer.row]) - int(evaluation.codes[query]))
            assert answer.distance_m == pytest.approx(apart * 111.195, rel=1e-4, abs=1e-6)
            assert answer.is_right == (apart == 0)
    assert len(scores.query) == 60


def test_distances_are_metres_on_the_sphere():
    assert distances_m(0, 0, 1, 0) == pytest.approx(111_195, abs=1)
    assert distances_m(60, 0, 60, 1) == pytest.approx(111_195 / 2, rel=1e-3)
    assert distances_m(0, 179.5, 0, -179.5) == pytest.approx(111_195, abs=1)
    assert [format_distance(metres) for metres in (0.2, 12.6, 4321)] == ["0 m", "13 m", "4.3 km"]


def test_a_split_in_which_every_query_succeeds_has_no_failures_to_show(workplace):
    building = np.repeat(np.arange(16), 2)
    table = make_table(2, num_buildings=16, images=2)
    values = pa.array((np.eye(16, dtype=np.float32)[building] * 9 + 0.1).reshape(-1))
    index = table.schema.get_field_index("embedding")
    write_split(
        workplace.parent, "test", table.set_column(index, "embedding", pa.FixedSizeListArray.from_arrays(values, 16))
    )
    page = make_report(workplace)
    assert page.count("There are none.") == 1


def test_a_split_of_one_building_makes_a_page_all_the_same(workplace):
    write_split(workplace.parent, "test", make_table(2, num_buildings=1, images=4))
    assert "Not measured: the validation split or the test split is missing" in make_report(workplace)
