"""Check a whole embeddings dataset: every row accounted for, nothing twice, all values as written."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.embeddings_dataset.columns import checksum_tables, hash_bytes, plain_values
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.deletions import DeletionOrder, read_order
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN, IMAGE_COLUMN, PackagedInput
from pipeline.embeddings_dataset.parts import (
    Part,
    embeddings_of,
    find_files,
    plan_parts,
    read_planned,
    rejects_beside,
)
from pipeline.errors import DamagedError, InputError, one_line
from pipeline.files.tables import read_provenance

# The model normalises in float32.
NORM_TOLERANCE = 1e-3


@dataclass
class Findings:
    """The problems, the files that can be set aside and made again, and those that are not ours.

    `sound` are the parts without a problem, in input order.
    """

    problems: list[str] = field(default_factory=list)
    broken: set[Path] = field(default_factory=set)
    foreign: list[Path] = field(default_factory=list)
    sound: tuple[Part, ...] = ()

    def add(self, path: Path, what: str, *, broken: bool = True) -> None:
        self.problems.append(f"{path}: {what}")
        if broken:
            self.broken.add(path)


def check_dataset(dataset: EmbeddingsDataset, input_path: Path | None = None) -> Findings:
    """Read all of a dataset and return its problems.

    Raises InputError where there is none, or where a file or the input cannot be read now.
    """
    files, order = find_files(dataset.folder), read_order(dataset.folder)
    state, findings = files.state, Findings(foreign=[*files.others, *files.foreign])
    if not (files.parts or files.damaged or findings.foreign or dataset.state_path.exists()):
        raise InputError(f"{dataset.folder}: no embeddings dataset (neither state.json nor parts): correct the path")
    for path in findings.foreign:
        findings.add(path, "not written by this project", broken=False)
    if state is None and dataset.state_path not in findings.foreign:
        what = "damaged" if dataset.state_path.exists() else "missing"
        findings.add(dataset.state_path, f"{what}: stage 8 makes it again from the parts")
    for path, error in files.damaged.items():
        findings.add(path, one_line(error).removeprefix(f"{path}: "))
    for path in files.orphans:
        # A kill between the two files leaves rejects alone, and a rerun writes both.
        findings.add(path, "its part is missing")
    recipe = state or next((part.recipe for part in files.parts), {})
    if files.parts and not any(part.recipe.items() <= recipe.items() for part in files.parts):
        raise InputError(f"{dataset.state_path}: of another dataset than the parts beside it: move it away")
    for part in files.parts:
        for problem in itertools.islice(_list_problems(part, recipe, order), 1):
            findings.add(part.path, problem)
    if input_path is not None and recipe:
        _compare_with_input(dataset.open_input(input_path, recipe), files.parts, order, findings)
    findings.sound = tuple(part for part in files.parts if part.path not in findings.broken)
    accounted = sum(part.counts["in"] for part in findings.sound)
    if state and state.get("complete") and accounted != (total := state.get("rows_total")):
        findings.add(dataset.state_path, f"complete, but {accounted} of {total} rows are accounted for", broken=False)
    if not order.done:
        findings.add(dataset.folder, "a deletion of ids was interrupted: run delete_ids.py again", broken=False)
    return findings


def _list_problems(part: Part, recipe: dict[str, Any], order: DeletionOrder) -> Iterator[str]:
    """Yield the problems of a part's origin, files and content; those behind the first one may follow from it."""
    for key in (key for key, value in part.recipe.items() if value != recipe.get(key)):
        yield f"made with another {key} ({part.recipe[key]!r}, the dataset has {recipe.get(key)!r})"
    if not rejects_beside(part.path).exists():
        yield "its rejects are missing: no such file"
    try:
        content = part.read_content()
        found = content.counts, content.reasons, len(content.image_hashes)
        said = part.counts, part.reasons, part.counts["out"]
        if read_provenance(rejects_beside(part.path)) != part.provenance:
            yield "its rejects are those of another part or run"
        if order.apply(content) is not content:
            yield "holds ids that were deleted: run delete_ids.py again"
        if found != said:
            yield f"holds {found}, but says {said}"
        if checksum_tables(content.embedded, content.rejects) != part.checksum:
            yield "its data are not those of its checksum"
        norms = np.linalg.norm(embeddings_of(content.embedded), axis=1)
        for row in np.flatnonzero(~(np.abs(norms - 1) <= NORM_TOLERANCE)):  # NaN too
            yield f"embedding {row} has norm {norms[row]:.4f}"
    except DamagedError as error:
        yield one_line(error)
    except (KeyError, TypeError, ValueError) as error:  # a changed byte in a column's name, a hash, a count
        yield f"damaged ({one_line(error)[:200]})"


def _compare_with_input(source: PackagedInput, parts: Sequence[Part], order: DeletionOrder, findings: Findings) -> None:
    plans = set(plan_parts(source))
    wanted = {part.plan: part for part in parts if part.path not in findings.broken}
    for plan in [plan for plan in wanted if plan not in plans]:
        findings.add(wanted.pop(plan).path, "stands for rows that the input does not have there")
    for plan, table in read_planned(source, wanted):
        for what in _list_differences(wanted[plan], table, source, order):
            findings.add(wanted[plan].path, f"its {what} are not those of the input's rows")


def _list_differences(part: Part, table: pa.Table, source: PackagedInput, order: DeletionOrder) -> Iterator[str]:
    """Yield "ids" and "pictures" where a part has others than its read batch, in order but for deleted ones.

    Ids are compared as text: NaN, pandas' missing number, equals itself.
    """
    content, table = part.read_content(), table.slice(0, part.counts["in"])
    ids = plain_values(table.column(ID_COLUMN))
    rejected = content.rejects.column("row").to_numpy() - part.plan.first_row
    embedded = np.setdiff1d(source.wanted_rows(table), rejected)
    embedded = embedded[~order.find(ids)[embedded]]
    held = [plain_values(one.column(ID_COLUMN)) for one in (content.embedded, content.rejects)]
    if [[repr(ids[row]) for row in rows] for rows in (embedded, rejected)] != [list(map(repr, one)) for one in held]:
        yield "ids"
    images = table.column(IMAGE_COLUMN)
    if [hash_bytes(images[int(row)].as_py() or b"") for row in embedded] != content.image_hashes.tolist():
        yield "pictures"
