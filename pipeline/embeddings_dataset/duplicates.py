"""Find images that are the same byte for byte under different ids, such as the grey tile for "no imagery"."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.embeddings_dataset.hashes import unpack_hashes
from pipeline.embeddings_dataset.parts import read_hashes, read_ids

# Images whose hashes are held at a time (16 bytes each, and as much again to sort them); more take several passes.
IMAGES_PER_PASS = 16_000_000
NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Duplicates:
    """How many images are shared by different ids, how many pictures these are, and the most frequent of them.

    `examples` holds (number of images, an id, another id).
    """

    num_images: int
    num_pictures: int
    examples: list[tuple[int, str, str]]

    def describe(self) -> str:
        """Say it in one line."""
        examples = "; ".join(f"{count} times, among them {one} and {other}" for count, one, other in self.examples)
        return (
            f"{self.num_images} images are byte for byte the same as an image of another OSMID "
            f"({self.num_pictures} pictures): {examples}: is one of them a placeholder for missing imagery?"
        )


def find_duplicates(part_paths: Sequence[Path], num_images: int, images_per_pass: int = IMAGES_PER_PASS) -> Duplicates:
    """Count the images that occur under several ids, in parts that hold `num_images` together.

    Images are told apart by 64-bit hashes: among 25 million, two different ones share one with a chance of 2e-5.
    """
    num_passes = max(1, -(-num_images // images_per_pass))
    num_shared = num_pictures = 0
    largest: list[_Group] = []
    for remainder in range(num_passes):
        groups = _find_groups(part_paths, num_passes, remainder)
        num_shared += sum(group[0] for group in groups)
        num_pictures += len(groups)
        largest = sorted(largest + groups, key=lambda group: (-group[0], group[1]))[:NUM_EXAMPLES]
    examples = [(count, _name(part_paths, one), _name(part_paths, other)) for count, one, other in largest]
    return Duplicates(num_shared, num_pictures, examples)


# How many images are the same, and two places where they lie: (number of the part, row in it).
_Group = tuple[int, tuple[int, int], tuple[int, int]]


def _find_groups(part_paths: Sequence[Path], num_passes: int, remainder: int) -> list[_Group]:
    """Return the groups of equal images under several ids, among the images whose hash leaves `remainder`.

    The places are the group's first, and the first under another id.
    """
    hashes, places = [], []
    for number, path in enumerate(part_paths):
        pairs = unpack_hashes(read_hashes(path))
        rows = np.flatnonzero(pairs[0] % np.uint64(num_passes) == remainder)
        hashes.append(pairs[:, rows])
        places.append(np.stack([np.full(len(rows), number), rows]).astype(np.int64))
    images, ids = np.concatenate(hashes, axis=1)  # (N,) each
    place = np.concatenate(places, axis=1)  # (2, N)
    order = np.lexsort((ids, images))  # stable: within an id, in input order
    images, ids, place = images[order], ids[order], place[:, order]
    bounds = np.flatnonzero(np.r_[True, images[1:] != images[:-1], True]) if len(images) else np.zeros(1, dtype=int)
    shared = ids[bounds[:-1]] != ids[bounds[1:] - 1]
    groups = []
    for start, end in zip(bounds[:-1][shared], bounds[1:][shared], strict=True):
        firsts = start + np.flatnonzero(np.r_[True, ids[start + 1 : end] != ids[start : end - 1]])  # one for each id
        one, other = sorted((int(place[0, at]), int(place[1, at])) for at in firsts)[:2]
        groups.append((int(end - start), one, other))
    return groups


def _name(part_paths: Sequence[Path], place: tuple[int, int]) -> str:
    """Return the id at a place as text."""
    return str(read_ids(part_paths[place[0]])[place[1]])
