"""Where the time of an engine went; apart from it, because the engine needs torch."""

import threading

from pipeline.log import Stopwatch


class EngineWatch(Stopwatch):
    """Adds up where an engine's time went, from all its threads, how many images it embedded, and their rate."""

    def __init__(self) -> None:
        super().__init__()
        self.device = "CPU"
        self.images = 0
        self.busy_seconds = 0.0  # for which the device computed
        self.wall_seconds = 0.0  # for which the engine ran
        self._lock = threading.Lock()

    def add(self, part: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere to `part`."""
        with self._lock:
            super().add(part, seconds)

    def describe_parts(self) -> str:
        """Say the rate, the share of the time in which the device computed, and the parts."""
        parts = super().describe_parts()
        if not self.wall_seconds:
            return parts
        rate, share = self.images / self.wall_seconds, self.busy_seconds / self.wall_seconds
        return f"; {rate:.1f} img/s, the {self.device} computed {share:.0%} of {self.wall_seconds:.2f} s{parts}"
