"""Scores by number of views, viewpoint change and distance."""

import itertools
import json

import numpy as np
import pytest
from evaluation_data import make_table, make_workplace, write_split

from evaluate_embeddings.evaluate import run
from evaluate_embeddings.scores.breakdowns import heading_changes, load_camera, name_group
from pipeline.cli import Options
from pipeline.config import load_config
from pipeline.retrieval.features import load_features
from pipeline.retrieval.scores import normalise_rows, score_queries


def test_the_smallest_change_of_heading_goes_round_the_circle_and_leaves_out_the_image_itself():
    codes = np.array([0, 0, 0, 1, 1, 2, 3, 3])
    headings = np.array([-175.0, 170.0, 90.0, 10.0, np.nan, 5.0, 0.0, 180.0])
    changes = heading_changes(codes, headings)
    np.testing.assert_allclose(changes[:3], [15, 15, 80])
    assert np.isnan(changes[3:6]).all()
    np.testing.assert_allclose(changes[6:], [180, 180])


@pytest.mark.parametrize("share_unknown", [0.0, 0.3, 1.0])
def test_the_smallest_change_of_heading_is_that_of_a_loop_over_all_pairs(share_unknown):
    generator = np.random.default_rng(0)
    codes, headings = generator.integers(0, 40, 200), generator.uniform(-720, 720, 200).round(1)
    headings[generator.random(200) < share_unknown] = np.nan
    expected = np.full(200, np.nan)
    for row, other in itertools.permutations(range(200), 2):
        if codes[row] == codes[other]:
            angle = abs((headings[row] - headings[other] + 180) % 360 - 180)
            expected[row] = np.fmin(expected[row], angle)
    np.testing.assert_array_equal(heading_changes(codes, headings), expected)


def test_groups_are_named_by_what_they_hold():
    assert [name_group(2, 2), name_group(4, 5), name_group(6, np.inf)] == ["2", "4-5", "6+"]
    assert [name_group(0, 15), name_group(90, np.inf)] == ["0-15", "90+"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    config_path = make_workplace(tmp_path_factory.mktemp("camera"), photos=False, camera=True)
    run(load_config(config_path), Options())
    return config_path.parent


def test_every_query_is_in_one_group_of_each_kind_and_scored_among_the_whole_gallery(workplace):
    metrics = json.loads((workplace / "report" / "metrics.json").read_text())
    for key in ("by_views", "by_viewpoint_change", "by_distance"):
        assert sum(group["queries"] for group in metrics[key].values()) == metrics["queries"]
    assert list(metrics["by_views"]) == ["3"]
    assert list(metrics["by_viewpoint_change"]) == ["15-30"]
    features = load_features(workplace / "merged" / "test.parquet")
    scores = score_queries(normalise_rows(features.embeddings), features.building_codes)
    distance = load_camera(workplace / "merged" / "test.parquet")[1]
    for name, low, high in (("0-10", 0, 10), ("10-20", 10, 20), ("20-30", 20, 30), ("30-50", 30, 50)):
        chosen = (distance >= low) & (distance < high)
        found = metrics["by_distance"][name]
        assert found["queries"] == chosen.sum() > 0
        assert found["raw"]["map"] == pytest.approx(scores.average_precision[chosen].mean())
    page = (workplace / "report" / "report.html").read_text()
    assert ">change of heading, degrees</th>" in page


def test_a_split_without_camera_columns_says_so_and_one_with_nulls_leaves_them_out(tmp_path):
    config_path = make_workplace(tmp_path, photos=False)
    run(load_config(config_path), Options())
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["by_viewpoint_change"] is metrics["by_distance"] is None
    assert "carries no camera columns" in (tmp_path / "report" / "report.html").read_text()
    table = make_table(2, camera=True)
    index = table.schema.get_field_index("distance_m")
    gaps = [None if row < 10 else 12.0 for row in range(len(table))]
    write_split(tmp_path, "test", table.set_column(index, "distance_m", [gaps]))
    run(load_config(config_path), Options(overwrite=True))
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert {name: group["queries"] for name, group in metrics["by_distance"].items()} == {"10-20": len(table) - 10}
