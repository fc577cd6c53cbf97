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
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import ClassVar, Concatenate, ParamSpec, TypeVar

from pipeline.errors import Rejection
from pipeline.log import logger
from pipeline.own_folders import discard, open_file

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
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
    places = itertools.count()
    own = threading.local()


def guarded(
    decode: Callable[Concatenate[bytes, _Arguments], _Result],
) -> Callable[Concatenate[bytes, _Arguments], _Result]:
    """Have a decoder note its picture while a stage runs, and raise Rejection for one that crashed an earlier run."""

    @functools.wraps(decode)
    def guard(data: bytes, /, *arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        own, shared = _Notes.own, _Notes.shared
        if shared is None or getattr(own, "is_noted", False):  # or a decoder that another one calls
            return decode(data, *arguments, **options)
        picture = len(data), zlib.crc32(data[:_SUMMED]), zlib.crc32(data[-_SUMMED:])
        if picture in _Notes.crashed:
            raise Rejection("unreadable_image", "its decoder crashed an earlier run")
        if not hasattr(own, "place"):
            own.place = next(_Notes.places) % _NUM_PLACES * _NOTE.size
        _NOTE.pack_into(shared, own.place, threading.get_ident(), *picture)
        own.is_noted = True
        try:
            return decode(data, *arguments, **options)
        finally:
            own.is_noted = False
            _NOTE.pack_into(shared, own.place, 0, 0, 0, 0)

    return guard


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
            file = held.enter_context(open(open_file(fault, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb"))
            descriptor = open_file(notes, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            held.callback(os.close, descriptor)
            if os.write(descriptor, bytes(_SIZE)) == _SIZE:  # a full disk fails here, not at a note
                _Notes.shared = mmap.mmap(descriptor, _SIZE)
                held.callback(_stop, notes, fault, is_enabled=faulthandler.is_enabled())
                faulthandler.enable(file)
        yield


def _stop(*paths: Path, is_enabled: bool) -> None:
    faulthandler.disable()
    if is_enabled and sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)
    _Notes.shared = None
    for path in paths:
        discard(path)


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
