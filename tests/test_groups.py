"""Stage 9's groups without labels: cut where the validation split says, measured on the test split."""

import json

import numpy as np
import pytest
from embedded_datasets import unit_rows
from evaluation_data import make_table, make_workplace, write_split
from scipy.cluster.hierarchy import fcluster, linkage

from evaluate_embeddings.evaluate import run
from evaluate_embeddings.scores.groups import summarize_groups
from pipeline.cli import Options
from pipeline.config import load_config
from pipeline.errors import StaleOutputError
from pipeline.retrieval.group_scores import measure_groups
from pipeline.retrieval.pair_table import PairTable, centre, describe_pairs


def draw(seed, num_buildings=40, noise=0.8):
    codes = np.repeat(np.arange(num_buildings, dtype=np.int32), 3)
    rows = unit_rows(seed, num_buildings, 16)[codes] + noise * unit_rows(seed + 1, len(codes), 16)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), codes


def test_the_groups_are_cut_where_validation_was_grouped_best_and_measured_by_the_labels():
    test, validation = draw(0), draw(10, 60)
    found = summarize_groups(test, validation)
    table, centred = PairTable.of(describe_pairs(*validation)["all"]), centre(test[0])
    assert found["threshold"] == pytest.approx(table.choose_threshold(119, table.measure_shift(centred)))
    tree = linkage(centred.astype(np.float64), "average", metric="cosine")
    expected = measure_groups(fcluster(tree, 1 - found["threshold"], "distance"), test[1])
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    cuts = np.linspace(0, 1, 201)
    best = max(measure_groups(fcluster(tree, 1 - cut, "distance"), test[1])["bcubed_f1"] for cut in cuts)
    assert found["best_bcubed_f1"] == pytest.approx(best, abs=0.02)
    assert 0.3 < found["bcubed_f1"] <= best + 1e-9
    assert found["images"] == 120


def test_without_pairs_of_both_kinds_nothing_is_measured():
    embeddings, codes = draw(0)
    for labels in (np.zeros_like(codes), np.arange(len(codes))):
        assert summarize_groups((embeddings, labels), draw(10)) is None
        assert summarize_groups(draw(10), (embeddings, labels)) is None


def test_the_section_needs_a_validation_split_of_the_same_run_which_counts_among_the_inputs(tmp_path):
    config_path = make_workplace(tmp_path, photos=False)

    def evaluate(**options):
        run(load_config(config_path), Options(**options))
        folder = tmp_path / "report"
        return json.loads((folder / "metrics.json").read_text()), (folder / "report.html").read_text()

    metrics, page = evaluate()
    assert metrics["groups"] is None
    assert "Not measured: the validation split or the test split is missing" in page
    write_split(tmp_path, "val", make_table(3, num_buildings=30, prefix="v"))
    with pytest.raises(StaleOutputError, match=r"val\.parquet"):
        evaluate()
    metrics, page = evaluate(overwrite=True)
    assert 0 < metrics["groups"]["bcubed_f1"] <= 1
    assert f"mean cosine reaches {metrics['groups']['threshold']:.3f}" in page
    assert "val.parquet" in {item["name"] for item in metrics["provenance"]["inputs"]}
