"""Score retrieval on a GPU, as `retrieval.score_queries` does without pairs to ignore, by tiles of a matrix product."""

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.retrieval.scores import TIE_TOLERANCE, Embeddings, QueryScores, RowGroups

# Similarities held at a time: 1 GiB of float32.
TILE_VALUES = 2**28


def score_queries_on(
    device: torch.device, embeddings: Embeddings, building_codes: NDArray[np.int32], tile_values: int = TILE_VALUES
) -> QueryScores:
    """Let each of the L2-normalised rows (N, D) whose building has another image query all others, on a device.

    The products are in float32, as torch computes them unless it is told to use TF32; a negative that ties with a
    positive counts as nearer. Queries are taken by the size of their building, so that a tile's have as many positives.
    """
    groups = RowGroups(building_codes)
    sizes = groups.sizes()[groups.codes]  # (N,)
    queries = np.flatnonzero(sizes > 1)
    order = np.argsort(sizes[queries], kind="stable")
    table = torch.from_numpy(embeddings).to(device)
    members, starts = _list_members(groups, device)
    codes, counts = torch.from_numpy(groups.codes).to(device), torch.from_numpy(sizes).to(device)
    found = []
    for block in torch.from_numpy(queries[order]).split(max(1, tile_values // len(table))):
        rows = block.to(device)
        slots = torch.arange(int(counts[rows].max()), device=device)
        there = slots < counts[rows, None]  # (Q, P)
        places = (starts[codes[rows], None] + slots).clamp_max(len(members) - 1)
        own = torch.where(there, members[places], rows[:, None])
        found.append(_rank(table, rows, own, counts[rows] - 1))
    first, precision = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
    back = np.argsort(order)
    return QueryScores(queries, first[back], precision[back])


def _list_members(groups: RowGroups, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all rows by building (N,), and where each building's begin (B,)."""
    members = np.argsort(groups.codes, kind="stable")
    starts = np.cumsum(groups.sizes()) - groups.sizes()
    return torch.from_numpy(members).to(device), torch.from_numpy(starts).to(device)


def _rank(
    table: torch.Tensor, rows: torch.Tensor, own: torch.Tensor, num_positives: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rank of the nearest positive (Q,) and the average precision (Q,) of the queries `rows` (Q,).

    `own` (Q, P) are the rows of their buildings, the query itself in the place of those that are missing.
    """
    similarities = table[rows] @ table.T  # (Q, N)
    positives = similarities.gather(1, own).masked_fill(own == rows[:, None], -torch.inf)
    thresholds = positives.sort(dim=1, descending=True).values - TIE_TOLERANCE
    similarities.scatter_(1, own, -torch.inf)
    width = own.shape[1] - 1
    nearer = torch.stack([(similarities >= thresholds[:, p, None]).sum(dim=1) for p in range(width)], dim=1)
    place = torch.arange(1, width + 1, device=rows.device)
    precisions = (place / (nearer + place).double()).masked_fill(place > num_positives[:, None], 0.0)
    return nearer[:, 0] + 1, precisions.sum(dim=1) / num_positives
