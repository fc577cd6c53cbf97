"""Check a whole embeddings dataset: every row accounted for, nothing twice, all values as written."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.embeddings_dataset.columns import checksum_tables, list_values
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset, read_state
from pipeline.embeddings_dataset.deletions import DeletionOrder, read_order
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN, PackagedInput, read_batches
from pipeline.embeddings_dataset.parts import (
    EMBEDDING_COLUMN,
    ForeignError,
    Part,
    PartContent,
    count_rows,
    embeddings_of,
    is_foreign,
    list_part_files,
    plan_parts,
    read_part,
)
from pipeline.errors import DamagedError, InputError, one_line
from pipeline.files.tables import read_provenance
from pipeline.log import logger

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
        """Note a problem of a file."""
        self.problems.append(f"{path}: {what}")
        if broken:
            self.broken.add(path)

    def add_foreign(self, path: Path) -> None:
        """Note a file that this project did not write."""
        self.foreign.append(path)
        self.add(path, "not written by this project", broken=False)


def check_dataset(dataset: EmbeddingsDataset, input_path: Path | None = None) -> Findings:
    """Read all of a dataset and return its problems; the dataset keeps its sound parts only.

    Raises InputError where there is none, or where a file or the input cannot be read now.
    """
    findings, state = Findings(), dataset.state
    paths = [dataset.path_of(name) for name in list_part_files(dataset.folder)]
    if not paths and not dataset.state_path.exists():
        raise InputError(f"{dataset.folder}: no embeddings dataset (neither state.json nor parts): correct the path")
    if state is None and read_state(dataset.state_path):
        findings.add_foreign(dataset.state_path)
    elif state is None:
        what = "damaged" if dataset.state_path.exists() else "missing"
        findings.add(dataset.state_path, f"{what}: stage 8 makes it again from the parts")
    recipe: dict[str, Any] = {}
    with contextlib.suppress(ForeignError):
        recipe = dataset.find_begun() or {}
    order = read_order(dataset.folder)
    parts = _open_sound(paths, recipe, order, findings)
    end = 0
    for part in parts:
        if part.plan.first_row < end:
            findings.add(part.path, "holds rows that another part holds too")
        end = max(end, part.plan.first_row + part.plan.num_rows)
    # A kill between the two files leaves rejects alone, and a rerun writes both.
    for path in sorted((dataset.folder / "_rejects").glob("rg*.parquet")):
        if dataset.path_of(path.name) not in paths:
            if is_foreign(path):
                findings.add_foreign(path)
            else:
                findings.add(path, "its part is missing")
    if input_path is not None and recipe:
        _compare_with_input(dataset.open_input(input_path, recipe), parts, order, findings)
    findings.sound = tuple(part for part in parts if part.path not in findings.broken)
    dataset.use_parts(findings.sound)
    if state is not None:
        _check_state(dataset, state, findings)
    if not order.done:
        findings.add(dataset.folder, "a deletion of ids was interrupted: run delete_ids.py again", broken=False)
    return findings


def _open_sound(paths: Sequence[Path], recipe: dict[str, Any], order: DeletionOrder, findings: Findings) -> list[Part]:
    """Return the parts of this recipe that hold what they say, in input order."""
    sound = []
    for path in paths:
        try:
            part = read_part(path)
        except ForeignError:
            findings.add_foreign(path)
            continue
        except DamagedError as error:
            # Where nothing says whose the dataset is, a file that cannot be read may be another program's.
            findings.add(path, one_line(error).removeprefix(f"{path}: "), broken=bool(recipe))
            continue
        other = next((key for key, value in part.recipe.items() if value != recipe.get(key)), None)
        if part.plan.name != path.name:
            findings.add(path, f"holds the rows of {part.plan.name}")
        elif other is not None:
            was, wanted = part.recipe.get(other), recipe.get(other)
            findings.add(path, f"made with another {other} ({was!r}, the dataset has {wanted!r})")
        elif (problem := _find_problem(part, order)) is not None:
            findings.add(path, problem)
        else:
            sound.append(part)
    return sorted(sound, key=lambda part: part.plan.first_row)


# ------------------------------------------------------------------------------------------------ one part


def _find_problem(part: Part, order: DeletionOrder) -> str | None:
    """Return the first problem of a part's files and content, None where there is none."""
    if not part.rejects_path.exists():
        return "its rejects are missing: no such file"
    try:
        content = part.read_content()
        if read_provenance(part.rejects_path) != part.provenance:
            return "its rejects are those of another part or run"
        if order.apply(content) is not content:
            return "holds ids that were deleted: run delete_ids.py again"
        return _find_wrong_count(part, content) or _find_wrong_value(part, content)
    except DamagedError as error:
        return one_line(error)
    except (KeyError, TypeError, ValueError) as error:  # a changed byte in a column's name, a hash, a count
        return f"damaged ({one_line(error)[:200]})"


