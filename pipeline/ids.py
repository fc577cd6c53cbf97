"""The names that tie images, buildings and tars together, and the shards that cut the work."""

import os
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pipeline.errors import InputError, Rejection

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Every `count`-th unit of work, beginning with number `index`."""

    index: int = 0
    count: int = 1

    def take(self, units: list[T]) -> list[T]:
        return units[self.index :: self.count]


def decode_name(name: str) -> str:
    """Return a file's name as text: its bytes as UTF-8 whatever the locale, `\\xNN` for those that are none."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def reject_second(name: str, first: str) -> Rejection:
    """Return why an item is rejected where another one was first: that one wins."""
    return Rejection("duplicate_image_id", "a second member of this name" if first == name else f"{first} comes first")


def reject_repeated(key: Hashable, name: str, firsts: dict[Hashable, str]) -> Rejection | None:
    """Note a name under its key, and return why it is rejected if another one was first."""
    if key not in firsts:
        firsts[key] = name
        return None
    return reject_second(name, firsts[key])


def join_id(dataset_id: int, number: int) -> str:
    """Name a building or an image: a target and a patch are unique only within their dataset."""
    return f"{dataset_name(dataset_id)}_{number}"


def dataset_name(dataset_id: int) -> str:
    """Name a dataset as its outputs are named, without the suffix."""
    return f"{dataset_id:04d}"


def tar_name(dataset_id: int) -> str:
    """Name a dataset's raw tar; `parse_dataset_id` is the inverse."""
    return f"{dataset_name(dataset_id)}.tar"


def parse_dataset_name(name: str) -> int | None:
    """Return the id of the dataset of that name, None if it is no dataset's name."""
    return int(name) if name.isascii() and name.isdigit() else None


def parse_dataset_id(tar_path: Path) -> int:
    """Return the dataset id that a tar's name gives; raise InputError if it gives none."""
    dataset_id = parse_dataset_name(tar_path.stem)
    if dataset_id is None or tar_path.name != tar_name(dataset_id):
        raise InputError(f"{tar_path}: a raw tar must be named NNNN.tar after its dataset id: rename or move it")
    return dataset_id
