"""Retrieval scores against slow, obvious loops."""

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.retrieval import device_scores
from pipeline.retrieval.scores import (
    SCORE_KEYS,
    QueryScores,
    normalise_rows,
    percentile_intervals,
    resample_means,
    score_queries,
    score_queries_twice,
    summarize_scores,
)

TIE = 1e-6


def make_views(num_buildings=30, width=8, noise=0.9, seed=0):
    """Return unit rows, building codes and panorama ids of buildings with 1 to 6 images, in mixed order."""
    generator = np.random.default_rng(seed)
    codes = np.repeat(np.arange(num_buildings), generator.integers(1, 7, num_buildings))
    generator.shuffle(codes)
    centres = generator.normal(size=(num_buildings, width))
    embeddings = normalise_rows(centres[codes] + noise * generator.normal(size=(len(codes), width)))
    return embeddings, codes, generator.integers(0, len(codes) // 3, len(codes))


def score_by_loops(embeddings, codes, ignored=(), panoramas=None):
    """Rank every query's candidates one by one; of two at the same similarity the wrong one comes first."""
    queries, first_ranks, precisions = [], [], []
    pairs = {frozenset(pair) for pair in ignored if pair[0] != pair[1]}
    for query in range(len(codes)):
        candidates = []
        for other in range(len(codes)):
            if other == query or frozenset((codes[query], codes[other])) in pairs:
                continue
            if panoramas is not None and panoramas[other] == panoramas[query]:
                continue
            similarity = float(embeddings[query].astype(np.float64) @ embeddings[other].astype(np.float64))
            right = bool(codes[other] == codes[query])
            candidates.append((similarity - (TIE if right else 0.0), right))
        candidates.sort(key=lambda candidate: (-candidate[0], candidate[1]))
        ranks = [rank for rank, (_, right) in enumerate(candidates, start=1) if right]
        if ranks:
            queries.append(query)
            first_ranks.append(ranks[0])
            precisions.append(sum(found / rank for found, rank in enumerate(ranks, start=1)) / len(ranks))
    return queries, first_ranks, precisions


def assert_equals_loops(scores, expected):
    queries, first_ranks, precisions = expected
    assert scores.query.tolist() == queries
    assert scores.first_rank.tolist() == first_ranks
    np.testing.assert_allclose(scores.average_precision, precisions, rtol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_a_loop_over_all_candidates(seed):
    embeddings, codes, _ = make_views(seed=seed)
    assert_equals_loops(score_queries(embeddings, codes), score_by_loops(embeddings, codes))


def test_scores_equal_a_loop_with_ignored_pairs():
    embeddings, codes, _ = make_views(seed=5)
    pairs = [(0, 1), (1, 0), (2, 3), (2, 4), (5, 5), (6, 999)]
    ignored = np.array(pairs)
    scores = score_queries(embeddings, codes, ignored=ignored)
    assert_equals_loops(scores, score_by_loops(embeddings, codes, ignored=pairs))
    assert scores.average_precision.mean() > score_queries(embeddings, codes).average_precision.mean()


def test_one_search_gives_the_scores_with_and_without_the_same_panorama():
    for seed in range(5):
        embeddings, codes, panoramas = make_views(seed=seed)
        ignored = np.array([[0, 5], [3, 7]])
        with_all, apart = score_queries_twice(embeddings, codes, panoramas, ignored=ignored)
        expected = score_queries(embeddings, codes, ignored=ignored)
        assert with_all.query.tolist() == expected.query.tolist()
        assert with_all.first_rank.tolist() == expected.first_rank.tolist()
        np.testing.assert_array_equal(with_all.average_precision, expected.average_precision)
        assert_equals_loops(apart, score_by_loops(embeddings, codes, [(0, 5), (3, 7)], panoramas))
    one_panorama = np.zeros(len(codes))
    assert score_queries_twice(embeddings, codes, one_panorama)[1] is None


def test_scores_do_not_depend_on_the_size_of_the_blocks(monkeypatch):
    embeddings, codes, _ = make_views(num_buildings=60)
    whole = score_queries(embeddings, codes)
    monkeypatch.setattr(device_scores, "BLOCK_ROWS", {"cpu": 8})
    done = []
    cut = score_queries(embeddings, codes, progress=done.append)
    assert len(done) > 3
    assert sum(done) == len(whole.query)
    assert cut.first_rank.tolist() == whole.first_rank.tolist()
    np.testing.assert_allclose(cut.average_precision, whole.average_precision)


def test_by_hand_one_query_with_positives_at_ranks_one_and_three():
    angles = np.radians([0, 10, 20, 30, 200])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    scores = score_queries(embeddings, np.array([7, 7, 3, 7, 4]))
    assert scores.query.tolist() == [0, 1, 3]
    assert scores.first_rank.tolist() == [1, 2, 2]  # the second ties its neighbours at 10 degrees: wrong first
    np.testing.assert_allclose(scores.average_precision, [(1 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2])
    summary = summarize_scores(scores)
    assert list(summary) == list(SCORE_KEYS)
    assert summary["recall_at_1"] == pytest.approx(1 / 3)
    assert summary["recall_at_5"] == summary["recall_at_10"] == 1.0
    assert summary["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)


def test_constant_features_come_last_and_not_first():
    codes = np.repeat(np.arange(50), 4)
    embeddings = normalise_rows(np.ones((200, 16)))
    scores = score_queries(embeddings, codes)
    assert (scores.first_rank == 197).all()
    assert summarize_scores(scores)["recall_at_10"] == summarize_scores(scores)["recall_at_100"] == 0.0


def test_features_that_differ_only_by_rounding_count_as_ties():
    noise = np.random.default_rng(0).normal(scale=1e-8, size=(200, 16))
    scores = score_queries(normalise_rows(np.ones((200, 16)) + noise), np.repeat(np.arange(50), 4))
    assert scores.first_rank.min() > 190


def test_a_picture_that_two_buildings_share_is_a_wrong_answer_at_rank_one():
    embeddings = normalise_rows(np.eye(6)[[0, 0, 0, 1, 2, 2]] + 1e-9)
    scores = score_queries(embeddings, np.array([0, 0, 1, 1, 2, 2]))
    assert scores.first_rank.tolist()[:2] == [2, 2]
    assert scores.first_rank.tolist()[4:] == [1, 1]


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_row_that_is_not_finite_or_zero_is_refused(value):
    embeddings, codes, _ = make_views()
    embeddings[3] = value
    with pytest.raises(InputError, match="row 3 is not finite or all zero, and 0 more"):
        score_queries(embeddings, codes)
    with pytest.raises(InputError, match="row 3"):
        normalise_rows(embeddings)


def test_buildings_of_one_image_are_no_queries_and_alone_an_error():
    embeddings = normalise_rows(np.eye(4))
    with pytest.raises(InputError, match="no image has another image of its building"):
        score_queries(embeddings, np.arange(4))
    assert score_queries(embeddings, np.array([0, 1, 1, 2])).query.tolist() == [1, 2]


def test_the_bootstrap_equals_a_loop_that_draws_whole_buildings():
    generator = np.random.default_rng(1)
    codes = np.array([4, 4, 4, 9, 9, 2, 2, 2, 2, 7, 7])
    values = generator.random((len(codes), 3))
    means = resample_means(values, codes, seed=11, num_resamples=40)
    draws = np.random.default_rng(11)
    buildings = sorted(set(codes.tolist()))
    for resample in means:
        drawn = [buildings[place] for place in draws.integers(4, size=4)]
        pool = [values[row] for building in drawn for row in np.flatnonzero(codes == building)]
        np.testing.assert_allclose(resample, np.mean(pool, axis=0))


def bootstrap_intervals(scores, codes, seed):
    return percentile_intervals(resample_means(scores.values(), codes[scores.query], seed))


def test_intervals_hold_the_mean_repeat_with_the_seed_and_narrow_with_more_buildings():
    embeddings, codes, _ = make_views(num_buildings=200, noise=2.0)
    scores = score_queries(embeddings, codes)
    intervals = bootstrap_intervals(scores, codes, seed=3)
    assert intervals == bootstrap_intervals(scores, codes, seed=3)
    assert intervals != bootstrap_intervals(scores, codes, seed=4)
    summary = summarize_scores(scores)
    assert all(intervals[key][0] < summary[key] < intervals[key][1] for key in SCORE_KEYS)
    few = scores.take(codes[scores.query] < 20)
    low, high = bootstrap_intervals(few, codes, seed=3)["map"]
    assert high - low > 2 * (intervals["map"][1] - intervals["map"][0])


def test_equal_scores_have_an_interval_of_no_width():
    scores = QueryScores(np.arange(4), np.array([1, 1, 1, 1]), np.ones(4))
    assert bootstrap_intervals(scores, np.array([0, 0, 1, 1]), seed=0)["map"] == [1.0, 1.0]


def test_recall_at_100_counts_a_first_positive_at_rank_100_and_none_behind_it():
    ranks = np.array([1, 100, 101, 5000])
    summary = summarize_scores(QueryScores(np.arange(4), ranks, np.zeros(4)))
    assert (summary["recall_at_10"], summary["recall_at_100"]) == (0.25, 0.5)
