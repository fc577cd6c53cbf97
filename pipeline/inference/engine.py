"""Embed a stream of encoded images: reading, decoding and computing overlap.

One thread reads and gathers passes, several decode, and the caller's feeds the GPU. Each is ahead of the next by a
bounded number of images. On a CPU each core computes a pass of its own: threads that share a pass wait for one another
at every layer, which took five times as long on busy cores.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Generic

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import Rejection, catch_rejection
from pipeline.inference.backbone import Decoded, Embedder, Launched, Staged
from pipeline.inference.images import log_turned
from pipeline.log import Stopwatch
from pipeline.threads import Item, map_in_order, prefetch

# Passes made ready ahead of those that a GPU computes.
PASSES_READY = 2


class End:
    """Marks a place in a stream that no pass spans; it comes back as `Embedded.end`."""


@dataclass
class Embedded(Generic[Item]):
    """The outcome of one pass: the images embedded and those rejected, `taken` in all.

    `is_full` says that it has as many images as a pass takes; `end` is the End that closed it, if any.
    """

    items: list[Item] = field(default_factory=list)
    embeddings: NDArray[np.float32] | None = None  # (len(items), D), None without items
    rejected: list[tuple[Item, Rejection]] = field(default_factory=list)
    taken: int = 0
    is_full: bool = False
    end: End | None = None


def embed_stream(
    embedder: Embedder,
    items: Iterable[Item | End],
    decode: Callable[[Item], Decoded],
    num_workers: int,
    watch: Stopwatch,
) -> Generator[Embedded[Item], None, None]:
    """Yield the outcome of the items, in their order, pass by pass.

    `decode` runs in threads and calls `embedder.decode` with an item's bytes; a Rejection that it raises rejects that
    item. `items` is read in a thread of its own. A caller that may stop early closes the generator.
    """
    started = time.monotonic()
    watch.device = "GPU" if embedder.on_gpu else "CPU"
    num_threads = torch.get_num_threads()  # of the caller's thread
    num_passes = 1 if embedder.on_gpu else num_threads
    in_flight = max(2 * embedder.micro_batch * num_passes, 2 * num_workers)
    gathered = _gather(embedder, items, decode, num_workers, in_flight, watch)
    staged = prefetch(gathered, PASSES_READY if embedder.on_gpu else num_passes)
    try:
        with closing(staged):
            if embedder.on_gpu:
                yield from _compute_on_gpu(embedder, staged, watch)
            else:
                yield from _compute_on_cpu(embedder, staged, num_passes, watch)
    finally:
        torch.set_num_threads(num_threads)  # undoes `use_one_thread` for new threads
        watch.wall_seconds += time.monotonic() - started
        log_turned()


def _gather(
    embedder: Embedder,
    items: Iterable[Item | End],
    decode: Callable[[Item], Decoded],
    num_workers: int,
    in_flight: int,
    watch: Stopwatch,
) -> Iterator[tuple[Embedded[Item], Staged]]:
    def attempt(item: Item | End) -> tuple[Item | End, Decoded | Rejection | None]:
        if isinstance(item, End):
            return item, None
        with watch.measure("decode in threads"):
            return item, catch_rejection(decode, item)

    def stage() -> tuple[Embedded[Item], Staged]:
        with watch.measure("stage"):
            return gathered, embedder.stage(ready)

    reader = watch.measure_each("read", items)
    gathered: Embedded[Item] = Embedded()
    ready: list[Decoded] = []
    with closing(map_in_order(attempt, reader, num_workers, in_flight, use_one_thread)) as decoded:
        for item, outcome in decoded:
            if isinstance(item, End):
                gathered.end = item
            else:
                gathered.taken += 1
                if isinstance(outcome, Rejection):
                    gathered.rejected.append((item, outcome))
                else:
                    assert outcome is not None
                    gathered.items.append(item)
                    ready.append(outcome)
            gathered.is_full = len(ready) >= embedder.micro_batch
            if gathered.is_full or gathered.end is not None:
                yield stage()
                gathered, ready = Embedded(), []
    if gathered.taken:
        yield stage()


def use_one_thread() -> None:
    """Keep torch from starting threads of its own in each of ours."""
    torch.get_num_threads()  # initialises the number, which would otherwise be set anew later
    torch.set_num_threads(1)


def _compute_on_gpu(
    embedder: Embedder, staged: Iterable[tuple[Embedded[Item], Staged]], watch: Stopwatch
) -> Iterator[Embedded[Item]]:
    """Run the passes, starting each before the previous one's embeddings are fetched."""
    under_way: list[tuple[Embedded[Item], Launched]] = []
    for gathered, inputs in watch.measure_each("wait", staged):
        with watch.measure("compute"):
            under_way.append((gathered, embedder.launch(inputs)))
        if len(under_way) > 1:
            yield _fetch(*under_way.pop(0), watch)
    for gathered, launched in under_way:
        yield _fetch(gathered, launched, watch)


def _compute_on_cpu(
    embedder: Embedder, staged: Iterable[tuple[Embedded[Item], Staged]], num_passes: int, watch: Stopwatch
) -> Iterator[Embedded[Item]]:
    def compute(entry: tuple[Embedded[Item], Staged]) -> tuple[Embedded[Item], Launched, float]:
        started = time.monotonic()
        return entry[0], embedder.launch(entry[1]), time.monotonic() - started

    reader = watch.measure_each("wait", staged)
    with closing(map_in_order(compute, reader, num_passes, num_passes + 1, use_one_thread)) as computed:
        for gathered, launched, seconds in computed:
            watch.add("compute", seconds / num_passes)
            watch.busy_seconds += seconds / num_passes
            yield _fetch(gathered, launched, watch)


def _fetch(gathered: Embedded[Item], launched: Launched, watch: Stopwatch) -> Embedded[Item]:
    if gathered.items:
        with watch.measure("compute"):
            gathered.embeddings = launched.result()
        watch.busy_seconds += sum(start.elapsed_time(end) for start, end in launched.events) / 1000.0
        watch.images += len(gathered.items)
    return gathered
