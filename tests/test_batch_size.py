"""The search for a batch size: the smallest that is as fast as any, within the memory."""

import pytest
import torch

from pipeline.inference.batch_size import SIZES, find_batch_size


def test_it_stops_where_larger_passes_are_hardly_faster():
    tried = []

    def measure(size):
        tried.append(size)
        return 1000.0 * size / (size + 20)

    assert find_batch_size(measure) == (512, pytest.approx(1000 * 512 / 532))
    assert tried == [size for size in SIZES if size <= 1024]
    assert find_batch_size(lambda _: 50.0) == (SIZES[0], 50.0)


def test_it_stays_within_the_memory():
    def measure(size):
        if size > 64:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return float(size)

    assert find_batch_size(measure) == (64, 64.0)


def test_where_nothing_fits_the_smallest_is_tried_in_earnest():
    def measure(_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    assert find_batch_size(measure) == (SIZES[0], 0.0)
