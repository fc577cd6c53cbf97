"""The table of pairs of validation images, and the threshold that it gives for others."""

import numpy as np
import pytest
from embedded_datasets import draw_buildings, unit_rows

from pipeline.retrieval import pair_table
from pipeline.retrieval.group_scores import measure_groups
from publish_model.derived.image_groups import group_images


def test_the_table_of_pairs_holds_the_rates_of_a_loop():
    embeddings, buildings = draw_buildings(5, 12, 3, 0.6)
    positions = np.stack([52 + buildings * 0.0008, np.zeros(36)], axis=1)  # 89 m apart
    tables = pair_table.describe_pairs(embeddings, buildings, positions)
    embeddings = pair_table.centre(embeddings)
    for kind, reach in (("all", 99), ("near", 1)):
        pairs = [
            (float(embeddings[a] @ embeddings[b]), buildings[a] == buildings[b])
            for a in range(36) for b in range(a) if abs(buildings[a] - buildings[b]) <= reach
        ]  # fmt: skip
        different, same = ([cosine for cosine, is_same in pairs if is_same == kind] for kind in (False, True))
        rows = tables[kind]
        assert len(rows) > 15
        assert rows[-1]["cosine"] == 1
        for row in rows:
            reached, right = (sum(cosine >= row["cosine"] - 1e-6 for cosine in kind) for kind in (different, same))
            assert row["right_partners"] == pytest.approx(2 * right / 36)
            assert row["partners"] == pytest.approx(2 * row["false_rate"] * len(different) / 36)
            if reached:
                assert row["false_rate"] == pytest.approx(reached / len(different))
        rates = np.array([row["false_rate"] for row in rows])
        assert (np.diff(rates) < 0).all()
        steps = np.diff(np.log(rates[-pair_table.NUM_BEYOND - 1 :]))
        assert steps == pytest.approx(steps[0])


def test_one_building_or_one_image_of_each_gives_no_table():
    embeddings = unit_rows(0, 6)
    for buildings in (np.zeros(6, int), np.arange(6)):
        assert pair_table.describe_pairs(embeddings, buildings) == {"all": []}


def test_precision_follows_the_partners_and_recall_the_cosine():
    table = pair_table.PairTable({
        "cosine": np.array([0.2, 0.4, 0.6]), "false_rate": np.array([1e-1, 1e-2, 1e-3]),
        "partners": np.array([10, 1, 0.1]), "bcubed_precision": np.array([0.1, 0.5, 1]),
        "bcubed_recall": np.array([1, 0.9, 0.5]), "wrong_pair_share": np.array([0.9, 0.5, 0.1]),
        "pairwise_recall": np.array([1, 0.8, 0.4]),
    })  # fmt: skip
    for rate, cosine in ((1e-1, 0.2), (10**-1.5, 0.3), (1e-3, 0.6), (1e-4, 0.6), (0.5, 0.2)):
        assert table.threshold_at(rate) == pytest.approx(cosine)
    assert table.partners_at(0.5, 1000, 0.1) == pytest.approx(10)
    for candidates, shift in ((100, 0.0), (1000, 0.0), (1000, 0.1)):
        scores = {}
        for cosine in np.linspace(0.2, 0.6, 500):
            decade = np.clip(5 * (cosine - shift) - 1, 0, 2)  # of rates below 0.1
            partners = np.log10(candidates * 10 ** -(1 + decade))
            precision = np.interp(-partners, [-1, 0, 1], [0.1, 0.5, 1])
            recall = np.interp(cosine, [0.2, 0.4, 0.6], [1, 0.9, 0.5])
            scores[cosine] = 2 * precision * recall / (precision + recall)
        best = [cosine for cosine, score in scores.items() if score >= max(scores.values()) - 0.01]
        assert table.choose_threshold(candidates, shift) == pytest.approx(np.median(best))
    assert table.expect_wrong_share(0.4, 100, 0) == pytest.approx(0.5)
    assert table.expect_wrong_share(0.6, 1000, 0) == pytest.approx(0.5 * 0.8 / (0.5 * 0.8 + 0.5 * 0.4))


def test_few_images_copies_and_one_direction_keep_their_cosines():
    rows = unit_rows(0, 4)
    assert pair_table.centre(rows) == pytest.approx(rows, abs=1e-6)
    copies = rows[:1] + 0.02 * unit_rows(1, 300)
    copies /= np.linalg.norm(copies, axis=1, keepdims=True)
    assert (pair_table.centre(copies) @ pair_table.centre(copies).T).min() > 0.99
    assert np.isfinite(pair_table.centre(np.repeat(rows[:1], 9, axis=0))).all()


@pytest.mark.parametrize(("num_buildings", "common"), [(25, 0.0), (25, 0.7), (400, 0.0), (400, 0.7)])
def test_other_images_are_cut_near_the_best_though_they_are_more_and_share_a_direction(num_buildings, common):
    table = pair_table.PairTable.of(pair_table.describe_pairs(*draw_buildings(5, 50, 4, 1.0, 32))["all"])
    rows, buildings = draw_buildings(9, num_buildings, 4, 1.0, 32)
    rows = rows + common * unit_rows(3, 1, 32)
    rows = pair_table.centre((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))
    shift, candidates = table.measure_shift(rows), len(rows) - 1
    threshold = table.choose_threshold(candidates, shift)
    scores = [
        measure_groups(group_images(rows, cosine)[0], buildings) for cosine in (threshold, *np.arange(0.1, 0.9, 0.05))
    ]
    assert scores[0]["bcubed_f1"] > max(score["bcubed_f1"] for score in scores) - 0.02
    found = max(0.1, scores[0]["wrong_pair_share"])  # 100 images have too few wrong pairs to tell
    assert 0.5 < max(0.1, table.expect_wrong_share(threshold, candidates, shift)) / found < 2.5


def test_a_shift_is_bounded_and_of_few_images_it_is_none():
    table = pair_table.PairTable.of(pair_table.describe_pairs(*draw_buildings(5, 50, 4, 0.6, 32))["all"])
    near = 1.5 * unit_rows(0, 1, 32) + unit_rows(1, 60, 32)
    near = (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float32)
    assert table.measure_shift(near) == pair_table.MAX_SHIFT
    assert table.measure_shift(near[:20]) == 0
    assert table.measure_shift(np.repeat(near[:1], 100, axis=0)) == 0


def test_thousands_of_copies_leave_the_threshold_of_the_others():
    table = pair_table.PairTable.of(pair_table.describe_pairs(*draw_buildings(5, 50, 4, 0.8, 32))["all"])
    others, _ = draw_buildings(9, 100, 4, 0.8, 32)
    copied = pair_table.centre(np.concatenate([np.repeat(unit_rows(0, 1, 32), 3_000, axis=0), others]))
    assert table.measure_shift(copied) == pytest.approx(table.measure_shift(pair_table.centre(others)), abs=0.05)
