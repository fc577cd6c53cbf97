"""The bandit that chooses the bands of negatives."""

import copy
import math

import pytest

from train_specialized_embeddings.sampling.bandit import DISCOUNT, EXPLORATION, PULLS_PER_DRAW, BandBandit
from train_specialized_embeddings.sampling.neighbor_table import NUM_BANDS


def play(bandit: BandBandit, shares: list[float], num_draws: int) -> list[float]:
    """Let bands have these shares of active triplets; return how often each came first in the last draw."""
    first = [0.0] * NUM_BANDS
    for _ in range(num_draws):
        orders = bandit.rank_bands()
        first = [float(sum(order[0] == band for order in orders)) for band in range(NUM_BANDS)]
        bandit.learn([100 * count for count in first], [100 * n * p for n, p in zip(first, shares, strict=True)])
    return first


def test_every_order_names_every_band_and_the_first_pulls_try_all() -> None:
    orders = BandBandit().rank_bands()
    assert len(orders) == PULLS_PER_DRAW
    assert all(sorted(order) == list(range(NUM_BANDS)) for order in orders)
    assert {order[0] for order in orders[:NUM_BANDS]} == set(range(NUM_BANDS))


def test_the_band_with_the_most_active_triplets_is_preferred_and_no_band_is_forgotten() -> None:
    shares = [0.2, 0.3, 0.9, 0.3, 0.2, 0.1, 0.0]
    bandit = BandBandit()
    first = play(bandit, shares, 50)
    assert first.index(max(first)) == 2
    assert first[2] > PULLS_PER_DRAW / 3
    assert min(bandit.pulls) > 1


def test_a_band_that_has_been_learnt_gives_way_to_the_next() -> None:
    bandit = BandBandit()
    play(bandit, [0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], 50)
    first = play(bandit, [0.0, 0.1, 0.1, 0.1, 0.8, 0.1, 0.1], 50)
    assert first.index(max(first)) == 4


def test_the_bounds_are_those_of_the_formula() -> None:
    bandit = BandBandit()
    bandit.learn([30.0, 10.0, 0, 0, 0, 0, 0], [15.0, 1.0, 0, 0, 0, 0, 0])
    assert bandit.pulls == [48.0, 16.0, 0, 0, 0, 0, 0]
    assert bandit.rewards == pytest.approx([24.0, 1.6, 0, 0, 0, 0, 0])
    bounds = [mean + EXPLORATION * math.sqrt(math.log(64) / pulls) for mean, pulls in ((0.5, 48), (0.1, 16))]
    assert [bandit._upper_bound(band, bandit.pulls) for band in (0, 1)] == pytest.approx(bounds)
    bandit.learn([0.0] * NUM_BANDS, [0.0] * NUM_BANDS)  # a draw of random negatives alone
    assert bandit.pulls[0] == pytest.approx(48 * DISCOUNT**PULLS_PER_DRAW)


def test_its_attributes_repeat_the_choices() -> None:
    bandit, other = BandBandit(), BandBandit()
    play(bandit, [0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.9], 3)
    vars(other).update(copy.deepcopy(vars(bandit)))
    play(bandit, [0.5] * NUM_BANDS, 0)
    assert other.rank_bands() == bandit.rank_bands()
