"""Log lines to stderr and to a file, and progress as a bar or as log lines."""

import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pipeline import LOGGER
from pipeline.errors import PipelineError, printable
from pipeline.workspace import open_file

Item = TypeVar("Item")

logger = LOGGER


class LineFormat(logging.Formatter):
    """One line a message, whatever the names in it hold; only a table of ours, behind an empty line, has several."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's own)
        text = super().formatMessage(record)
        return "\n".join(map(printable, text.split("\n") if "\n\n" in str(record.msg) else [text]))


class _SharedFormat(LineFormat):
    """Leave out the folders of absolute paths: whoever gets a dataset gets the logs inside it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's own)
        return re.sub(r"(?<![\w.:/~-])[~/](?:[^\s/:'\"]*/)+", "", super().formatMessage(record))


# Between two lines of progress.
_SECONDS_BETWEEN_LINES = 30.0
_LINES = "%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"


class _LogFile(logging.FileHandler):
    """A log file that warns once when a line cannot be written, as on a full disk."""

    _has_failed = False

    def _open(self) -> TextIOWrapper:
        descriptor = open_file(Path(self.baseFilename), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        return open(descriptor, "a", encoding=self.encoding, errors=self.errors)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 (logging's own)
        """Print one line, where logging would print a traceback for each record."""
        if not self._has_failed:
            self._has_failed = True
            print(f"warning: cannot write the log {self.baseFilename} ({sys.exc_info()[1]})", file=sys.stderr)


@contextmanager
def logging_to(log_path: Path | None, level: str = "INFO") -> Iterator[None]:
    """Send log lines to stderr and, appended, to `log_path`; raise PipelineError if that cannot be written."""
    stream = logging.StreamHandler(sys.stderr)
    stream.addFilter(lambda record: not getattr(record, "file_only", False))
    handlers: dict[logging.Handler, type[LineFormat]] = {stream: LineFormat}
    if log_path is not None:
        try:
            file = _LogFile(log_path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise PipelineError(
                f"cannot write the log {log_path} ({error.strerror}): set [global].log_dir to a writable folder"
            ) from None
        handlers[file] = _SharedFormat if log_path.parent.name == "_logs" else LineFormat
    logger.setLevel(level)
    logger.propagate = False
    for handler, line_format in handlers.items():
        handler.setFormatter(line_format(*_LINES))
        logger.addHandler(handler)
    try:
        with logging_redirect_tqdm([logger]):
            yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            with suppress(OSError):  # a full disk must not hide the run's own error
                handler.close()


class Progress(AbstractContextManager["Progress"]):
    """Counts items done: a bar on a terminal, elsewhere a log line every 30 seconds with rate and ETA."""

    def __init__(self, label: str, total: int | None, unit: str = "img") -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._resumed = 0
        self._started = self._reported = time.monotonic()
        size = shutil.get_terminal_size()  # tqdm draws nothing where a terminal reports 0 columns
        self._bar = tqdm(
            total=total, desc=printable(label), unit=unit, file=sys.stderr, ncols=size.columns, nrows=size.lines,
            disable=not sys.stderr.isatty(),
        )  # fmt: skip

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def resume_at(self, done: int) -> None:
        """Count `done` items that an earlier run finished; they stay out of this run's rate."""
        self.done = self._resumed = self._bar.initial = done
        self._bar.update(done - self._bar.n)

    def advance(self, count: int = 1) -> None:
        self.done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and now - self._reported >= _SECONDS_BETWEEN_LINES:
            self._reported = now
            logger.info(self.describe(now - self._started))

    def describe(self, seconds: float) -> str:
        rate = (self.done - self._resumed) / max(seconds, 1e-9)
        if self.total is None:
            return f"{self.label}: {self.done} {self.unit}, {rate:.1f} {self.unit}/s"
        left = f"{(self.total - self.done) / rate:.0f} s" if rate > 0 else "unknown"
        return f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s, ETA {left}"


class Stopwatch:
    """Adds up seconds by the name of the part, from all threads, and what an engine computed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.device, self.images = "CPU", 0
        self.busy_seconds = self.wall_seconds = 0.0  # the device computed, the engine ran
        self._lock = threading.Lock()

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(part, time.monotonic() - started)

    def measure_each(self, part: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, and add the time that getting each takes to `part`."""
        iterator = iter(items)
        while True:
            with self.measure(part):
                found = list(islice(iterator, 1))
            if not found:
                return
            yield found.pop()

    def add(self, part: str, seconds: float) -> None:
        with self._lock:
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def describe_parts(self) -> str:
        """Return an engine's rate and its device's share of the time, and the parts, as in ` (read 1.0)`."""
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        text = f" ({parts})" if parts else ""
        if self.wall_seconds:
            rate, share = self.images / self.wall_seconds, self.busy_seconds / self.wall_seconds
            text = f"; {rate:.1f} img/s, the {self.device} computed {share:.0%} of {self.wall_seconds:.2f} s{text}"
        return text
