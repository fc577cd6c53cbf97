"""What the gallery finds to show beyond right and wrong answers: suspected label errors."""

import numpy as np
import pytest
from evaluation_data import make_workplace

from evaluate_embeddings.evaluate import embed_split, score_split
from evaluate_embeddings.page import gallery
from evaluate_embeddings.page.gallery import find_suspects
from pipeline.config import load_config
from pipeline.retrieval.candidates import IgnoredPairs

THRESHOLD = 0.95
NO_PAIRS = IgnoredPairs(np.array([], np.int64), np.array([], np.int64))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("gallery"), photos=False)


def evaluate(config_path, ignored=NO_PAIRS):
    config = load_config(config_path)
    features, embeddings, _ = embed_split(config)
    return score_split(features, embeddings, ignored, config)[0]


@pytest.fixture(scope="module")
def evaluation(workplace):
    return evaluate(workplace)


def find_by_hand(evaluation, threshold):
    """Return the similarity of each pair of buildings of which one has an image that is nearest to one of the other."""
    embeddings, codes = evaluation.embeddings["projector"], evaluation.codes
    best = {}
    for one in range(len(codes)):
        others = [row for row in range(len(codes)) if codes[row] != codes[one]]
        other = max(others, key=lambda row: float(embeddings[one] @ embeddings[row]))
        pair = tuple(sorted((int(codes[one]), int(codes[other]))))
        best[pair] = max(best.get(pair, -2), float(embeddings[one] @ embeddings[other]))
    return sorted((value for value in best.values() if value >= threshold), reverse=True)


def test_suspects_are_the_most_similar_pairs_of_two_buildings_each_pair_once(evaluation):
    found = find_suspects(evaluation, THRESHOLD, 5, seed=0)
    expected = find_by_hand(evaluation, THRESHOLD)[:5]
    assert len(found) == len(expected) == 5
    np.testing.assert_allclose([suspect.similarity for suspect in found], expected, atol=1e-5)
    assert len(find_suspects(evaluation, THRESHOLD, 99, seed=0)) == len(find_by_hand(evaluation, THRESHOLD))
    for suspect in found:
        one, other = suspect.rows
        assert evaluation.codes[one] != evaluation.codes[other]
        raw = evaluation.embeddings["raw"]
        assert suspect.raw_similarity == pytest.approx(float(raw[one] @ raw[other]), abs=1e-6)
        # A building lies 1e-4 degrees north and east of the one before it: 13 m.
        steps = abs(int(evaluation.codes[one]) - int(evaluation.codes[other]))
        assert suspect.distance_m == pytest.approx(13.05 * steps, rel=0.01)


def test_an_ignored_pair_is_no_suspect(workplace, evaluation):
    one, other = (int(evaluation.codes[row]) for row in find_suspects(evaluation, -1, 1, seed=0)[0].rows)
    ignored = IgnoredPairs(np.array([min(one, other)]), np.array([max(one, other)]))
    again = evaluate(workplace, ignored)
    pairs = [{int(again.codes[row]) for row in suspect.rows} for suspect in find_suspects(again, -1, 99, seed=0)]
    assert {one, other} not in pairs


def test_of_many_images_a_sample_is_looked_at(evaluation, monkeypatch):
    monkeypatch.setattr(gallery, "MAX_SUSPECT_QUERIES", 10)
    whole = {suspect.rows for suspect in find_suspects(evaluation, -1, 99, seed=0)}
    assert len(whole) <= 10
    assert whole == {suspect.rows for suspect in find_suspects(evaluation, -1, 99, seed=0)}
