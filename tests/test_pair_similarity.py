"""Same building or not by one threshold: sampled pairs, equal error, fixed false-positive rates."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from evaluate_embeddings.scores.pair_similarity import (
    PairSimilarities,
    sample_similarities,
    share_of_same_pairs,
    summarize_pairs,
)
from pipeline.retrieval.candidates import IgnoredPairs
from pipeline.retrieval.scores import normalise_rows

NO_PAIRS = IgnoredPairs(np.array([], int), np.array([], int))


def make_pairs(seed=0, same=400, different=900):
    generator = np.random.default_rng(seed)
    one, two = generator.normal(0.5, 0.2, same), generator.normal(0.1, 0.2, different)
    return PairSimilarities(np.sort(one).astype(np.float32), np.sort(two).astype(np.float32))


def test_sampled_pairs_are_of_one_building_or_of_two_that_are_no_ignored_pair():
    codes = np.array([2, 0, 1, 0, 2, 1, 0, 3], dtype=np.int32)
    embeddings = np.eye(4, dtype=np.float32)[codes]
    pairs = sample_similarities(embeddings, codes, NO_PAIRS, seed=0)
    assert (pairs.same == 1).all()
    assert (pairs.different == 0).all()
    embeddings[codes == 2] = embeddings[codes == 1][0]
    ignored = IgnoredPairs(np.array([1]), np.array([2]))
    assert (sample_similarities(embeddings, codes, ignored, seed=0).different == 0).all()


def test_sampled_pairs_never_join_an_image_with_itself():
    codes = np.repeat(np.arange(5, dtype=np.int32), 2)
    embeddings = normalise_rows(np.random.default_rng(0).normal(size=(10, 8)))
    assert sample_similarities(embeddings, codes, NO_PAIRS, seed=0).same.max() < 0.999


def test_the_area_under_the_curve_is_scikit_learns():
    pairs = make_pairs()
    pairs.same[:50] = pairs.different[100:150]  # ties
    truth = np.repeat([1, 0], [len(pairs.same), len(pairs.different)])
    pairs = PairSimilarities(np.sort(pairs.same), pairs.different)
    expected = roc_auc_score(truth, np.concatenate([pairs.same, pairs.different]))
    assert pairs.area_under_curve() == pytest.approx(expected)


def test_at_the_equal_error_threshold_both_errors_are_counted_equal():
    pairs = make_pairs()
    threshold, rate = pairs.find_equal_error()
    false_positive = np.mean(pairs.different >= np.float32(threshold))
    false_negative = np.mean(pairs.same < np.float32(threshold))
    assert false_positive == pytest.approx(false_negative, abs=1 / 400)
    assert rate == pytest.approx((false_positive + false_negative) / 2)


@pytest.mark.parametrize("rate", [1.0, 0.5, 0.1, 0.01, 0.001, 0.0])
def test_the_lowest_threshold_of_a_rate_lets_just_so_many_pass(rate):
    pairs = make_pairs()
    threshold = np.float32(pairs.threshold_at(rate))
    passing = np.count_nonzero(pairs.different >= threshold)
    assert passing == int(rate * len(pairs.different))
    lower = np.count_nonzero(pairs.different >= np.nextafter(threshold, np.float32(-np.inf)))
    assert lower > passing or rate == 1.0


def test_equal_similarities_pass_together_or_not_at_all():
    pairs = PairSimilarities(np.ones(3, np.float32), np.array([0.1, 0.5, 0.5, 0.5], np.float32))
    assert np.count_nonzero(pairs.different >= np.float32(pairs.threshold_at(0.5))) == 0


def test_a_summary_counts_what_passes_and_weighs_the_precision_by_the_splits_share():
    pairs = make_pairs()
    codes = np.repeat(np.arange(4, dtype=np.int32), [3, 2, 1, 4])
    equal = [codes[a] == codes[b] for a in range(10) for b in range(10) if a != b]
    assert share_of_same_pairs(codes) == pytest.approx(np.mean(equal))
    found = summarize_pairs(pairs, 0.02)
    for rate, row in found["at_false_positive_rate"].items():
        recall = np.mean(pairs.same >= np.float32(row["threshold"]))
        false_positive = np.mean(pairs.different >= np.float32(row["threshold"]))
        assert false_positive <= float(rate)
        assert row["recall"] == pytest.approx(recall)
        assert row["precision_balanced"] == pytest.approx(recall / (recall + false_positive))
        expected = 0.02 * recall / (0.02 * recall + 0.98 * false_positive)
        assert row["precision_in_split"] == pytest.approx(expected)
    assert found["recommended_threshold"] == found["at_false_positive_rate"]["0.001"]["threshold"]


def test_where_nothing_passes_there_is_no_precision():
    pairs = PairSimilarities(np.zeros(5, np.float32), np.ones(5, np.float32))
    assert summarize_pairs(pairs, 0.1)["at_false_positive_rate"]["0.001"]["precision_balanced"] is None


def test_equal_similarities_have_a_summary_and_none_have_none():
    ones = np.ones(10, np.float32)
    assert summarize_pairs(PairSimilarities(ones, ones), 0.1) is not None
    assert summarize_pairs(PairSimilarities(ones, np.empty(0, np.float32)), 0.1) is None
