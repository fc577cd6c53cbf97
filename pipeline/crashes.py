"""Reject a picture whose decoder crashed an earlier run, instead of crashing on it again.

Each thread notes in a file what it decodes, and Python's faulthandler writes there which thread a fatal signal met: the
next run puts the two together. A killed process leaves notes too, but names no thread, so that nothing is rejected.
"""

import faulthandler
import functools
import itertools
import mmap
import os
import re
import struct
import threading
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from pipeline.errors import Rejection
from pipeline.log import logger
from pipeline.own_folders import discard, open_file

_Decoder = TypeVar("_Decoder", bound=Callable[..., Any])
# A thread, and the picture: its length, and sums of its first and last bytes, which cost less than one of all.
_NOTE = struct.Struct("=QQII")
_SUMMED = 4_096
# Threads that have a place of their own in the file; it lies in memory, as calls of the system would take turns.
_NUM_PLACES = 1_024
_SIZE = _NUM_PLACES * _NOTE.size
_THREAD = re.compile(r"^Current thread 0x([0-9a-f]+)", re.MULTILINE)


class _Notes:
    shared: mmap.mmap | None = None  # the file, while a stage runs
    crashed: ClassVar[set[tuple[int, int, int]]] = set()
    places: ClassVar[defaultdict[int, int]] = defaultdict(itertools.count().__next__)  # of each thread


def guarded(decode: _Decoder) -> _Decoder:
    """Have a decoder note its picture while a stage runs, and raise Rejection for one that crashed an earlier run."""

    @functools.wraps(decode)
    def guard(data: bytes, *arguments: Any, **options: Any) -> Any:
        shared = _Notes.shared
        if shared is None:
            return decode(data, *arguments, **options)
        picture = len(data), zlib.crc32(data[:_SUMMED]), zlib.crc32(data[-_SUMMED:])
        if picture in _Notes.crashed:
            raise Rejection("unreadable_image", "its decoder crashed an earlier run")
        thread = threading.get_ident()
        place = _Notes.places[thread] % _NUM_PLACES * _NOTE.size
        before = shared[place : place + _NOTE.size]  # of a decoder that calls this one
        _NOTE.pack_into(shared, place, thread, *picture)
        try:
            return decode(data, *arguments, **options)
        finally:
            shared[place : place + _NOTE.size] = before

    return cast("_Decoder", guard)


@contextmanager
def noting_decoders(log_path: Path | None) -> Iterator[None]:
    """Keep the notes beside a stage's log while the block runs, and read those of an earlier run that crashed."""
    if log_path is None or _Notes.shared is not None:
        yield
        return
    notes, fault, known = (log_path.with_name(f".{log_path.name}.{end}") for end in ("decoding", "fault", "crashed"))
    with ExitStack() as held:
        with suppress(OSError):  # without room for notes the stage runs all the same
            _Notes.crashed = _learn(notes, fault, known)
            for path in (notes, fault):
                discard(path)
                held.callback(discard, path)
            file = held.enter_context(open(open_file(fault, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb"))
            space = held.enter_context(open(open_file(notes, os.O_RDWR | os.O_CREAT | os.O_EXCL), "r+b", buffering=0))
            if space.write(bytes(_SIZE)) == _SIZE:  # a full disk fails here, not at a note
                _Notes.shared = mmap.mmap(space.fileno(), _SIZE)
                held.callback(setattr, _Notes, "shared", None)
                held.callback(faulthandler.disable)
                faulthandler.enable(file)
        yield


def _learn(notes: Path, fault: Path, known: Path) -> set[tuple[int, int, int]]:
    """Return the pictures that crashed earlier runs, and add that of the last one to those known."""
    listed = _read(known)
    if fault.is_file() and (thread := _THREAD.search(fault.read_text(encoding="utf-8", errors="replace"))):
        met = [note for note in _read(notes) if note[0] == int(thread[1], 16)]
        listed += met
        with open(open_file(known, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as file:
            file.writelines(_NOTE.pack(*note) for note in met)
        for _, length, *_ in met:
            logger.warning("an earlier run crashed on a picture of %d bytes, which is rejected now", length)
    return {note[1:] for note in listed}


def _read(path: Path) -> list[tuple[int, int, int, int]]:
    """Return the whole notes of a file, none if it is missing."""
    content = path.read_bytes() if path.is_file() else b""
    return list(_NOTE.iter_unpack(content[: len(content) // _NOTE.size * _NOTE.size]))
