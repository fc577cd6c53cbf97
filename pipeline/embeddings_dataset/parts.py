"""The parts of an embeddings dataset: plan them, put together their content, read and write them."""

import base64
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.embeddings_dataset.columns import bare_field, checksum_tables, plain_values, take_rows
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN, PackagedInput, read_batches
from pipeline.errors import DamagedError, InputError, Rejection, StaleOutputError
from pipeline.files.tables import PROVENANCE_KEY, open_parquet, provenance_of, read_provenance, reading, write_parquet
from pipeline.workspace import read_json_object

EMBEDDING_COLUMN = "embedding"
STAGE = "generate_embeddings_from_parquet"
HASHES_KEY = PROVENANCE_KEY + b".image_hashes"
_NAME = re.compile(r"rg\d{5,}_rb\d{5,}\.parquet")
# A state with a value of another type is damaged.
_EXAMPLE: dict[str, Any] = {
    "rows_total": 0, "rows_embedded": 0, "rows_rejected": 0, "rows_skipped_invalid": 0, "rows_deleted": 0,
    "parts_done": 0, "parts_total": 0, "read_batch_size": 1, "id_column": "", "image_column": "", "keep_columns": [],
}  # fmt: skip


@dataclass(frozen=True)
class PartPlan:
    """One read batch of the input: rows `first_row` to `first_row + num_rows` of the file."""

    row_group: int
    read_batch: int
    first_row: int
    num_rows: int

    @property
    def name(self) -> str:
        return f"rg{self.row_group:05d}_rb{self.read_batch:05d}.parquet"

    def rows_within(self, limit: int | None) -> int:
        """Return how many of its rows are among the first `limit` of the input."""
        return self.num_rows if limit is None else max(0, min(self.num_rows, limit - self.first_row))


def plan_parts(source: PackagedInput) -> list[PartPlan]:
    """Return a plan for every read batch of every row group, in input order."""
    plans, first_row, read_batch_size = [], 0, source.options.read_batch_size
    for row_group, num_rows in enumerate(source.row_group_rows):
        for read_batch, start in enumerate(range(0, num_rows, read_batch_size)):
            plans.append(PartPlan(row_group, read_batch, first_row + start, min(read_batch_size, num_rows - start)))
        first_row += num_rows
    return plans


def read_planned(source: PackagedInput, plans: Iterable[PartPlan]) -> Iterator[tuple[PartPlan, pa.Table]]:
    """Yield the rows of each plan, in input order; raise InputError if the input ends before its footer says so."""
    for row_group, group in itertools.groupby(plans, key=lambda plan: plan.row_group):
        batches = enumerate(read_batches(source, row_group))
        for plan in group:
            table = next((table for number, table in batches if number == plan.read_batch), None)
            if table is None:
                raise InputError(f"{source.path}: row group {row_group} ends too early: fetch the file again")
            yield plan, table


@dataclass(frozen=True)
class PartContent:
    """The rows of a part, embedded and rejected, and the hash of each embedded image.

    `deleted` counts the rows that delete_ids.py has taken out.
    """

    embedded: pa.Table
    rejects: pa.Table
    skipped: int
    image_hashes: NDArray[np.uint64]  # (N,)
    deleted: int = 0

    @property
    def reasons(self) -> dict[str, int]:
        return dict(Counter(self.rejects.column("reason").to_pylist()))

    @property
    def counts(self) -> dict[str, int]:
        """The part's line of the ledger; deleted rows are among the dropped ones."""
        out, rejected, dropped = self.embedded.num_rows, self.rejects.num_rows, self.skipped + self.deleted
        counts = {"in": out + rejected + dropped, "out": out, "rejected": rejected, "dropped": dropped}
        return counts | ({"deleted": self.deleted} if self.deleted else {})


@dataclass(frozen=True)
class Outcome:
    """The rows of a read batch that have an embedding, and those that were rejected, both ascending.

    `image_hashes` holds the hash of each embedded image.
    """

    rows: NDArray[np.int64]  # (N,)
    embeddings: NDArray[np.float32]  # (N, D)
    image_hashes: list[int]
    rejected: list[tuple[int, Rejection]]


def make_content(source: PackagedInput, plan: PartPlan, table: pa.Table, outcome: Outcome) -> PartContent:
    """Return the content of a part whose read batch is `table`."""
    ids = table.column(ID_COLUMN).combine_chunks()
    # A list's element is called so when it is read from a parquet: a part that is written again has the same bytes.
    kind = pa.list_(pa.field("element", pa.float32()), outcome.embeddings.shape[1])
    values = pa.FixedSizeListArray.from_arrays(pa.array(outcome.embeddings.ravel(), pa.float32()), type=kind)
    embedded = {ID_COLUMN: take_rows(ids, outcome.rows), EMBEDDING_COLUMN: values}
    for name in source.options.keep_columns:
        embedded[name] = take_rows(table.column(name).combine_chunks(), outcome.rows)
    rows = np.array([row for row, _ in outcome.rejected], dtype=np.int64)
    rejects = {
        "row": pa.array(plan.first_row + rows, pa.int64()),
        ID_COLUMN: take_rows(ids, rows),
        "reason": pa.array([rejection.reason for _, rejection in outcome.rejected], pa.string()),
        "detail": pa.array([rejection.detail for _, rejection in outcome.rejected], pa.string()),
    }
    return PartContent(
        embedded=pa.table(embedded),
        rejects=pa.table(rejects),
        skipped=table.num_rows - len(outcome.rows) - len(rows),
        image_hashes=np.array(outcome.image_hashes, np.uint64),
    )


