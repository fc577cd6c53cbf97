"""Reject a picture whose decoder crashed an earlier run, instead of crashing on it again.

Each thread notes in a file what it decodes, and faulthandler writes behind the notes which thread a fatal signal met:
the next run puts the two together. A killed process leaves notes too, but names no thread: nothing is rejected.
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
from pipeline.workspace import discard, open_file

_Decoder = TypeVar("_Decoder", bound=Callable[..., Any])
# A thread, 0 for a crash of an earlier run, and the picture: its length, and sums of its first and last bytes, which
# cost less than one of all.
_NOTE = struct.Struct("=QQII")
_SUMMED = 4_096
# Threads that have a place of their own in the file; it lies in memory, as calls of the system would take turns.
_NUM_PLACES = 1_024
_SIZE = _NUM_PLACES * _NOTE.size
_THREAD = re.compile(rb"^Current thread 0x([0-9a-f]+)", re.MULTILINE)


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
    path = log_path.with_name(f".{log_path.name}.decoding")
    with ExitStack() as held:
        with suppress(OSError):  # without room for notes the stage runs all the same
            _Notes.crashed = _learn(path)
            discard(path)
            file = held.enter_context(open(open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), "r+b", buffering=0))
            if not _Notes.crashed:
                held.callback(discard, path)
            known = b"".join(_NOTE.pack(0, *picture) for picture in _Notes.crashed)
            if file.write(known.ljust(_SIZE, b"\0")) == _SIZE:  # a full disk fails here, not at a note
                _Notes.places = defaultdict(itertools.count(len(_Notes.crashed)).__next__)
                _Notes.shared = mmap.mmap(file.fileno(), _SIZE)
                held.callback(setattr, _Notes, "shared", None)
                held.callback(faulthandler.disable)
                faulthandler.enable(file)
        yield


def _learn(path: Path) -> set[tuple[int, int, int]]:
    """Return the pictures that crashed earlier runs, of the last one that which its crashed thread decoded."""
    content = path.read_bytes() if path.is_file() else b""
    met = _THREAD.search(content, _SIZE)
    crashed = set()
    for thread, length, first, last in _NOTE.iter_unpack(content[:_SIZE] if len(content) >= _SIZE else b""):
        is_new = met is not None and thread == int(met[1], 16)
        if length and (is_new or thread == 0):
            crashed.add((length, first, last))
        if is_new:
            logger.warning("an earlier run crashed on a picture of %d bytes, which is rejected now", length)
    return crashed
