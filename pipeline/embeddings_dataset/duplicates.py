"""Find images that are the same byte for byte, such as the grey tile for "no imagery"."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.embeddings_dataset.parts import read_ids, read_image_hashes

NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Duplicates:
    """The number of images that different ids share, the number of their pictures, and the most frequent of these.

    `examples` holds (number of images, an id, another id), `repeated_ids` the id of each image that its id has already.
    """

    num_images: int
    num_pictures: int
    examples: list[tuple[int, str, str]]
    repeated_ids: list[str]

    def describe(self) -> list[str]:
        """Return a line for each of the two kinds that is there."""
        lines = []
        if self.num_images:
            examples = "; ".join(f"{count} times, among them {one} and {other}" for count, one, other in self.examples)
            lines.append(
                f"{self.num_images} images are byte for byte the same as an image of another OSMID "
                f"({self.num_pictures} pictures): {examples}: is one of them a placeholder for missing imagery?"
            )
        if self.repeated_ids:
            lines.append(
                f"{len(self.repeated_ids)} images are byte for byte the same as an earlier image of their own OSMID, "
                f"among them one of {self.repeated_ids[0]}: was it packaged twice?"
            )
        return lines


def find_duplicates(part_paths: Sequence[Path]) -> Duplicates:
    """Count the images that occur more than once; this takes about 30 bytes an image, and the ids of those.

    Images are compared by 64-bit hashes: among 25 million, two different ones share one with a chance of 2e-5.
    """
    hashes = [read_image_hashes(path) for path in part_paths]
    images = np.sort(np.concatenate(hashes))
    repeated = np.unique(images[1:][images[1:] == images[:-1]])
    ids_of: dict[int, list[str]] = {}  # in input order
    for path, own in zip(part_paths, hashes, strict=True):
        rows = np.flatnonzero(np.isin(own, repeated))
        ids = read_ids(path) if len(rows) else []
        for row in rows.tolist():
            ids_of.setdefault(int(own[row]), []).append(str(ids[row]))
    groups = [Counter(ids) for ids in ids_of.values()]
    shared = sorted((group for group in groups if len(group) > 1), key=lambda group: -group.total())
    examples = [(group.total(), list(group)[0], list(group)[1]) for group in shared[:NUM_EXAMPLES]]
    repeated_ids = [one for group in groups for one, count in group.items() for _ in range(count - 1)]
    return Duplicates(sum(group.total() for group in shared), len(shared), examples, repeated_ids)
