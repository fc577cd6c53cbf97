"""Bounded work in threads that keeps its order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from pipeline.errors import Result

Item = TypeVar("Item")

# What the items in flight may take together, but for one: some hundreds of pictures of Street View.
HELD_BYTES = 2**27


def map_in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    num_workers: int,
    in_flight: int | None = None,
    initializer: Callable[[], None] | None = None,
    weigh: Callable[[Item], int] = lambda _: 0,
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item in order, computed by threads, with at most `in_flight` items held.

    `weigh` tells the bytes of an item: a new one is taken only while those held are at most HELD_BYTES. `items` is
    consumed in the calling thread. A caller that may stop early closes the generator, and with it `items`.
    """
    in_flight = in_flight or 4 * num_workers
    pending: deque[Future[Result]] = deque()
    weights: deque[int] = deque()
    with ThreadPoolExecutor(num_workers, initializer=initializer) as pool:
        try:
            for item in items:
                weights.append(weigh(item))
                pending.append(pool.submit(function, item))
                while len(pending) >= in_flight or sum(weights) > HELD_BYTES:
                    weights.popleft()
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            if isinstance(items, Generator):
                items.close()  # now, not when it is collected: it may hold a file


def prefetch(items: Iterable[Item], depth: int = 1) -> Generator[Item, None, None]:
    """Yield the items in order, made by a thread of their own; at most `depth` are ready, and are closed with it."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, iterator, end) for _ in range(depth))
        try:
            while (item := pending.popleft().result()) is not end:
                pending.append(pool.submit(next, iterator, end))
                yield item  # type: ignore[misc]
        finally:
            for future in pending:
                future.cancel()
            if isinstance(iterator, Generator):
                pool.submit(iterator.close).result()


class Background:
    """A thread that runs one call at a time in the background; the next call raises the previous one's error."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._pending: list[Future[None]] = []

    def submit(self, call: Callable[[], None]) -> None:
        self.finish()
        self._pending.append(self._pool.submit(call))

    def finish(self) -> None:
        while self._pending:
            self._pending.pop().result()

    def close(self) -> None:
        self._pool.shutdown()
        self.finish()
