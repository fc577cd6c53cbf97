"""Pair the members of a tar, in whatever order they come, and judge each pair."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite

from pipeline.errors import Rejection
from pipeline.files.archive import Member
from preprocess_raw_data.tars.views import FoundImage, View, ViewRecord, ViewStore

NUM_FIELDS = 17  # behind the d; shared by all releases of the dataset
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_MAX_ID = 2**63 - 1

Reject = tuple[str, Rejection]  # the item's name, and why


@dataclass(slots=True)
class Item:
    """All members that share one path without suffix."""

    is_unsafe: bool
    images: list[FoundImage] = field(default_factory=list)
    metadata_name: str | None = None
    metadata: ViewRecord | Rejection | None = None
    not_files: list[Member] = field(default_factory=list)


def parse_metadata(data: bytes) -> ViewRecord:
    """Read the first valid `d` line of a metadata text.

    Raises Rejection `bad_metadata` where there is none, saying what is wrong with the first `d` line.
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
    """Read the numbers behind the `d`; the ValueError says which is wrong."""
    if len(words) != NUM_FIELDS:
        raise ValueError(f"{len(words)} fields behind the d, expected {NUM_FIELDS}")
    numbers = [_parse_number(word) for word in words]
    for name, (latitude, longitude) in {"target": numbers[4:6], "street": numbers[10:12]}.items():
        if not (-90 <= latitude <= 90 and -180 <= longitude <= 180):
            raise ValueError(f"{name} position {latitude:g}, {longitude:g} is not on Earth")
    dataset_id, target_id, patch_id, street_view_id = (_parse_id(word) for word in words[:4])
    target_lat, target_lon = numbers[4:6]
    street_lat, street_lon = numbers[10:12]
    distance_m, heading, pitch = numbers[13:16]
    return ViewRecord(
        dataset_id, target_id, patch_id, street_view_id,
        target_lat, target_lon, street_lat, street_lon, distance_m, heading, pitch,
    )  # fmt: skip


def _parse_number(word: str) -> float:
    value = float(word) if _NUMBER.fullmatch(word) else float("nan")
    if not isfinite(value):
        raise ValueError(f"{word[:40]!r} is not a finite number")
    return value


def _parse_id(word: str) -> int:
    """Read an id, also one that is written as 12.0."""
    value = int(word) if word.lstrip("+-").isdecimal() else float(word)
    if value != int(value) or abs(value) > _MAX_ID:
        raise ValueError(f"{word[:40]!r} is not an id")
    return int(value)


