"""Ids that were taken out of an embeddings dataset for good: kept as hashes, so that a rerun leaves them out too."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.files.writing import write_json
from publish_model.dataset.hashes import hash_ids, pack_hashes, unpack_hashes
from publish_model.dataset.part_plans import PartContent
from publish_model.new_data.packaged_input import ID_COLUMN, plain_values


@dataclass(frozen=True)
class DeletionOrder:
    """The 64-bit hashes of the ids, and whether every part has been rewritten without them."""

    id_hashes: frozenset[int]
    done: bool


def order_path(folder: Path) -> Path:
    """Return where a dataset keeps its order."""
    return folder / "_deleted" / "id_hashes.json"


def read_order(folder: Path) -> DeletionOrder | None:
    """Return a dataset's order, None where nothing was ever deleted.

    Raises InputError if it cannot be read: to go on without it would bring the rows back.
    """
    path = order_path(folder)
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        return DeletionOrder(frozenset(int(text, 16) for text in content["id_hashes"]), bool(content["done"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged: remove it and run delete_ids.py again with all ids to leave out") from None


def write_order(folder: Path, order: DeletionOrder) -> None:
    """Write a dataset's order."""
    hashes = [f"{value:016x}" for value in sorted(order.id_hashes)]
    write_json(order_path(folder), {"id_hashes": hashes, "done": order.done})


def without_ids(content: PartContent, id_hashes: frozenset[int]) -> PartContent:
    """Return a part's content without the rows, embedded and rejected, of some ids."""
    if not id_hashes:
        return content
    embedded, rejects = stay_rows(content.embedded, id_hashes), stay_rows(content.rejects, id_hashes)
    num_deleted = int(np.sum(~embedded) + np.sum(~rejects))
    if not num_deleted:
        return content
    kept_rejects = content.rejects.filter(pa.array(rejects))
    reasons = kept_rejects.column("reason").value_counts().to_pylist()
    hashes = unpack_hashes(content.hashes)[:, embedded]  # (2, N)
    return replace(
        content,
        embedded=content.embedded.filter(pa.array(embedded)),
        rejects=kept_rejects,
        hashes=pack_hashes(hashes[0].tolist(), hashes[1].tolist()),
        reasons={entry["values"]: entry["counts"] for entry in reasons},
        deleted=content.deleted + num_deleted,
    )


def stay_rows(table: pa.Table, id_hashes: frozenset[int]) -> NDArray[np.bool_]:
    """Return which rows do not have one of the ids, (N,)."""
    hashes = [value for chunk in table.column(ID_COLUMN).chunks for value in hash_ids(plain_values(chunk))]
    return np.array([value not in id_hashes for value in hashes], dtype=bool)
