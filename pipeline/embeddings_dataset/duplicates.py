"""Find images that are the same byte for byte under different ids, such as the grey tile for "no imagery"."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.embeddings_dataset.hashes import unpack_hashes
from pipeline.embeddings_dataset.parts import read_hashes, read_ids

NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Duplicates:
    """The number of images that different ids share, the number of their pictures, and the most frequent of these.

    `examples` holds (number of images, an id, another id).
    """

    num_images: int
    num_pictures: int
    examples: list[tuple[int, str, str]]

    def describe(self) -> str:
        """Return it as one line."""
        examples = "; ".join(f"{count} times, among them {one} and {other}" for count, one, other in self.examples)
        return (
            f"{self.num_images} images are byte for byte the same as an image of another OSMID "
            f"({self.num_pictures} pictures): {examples}: is one of them a placeholder for missing imagery?"
        )


def find_duplicates(part_paths: Sequence[Path]) -> Duplicates:
    """Count the images that occur under several ids; this takes about 60 bytes an image.

    Images are compared by 64-bit hashes: among 25 million, two different ones share one with a chance of 2e-5.
    """
    hashes = [unpack_hashes(read_hashes(path)) for path in part_paths]
    images, ids = np.concatenate(hashes, axis=1)  # (N,) each
    order = np.lexsort((ids, images))  # stable: within an id, in input order
    images, ids = images[order], ids[order]
    bounds = np.flatnonzero(np.r_[True, images[1:] != images[:-1], True]) if len(images) else np.zeros(1, dtype=int)
    is_shared = ids[bounds[:-1]] != ids[bounds[1:] - 1]
    groups = []  # how many images are the same, and the first two of different ids, by their place in the dataset
    for start, end in zip(bounds[:-1][is_shared], bounds[1:][is_shared], strict=True):
        firsts = start + np.flatnonzero(np.r_[True, ids[start + 1 : end] != ids[start : end - 1]])  # one for each id
        one, other = sorted(order[firsts].tolist())[:2]
        groups.append((int(end - start), one, other))
    groups.sort(key=lambda group: (-group[0], group[1]))
    starts = np.cumsum([0, *(part.shape[1] for part in hashes)])

    def name(place: int) -> str:
        part = int(np.searchsorted(starts, place, side="right")) - 1
        return str(read_ids(part_paths[part])[place - starts[part]])

    examples = [(count, name(one), name(other)) for count, one, other in groups[:NUM_EXAMPLES]]
    return Duplicates(sum(group[0] for group in groups), len(groups), examples)
