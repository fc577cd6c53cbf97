"""Delete ids from an embeddings dataset for good: stage 8 leaves out ids with the same hashes too."""

import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import workspace
from pipeline.embeddings_dataset.columns import filter_rows, hash_ids, plain_values
from pipeline.embeddings_dataset.dataset import SET_ASIDE, EmbeddingsDataset
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN
from pipeline.embeddings_dataset.parts import (
    EMBEDDING_COLUMN,
    Part,
    PartContent,
    find_files,
    holds_notes,
    is_ours,
    read_ids,
    rejects_beside,
)
from pipeline.errors import DamagedError, InputError, PipelineError
from pipeline.files.outputs import is_dataset
from pipeline.files.tables import read_provenance
from pipeline.log import logger
from pipeline.workspace import read_json, remove

# What is made from a dataset: the tools' copies, what was set aside, and logs, which name ids.
_DERIVED = re.compile(
    r"_adopted/state\.json|_aggregated/[^/]+\.parquet|_clusters/(clusters|look_alike)\.(parquet|json|html)"
    r"|_logs/.+\.log(\.decoding)?|_exports/(float16|int8)/(export\.json|parts/rg\d{5,}_rb\d{5,}\.parquet)"
    r"|_removed/[1-9]\d*/(state\.json|(parts|_rejects)/rg\d{5,}_rb\d{5,}\.parquet)",
    re.ASCII,
)
_DERIVED_FOLDERS = re.compile(r"(_adopted|_aggregated|_clusters|_exports|_logs|_removed)(/.+)?")
_SET_ASIDE = re.compile(rf"{SET_ASIDE}/[1-9]\d*", re.ASCII)
_ORDER = "_deleted/id_hashes.json"
# The dataset's own files: parts and rejects are rewritten, the others hold no ids.
_OWN = re.compile(
    r"state\.json|\.dataset\.lock(\..+)?|_deleted/id_hashes\.json"
    r"|_logs/slurm/\.lock|(parts|_rejects)/rg\d{5,}_rb\d{5,}\.parquet"
)


@dataclass(frozen=True)
class DeletionOrder:
    """The 64-bit hashes of the ids to leave out, and whether nothing in the dataset holds one of them any more.

    `salt` is the dataset's own, and empty where nothing was ever deleted. `unmatched` are the hashes that no row had
    when they were ordered.
    """

    salt: bytes = b""
    id_hashes: frozenset[int] = frozenset()
    unmatched: frozenset[int] = frozenset()
    done: bool = True

    def find(self, ids: Sequence[object]) -> NDArray[np.bool_]:
        """Return which of some ids are to be left out, (N,)."""
        if not self.id_hashes:
            return np.zeros(len(ids), dtype=bool)
        hashes = (hash_ids(_spellings(one), self.salt) for one in ids)
        return np.array([not self.id_hashes.isdisjoint(one) for one in hashes], dtype=bool)

    def apply(self, content: PartContent) -> PartContent:
        """Return a part's content without the rows, embedded and rejected, of the ids; itself if it has none."""
        embedded, rejects = (
            ~self.find(plain_values(table.column(ID_COLUMN))) for table in (content.embedded, content.rejects)
        )
        num_deleted = int(np.sum(~embedded) + np.sum(~rejects))
        if not num_deleted:
            return content
        return replace(
            content,
            embedded=filter_rows(content.embedded, embedded),
            rejects=filter_rows(content.rejects, rejects),
            image_hashes=content.image_hashes[embedded],
            deleted=content.deleted + num_deleted,
        )


def _spellings(value: object) -> list[object]:
    """Return an id as it is and as text, bytes and number: another package may hold it so."""
    if value is None:
        return [value]
    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
    text = re.sub(r"\.0+$", "", f"{value:f}") if isinstance(value, Decimal) else text
    numbers = [int(text)] if re.fullmatch("0|-?[1-9][0-9]{0,19}", text) else []
    return [value, text, text.encode("utf-8", "surrogateescape"), *numbers]


def read_order(folder: Path) -> DeletionOrder:
    """Return a dataset's order, an empty one where nothing was ever deleted.

    Raises InputError if it cannot be read: to go on without it would bring the rows back.
    """
    path = folder / _ORDER
    try:
        content: Any = read_json(path)
        hashes, unmatched = (frozenset(int(text, 16) for text in content[key]) for key in ("id_hashes", "unmatched"))
        return DeletionOrder(bytes.fromhex(content["salt"]), hashes, unmatched, bool(content["done"]))
    except (FileNotFoundError, NotADirectoryError):
        return DeletionOrder()
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged: remove it and run delete_ids.py again with all ids to leave out") from None


def _write_order(folder: Path, order: DeletionOrder) -> None:
    hashes, unmatched = ([f"{value:016x}" for value in sorted(one)] for one in (order.id_hashes, order.unmatched))
    content = {"salt": order.salt.hex(), "id_hashes": hashes, "unmatched": unmatched, "done": order.done}
    workspace.write_json(folder / _ORDER, content)


