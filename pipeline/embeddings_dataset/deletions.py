"""Delete ids from an embeddings dataset for good: stage 8 leaves out ids with the same hashes too."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.embeddings_dataset import set_aside
from pipeline.embeddings_dataset.columns import filter_rows
from pipeline.embeddings_dataset.content import PartContent
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.hashes import pack_hashes, unpack_hashes
from pipeline.embeddings_dataset.parts import Part, as_written, hash_rows
from pipeline.errors import InputError
from pipeline.files import workspace
from pipeline.files.tables import read_provenance, write_parquet
from pipeline.files.workspace import write_json
from pipeline.log import logger

# What the tools derive from a dataset inside its folder.
DERIVED = ("_aggregated", "_exports")


@dataclass(frozen=True)
class DeletionOrder:
    """The 64-bit hashes of the ids to leave out, and whether every part has been rewritten without them.

    `unmatched` holds those that no row had when they were ordered.
    """

    id_hashes: frozenset[int] = frozenset()
    done: bool = True
    unmatched: frozenset[int] = frozenset()


def read_order(folder: Path) -> DeletionOrder:
    """Return a dataset's order, an empty one where nothing was ever deleted.

    Raises InputError if it cannot be read: to go on without it would bring the rows back.
    """
    path = _order_path(folder)
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        hashes, unmatched = (frozenset(int(text, 16) for text in content[key]) for key in ("id_hashes", "unmatched"))
        return DeletionOrder(hashes, bool(content["done"]), unmatched)
    except (FileNotFoundError, NotADirectoryError):
        return DeletionOrder()
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged: remove it and run delete_ids.py again with all ids to leave out") from None


def write_order(folder: Path, order: DeletionOrder) -> None:
    """Write a dataset's order."""
    hashes, unmatched = ([f"{value:016x}" for value in sorted(one)] for one in (order.id_hashes, order.unmatched))
    write_json(_order_path(folder), {"id_hashes": hashes, "done": order.done, "unmatched": unmatched})


def _order_path(folder: Path) -> Path:
    return folder / "_deleted" / "id_hashes.json"


def delete_ids(dataset: EmbeddingsDataset, id_hashes: frozenset[int]) -> tuple[int, frozenset[int]]:
    """Take ids out for good; return the number of rows deleted and the hashes that no row has or had.

    What was derived from the dataset inside its folder goes too, and what was set aside, if it may hold the ids.
    """
    folder, before = dataset.folder, read_order(dataset.folder)
    new = id_hashes - before.id_hashes
    unmatched = before.unmatched | _find_unmatched(dataset.parts, new)
    order = DeletionOrder(before.id_hashes | new, done=False, unmatched=unmatched)
    if new:
        write_order(folder, order)
    num_rows = sum(_rewrite(part, order.id_hashes) for part in dataset.parts)
    dataset.use_parts(None)
    dataset.update_state()
    for name in DERIVED if num_rows else ():
        if (folder / name).is_dir():
            workspace.remove(folder / name)
            logger.warning("%s: removed, as it was made with the ids: make it again", folder / name)
    set_aside.discard_ids(folder, order.id_hashes)
    if order.id_hashes:
        write_order(folder, replace(order, done=True))
    return num_rows, order.unmatched & id_hashes


def _find_unmatched(parts: Iterable[Part], id_hashes: frozenset[int]) -> frozenset[int]:
    """Return the hashes that no row has, embedded or rejected."""
    left = set(id_hashes)
    for part in parts if left else ():
        content = part.read_content()
        for table in (content.embedded, content.rejects):
            left.difference_update(hash_rows(table))
    return frozenset(left)


def _rewrite(part: Part, id_hashes: frozenset[int]) -> int:
    """Write a part again without some ids unless it has none of them; return how many rows that takes out."""
    promised = read_provenance(part.rejects_path) or {}
    if promised.get("checksum") != part.checksum:
        # Killed between the rejects and their part: the rejects are the new ones, and tell what the part is to hold.
        embedded = as_written(part.read())
        write_parquet(part.path, filter_rows(embedded, _find_kept(embedded, id_hashes)), promised)
        return int(promised["counts"].get("deleted", 0)) - part.num_deleted
    content = part.read_content()
    left = without_ids(content, id_hashes)
    if left is not content:
        part.rewrite(left)
    return left.deleted - content.deleted


def without_ids(content: PartContent, id_hashes: frozenset[int]) -> PartContent:
    """Return a part's content without the rows, embedded and rejected, of some ids; itself if it has none of them."""
    if not id_hashes:
        return content
    embedded, rejects = _find_kept(content.embedded, id_hashes), _find_kept(content.rejects, id_hashes)
    num_deleted = int(np.sum(~embedded) + np.sum(~rejects))
    if not num_deleted:
        return content
    kept_rejects = filter_rows(content.rejects, rejects)
    reasons = kept_rejects.column("reason").value_counts().to_pylist()
    hashes = unpack_hashes(content.hashes)[:, embedded]  # (2, N)
    return replace(
        content,
        embedded=filter_rows(content.embedded, embedded),
        rejects=kept_rejects,
        hashes=pack_hashes(hashes[0].tolist(), hashes[1].tolist()),
        reasons={entry["values"]: entry["counts"] for entry in reasons},
        deleted=content.deleted + num_deleted,
    )


def _find_kept(table: pa.Table, id_hashes: frozenset[int]) -> NDArray[np.bool_]:
    """Return which rows do not have one of the ids, (N,)."""
    return np.array([value not in id_hashes for value in hash_rows(table)], dtype=bool)
