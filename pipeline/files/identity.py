"""Decide whether an input is the one that an output was made from. No stage has a rule of its own.

An output's provenance records what its inputs hold: a parquet's footer, other files' digests. A note beside the output
says at which sizes and times of change which files had which digest, so that files are read again only at other times.
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import DamagedError, InputError, PipelineError
from pipeline.files.listing import is_parquet
from pipeline.files.workspace import read_json_object, write_json
from pipeline.log import logger
from pipeline.own_folders import open_without_waiting


def identify(path: Path) -> dict[str, Any]:
    """Return a file's identity for provenance: name, size and a hash, for parquet of its footer.

    A footer has every column chunk's place and statistics, and the provenance. Raises InputError if the file is missing
    or damaged.
    """
    try:
        identity: dict[str, Any] = {"name": path.name, "size": path.stat().st_size}
        if is_parquet(path):
            identity["footer"] = hash_footer(path)
        else:
            identity["hash"] = digest_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: run the stage that writes it, or correct the path") from None
    return identity


def identify_tar(path: Path, notes: Sequence[Path], *, read: bool = True) -> dict[str, Any]:
    """Return a tar's identity: its name, size and digest.

    The first of `notes` that knows it at this size and time gives the digest; else the tar is read, and the first note
    is written. Without `read` the digest may be missing: stage 1 reads the tar anyway, and notes it.
    """
    seen = look_at(path)
    digest = next((note["digest"] for note in map(read_json_object, notes) if note.get("seen") == seen), None)
    if digest is None and read:
        logger.info("%s: its time is not the recorded one: it is read to see what it holds", path.name)
        digest = note_digest(path, digest_file(path), seen, notes)
    return {"name": path.name, "size": (seen or [0])[0], **({"digest": digest} if digest else {})}


def note_digest(path: Path, digest: str, seen: list[int] | None, notes: Sequence[Path]) -> str:
    """Note the digest of a file that was `seen` (see `look_at`) before it was read, and return it.

    Raises InputError if the file has changed since.
    """
    if look_at(path) != seen:
        raise InputError(f"{path}: changed while it was read: run this again")
    with contextlib.suppress(PipelineError):  # it is read once more the next time
        write_json(notes[0], {"seen": seen, "digest": digest})
    return digest


def look_at(path: Path) -> list[int] | None:
    """Return a file's size and time of change, None if there is none: where they are as recorded, the file is too."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # a zero byte in its name
        return None
    return [status.st_size, status.st_mtime_ns]


def hash_json(content: Any) -> str:
    """Return a short hash of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def digest_file(path: Path) -> str:
    """Return the digest of a file's content."""
    with open_without_waiting(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


class DigestingFile(io.FileIO):
    """A file that is hashed while it is read, in the order of its bytes; what is passed over is read too."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._hash, self._done = hashlib.sha256(), 0

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer, for a BufferedReader above."""
        place = self.tell()
        self._hash_until(place)
        count = super().readinto(buffer) or 0
        if place + count > self._done:
            self._hash.update(memoryview(buffer)[self._done - place : count])
            self._done = place + count
        return count

    def digest(self) -> str:
        """Read what is left, and return the digest of the whole file."""
        self._hash_until(os.fstat(self.fileno()).st_size)
        return self._hash.hexdigest()[:32]

    def _hash_until(self, end: int) -> None:
        while self._done < end and (data := os.pread(self.fileno(), min(end - self._done, 2**20), self._done)):
            self._hash.update(data)
            self._done += len(data)


# ------------------------------------------------------------------------------------------------ parquet


def hash_footer(path: Path) -> str:
    """Hash the Thrift footer of a parquet."""
    return hashlib.sha256(read_footer(path)).hexdigest()[:32]


def read_footer(path: Path) -> bytes:
    """Return the Thrift footer of a parquet; its length stands in the last 8 bytes (Parquet's file format).

    Raises DamagedError if there is none.
    """
    with open_without_waiting(path) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 8))
        tail = file.read(8)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != b"PAR1" or length > end - 12:
            raise DamagedError(f"{path}: not a readable parquet file (no footer): remove it and make it again")
        file.seek(end - 8 - length)
        return file.read(length)


# ------------------------------------------------------------------------------------------------ comparing


def as_provenance(content: Any) -> dict[str, Any] | None:
    """Return what stands where provenance is kept, None if it has not the shape of this project's."""
    if not isinstance(content, dict):
        return None
    parts = {"inputs": list, "settings": dict, "counts": dict, "reasons": dict}
    is_shaped = all(isinstance(content.get(key, kind()), kind) for key, kind in parts.items())
    return content if is_shaped and all(isinstance(one, dict) for one in content.get("inputs", [])) else None


def describe_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Name the first difference of two provenances in stage, settings or inputs; None if they agree.

    A tar that is gone is no difference.
    """
    if old.get("stage") != new.get("stage"):
        return f"it was made by {old.get('stage')}"
    for key in sorted(set(old.get("settings", {})) | set(new.get("settings", {}))):
        before, after = (one.get("settings", {}).get(key) for one in (old, new))
        if before != after:
            return f"{key} was {before!r} and is now {after!r}"
    old_inputs, new_inputs = ({str(item.get("name")): item for item in one.get("inputs", [])} for one in (old, new))
    for name in sorted(old_inputs.keys() | new_inputs.keys()):
        if name not in old_inputs:
            return f"input {name} was not among its inputs"
        if name not in new_inputs:
            if not name.endswith(".tar"):
                return f"input {name} is gone"
        elif old_inputs[name] != new_inputs[name]:
            return f"input {name} has changed"
    return None
