"""The tiled search against slow, obvious loops, on every device there is, whatever the size of its tiles."""

from functools import cache

import numpy as np
import pytest
import torch
from test_scores import assert_equals_loops, score_by_loops

from pipeline.errors import PipelineError
from pipeline.retrieval import device_scores
from pipeline.retrieval.scores import normalise_rows, score_queries, score_queries_twice

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
# Of 8 rows many lie across buildings; 2048 is more than one lane of bytes can add up; the last holds everything.
BLOCKS = [8, 64, 1024, 2048]


@pytest.fixture(params=BLOCKS)
def block_rows(request, monkeypatch):
    monkeypatch.setattr(device_scores, "BLOCK_ROWS", dict.fromkeys(("cpu", "cuda"), request.param))
    return request.param


def draw(sizes, width=5, seed=0):
    """Return unit rows that lie near their building's centre, and shuffled building codes."""
    generator = np.random.default_rng(seed)
    codes = generator.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32) * 3 + 1
    centres = generator.standard_normal((3 * len(sizes) + 1, width))
    return normalise_rows(centres[codes] + generator.standard_normal((len(codes), width))), codes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [[2, 2], [1, 2, 3, 4, 5, 1], [40, 1, 2, 2], [3] * 60], ids=str)
def test_every_query_fares_as_in_a_loop(sizes, device, block_rows):
    embeddings, codes = draw(sizes)
    found = score_queries(embeddings, codes, device=torch.device(device))
    assert_equals_loops(found, score_by_loops(embeddings, codes))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(3))
def test_ignored_pairs_and_panoramas_are_left_out_as_in_a_loop(seed, device, block_rows):
    sizes = np.random.default_rng(seed).integers(1, 7, 30).tolist()
    embeddings, codes = draw(sizes, seed=seed)
    panoramas = np.random.default_rng(seed).integers(0, len(codes) // 3, len(codes))
    pairs = [(1, 4), (4, 1), (7, 10), (7, 13), (16, 16), (19, 9999)]
    ignored = np.array(pairs)
    found = score_queries_twice(embeddings, codes, panoramas, ignored=ignored, device=torch.device(device))
    assert_equals_loops(found[0], score_by_loops(embeddings, codes, pairs))
    assert_equals_loops(found[1], score_by_loops(embeddings, codes, pairs, panoramas))


@cache
def draw_few_hard_queries(share_hard):
    """Return embeddings, codes and panoramas, and how every query fares without and with the panoramas."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 6, 150).tolist()
    _, codes = draw(sizes)
    centres = generator.standard_normal((3 * len(sizes) + 1, 16))
    spread = np.where(generator.random((len(codes), 1)) < share_hard, 2.0, 0.05)
    embeddings = normalise_rows(centres[codes] + spread * generator.standard_normal((len(codes), 16)))
    panoramas = generator.integers(0, len(codes) // 3, len(codes))
    expected = score_by_loops(embeddings, codes), score_by_loops(embeddings, codes, [], panoramas)
    return embeddings, codes, panoramas, expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("share_hard", [0.0, 0.05, 0.3])
def test_few_hard_queries_among_easy_ones_fare_as_in_a_loop(share_hard, device, block_rows):
    embeddings, codes, panoramas, expected = draw_few_hard_queries(share_hard)
    found = score_queries_twice(embeddings, codes, panoramas, device=torch.device(device))
    assert_equals_loops(found[0], expected[0])
    assert_equals_loops(found[1], expected[1])


@pytest.mark.parametrize("device", DEVICES)
def test_a_negative_that_ties_with_a_positive_counts_as_nearer(device, block_rows):
    embeddings = normalise_rows(np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    found = score_queries(embeddings, np.array([0, 0, 1, 1]), device=torch.device(device))
    assert found.first_rank.tolist() == [2, 2, 3, 3]


def test_counts_beyond_what_a_byte_holds_are_right(block_rows):
    generator = np.random.default_rng(0)
    for share in (0.0, 0.3, 1.0):
        for width in (block_rows, 3, 1):
            for dim, shape in enumerate([(block_rows, width), (width, block_rows)]):
                mask = torch.from_numpy(generator.random(shape) < share)
                assert torch.equal(device_scores._count(mask, dim), mask.sum(dim=dim))


def test_a_gpu_whose_memory_runs_out_is_given_smaller_tiles_and_in_the_end_an_error(monkeypatch, caplog):
    embeddings, codes = draw([2] * 1500)
    expected = score_queries(embeddings, codes)
    monkeypatch.setattr(device_scores, "BLOCK_ROWS", {"cpu": 4096})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    whole, room = device_scores._rank_blocks, 1024

    def rank(images, back, block_rows, progress):
        if block_rows > room:
            raise torch.cuda.OutOfMemoryError
        return whole(images, back, block_rows, progress)

    monkeypatch.setattr(device_scores, "_rank_blocks", rank)
    found = score_queries(embeddings, codes)
    assert found.first_rank.tolist() == expected.first_rank.tolist()
    assert [record.args for record in caplog.records] == [("scores", 2048), ("scores", 1024)]
    room = 0
    with pytest.raises(
        PipelineError, match="the GPU cannot hold 0.0 GB of embeddings and .* set .infrastructure..device to cpu"
    ):
        score_queries(embeddings, codes)
