"""Average linkage against scipy's, in bounded memory, and the scores of groups against loops."""

import numpy as np
import pytest
from embedded_datasets import unit_rows
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.metrics import adjusted_rand_score, pair_confusion_matrix

from pipeline.retrieval.group_scores import measure_groups
from publish_model.derived import image_groups
from publish_model.derived.image_groups import count_pairs, group_images


def draw(seed, num_rows=200):
    generator = np.random.default_rng(seed)
    rows = unit_rows(seed, 30, 16)[generator.integers(0, 30, num_rows)] + 0.5 * unit_rows(seed + 100, num_rows, 16)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("seed", range(8))
def test_the_groups_are_those_of_average_linkage_over_all_pairs(seed):
    rows = draw(seed)
    rows[:20] = rows[0]
    threshold = 0.2 + 0.1 * seed
    tree = linkage(rows.astype(np.float64), "average", metric="cosine")
    expected = fcluster(tree, 1 - threshold, "distance")
    assert adjusted_rand_score(expected, group_images(rows, threshold)[0]) == 1


def test_no_two_groups_that_reach_the_threshold_are_left_where_neighbours_are_cut(monkeypatch):
    monkeypatch.setattr(image_groups, "NUM_NEAREST", 3)
    rows = draw(1)
    groups = group_images(rows, 0.5)[0]
    means = np.stack([rows[groups == number].mean(axis=0) for number in range(groups.max() + 1)])
    similarity = means @ means.T
    np.fill_diagonal(similarity, -1)
    assert similarity.max() < 0.5


def test_a_wrong_pair_does_not_merge_two_groups():
    one, other = np.eye(8, dtype=np.float32)[:2]
    bridge = (one + other) / np.sqrt(2)
    rows = np.stack([one] * 5 + [other] * 5 + [bridge] * 2).astype(np.float32)
    groups = group_images(rows, 0.7)[0]
    assert groups[0] != groups[5]


def test_copies_and_near_copies_at_one_place_are_one_group():
    rows = np.repeat(unit_rows(0, 1), 1500, axis=0)
    assert set(group_images(rows, 0.9)[0].tolist()) == {0}
    noisy = rows + 1e-3 * unit_rows(1, 1500)
    noisy /= np.linalg.norm(noisy, axis=1, keepdims=True)
    positions = np.array([52.0, 0.1]) + 1e-5 * unit_rows(2, 1500, 2)
    for given in (None, positions):
        assert set(group_images(noisy.astype(np.float32), 0.9, given)[0].tolist()) == {0}
    assert set(group_images(rows, 0.9, positions)[0].tolist()) == {0}


def test_only_images_near_each_other_are_compared_also_across_the_antimeridian():
    rows = np.repeat(unit_rows(0, 1), 6, axis=0)
    positions = np.array([[0, 179.9995], [0, -179.9995], [0, 179.99], [10, 0], [np.nan, np.nan], [np.nan, np.nan]])
    groups = group_images(rows, 0.9, positions)[0]
    assert groups.tolist() == [0, 0, 1, 2, 3, 4]
    assert count_pairs(6, positions, 150) == 1
    assert count_pairs(6, None, 150) == 15
    assert count_pairs(6, positions * np.nan, 150) == 0


def test_places_give_the_groups_of_a_loop_over_all_near_pairs():
    generator = np.random.default_rng(4)
    rows = draw(4, 300)
    positions = np.stack([52 + generator.uniform(0, 0.01, 300), generator.uniform(0, 0.01, 300)], axis=1)
    groups = group_images(rows, 0.6, positions, 150)[0]
    far = group_images(rows, 0.6, positions, 1e6)[0]
    assert adjusted_rand_score(far, group_images(rows, 0.6)[0]) == 1
    assert len(set(groups.tolist())) > len(set(far.tolist()))


def test_an_approximate_search_says_its_recall(monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(image_groups, "EXACT_ROWS", 1000)
    rows = draw(2, 3000)
    found, recall = group_images(rows, 0.8)
    assert 0.5 < recall <= 1
    monkeypatch.undo()
    assert adjusted_rand_score(group_images(rows, 0.8)[0], found) > 0.8


def test_no_rows_are_no_groups():
    for positions in (None, np.empty((0, 2))):
        assert len(group_images(np.empty((0, 8), np.float32), 0.5, positions)[0]) == 0


@pytest.mark.parametrize("seed", range(5))
def test_the_scores_are_those_of_loops(seed):
    generator = np.random.default_rng(seed)
    groups, labels = generator.integers(0, 12, 60), generator.integers(0, 9, 60)
    scores = measure_groups(groups, labels)
    same = [(groups == groups[row]) & (labels == labels[row]) for row in range(60)]
    precision = np.mean([own.sum() / (groups == groups[row]).sum() for row, own in enumerate(same)])
    recall = np.mean([own.sum() / (labels == labels[row]).sum() for row, own in enumerate(same)])
    assert scores["bcubed_precision"] == pytest.approx(precision)
    assert scores["bcubed_recall"] == pytest.approx(recall)
    assert scores["bcubed_f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    (_, false_positive), (false_negative, true_positive) = pair_confusion_matrix(labels, groups)
    assert scores["pairwise_precision"] == pytest.approx(true_positive / (true_positive + false_positive))
    assert scores["pairwise_recall"] == pytest.approx(true_positive / (true_positive + false_negative))
    assert scores["wrong_pair_share"] == pytest.approx(false_positive / (true_positive + false_positive))
    assert scores["adjusted_rand"] == pytest.approx(adjusted_rand_score(labels, groups))


def test_images_alone_have_no_pairs():
    scores = measure_groups(np.arange(4), np.arange(4))
    assert (scores["bcubed_f1"], scores["pairwise_f1"], scores["wrong_pair_share"]) == (1.0, 0.0, 0.0)
