"""Delete ids from an embeddings dataset for good: stage 8 leaves out ids with the same hashes too."""

import base64
import itertools
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import workspace
from pipeline.embeddings_dataset.columns import filter_rows, hash_ids, plain_values
from pipeline.embeddings_dataset.dataset import SET_ASIDE, SET_ASIDE_FILES, EmbeddingsDataset
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
from pipeline.files.outputs import carries, is_dataset
from pipeline.files.tables import read_provenance
from pipeline.log import logger
from pipeline.workspace import read_json, remove

# What is made from a dataset: the tools' copies, what was set aside, and logs, which name ids.
_DERIVED = re.compile(
    r"_adopted/state\.json|_aggregated/[^/]+\.parquet|_clusters/(clusters|look_alike)\.(parquet|json|html)"
    r"|_logs/.+\.log(\.decoding)?"
    rf"|{SET_ASIDE}/{SET_ASIDE_FILES}",
    re.ASCII,
)
# Files there that these did not write are the user's.
_TOOLS = {"_aggregated": "aggregate_embeddings", "_clusters": "cluster_embeddings"}
_DERIVED_FOLDERS = re.compile(r"(_adopted|_aggregated|_clusters|_logs|_removed)(/.+)?")
_SET_ASIDE = re.compile(rf"{SET_ASIDE}/[1-9]\d*", re.ASCII)
_ORDER = "_deleted/id_hashes.json"
_SALT_BYTES = 16
# The dataset's own files: parts and rejects are rewritten, the others hold no ids.
_OWN = re.compile(
    r"state\.json|\.dataset\.lock(\..+)?|_deleted/id_hashes\.json"
    r"|_logs/slurm/\.lock|(parts|_rejects)/rg\d{5,}_rb\d{5,}\.parquet"
)


@dataclass(frozen=True)
class DeletionOrder:
    """The 64-bit hashes of the ids to leave out, (N,) ascending, and whether nothing in the dataset holds one any more.

    `salt` is the dataset's own, and empty where nothing was ever deleted. `unmatched` are the hashes that no row had
    when they were ordered.
    """

    salt: bytes
    id_hashes: NDArray[np.uint64]
    unmatched: NDArray[np.uint64]
    done: bool

    def find(self, ids: Sequence[object]) -> NDArray[np.bool_]:
        """Return which of some ids are to be left out, (N,)."""
        if not len(self.id_hashes):
            return np.zeros(len(ids), dtype=bool)
        spellings = [_spellings(one) for one in ids]
        is_listed = _are_among(hash_ids(itertools.chain(*spellings), self.salt), self.id_hashes)
        return np.logical_or.reduceat(is_listed, np.cumsum([0, *map(len, spellings)])[:-1])

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


