"""Read a view's metadata file. For another format change this file alone: `SUFFIX` and `parse_metadata`."""

import re
from dataclasses import dataclass
from math import isfinite

from pipeline.errors import Rejection

SUFFIX = ".txt"
MAX_BYTES = 1 << 20  # read of a text; a real one has under 200 bytes
NUM_FIELDS = 17  # behind the d; shared by all releases of the dataset
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_ID = re.compile(r"([+-]?\d+)(\.0*)?", re.ASCII)
_MAX_ID = 2**63 - 1


@dataclass(frozen=True, slots=True)
class ViewRecord:
    """The ids, positions and camera of one view; degrees and metres."""

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


def is_metadata_name(name: str) -> bool:
    return name.lower().endswith(SUFFIX)


def parse_metadata(data: bytes) -> ViewRecord:
    """Return the first valid `d` line of a metadata text.

    Raises Rejection `bad_metadata` if there is none, with the fault of the first `d` line.
    """
    problem = None
    for line in data.decode("utf-8-sig", errors="replace").split("\n"):
        words = line.split()
        if words[:1] == ["d"]:
            try:
                return _parse_fields(words[1:])
            except ValueError as error:
                problem = problem or str(error)
    raise Rejection("bad_metadata", problem or "no line that begins with d")


def _parse_fields(words: list[str]) -> ViewRecord:
    if len(words) != NUM_FIELDS:
        raise ValueError(f"{len(words)} fields behind the d, expected {NUM_FIELDS}")
    numbers = [_parse_number(word) for word in words]
    for name, (latitude, longitude) in {"target": numbers[4:6], "street": numbers[10:12]}.items():
        if not (-90 <= latitude <= 90 and -180 <= longitude <= 180):
            raise ValueError(f"{name} position {latitude!r}, {longitude!r} is not on Earth")
    ids = [_parse_id(word) for word in words[:4]]
    return ViewRecord(*ids, *numbers[4:6], *numbers[10:12], *numbers[13:16])


def _parse_number(word: str) -> float:
    value = float(word) if _NUMBER.fullmatch(word) else float("nan")
    if not isfinite(value):
        raise ValueError(f"{word[:40]!r} is not a finite number")
    return value


def _parse_id(word: str) -> int:
    """Return an id, also of 12.0; floats from 2^53 on may be rounded ids, and 1.23457e+06 has lost its last digits."""
    whole = _ID.fullmatch(word)
    if not whole or abs(int(whole[1])) > (2**53 - 1 if whole[2] else _MAX_ID):
        raise ValueError(f"{word[:40]!r} is not an id")
    return int(whole[1])
