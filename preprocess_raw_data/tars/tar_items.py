"""Pair the members of a tar, in whatever order they come, and judge each pair."""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from pipeline.errors import Rejection, catch_rejection
from pipeline.files.archive import Member
from pipeline.ids import reject_repeated, reject_second
from preprocess_raw_data.tars.metadata import SUFFIX, ViewRecord, is_metadata_name, parse_metadata

Reject = tuple[str, Rejection]  # the item's name, and why

NOT_A_FILE = Rejection("not_a_file", "a link, a device, a pipe or a sparse file: nothing is followed")
UNSAFE_PATH = Rejection("unsafe_path", "absolute, or climbs with ..")
MISSING_IMAGE = Rejection("missing_image", "no image of this name")
MISSING_METADATA = Rejection("missing_metadata", f"no {SUFFIX} of this name")
SECOND_IMAGE = Rejection("duplicate_image_id", "a second image of this name")


@dataclass(frozen=True, slots=True)
class FoundImage:
    name: str
    offset: int
    size: int
    rejection: Rejection | None = None


@dataclass(frozen=True, slots=True)
class View:
    stem: str
    image: FoundImage
    record: ViewRecord


@dataclass(slots=True)
class Item:
    """All members that share one path without suffix."""

    is_unsafe: bool
    images: list[FoundImage] = field(default_factory=list)
    metadata_name: str | None = None
    metadata: ViewRecord | Rejection | None = None
    not_files: list[Member] = field(default_factory=list)


class TarInventory:
    def __init__(self) -> None:
        self.ignored: Counter[str] = Counter()
        self._repeated: list[Reject] = []
        self._items: dict[str, Item] = {}

    def wants(self, member: Member) -> bool:
        """Note a member, and return whether its bytes have to be read."""
        base_name = member.name.rpartition("/")[2]
        if member.isdir() or base_name.startswith("._") or not (member.is_image_name or is_metadata_name(member.name)):
            self.ignored["folders" if member.isdir() else "other members"] += 1
            return False
        item = self._find(member)
        if not member.is_file:
            item.not_files.append(member)
        elif member.is_image_name:
            if not item.is_unsafe:
                return True
            self.add_image(member, None)
        elif item.metadata_name is None:
            item.metadata_name = member.name
            return not item.is_unsafe
        else:
            self._repeated.append((member.name, reject_second(member.name, item.metadata_name)))
        return False

    def add_metadata(self, member: Member, data: bytes) -> None:
        self._find(member).metadata = catch_rejection(parse_metadata, data)

    def add_image(self, member: Member, rejection: Rejection | None) -> None:
        """Note an image, in the order of the tar, and why it cannot be used, if so."""
        item = self._find(member)
        if rejection is None and any(image.name == member.name for image in item.images):
            rejection = reject_second(member.name, member.name)
        item.images.append(FoundImage(member.name, member.offset_data, member.size, rejection))

    def _find(self, member: Member) -> Item:
        if member.stem not in self._items:
            climbs = ".." in PurePosixPath(member.name).parts
            self._items[member.stem] = Item(climbs or member.name.startswith("/"))
        return self._items[member.stem]

    def judge(self) -> tuple[list[View], list[Reject]]:
        judged = [judge_item(stem, item) for stem, item in self._items.items()]
        rejects = self._repeated + [reject for _, refused in judged for reject in refused]
        kept: list[View] = []
        firsts: dict[Hashable, str] = {}
        for view in sorted((view for view, _ in judged if view), key=lambda view: view.image.offset):
            if rejection := reject_repeated(view.record.patch_id, view.image.name, firsts):
                rejects.append((view.stem, rejection))
            else:
                kept.append(view)
        kept.sort(key=lambda view: view.record.patch_id)
        return kept, sorted(rejects, key=lambda reject: reject[0])


def judge_item(stem: str, item: Item) -> tuple[View | None, list[Reject]]:
    """Return an item's usable view, if any, and its rejects; the reasons are tested in a fixed order.

    Of several images with one stem the first usable one is the pair's. A pair is rejected under its stem, other members
    under their full names.
    """
    images, texts = [image.name for image in item.images], [item.metadata_name] if item.metadata_name else []
    links, rejects = [member.name for member in item.not_files], list[Reject]()
    if images and texts:  # the pair is whole without them
        links, rejects = [], [(name, NOT_A_FILE) for name in links]
    reasons: list[tuple[object, Rejection]] = [
        (links, NOT_A_FILE), (item.is_unsafe, UNSAFE_PATH), (not images, MISSING_IMAGE), (not texts, MISSING_METADATA),
    ]  # fmt: skip
    if isinstance(item.metadata, Rejection):
        reasons.append((True, item.metadata))
    if reason := next((reason for holds, reason in reasons if holds), None):
        images += [name for name in links if not is_metadata_name(name)]
        texts += [name for name in links if is_metadata_name(name)]
        if images and texts:
            images, texts = [stem, *images[1:]], texts[1:]
        return None, rejects + [(name, reason) for name in images + texts]
    assert isinstance(item.metadata, ViewRecord)  # every text that is not unsafe is read
    chosen = next((image for image in item.images if image.rejection is None), None)
    for image in item.images:
        if image is not chosen:
            is_pair = chosen is None and image is item.images[0]
            rejects.append((stem if is_pair else image.name, image.rejection or SECOND_IMAGE))
    return View(stem, chosen, item.metadata) if chosen else None, rejects