def _sorted(*hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    joined = np.concatenate(hashes)
    joined.sort()  # numpy's `unique` takes 50 times as long
    return np.extract(np.append(joined[:-1] != joined[1:], True)[: len(joined)], joined)


def _are_among(hashes: NDArray[np.uint64], ascending: NDArray[np.uint64]) -> NDArray[np.bool_]:
    return np.searchsorted(ascending, hashes, side="right") > np.searchsorted(ascending, hashes)


def read_order(folder: Path) -> DeletionOrder:
    """Return a dataset's order, an empty one where nothing was ever deleted.

    Raises InputError if it cannot be read: to go on without it would bring the rows back.
    """
    path = folder / _ORDER
    try:
        content: Any = read_json(path)
        hashes = np.frombuffer(base64.b64decode(content["id_hashes"]), "<u8")
        is_unmatched = np.unpackbits(np.frombuffer(bytes.fromhex(content["unmatched"]), np.uint8), count=len(hashes))
        salt = bytes.fromhex(content["salt"])
        if len(salt) != _SALT_BYTES:
            raise ValueError("another salt than ours")
        return DeletionOrder(salt, hashes, hashes[is_unmatched.astype(bool)], bool(content["done"]))
    except (FileNotFoundError, NotADirectoryError):
        return DeletionOrder(b"", np.empty(0, np.uint64), np.empty(0, np.uint64), done=True)
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged: remove it and run delete_ids.py again with all ids to leave out") from None


def _write_order(folder: Path, order: DeletionOrder) -> None:
    content = {
        "salt": order.salt.hex(),
        "id_hashes": base64.b64encode(order.id_hashes.astype("<u8", copy=False).data).decode(),
        "unmatched": np.packbits(_are_among(order.id_hashes, order.unmatched)).tobytes().hex(),  # a bit a hash
        "done": order.done,
    }
    workspace.write_json(folder / _ORDER, content)


def delete_ids(
    dataset: EmbeddingsDataset, ids: Iterable[object]
) -> tuple[int, NDArray[np.int64], NDArray[np.int64], list[Path]]:
    """Take ids out for good; return the number of rows deleted, and the places of distinct ids: all, unmatched, (N,).

    No row has or had the unmatched. Last come files of others and other datasets in its folder: they stay, and may hold
    the ids. The order comes first and derived data go next, so that a killed run is finished by the next one; the order
    is done when no file holds one of the ids. The caller keeps others out, see `EmbeddingsDataset.held`. Raises
    PipelineError, and deletes nothing, where the dataset holds a link.
    """
    folder, before = dataset.folder, read_order(dataset.folder)
    for path in _survey(folder, "link"):
        raise PipelineError(f"{path}: a link, and what it leads to may hold the ids: remove it, then run this again")
    salt = before.salt or secrets.token_bytes(_SALT_BYTES)
    # All rows are looked up in each of their spellings, and the text of a decimal stands for it everywhere.
    hashes = hash_ids((_spellings(one)[-1] if isinstance(one, Decimal) else one for one in ids), salt)
    wanted, found = _sorted(before.id_hashes, hashes), np.empty(0, np.uint64)
    held = [path for part in dataset.parts for path in (part.path, rejects_beside(part.path))]
    set_aside = list(folder.glob(f"{SET_ASIDE}/[0-9]*/*/rg*.parquet"))
    for path in [*held, *find_files(folder).orphans, *set_aside]:
        try:
            own = hash_ids((value for one in read_ids(path) for value in _spellings(one)), salt)
            found = _sorted(found, own[_are_among(own, wanted)])
        except (InputError, LookupError):
            if path not in set_aside:  # where files are because they are damaged
                raise
    is_known = _are_among(wanted, before.id_hashes) | _are_among(wanted, found)
    unmatched = _sorted(before.unmatched, wanted[~is_known])
    order = DeletionOrder(salt, wanted, unmatched, done=False)
    _write_order(folder, order)
    _remove_derived(folder, only_left_behind=not (len(found) or set_aside) and before.done)
    num_rows = sum(_rewrite(part, order) for part in dataset.parts)
    del dataset.parts  # they have changed
    dataset.update_state(dataset.parts)
    _write_order(folder, replace(order, done=True))
    firsts = np.sort(np.unique(hashes, return_index=True)[1])
    return num_rows, firsts, firsts[_are_among(hashes[firsts], unmatched)], _survey(folder, "other")


def list_naming_columns(dataset: EmbeddingsDataset) -> tuple[list[str], list[str]]:
    """Return the kept columns whose name, or text in a row that stays, is an id that was to go; then those of numbers.

    A number may be one by chance, such as a year.
    """
    order, found = read_order(dataset.folder), {str: set[str](), int: set[str]()}
    kept = set(dataset.schema.names) - {ID_COLUMN, EMBEDDING_COLUMN}
    for part in dataset.parts if kept else ():
        table = part.read(sorted(kept - found[str]))
        for name in table.column_names:
            values = list({name, *_list_values(plain_values(table.column(name)))})
            for place in np.flatnonzero(order.find(values)):
                found[int if isinstance(values[place], int) else str].add(name)
    return sorted(found[str]), sorted(found[int] - found[str])


def _list_values(value: object) -> Iterator[object]:
    """Yield the texts, bytes, whole numbers and names of fields in a plain value, nested or not."""
    if isinstance(value, str | bytes | int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, float | Decimal) and value % 1 == 0:
        yield int(value)
    elif isinstance(value, dict | list | tuple):
        for one in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _list_values(one)


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
                tool = _TOOLS.get(path.parent.name)
                is_made = bool(_DERIVED.fullmatch(name)) and (tool is None or carries(path, tool))
                is_left = workspace.is_temporary(path.name) or (is_orphan and is_ours(path))
                kind = "derived" if is_made or is_left else "other"
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