# ------------------------------------------------------------------------------------------------ a part that is there


def refuse_foreign(paths: Iterable[Path]) -> None:
    """Raise StaleOutputError for the first of some files that this project did not write: it stays as it is."""
    for path in paths:
        raise StaleOutputError(
            f"{path}: not written by this project (its name or its footer does not say so): adopt the dataset with "
            "adopt_embeddings.py, move the file away, or give another path"
        )


@dataclass(frozen=True)
class Part:
    """A part that is there and readable; `provenance` is all that its footer says.

    `recipe` names what it was made from as `state.json` does.
    """

    path: Path
    plan: PartPlan
    provenance: dict[str, Any]
    recipe: dict[str, Any]
    counts: dict[str, int]
    reasons: dict[str, int]
    checksum: str | None

    @property
    def num_deleted(self) -> int:
        """Rows that delete_ids.py has taken out."""
        return self.counts.get("deleted", 0)

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """Read its rows; raise InputError if the file cannot be read, DamagedError if it is damaged."""
        return read_table(self.path, columns, self.provenance)

    def read_content(self) -> PartContent:
        """Read all that `write_part` wrote."""
        rejects, skipped = read_table(rejects_beside(self.path)), self.counts["dropped"] - self.num_deleted
        return PartContent(self.read(), rejects, skipped, read_image_hashes(self.path), self.num_deleted)

    def rewrite(self, content: PartContent) -> None:
        """Write it again with other rows and the same origin."""
        write_part(self.path.parents[1], self.plan, content, self.provenance)


def count_rows(parts: Iterable[Part]) -> dict[str, Any]:
    """Add up the counts of parts under the names of `state.json`."""
    sums, reasons, whole = Counter[str](), Counter[str](), 0
    for part in parts:
        sums.update(part.counts)
        reasons.update(part.reasons)
        whole += part.counts["in"] == part.plan.num_rows
    return {
        "rows_embedded": sums["out"],
        "rows_rejected": sums["rejected"],
        "rows_skipped_invalid": sums["dropped"] - sums["deleted"],
        "rows_deleted": sums["deleted"],
        "rejected_by_reason": dict(sorted(reasons.items())),
        "parts_done": whole,
    }


def rejects_beside(path: Path) -> Path:
    """Return the rejects of a part, or the part of rejects."""
    return path.parents[1] / ("_rejects" if path.parent.name == "parts" else "parts") / path.name


def list_part_files(folder: Path) -> dict[str, int]:
    """Return a dataset's part files by name, each with its number: a file that is made again has another."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder / "parts") as entries:
        numbers = {one.name: one.inode() for one in entries}
        return {name: numbers[name] for name in sorted(numbers) if name.endswith(".parquet") and name[0] not in "._"}
    return {}


def read_state(path: Path) -> dict[str, Any] | None:
    """Return what a `state.json` says, None for one that is missing, damaged or not ours."""
    content = read_json_object(path)
    state = _EXAMPLE | content
    is_sound = all(isinstance(state[key], type(value)) for key, value in _EXAMPLE.items())
    is_sound = is_sound and state["read_batch_size"] > 0 and all(isinstance(one, str) for one in state["keep_columns"])
    return content if is_sound and content.get("embedding_version") else None


@dataclass(frozen=True)
class DatasetFiles:
    """A dataset's files: its state if that is ours, sound parts in input order, damaged ones, and rejects without part.

    This project did not write the parts `foreign` and the `others`: rejects without part, and a state without any.
    """

    state: dict[str, Any] | None
    parts: list[Part]
    damaged: dict[Path, DamagedError]
    orphans: list[Path]
    foreign: list[Path]
    others: list[Path]

    @property
    def begun(self) -> dict[str, Any] | None:
        """What the dataset was made from: by its state, or by a part where that is lost; None before it has begun."""
        if self.state or not self.parts:
            return self.state
        provenance = self.parts[0].provenance
        return self.parts[0].recipe | {key: provenance[key] for key in ("fidelity",) if key in provenance}


def find_files(folder: Path) -> DatasetFiles:
    """Read the state and the footers of a dataset's part files; raise InputError if one cannot be read now."""
    state_path = folder / "state.json"
    names, files = list_part_files(folder), DatasetFiles(read_state(state_path), [], {}, [], [], [])
    for path in (folder / "parts" / name for name in names):
        try:
            files.parts.append(read_part(path))
        except DamagedError as error:
            if is_ours(path):
                files.damaged[path] = error
            else:
                files.foreign.append(path)
    for path in sorted((folder / "_rejects").glob("rg*.parquet")):
        if path.name not in names:
            (files.orphans if is_ours(path) else files.others).append(path)
    if state_path.exists() and not (files.state or files.parts or files.damaged):  # else one of ours is damaged
        files.others.append(state_path)
    files.parts.sort(key=lambda part: part.plan.first_row)
    return files


