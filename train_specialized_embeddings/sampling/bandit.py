"""Choose the bands of negatives by upper confidence bounds on the share of triplets that are still active."""

import math

from train_specialized_embeddings.sampling.neighbor_table import NUM_BANDS

# A draw is cut into this many pulls, each of which prefers one order of the bands.
PULLS_PER_DRAW = 64
# What a pull counts for after the next one: the share of active triplets falls as training goes on, so that old pulls
# have to be forgotten. It halves after 700 pulls, that is 11 draws.
DISCOUNT = 0.999
# Weight of the bonus sqrt(ln n / n_b). UCB1 has sqrt(2) for single outcomes of 0 or 1; a pull is the mean of hundreds.
EXPLORATION = 0.5


class BandBandit:
    """A discounted UCB bandit whose arms are the bands and whose reward is the share of active triplets.

    Not minus the loss: that would seek the easiest band. Sources: Auer, Cesa-Bianchi and Fischer 2002 (UCB1), Garivier
    and Moulines 2011 (discounted).
    """

    def __init__(self) -> None:
        self.pulls = [0.0] * NUM_BANDS  # discounted
        self.rewards = [0.0] * NUM_BANDS  # discounted sums

    def rank_bands(self) -> list[list[int]]:
        """Return the order in which each pull of a draw prefers the bands, PULLS_PER_DRAW x NUM_BANDS.

        Within a draw a pull counts at once and its reward is taken to be the band's mean, so that the pulls spread.
        """
        pulls = list(self.pulls)
        orders = []
        for _ in range(PULLS_PER_DRAW):
            bounds = [self._upper_bound(band, pulls) for band in range(NUM_BANDS)]
            order = sorted(range(NUM_BANDS), key=lambda band: -bounds[band])  # ties: the harder band
            pulls[order[0]] += 1
            orders.append(order)
        return orders

    def learn(self, num_triplets: list[float], num_active: list[float]) -> None:
        """Take in a draw's triplets and active ones by band, NUM_BANDS numbers each."""
        total = sum(num_triplets)
        for band in range(NUM_BANDS):
            share = num_triplets[band] / total if total else 0.0
            reward = num_active[band] / num_triplets[band] if num_triplets[band] else 0.0
            self.pulls[band] = DISCOUNT**PULLS_PER_DRAW * self.pulls[band] + PULLS_PER_DRAW * share
            self.rewards[band] = DISCOUNT**PULLS_PER_DRAW * self.rewards[band] + PULLS_PER_DRAW * share * reward

    def list_means(self) -> list[float | None]:
        """Return the discounted share of active triplets of each band, None where it was never pulled."""
        return [reward / pulls if pulls else None for reward, pulls in zip(self.rewards, self.pulls, strict=True)]

    def _upper_bound(self, band: int, pulls: list[float]) -> float:
        if pulls[band] < 1e-9:
            return math.inf
        mean = self.rewards[band] / self.pulls[band] if self.pulls[band] > 0 else 1.0
        return mean + EXPLORATION * math.sqrt(math.log(max(sum(pulls), 1.0)) / pulls[band])
