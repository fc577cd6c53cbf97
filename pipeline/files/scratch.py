"""Rows of floats kept on disk while they are computed, so that an interrupted run goes on from there."""

import contextlib
import os
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import Rejection
from pipeline.files.workspace import locked, naming_failures, read_json, write_json
from pipeline.log import logger
from pipeline.own_folders import open_file, remove

# How much work a killed node may lose, against a sync of the file each time.
SECONDS_BETWEEN_SAVES = 30.0


class RowScratch:
    """A hidden file of float32 rows beside an output, with a note of its progress; one process at a time holds it.

    Rows come in the order of the input (`seen` counts them) and are stored at their place in the output. No memory
    map: on a full disk that ends the process with SIGBUS.
    """

    def __init__(self, output_path: Path, num_rows: int, identity: str) -> None:
        """Open an output's scratch, and go on from a run of the same `identity`; PipelineError if it is held."""
        self.num_rows, self.identity = num_rows, identity
        self._output_path = output_path
        hidden = f".{output_path.name}"
        self._rows_path = output_path.with_name(f"{hidden}.rows")
        self._progress_path = output_path.with_name(f"{hidden}.progress.json")
        with contextlib.ExitStack() as held, naming_failures(self._rows_path):
            held.enter_context(locked(output_path, "is making it: wait for that one, or stop it and run this again"))
            self._descriptor = open_file(self._rows_path, os.O_RDWR | os.O_CREAT)
            held.callback(os.close, self._descriptor)
            self._held = held.pop_all()
        self.seen, self._saved = 0, time.monotonic()
        self.width: int | None = None
        self.rejects: dict[int, Rejection] = {}
        self._load()

    def _load(self) -> None:
        """Take up the rows of the same run, else begin anew."""
        try:
            progress = read_json(self._progress_path)
            is_whole = os.fstat(self._descriptor).st_size >= progress["num_bytes"]  # unless someone has removed it
            if is_whole and progress["identity"] == self.identity and progress["num_rows"] == self.num_rows:
                self.seen, self.width = progress["seen"], progress["width"]
                self.rejects = {row: Rejection(reason, detail) for row, reason, detail in progress["rejects"]}
                logger.info("%s: going on behind image %d of %d", self._output_path.name, self.seen, self.num_rows)
                return
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no note, or one that is not ours
        os.ftruncate(self._descriptor, 0)

    def write(self, rows: list[int], values: NDArray[np.float32]) -> None:
        """Store values (len(rows), D) at their places; raise PipelineError if the disk is full."""
        self.width = values.shape[1]
        with naming_failures(self._rows_path):
            for row, value in zip(rows, np.ascontiguousarray(values), strict=True):
                data, place = value.tobytes(), row * value.nbytes
                while data:  # a nearly full disk takes a part, and refuses the rest
                    written = os.pwrite(self._descriptor, data, place)
                    data, place = data[written:], place + written

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return the rows from `start` up to `stop`, (stop - start, D); rows never written are zero."""
        width = self.width or 0
        size = (stop - start) * width * 4
        data = os.pread(self._descriptor, size, start * width * 4).ljust(size, b"\0")
        return np.frombuffer(data, np.float32).reshape(stop - start, width)

    def advance(self, seen: int) -> None:
        """Note that the first `seen` rows of the input are done, and save that now and then."""
        self.seen = seen
        if time.monotonic() - self._saved > SECONDS_BETWEEN_SAVES:
            self.save()

    def save(self) -> None:
        """Make what is stored so far safe against a kill, and note how far it is."""
        os.fsync(self._descriptor)
        progress = {
            "identity": self.identity,
            "num_rows": self.num_rows,
            "num_bytes": os.fstat(self._descriptor).st_size,
            "seen": self.seen,
            "width": self.width,
            "rejects": [[row, rejection.reason, rejection.detail] for row, rejection in self.rejects.items()],
        }
        write_json(self._progress_path, progress)
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Remove the file and its note, once the output is complete."""
        remove(self._progress_path)
        remove(self._rows_path)

    def close(self) -> None:
        """Let go of the file, and remove it if there is nothing to go on from."""
        if self.seen == 0:
            self.remove()
        self._held.close()