def read_part(path: Path) -> Part:
    """Return a part; raise DamagedError if it is damaged or not ours, InputError if it cannot be read now."""
    with open_parquet(path) as file:
        num_rows, provenance = file.metadata.num_rows, provenance_of(file.metadata) or {}
    try:
        recipe = {**provenance["inputs"][0], **provenance["settings"]}
        _ = recipe["embedding_version"]
        plan, checksum = PartPlan(**provenance["part"]), provenance.get("checksum")
        part = Part(path, plan, provenance, recipe, provenance["counts"], provenance["reasons"], checksum)
        total, *counted = (part.counts[key] for key in ("in", "out", "rejected", "dropped"))
    except (LookupError, TypeError):
        raise DamagedError(f"{path}: damaged (it does not say in full what it was made from)") from None
    if plan.name != path.name:
        raise DamagedError(f"{path}: holds the rows of {plan.name}")
    if num_rows != counted[0] or min(counted) < 0 or not sum(counted) == total <= plan.num_rows:
        raise DamagedError(f"{path}: holds {num_rows} rows, but says {part.counts} of {plan.num_rows}")
    return part


def is_ours(path: Path) -> bool:
    """Return whether stage 8 wrote a part or its rejects; the other of the two tells it of a damaged one."""
    for one in (path, rejects_beside(path)):
        with suppress(DamagedError):
            if one.exists() and (read_provenance(one) or {}).get("stage") == STAGE:
                return _NAME.fullmatch(path.name) is not None
    return False


def write_part(folder: Path, plan: PartPlan, content: PartContent, made_from: dict[str, Any]) -> None:
    """Write a part behind its rejects, so that where the part is, both are.

    `made_from` is the provenance; what it says of the content is set here.
    """
    provenance = made_from | {
        "part": asdict(plan),
        "cut": content.counts["in"] < plan.num_rows,
        "counts": content.counts,
        "reasons": content.reasons,
        "checksum": checksum_tables(content.embedded, content.rejects),
    }
    hashes = {HASHES_KEY: base64.b64encode(content.image_hashes.astype("<u8").tobytes())}
    write_parquet(folder / "_rejects" / plan.name, _without_notes(content.rejects), provenance)
    write_parquet(folder / "parts" / plan.name, _without_notes(content.embedded), provenance, hashes)


def _without_notes(table: pa.Table) -> pa.Table:
    return pa.Table.from_arrays(table.columns, schema=pa.schema(map(bare_field, table.schema)))


def holds_notes(path: Path) -> bool:
    """Return whether another program noted something in the footer of a part or its rejects."""
    with open_parquet(path) as file:
        has_more = not {PROVENANCE_KEY, HASHES_KEY, b"ARROW:schema"}.issuperset(file.metadata.metadata)
        return has_more or any(not field.equals(bare_field(field), check_metadata=True) for field in file.schema_arrow)


def read_table(path: Path, columns: list[str] | None = None, made: dict[str, Any] | None = None) -> pa.Table:
    """Read a part or its rejects; raise InputError if it is not the one that was `made` so."""
    with reading(path), open_parquet(path) as file:
        if made is not None and provenance_of(file.metadata) != made:
            raise InputError(f"{path}: replaced while the dataset was read: run this again")
        table: pa.Table = file.read(columns)
        table.validate(full=True)  # a changed byte may leave text that is none
        return table.replace_schema_metadata()


def read_image_hashes(part_path: Path) -> NDArray[np.uint64]:
    """Return the hash of each image of a part, (N,)."""
    with open_parquet(part_path) as file:
        return np.frombuffer(base64.b64decode((file.metadata.metadata or {}).get(HASHES_KEY, b"")), "<u8")


def read_ids(path: Path) -> list[object]:
    """Return the ids of a part, or of its rejects, as plain Python values."""
    return plain_values(read_table(path, [ID_COLUMN]).column(0))


def embeddings_of(table: pa.Table) -> NDArray[np.float32]:
    """Return the embeddings of a part's rows, (N, D)."""
    column = table.column(EMBEDDING_COLUMN).combine_chunks()
    values: NDArray[np.float32] = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    return values.reshape(len(table), column.type.list_size)
