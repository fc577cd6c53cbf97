"""Rows of floats kept on disk while they are computed, so that an interrupted run goes on from there."""

import contextlib
import errno
import os
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import Rejection
from pipeline.log import logger
from pipeline.workspace import locked, naming_failures, open_file, read_json_object, remove, write_json

# How much work a killed node may lose, against a sync of the file each time.
SECONDS_BETWEEN_SAVES = 30.0


class RowScratch:
    """A hidden file of float32 rows beside an output, with a note of its progress; one process at a time holds it.

    Rows come in the order of the input (`seen` counts them) and are stored at their place in the output. No memory
    map: on a full disk that ends the process with SIGBUS.
    """

    def __init__(self, output_path: Path, identity: str) -> None:
        """Open an output's scratch, and go on from a run of the same `identity`; PipelineError if it is held."""
        hidden = output_path.with_name(f".{output_path.name}")
        self._rows_path, self._progress_path = (Path(f"{hidden}.{end}") for end in ("rows", "progress.json"))
        with contextlib.ExitStack() as held, naming_failures(self._rows_path):
            held.enter_context(locked(output_path, "is making it: wait for that one, or stop it and run this again"))
            self._descriptor = open_file(self._rows_path, os.O_RDWR | os.O_CREAT)
            held.callback(os.close, self._descriptor)
            self._held = held.pop_all()
        found, size = read_json_object(self._progress_path), os.fstat(self._descriptor).st_size
        if found.get("identity") == identity and size >= found["num_bytes"]:  # unless someone has removed the rows
            logger.info("%s: going on behind image %d", output_path.name, found["seen"])
        else:
            found = {"seen": 0, "width": None, "rejects": []}
            os.ftruncate(self._descriptor, 0)
        self.identity, self._saved = identity, time.monotonic()
        self.seen: int = found["seen"]
        self.width: int | None = found["width"]
        self.rejects = {row: Rejection(reason, detail) for row, reason, detail in found["rejects"]}

    def write(self, rows: list[int], values: NDArray[np.float32]) -> None:
        """Store values (len(rows), D) at their places; raise PipelineError if the disk is full."""
        self.width = values.shape[1]
        with naming_failures(self._rows_path):
            for row, value in zip(rows, np.ascontiguousarray(values), strict=True):
                if os.pwrite(self._descriptor, value, row * value.nbytes) < value.nbytes:  # a part of it has found room
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

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
        rejects = [[row, rejection.reason, rejection.detail] for row, rejection in self.rejects.items()]
        progress = {"identity": self.identity, "num_bytes": os.fstat(self._descriptor).st_size}
        write_json(self._progress_path, progress | {"seen": self.seen, "width": self.width, "rejects": rejects})
        self._saved = time.monotonic()

    def remove(self) -> None:
        remove(self._progress_path)
        remove(self._rows_path)

    def close(self) -> None:
        """Let go of the file, and remove it if there is nothing to go on from."""
        if self.seen == 0:
            self.remove()
        self._held.close()