class TarInventory:
    """Gathers a tar's members into items."""

    def __init__(self) -> None:
        self.ignored: Counter[str] = Counter()
        self._items: dict[str, Item] = {}  # those that are no view yet, or more than one
        self._views = ViewStore()
        self._num_images = 0

    def wants(self, member: Member) -> bool:
        """Note a member, and return whether its bytes have to be read."""
        base_name = member.name.rpartition("/")[2]
        if member.is_folder:
            self.ignored["folders"] += 1
            return False
        if base_name.startswith("._") or not (member.is_image_name or member.is_metadata_name):
            self.ignored["other members"] += 1
            return False
        item = self._find(member)
        if not member.is_file:
            item.not_files.append(member)
        elif member.is_image_name:
            if not item.is_unsafe:
                return True
            self.add_image(member, None)
        elif item.metadata_name is not None:
            self.ignored["repeated metadata"] += 1
        else:
            item.metadata_name = member.name
            return not item.is_unsafe
        return False

    def add_metadata(self, member: Member, data: bytes) -> None:
        """Note what a metadata text says."""
        item = self._find(member)
        try:
            item.metadata = parse_metadata(data)
        except Rejection as rejection:
            item.metadata = rejection
        self._settle(member.stem, item)

    def add_image(self, member: Member, rejection: Rejection | None) -> None:
        """Note an image and why it cannot be used, if so; images come in the order of the tar."""
        item = self._find(member)
        if any(image.name == member.name for image in item.images):
            rejection = rejection or Rejection("duplicate_image_id", "a second member of this name")
        item.images.append(FoundImage(self._num_images, member.name, member.offset, member.size, rejection))
        self._num_images += 1
        self._settle(member.stem, item)

    def _find(self, member: Member) -> Item:
        """Return a member's item, taken back from the views where it was one already."""
        item = self._items.get(member.stem)
        if item is None:
            item = self._items[member.stem] = Item(member.has_unsafe_path)
            if (stored := self._views.pop(member.stem)) is not None:
                view, item.metadata_name = stored
                item.images, item.metadata = [view.image], view.record
        return item

    def _settle(self, stem: str, item: Item) -> None:
        """Move an item that is one sound pair, which most are, to the views on disk."""
        if len(item.images) != 1 or item.images[0].rejection is not None or item.not_files or item.is_unsafe:
            return
        if isinstance(item.metadata, ViewRecord):
            self._views.add(View(stem, item.images[0], item.metadata), item.metadata_name or "")
            del self._items[stem]

    def judge(self) -> tuple[ViewStore, list[Reject]]:
        """Return the usable views by patch id, and the rejects by name."""
        rejects: list[Reject] = []
        for stem, item in self._items.items():
            view, refused = judge_item(stem, item)
            if view:
                self._views.add(view, item.metadata_name or "")
            rejects += refused
        self._items.clear()
        for view, first in self._views.pop_repeated():
            detail = f"patch {view.record.patch_id} is also {first.image.name}, which comes first"
            rejects.append((view.stem, Rejection("duplicate_image_id", detail)))
        return self._views, sorted(rejects, key=lambda reject: reject[0])


def judge_item(stem: str, item: Item) -> tuple[View | None, list[Reject]]:
    """Return an item's view, if it has a usable one, and what of it is rejected, tested in the contract's order.

    Where several images share the stem, each is judged with the metadata, and the first usable one is the pair's.
    """
    rejects: list[Reject] = []
    if item.not_files:
        reason = Rejection("not_a_file", "a link, a device, a pipe or a sparse file: nothing is followed")
        if not (item.images and item.metadata_name):
            return None, list(_reject_all(stem, item, reason))
        rejects = [(member.name, reason) for member in item.not_files]
        item.not_files = []
    if item.is_unsafe:
        return None, rejects + list(_reject_all(stem, item, Rejection("unsafe_path", "absolute, or climbs with ..")))
    if not item.images:
        return None, [*rejects, (item.metadata_name or stem, Rejection("missing_image", "no image of this name"))]
    if item.metadata_name is None:
        reason = Rejection("missing_metadata", "no .txt of this name")
        return None, rejects + [(image.name, reason) for image in item.images]
    if not isinstance(item.metadata, ViewRecord):
        assert item.metadata is not None  # every text that is not unsafe is read
        return None, rejects + list(_reject_all(stem, item, item.metadata))
    return _choose_image(stem, item.images, item.metadata, rejects)


def _choose_image(
    stem: str, images: list[FoundImage], record: ViewRecord, rejects: list[Reject]
) -> tuple[View | None, list[Reject]]:
    """Take the first usable image; the others are rejected by their full names, as no part of the pair."""
    chosen = next((image for image in images if image.rejection is None), None)
    pair = chosen or images[0]
    second = Rejection("duplicate_image_id", "a second image of this name")
    for image in images:
        if image is not chosen:
            rejects.append((stem if image is pair else image.name, image.rejection or second))
    return View(stem, chosen, record) if chosen else None, rejects


def _reject_all(stem: str, item: Item, reason: Rejection) -> Iterator[Reject]:
    """Reject all of an item: the pair under its stem, whatever is left over under its own name."""
    images = [image.name for image in item.images] + [m.name for m in item.not_files if m.is_image_name]
    texts = [item.metadata_name] if item.metadata_name else []
    texts += [member.name for member in item.not_files if member.is_metadata_name]
    if images and texts:
        yield stem, reason
        images, texts = images[1:], texts[1:]
    for name in images + texts:
        yield name, reason