def delete_ids(dataset: EmbeddingsDataset, listed: Mapping[str, Iterable[object]]) -> tuple[int, list[str], list[Path]]:
    """Take ids out for good; return the number of rows deleted, and the listed names that no row has or had.

    What in its folder is not its own comes third: other datasets and files of others stay, and may hold the ids.
    The order comes first and derived data go next, so that a killed run is finished by the next one; the order is done
    when no file holds one of the ids. The caller keeps others out, see `EmbeddingsDataset.held`. Raises PipelineError,
    and deletes nothing, where the dataset holds a link.
    """
    folder, before = dataset.folder, read_order(dataset.folder)
    for path in _survey(folder, "link"):
        raise PipelineError(f"{path}: a link, and what it leads to may hold the ids: remove it, then run this again")
    salt = before.salt or secrets.token_bytes(16)
    hashes = {}
    for name, values in listed.items():  # other ids are whole in each of their spellings, a decimal in none
        spellings = [own for one in values for own in (_spellings(one) if isinstance(one, Decimal) else [one])]
        hashes[name] = set(hash_ids(spellings, salt))
    wanted, found = before.id_hashes.union(*hashes.values()), set[int]()
    if not wanted:
        return 0, list(listed), []
    held = [path for part in dataset.parts for path in (part.path, rejects_beside(part.path))]
    set_aside = list(folder.glob(f"{SET_ASIDE}/[0-9]*/*/rg*.parquet"))
    for path in [*held, *find_files(folder).orphans, *set_aside]:
        try:
            found |= wanted.intersection(hash_ids(read_ids(path), salt))
        except (InputError, LookupError):
            if path not in set_aside:  # where files are because they are damaged
                raise
    unmatched = before.unmatched | (wanted - before.id_hashes - found)
    order = DeletionOrder(salt, wanted, unmatched, done=False)
    _write_order(folder, order)
    _remove_derived(folder, only_left_behind=not (found or set_aside) and before.done)
    num_rows = sum(_rewrite(part, order) for part in dataset.parts)
    del dataset.parts  # they have changed
    dataset.update_state(dataset.parts)
    _write_order(folder, replace(order, done=True))
    return num_rows, [name for name, own in hashes.items() if own <= unmatched], _survey(folder, "other")


def list_naming_columns(dataset: EmbeddingsDataset) -> list[str]:
    """Return the kept columns in which the text of a row that stays is an id that was to go."""
    order, found = read_order(dataset.folder), set[str]()
    kept = set(dataset.schema.names) - {ID_COLUMN, EMBEDDING_COLUMN}
    for part in dataset.parts if kept else ():
        table = part.read(sorted(kept - found))
        texts = {name: set(_list_texts(plain_values(table.column(name)))) for name in table.column_names}
        found |= {name for name, values in texts.items() if order.find(list(values)).any()}
    return sorted(found)


def _list_texts(value: object) -> Iterator[object]:
    """Yield the texts and bytes in a plain value, nested or not."""
    if isinstance(value, str | bytes):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _list_texts(one)


def finish_order(folder: Path) -> None:
    """Finish an interrupted order of a dataset that has no parts any more."""
    order = read_order(folder)
    if not order.done:
        _remove_derived(folder)
        _write_order(folder, replace(order, done=True))


def _survey(folder: Path, wanted: str) -> list[Path]:
    """Return the paths in a dataset's folder of a kind: `derived`, `link`, or `other`.

    Derived is what was made from the dataset, what was set aside and what killed runs have left; another dataset is
    one `other`. Raises OSError where a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for place, below, names in os.walk(folder, onerror=refuse):
        for path in map(Path(place).joinpath, [*below, *names]):
            name = path.relative_to(folder).as_posix()
            is_orphan = name.startswith("_rejects/") and not rejects_beside(path).exists()
            if path.is_symlink():
                kind = "link"
            elif path.name in below:
                kind = "other" if is_dataset(path) and not _SET_ASIDE.fullmatch(name) else "own"
            elif _OWN.fullmatch(name) and not is_orphan:
                kind = "own"
            else:
                is_made = _DERIVED.fullmatch(name) or workspace.is_temporary(path.name) or (is_orphan and is_ours(path))
                kind = "derived" if is_made else "other"
            if kind != "own" and path.name in below:
                below.remove(path.name)
            found += [path] if kind == wanted else []
    return sorted(found)


def _remove_derived(folder: Path, *, only_left_behind: bool = False) -> None:
    """Remove what was made from the dataset inside its folder, what was set aside, and what killed runs have left.

    Only logs and temporary files may name an id of no part: a run was killed before it wrote the part.
    """
    gone = set(_survey(folder, "derived"))
    if only_left_behind:
        gone = {path for path in gone if "_logs" in path.relative_to(folder).parts or workspace.is_temporary(path.name)}
    for path in gone:
        remove(path)
    for place in sorted({above for path in gone for above in path.parents if folder in above.parents}, reverse=True):
        if _DERIVED_FOLDERS.fullmatch(place.relative_to(folder).as_posix()) and not any(place.iterdir()):
            remove(place)
            gone.add(place)
    for path in sorted(gone):  # a folder stands for all that was in it
        if path.parent.exists() and not workspace.is_temporary(path.name):
            logger.warning("%s: removed, as it was made with the ids: make it again", path)


def _rewrite(part: Part, order: DeletionOrder) -> int:
    """Write a part again without some ids unless it names none of them; return how many rows that takes out.

    Notes of other programs may name ids and go too. Where a run was killed between the rejects and their part, the
    rejects lack the ids already.
    """
    rejects_path = rejects_beside(part.path)
    beside = read_provenance(rejects_path) or {}
    if beside.get("part") != part.provenance["part"]:
        raise DamagedError(f"{rejects_path}: of another part: remove it and {part.path}, run this again, then stage 8")
    content = order.apply(part.read_content())
    num_deleted = part.counts["in"] - content.counts["out"] - content.counts["rejected"] - content.skipped
    has_notes = any(map(holds_notes, (part.path, rejects_path)))
    if num_deleted != part.num_deleted or beside != part.provenance or has_notes:
        part.rewrite(replace(content, deleted=num_deleted))
    return num_deleted - part.num_deleted
