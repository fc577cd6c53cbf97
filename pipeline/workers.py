"""Bounded parallel work that keeps its order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], num_workers: int, in_flight: int | None = None
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item in order, computed by threads, with at most `in_flight` items held.

    Threads, because the decoders release the interpreter lock, nothing has to be copied to another process, and
    no orphan survives a kill. `items` is consumed in the calling thread. An exception of `function` is raised here.
    Whoever may stop early closes what is returned, and with it `items`.
    """
    in_flight = in_flight or 4 * num_workers
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= in_flight:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            if isinstance(items, Generator):
                items.close()  # now, not when it is collected: it may hold a file
