"""Find by measurement how many images a pass of a model should take on a GPU."""

from collections.abc import Callable

import torch

SIZES = tuple(2**exponent for exponent in range(3, 11))
# A pass twice as large has to be faster by this share, or its memory buys nothing.
LEAST_GAIN = 0.03


def find_batch_size(measure: Callable[[int], float], sizes: tuple[int, ...] = SIZES) -> tuple[int, float]:
    """Return the size from which on larger passes are hardly faster, and its images/s.

    `measure` gives the images/s of a size and raises torch.cuda.OutOfMemoryError where the memory does not hold it.
    If it holds none, the smallest is returned, with rate 0.
    """
    best, best_rate = sizes[0], 0.0
    for size in sizes:
        try:
            rate = measure(size)
        except torch.cuda.OutOfMemoryError:
            break
        if rate < (1 + LEAST_GAIN) * best_rate:
            break
        best, best_rate = size, rate
    return best, best_rate
