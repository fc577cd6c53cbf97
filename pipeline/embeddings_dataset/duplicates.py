"""Find images that are the same byte for byte, such as the grey tile for "no imagery"."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.embeddings_dataset.parts import read_ids, read_image_hashes

NUM_EXAMPLES = 3


def describe_duplicates(part_paths: Sequence[Path]) -> list[str]:
    """Return a line on the images that several ids share, and one on those that an id has twice, where there are any.

    This takes about 30 bytes an image, and the ids of those. Images are compared by 64-bit hashes: among 25 million,
    two different ones share one with a chance of 2e-5.
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
    groups, lines = [Counter(ids) for ids in ids_of.values()], []
    if shared := sorted((group for group in groups if len(group) > 1), key=lambda group: -group.total()):
        firsts = [(group.total(), *list(group)[:2]) for group in shared[:NUM_EXAMPLES]]
        examples = "; ".join(f"{count} times, among them {one} and {other}" for count, one, other in firsts)
        lines.append(
            f"{sum(group.total() for group in shared)} images are byte for byte the same as an image of another OSMID "
            f"({len(shared)} pictures): {examples}: is one of them a placeholder for missing imagery?"
        )
    if own_ids := [one for group in groups for one, count in group.items() for _ in range(count - 1)]:
        lines.append(
            f"{len(own_ids)} images are byte for byte the same as an earlier image of their own OSMID, among them one "
            f"of {own_ids[0]}: was it packaged twice?"
        )
    return lines
