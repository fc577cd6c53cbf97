"""Run scripts in forked processes, and disturb them at a chosen file operation instead of at a chosen time."""

import errno
import io
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from pipeline import cli

# What Python says of itself to an audit hook when it touches a file (https://docs.python.org/3/library/audit_events.html).
# Arrow writes between these, so a disturbance at each of them also falls before, between and after its writes.
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.link", "os.rmdir", "shutil.rmtree", "os.scandir"}
TIMEOUT_SECONDS = 120
Hook = Callable[[], None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the exit code (-9 for SIGKILL) and what it wrote to stderr."""

    code: int
    stderr: str

    @property
    def is_clear_refusal(self) -> bool:
        """Whether it ended with one line that says what is wrong."""
        last = (self.stderr.strip().splitlines() or [""])[-1]
        return self.code in (1, 2) and last.startswith("error: ") and "Traceback" not in self.stderr


class Operations:
    """Counts the file operations below a folder, and acts before the one that is wanted."""

    def __init__(self, folder: Path, at: int | None, act: Hook) -> None:
        self.count, self._folder, self._at, self._act = 0, str(folder), at, act

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        """Take one audit event."""
        paths = arguments[:1] if event == "open" else arguments[:2]  # the second one of "open" is its mode
        if event not in FILE_EVENTS or not any(map(self._is_below, paths)):
            return
        self.count += 1
        if self.count == self._at:
            self._act()

    def _is_below(self, argument: object) -> bool:
        path = os.fsdecode(argument) if isinstance(argument, str | bytes | os.PathLike) else "/"
        # A name alone is of a folder that is open: only outputs are worked on in this way.
        return path.startswith((self._folder, f"/proc/{os.getpid()}/")) or os.sep not in path


def kill() -> None:
    """Die without a word."""
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    """Ask oneself to stop, as a queue does."""
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt_twice() -> None:
    """Press Ctrl-C where a launcher passes it on too."""
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)


def fill_disk() -> None:
    """Say that the disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Run:
    """A script's main in a forked process: the heavy libraries are imported once, by the parent."""

    def __init__(self, main: Callable[..., None], arguments: Sequence[object], prepare: Hook | None = None) -> None:
        self._log_dir = Path(tempfile.mkdtemp(prefix="faults-"))
        self._pid = os.fork()
        if self._pid == 0:
            self._become(main, [str(argument) for argument in arguments], prepare)

    def _become(self, main: Callable[..., None], arguments: list[str], prepare: Hook | None) -> None:
        code = 70
        signal.alarm(TIMEOUT_SECONDS)  # a run that hangs is a finding too
        with (
            open(self._log_dir / "stderr", "w", buffering=1) as log,
            redirect_stderr(log),
            redirect_stdout(io.StringIO()),
        ):
            try:
                if prepare is not None:
                    prepare()
                cli.run_guarded(main, arguments)
            except SystemExit as stop:
                code = int(stop.code or 0)
            finally:
                if sys.exc_info()[0] is not None:  # a bug, which is a finding
                    traceback.print_exc()
                log.flush()
                os._exit(code)

    def wait(self) -> Outcome:
        """Return how it ended."""
        _, status = os.waitpid(self._pid, 0)
        stderr = (self._log_dir / "stderr").read_text() if (self._log_dir / "stderr").exists() else ""
        shutil.rmtree(self._log_dir)
        return Outcome(os.waitstatus_to_exitcode(status), stderr)


def disturb(folder: Path, at: int, act: Hook) -> Hook:
    """Return a preparation that acts before operation number `at` below a folder."""
    return lambda: sys.addaudithook(Operations(folder, at, act))


def count_operations(folder: Path, main: Callable[..., None], arguments: Sequence[object]) -> int:
    """Return how many file operations an undisturbed run takes below a folder."""
    report = Path(tempfile.mkdtemp(prefix="faults-")) / "count"

    def counted(argv: list[str]) -> None:
        operations = Operations(folder, None, kill)
        sys.addaudithook(operations)
        try:
            main(argv)
        finally:
            report.write_text(str(operations.count))

    outcome = Run(counted, arguments).wait()
    if outcome.code:
        raise RuntimeError(f"the undisturbed run failed: {outcome.stderr}")
    count = int(report.read_text())
    shutil.rmtree(report.parent)
    return count
