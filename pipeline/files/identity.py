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


def identify_files(name: str, files: Mapping[str, Path], notes: Sequence[Path], *, read: bool = True) -> dict[str, Any]:
    """Return the identity of files together, such as a tar or the photographs of a folder, each under its name.

    The first of `notes` that knows them at these times gives the digest; else they are read, and the first note is
    written. Without `read` the digest may be missing: for an output that is not there yet, whose maker reads the files
    anyway and gives their digests to `note_digests`. Raises InputError if a file is missing.
    """
    stamp, size = _stamp(files)
    digest = next((note["digest"] for note in map(read_json_object, notes) if note.get("stamp") == stamp), None)
    if digest is None and read:
        logger.info("%s: its time is not the recorded one: %d bytes are read to see what it holds", name, size)
        digests = {key: digest_file(path) for key, path in files.items()}
        if _stamp(files)[0] != stamp:
            raise InputError(f"{name}: changed while it was read: run this again")
        digest = note_digests(files, digests, notes)
    return {"name": name, "size": size, **({"digest": digest} if digest else {})}


def note_digests(files: Mapping[str, Path], digests: Mapping[str, str], notes: Sequence[Path]) -> str:
    """Return the digest of files together from each one's own; note it, with the times that they have now."""
    digest = hash_json(sorted(digests.items()))
    with contextlib.suppress(PipelineError):  # the files are read once more the next time
        write_json(notes[0], {"stamp": _stamp(files)[0], "digest": digest})
    return digest


def look_at(path: Path) -> list[int] | None:
    """Return a file's size and time of change, None if there is none: where they are as recorded, the file is too."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # a zero byte in its name
        return None
    return [status.st_size, status.st_mtime_ns]


def _stamp(files: Mapping[str, Path]) -> tuple[str, int]:
    """Return a hash of the names, sizes and times of change of files, and the sum of their sizes."""
    found, size = [], 0
    for name, path in sorted(files.items()):
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}): correct the path") from None
        found.append([name, status.st_size, status.st_mtime_ns])
        size += status.st_size
    return hash_json(found), size


def hash_json(content: Any) -> str:
    """Return a short hash of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def digest_file(path: Path) -> str:
    """Return the digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


class DigestingFile(io.BufferedReader):
    """A file that knows its digest once it was read from its beginning on; what is passed over is read too."""

    def __init__(self, path: Path) -> None:
        self._digested = _DigestedBytes(path)
        super().__init__(self._digested)
        self._seen, self._path = look_at(path), path

    def digest(self) -> str:
        """Read what is left, and return the digest of the whole file.

        Raises InputError if the file has changed since it was opened.
        """
        self.seek(0, os.SEEK_END)
        self._digested.read_to(self.tell())
        if look_at(self._path) != self._seen:
            raise InputError(f"{self._path}: changed while it was read: run this again")
        return self._digested.hash.hexdigest()[:32]


class _DigestedBytes(io.RawIOBase):
    """Adds all bytes to a hash in their order, whatever is asked for: buffering above spares a call for each read."""

    def __init__(self, path: Path) -> None:
        self._file, self.name, self.hash = io.FileIO(path), str(path), hashlib.sha256()
        self._place = self._done = 0  # of the next read, and where the hash ends

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = self._file.seek(offset, whence)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        self.read_to(self._place)
        count = self._file.readinto(buffer)
        self._add(memoryview(buffer)[:count][self._done - self._place :], self._place + count)
        self._place += count
        return count

    def read_to(self, end: int) -> None:
        """Add the bytes before `end` that were passed over."""
        while self._done < end and (data := os.pread(self._file.fileno(), min(end - self._done, 2**20), self._done)):
            self._add(data, self._done + len(data))

    def _add(self, data: bytes | memoryview, end: int) -> None:
        if end > self._done:
            self.hash.update(data)
            self._done = end

    def close(self) -> None:
        self._file.close()
        super().close()


# ------------------------------------------------------------------------------------------------ parquet


def hash_footer(path: Path) -> str:
    """Hash the Thrift footer of a parquet."""
    return hashlib.sha256(read_footer(path)).hexdigest()[:32]


def read_footer(path: Path) -> bytes:
    """Return the Thrift footer of a parquet; its length stands in the last 8 bytes (Parquet's file format).

    Raises DamagedError if there is none.
    """
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 8))
        tail = file.read(8)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != b"PAR1" or length > end - 12:
            raise DamagedError(f"{path}: not a readable parquet file (no footer): remove it and make it again")
        file.seek(end - 8 - length)
        return file.read(length)


# ------------------------------------------------------------------------------------------------ comparing


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
    old_inputs = {item["name"]: item for item in old.get("inputs", [])}
    new_inputs = {item["name"]: item for item in new.get("inputs", [])}
    for name in sorted(old_inputs.keys() | new_inputs.keys()):
        if name not in old_inputs:
            return f"input {name} was not among its inputs"
        if name not in new_inputs:
            if not name.endswith(".tar"):
                return f"input {name} is gone"
        elif old_inputs[name] != new_inputs[name]:
            return f"input {name} has changed"
    return None