def _find_wrong_count(part: Part, content: PartContent) -> str | None:
    rows, first = content.rejects.column("row").to_numpy(), part.plan.first_row
    found = content.counts, content.reasons, len(content.image_hashes)
    said = part.counts, part.reasons, part.counts["out"]
    if found != said:
        return f"holds {found}, but says {said}"
    if not ((rows >= first) & (rows < first + part.counts["in"])).all() or (np.diff(rows) <= 0).any():
        return "its rejects list rows that are not its own, or one twice"
    return None


def _find_wrong_value(part: Part, content: PartContent) -> str | None:
    kind = content.embedded.schema.field(EMBEDDING_COLUMN).type
    if not (pa.types.is_fixed_size_list(kind) and kind.value_type == pa.float32()):
        return f"its embeddings are {kind}"
    if content.embedded.column(EMBEDDING_COLUMN).null_count:
        return "an embedding is null"
    embeddings = embeddings_of(content.embedded)  # (N, D)
    norms = np.linalg.norm(embeddings.astype(np.float64), axis=1)  # a changed byte may make a number huge
    wrong = np.flatnonzero(~(np.abs(norms - 1) <= NORM_TOLERANCE))  # NaN too
    if len(wrong):
        norm = norms[wrong[0]]
        return f"embedding {wrong[0]} {f'has norm {norm:.4f}' if np.isfinite(norm) else 'is not finite'}"
    if checksum_tables(content.embedded, content.rejects) != part.checksum:
        return "its data are not those of its checksum"
    return None


# ------------------------------------------------------------------------------------------------ the input, the state


def _compare_with_input(source: PackagedInput, parts: Sequence[Part], order: DeletionOrder, findings: Findings) -> None:
    """Compare parts with their rows of the input."""
    plans = {plan.name: plan for plan in plan_parts(source)}
    wanted: dict[int, dict[int, Part]] = {}
    for part in parts:
        if plans.get(part.path.name) != part.plan:
            findings.add(part.path, "stands for rows that the input does not have there")
        else:
            wanted.setdefault(part.plan.row_group, {})[part.plan.read_batch] = part
    for row_group, own in wanted.items():
        for read_batch, table in enumerate(read_batches(source, row_group, with_images=False)):
            if read_batch in own and not _has_ids_of(own[read_batch], table, source, order):
                findings.add(own[read_batch].path, "its ids are not those of the input's rows")


def _has_ids_of(part: Part, table: pa.Table, source: PackagedInput, order: DeletionOrder) -> bool:
    """Return whether a part has the ids of its read batch, which comes without images, in order but for deleted ones.

    Ids are compared as text: NaN, pandas' missing number, equals itself.
    """
    content, table = part.read_content(), table.slice(0, part.counts["in"])
    ids = list_values(table.column(ID_COLUMN))
    embedded = source.embedded_rows(table, part.plan.first_row, content.rejects)
    embedded = embedded[~order.find(ids)[embedded]]
    rejected = content.rejects.column("row").to_numpy() - part.plan.first_row
    held = [list_values(one.column(ID_COLUMN)) for one in (content.embedded, content.rejects)]
    return [[repr(ids[row]) for row in rows] for rows in (embedded, rejected)] == [list(map(repr, one)) for one in held]


def _check_state(dataset: EmbeddingsDataset, state: dict[str, Any], findings: Findings) -> None:
    """Note where the state claims more than the parts hold; the next run mends one that is behind."""
    path, counted = dataset.state_path, count_rows(findings.sound)
    ahead = {key: state.get(key, 0) - value for key, value in counted.items() if isinstance(value, int)}
    for key in (key for key, number in ahead.items() if number > 0):
        findings.add(path, f"{key} is {state[key]}, the sound parts have {counted[key]}", broken=False)
    accounted = sum(part.counts["in"] for part in findings.sound)
    if state.get("complete") and accounted != state.get("rows_total"):
        what = f"complete, but {accounted} of {state.get('rows_total')} rows are accounted for"
        findings.add(path, what, broken=False)
    if min(ahead.values()) < 0:
        logger.info("%s: behind its parts: the next run of stage 8 sets it right", path)
