"""The usable pairs of a tar, kept in a temporary database, so that memory does not grow with the tar."""

import sqlite3
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

from pipeline.errors import PipelineError, Rejection


@dataclass(frozen=True, slots=True)
class ViewRecord:
    """What the `d` line says of a view, as far as the pipeline keeps it; degrees and metres."""

    dataset_id: int
    target_id: int
    patch_id: int
    street_view_id: int
    target_lat: float
    target_lon: float
    street_lat: float
    street_lon: float
    distance_m: float
    heading: float
    pitch: float


@dataclass(frozen=True, slots=True)
class FoundImage:
    """An image member: which of the tar's images it is, where it lies, and why it cannot be used, if so."""

    order: int
    name: str
    offset: int
    size: int
    rejection: Rejection | None = None


@dataclass(frozen=True, slots=True)
class View:
    """A usable pair."""

    stem: str
    image: FoundImage
    record: ViewRecord


_IMAGE = ("order", "name", "offset", "size")
_RECORD = tuple(field.name for field in fields(ViewRecord))
# Columns without a type keep every number as it is.
_COLUMNS = ("stem", "metadata_name", *(f"image_{name}" for name in _IMAGE), *_RECORD)
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM views"
_CACHE_KIB = 16 * 1024

Stored = tuple[View, str]  # with the name of its metadata


class ViewStore:
    """Views by stem and, once all are there, by patch id."""

    def __init__(self) -> None:
        # Without a name the database lies in the temporary folder, and goes with the process however that ends.
        self._base = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        weakref.finalize(self, self._base.close)
        for command in (
            "PRAGMA journal_mode = OFF",
            f"PRAGMA cache_size = -{_CACHE_KIB}",
            f"CREATE TABLE views ({', '.join(_COLUMNS)}, PRIMARY KEY (stem)) WITHOUT ROWID",
            "BEGIN",
        ):
            self._base.execute(command)

    def __len__(self) -> int:
        return int(self._base.execute("SELECT COUNT(*) FROM views").fetchone()[0])

    def __iter__(self) -> Iterator[View]:
        """Yield the views by patch id."""
        with _writing():
            for row in self._base.execute(_SELECT + " ORDER BY patch_id, image_order"):
                yield _unpack(row)[0]

    def add(self, view: View, metadata_name: str) -> None:
        """Keep a view; its stem is not there yet."""
        image = [getattr(view.image, name) for name in _IMAGE]
        row = [view.stem, metadata_name, *image, *(getattr(view.record, name) for name in _RECORD)]
        with _writing():
            self._base.execute(f"INSERT INTO views VALUES ({', '.join('?' * len(row))})", row)

    def pop(self, stem: str) -> Stored | None:
        """Return the view of a stem and the name of its metadata, and forget it; None where there is none."""
        with _writing():
            row = self._base.execute(_SELECT + " WHERE stem = ?", (stem,)).fetchone()
            if row is None:
                return None
            self._base.execute("DELETE FROM views WHERE stem = ?", (stem,))
        return _unpack(row)

    def pop_repeated(self) -> Iterator[tuple[View, View]]:
        """Forget and yield every view whose patch id an earlier image of the tar has, with that earlier one."""
        several = "SELECT patch_id FROM views GROUP BY patch_id HAVING COUNT(*) > 1"
        with _writing():
            rows = self._base.execute(
                f"{_SELECT} WHERE patch_id IN ({several}) ORDER BY patch_id, image_order"
            ).fetchall()
        for _, alike in groupby((_unpack(row)[0] for row in rows), key=lambda view: view.record.patch_id):
            first, *others = alike
            for view in others:
                self.pop(view.stem)
                yield view, first


def _unpack(row: tuple[Any, ...]) -> Stored:
    stem, metadata_name, *values = row
    image, record = values[: len(_IMAGE)], values[len(_IMAGE) :]
    return View(stem, FoundImage(*image), ViewRecord(*record)), metadata_name


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise PipelineError(
            f"the temporary folder cannot take the list of a tar's images ({error}): free space there or set TMPDIR, "
            "then run this again"
        ) from error
