"""Decide whether an input is the one that an output was made from. No stage has a rule of its own.

An output's provenance records what its inputs hold: a parquet's footer, other files' digests. A note beside a tar's
intermediate says at which size and time of change the tar had which digest, so that it is read again only at others.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any

from pipeline.errors import DamagedError, InputError, PipelineError
from pipeline.files.listing import is_parquet
from pipeline.log import logger
from pipeline.workspace import open_without_waiting, read_json_object, write_json

# The most that the hub takes of one file; tars may be longer.
MOST_BYTES = 50_000_000_000


def identify(path: Path) -> dict[str, Any]:
    """Return a file's identity for provenance: name, size and a hash; raise InputError if it is missing.

    A parquet's is that of its footer, which has every column chunk's place and statistics, and the provenance.
    """
    try:
        content = {"footer": hash_footer(path)} if is_parquet(path) else {"hash": digest_file(path)}
        return {"name": path.name, "size": path.stat().st_size, **content}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: run the stage that writes it, or correct the path") from None


def identify_tar(path: Path, note: Path, *, read: bool = True) -> dict[str, Any]:
    """Return a tar's identity: its name, size and digest, noted or read.

    Without `read` the digest may be missing: stage 1 reads the tar anyway, and notes it.
    """
    seen, noted = look_at(path), read_json_object(note)
    digest = noted.get("digest") if noted.get("seen") == seen else None
    if digest is None and read:
        logger.info("%s: its time is not the recorded one: it is read to see what it holds", path.name)
        digest = note_digest(path, digest_file(path), seen, note)
    return {"name": path.name, "size": (seen or [0])[0], **({"digest": digest} if digest else {})}


def note_digest(path: Path, digest: str, seen: list[int] | None, note: Path) -> str:
    """Note the digest of a file, and return it; raise InputError if it has changed since it was `seen`."""
    if look_at(path) != seen:
        raise InputError(f"{path}: changed while it was read: run this again")
    with contextlib.suppress(PipelineError):  # it is read once more the next time
        write_json(note, {"seen": seen, "digest": digest})
    return digest


def look_at(path: Path) -> list[int] | None:
    """Return a file's size and time of change, None if there is none: where they are as recorded, the file is too."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # a zero byte in its name
        return None
    return [status.st_size, status.st_mtime_ns]


def hash_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def digest_file(path: Path) -> str:
    """Return the digest of a file; raise InputError for a sparse one of absurd length, which could take a day."""
    most = 2**30 if path.suffix in (".json", ".py") else MOST_BYTES
    with open_without_waiting(path) as file:
        if path.suffix != ".tar" and os.fstat(file.fileno()).st_size > most:
            raise InputError(f"{path}: over {most} bytes, which no model or list has: fetch or make it again")
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


class RunningDigest:
    """The digest of a file that someone else reads meanwhile, so that its bytes come from the system's cache."""

    def __init__(self, file: IO[bytes]) -> None:
        self._descriptor, self._hash, self._done = file.fileno(), hashlib.sha256(), 0

    def read_to(self, end: int) -> str:
        """Add the bytes before `end`, and return the digest of all that were added."""
        while self._done < end and (data := os.pread(self._descriptor, min(end - self._done, 2**20), self._done)):
            self._hash.update(data)
            self._done += len(data)
        return self._hash.hexdigest()[:32]


def hash_footer(path: Path) -> str:
    """Hash a parquet's Thrift footer, whose length stands in the last 8 bytes; raise DamagedError if there is none."""
    with open_without_waiting(path) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 8))
        tail = file.read(8)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != b"PAR1" or length > end - 12:
            raise DamagedError(f"{path}: not a readable parquet file (no footer): remove it and make it again")
        file.seek(end - 8 - length)
        return hashlib.sha256(file.read(length)).hexdigest()[:32]
