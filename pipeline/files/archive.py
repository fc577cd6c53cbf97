"""Stream a raw tar, member by member, in constant memory; nothing is extracted to disk."""

import contextlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from pipeline.errors import InputError, Rejection, one_line, unreadable
from pipeline.files.identity import RunningDigest
from pipeline.log import logger
from pipeline.workspace import open_without_waiting

IMAGE_SUFFIXES = (".jpg", ".jpeg")
# No 100-megapixel JPEG, PNG or WebP of a camera comes near this; of larger members no more is read.
MAX_IMAGE_BYTES = 256 * 1024**2
# tar pads to its record, 10 KiB by default; with the largest that tape drives take it stays below this.
MAX_PADDING_BYTES = 1 << 20
# Names of any length and what else stands in a header before a member; the module reads it as a whole.
_LONG_HEADERS = b"xgXLK"  # the types of POSIX, Solaris and GNU
MAX_HEADER_BYTES = 1 << 20


class Member(tarfile.TarInfo):
    """One entry of a tar, with a header of bounded size."""

    file: IO[bytes]  # the tar

    def _proc_member(self, tar: tarfile.TarFile) -> "Member":
        if self.type in _LONG_HEADERS and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes at byte {self.offset}")
        found: Member = super()._proc_member(tar)  # type: ignore[misc]
        found.file = tar.fileobj  # type: ignore[assignment]
        return found

    @property
    def is_file(self) -> bool:
        """Whether this is a file in one piece: a sparse one's bytes lie apart."""
        return self.isreg() and not self.issparse()

    def read(self, limit: int = MAX_IMAGE_BYTES) -> bytes:
        """Return the member's first `limit` bytes; raise InputError if the tar ends before."""
        wanted = min(self.size, limit)
        try:
            self.file.seek(self.offset_data)
            data = self.file.read(wanted)
        except OSError as error:
            raise unreadable(self.file.name, error) from None
        if len(data) < wanted:
            raise InputError(f"{self.file.name}: truncated inside {self.name}: fetch the tar again")
        return data

    @property
    def is_image_name(self) -> bool:
        return self.name.lower().endswith(IMAGE_SUFFIXES)

    @property
    def stem(self) -> str:
        """The path without its suffix, equal for an image and its metadata."""
        return self.name.rpartition(".")[0]


def stream_members(tar_path: Path, digests: list[str] | None = None) -> Iterator[Member]:
    """Yield the members of a plain tar in their order; bytes of a name that are not UTF-8 become `\\xNN`.

    In the end the tar's digest is added to `digests`, if they are given.

    Raises InputError if the tar is missing, empty, not a tar, damaged or truncated. The standard library takes a
    damaged header, or a cut between two members, for the end; here only an end-of-archive block ends a tar.
    """
    try:
        with (
            open_without_waiting(tar_path) as file,
            # The encoding is named, or a name would read differently under another locale.
            tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace", tarinfo=Member) as tar,
        ):
            digest = RunningDigest(file)
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # the module would keep every member
                if info.size < 0:  # older Pythons would go backwards for ever
                    raise tarfile.ReadError(f"negative size at byte {info.offset}")
                yield info  # type: ignore[misc]
                if digests is not None:
                    digest.read_to(tar.offset)
            _check_end(tar_path, file, tar.offset)
            if digests is not None:
                digests.append(digest.read_to(os.fstat(file.fileno()).st_size))
    except (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        # Also absurd sizes, and headers of headers without end.
        with open_without_waiting(tar_path) as file:
            start = file.read(16)
        problem = f"not a readable tar ({one_line(error)}), it begins with {start!r}"
        raise InputError(f"{tar_path}: {problem}: fetch the tar again, or unpack it if it is compressed") from None
    except OSError as error:
        raise unreadable(tar_path, error) from None


class TarImage(NamedTuple):
    row: int
    name: str
    data: bytes


def read_images(tar_path: Path, rows: dict[str, int], num_seen: int = 0) -> Iterator[TarImage]:
    """Yield the images that `rows` names, except the first `num_seen`, and remove each one found from `rows`.

    Of two files of one name the first is the image that stage 1 accepted. Raises InputError if the tar is damaged.
    """
    found = 0
    for member in stream_members(tar_path):
        row = rows.pop(member.name, None) if member.is_file else None
        if row is not None:
            found += 1
            if found > num_seen:
                yield TarImage(row, member.name, member.read())


def read_placed(tar_path: Path, offset: int, size: int) -> bytes:
    """Return the bytes of a member of a tar; raise Rejection `missing_image` where none of that size begins there."""
    if not 0 < size <= MAX_IMAGE_BYTES or offset < tarfile.BLOCKSIZE:
        raise Rejection("missing_image", "no place is known")
    with open_without_waiting(tar_path) as file:
        file.seek(offset - tarfile.BLOCKSIZE)
        header = file.read(tarfile.BLOCKSIZE)
        data = file.read(size)
    with contextlib.suppress(tarfile.HeaderError):
        if tarfile.TarInfo.frombuf(header, "utf-8", "backslashreplace").size == len(data) == size:
            return data
    raise Rejection("missing_image", f"not at byte {offset} any more")


def _check_end(tar_path: Path, file: IO[bytes], offset: int) -> None:
    """Raise InputError unless the tar ends at `offset`, with a block of zeros and nothing but zeros behind it.

    Tars joined by cat, and a download whose middle was never written, have members behind it.
    """
    file.seek(offset)
    end = file.read(tarfile.BLOCKSIZE)  # two blocks end a tar; some writers leave out the second
    if len(end) < tarfile.BLOCKSIZE or any(end):
        raise InputError(f"{tar_path}: truncated or damaged at byte {offset}: fetch the tar again")
    num_zeros = len(end)
    while chunk := file.read(1 << 20):
        if data := chunk.lstrip(b"\0"):
            place = offset + num_zeros + len(chunk) - len(data)
            raise InputError(
                f"{tar_path}: data behind the end of the archive, at byte {place} (the end is at byte {offset}): fetch "
                "the tar again, or, if it was put together from several, make one with tar --concatenate"
            )
        num_zeros += len(chunk)
    if num_zeros > MAX_PADDING_BYTES:
        logger.warning(
            "%s: %d bytes of zeros behind its last member, more than padding explains: was it fetched to its end? "
            "Compare its size with the source's",
            tar_path, num_zeros,
        )  # fmt: skip
