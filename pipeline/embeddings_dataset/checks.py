"""Check a whole embeddings dataset: every row accounted for, nothing twice, all values as written."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.embeddings_dataset.columns import checksum_tables, hash_bytes, list_values
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset, read_state
from pipeline.embeddings_dataset.deletions import DeletionOrder, read_order
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN, IMAGE_COLUMN, PackagedInput, read_batches
from pipeline.embeddings_dataset.parts import (
    EMBEDDING_COLUMN,
    ForeignError,
    Part,
    PartContent,
    embeddings_of,
    is_ours,
    plan_parts,
    read_parts,
    rejects_beside,
)
from pipeline.errors import DamagedError, InputError, PipelineError, one_line
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
    findings, state, found = Findings(), dataset.state, dict(read_parts(dataset.folder))
    if not found and not dataset.state_path.exists():
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
    parts = _find_sound(found, recipe, order, findings)
    # A kill between the two files leaves rejects alone, and a rerun writes both.
    for path in sorted((dataset.folder / "_rejects").glob("rg*.parquet")):
        if rejects_beside(path) not in found:
            if is_ours(path) is False:
                findings.add_foreign(path)
            else:
                findings.add(path, "its part is missing")
    if input_path is not None and recipe:
        _compare_with_input(dataset.open_input(input_path, recipe), parts, order, findings)
    findings.sound = dataset.parts = tuple(part for part in parts if part.path not in findings.broken)
    accounted, total = sum(part.counts["in"] for part in findings.sound), (state or {}).get("rows_total")
    if state is not None and state.get("complete") and accounted != total:
        what = f"complete, but {accounted} of {total} rows are accounted for"
        findings.add(dataset.state_path, what, broken=False)
    if not order.done:
        findings.add(dataset.folder, "a deletion of ids was interrupted: run delete_ids.py again", broken=False)
    return findings


# ------------------------------------------------------------------------------------------------ one part


def _find_sound(
    found: Mapping[Path, Part | PipelineError], recipe: dict[str, Any], order: DeletionOrder, findings: Findings
) -> list[Part]:
    """Return the parts of this recipe that hold what they say, in input order."""
    sound: list[Part] = []
    for path, part in found.items():
        if isinstance(part, ForeignError):
            findings.add_foreign(path)
        elif isinstance(part, PipelineError):
            # Where nothing says whose the dataset is, a file that cannot be read may be another program's.
            findings.add(path, one_line(part).removeprefix(f"{path}: "), broken=bool(recipe))
        elif problem := next(_list_problems(part, recipe, order), None):
            findings.add(path, problem)
        else:
            sound.append(part)
    return sorted(sound, key=lambda part: part.plan.first_row)


def _list_problems(part: Part, recipe: dict[str, Any], order: DeletionOrder) -> Iterator[str]:
    """Yield the problems of a part's origin, files and content; those behind the first one may follow from it."""
    for other in (key for key, value in part.recipe.items() if value != recipe.get(key)):
        yield f"made with another {other} ({part.recipe[other]!r}, the dataset has {recipe.get(other)!r})"
    if not rejects_beside(part.path).exists():
        yield "its rejects are missing: no such file"
    try:
        content = part.read_content()
        if read_provenance(rejects_beside(part.path)) != part.provenance:
            yield "its rejects are those of another part or run"
        if order.apply(content) is not content:
            yield "holds ids that were deleted: run delete_ids.py again"
        yield from _list_wrong_values(part, content)
    except DamagedError as error:
        yield one_line(error)
    except (KeyError, TypeError, ValueError) as error:  # a changed byte in a column's name, a hash, a count
        yield f"damaged ({one_line(error)[:200]})"


def _list_wrong_values(part: Part, content: PartContent) -> Iterator[str]:
    found = content.counts, content.reasons, len(content.image_hashes)
    said = part.counts, part.reasons, part.counts["out"]
    if found != said:
        yield f"holds {found}, but says {said}"
    rows, first = content.rejects.column("row").to_numpy(), part.plan.first_row
    if not ((rows >= first) & (rows < first + part.counts["in"])).all() or (np.diff(rows) <= 0).any():
        yield "its rejects list rows that are not its own, or one twice"
    kind = content.embedded.schema.field(EMBEDDING_COLUMN).type
    if not (pa.types.is_fixed_size_list(kind) and kind.value_type == pa.float32()):
        yield f"its embeddings are {kind}"
    if content.embedded.column(EMBEDDING_COLUMN).null_count:
        yield "an embedding is null"
    embeddings = embeddings_of(content.embedded)  # (N, D)
    norms = np.linalg.norm(embeddings.astype(np.float64), axis=1)  # a changed byte may make a number huge
    for wrong in np.flatnonzero(~(np.abs(norms - 1) <= NORM_TOLERANCE)):  # NaN too
        yield f"embedding {wrong} {f'has norm {norms[wrong]:.4f}' if np.isfinite(norms[wrong]) else 'is not finite'}"
    if checksum_tables(content.embedded, content.rejects) != part.checksum:
        yield "its data are not those of its checksum"


# ------------------------------------------------------------------------------------------------ the input


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
        for read_batch, table in enumerate(read_batches(source, row_group)):
            if read_batch in own:
                for what in _list_differences(own[read_batch], table, source, order):
                    findings.add(own[read_batch].path, f"its {what} are not those of the input's rows")


def _list_differences(part: Part, table: pa.Table, source: PackagedInput, order: DeletionOrder) -> Iterator[str]:
    """Yield "ids" and "pictures" where a part has others than its read batch, in order but for deleted ones.

    Ids are compared as text: NaN, pandas' missing number, equals itself.
    """
    content, table = part.read_content(), table.slice(0, part.counts["in"])
    ids = list_values(table.column(ID_COLUMN))
    embedded = source.embedded_rows(table, part.plan.first_row, content.rejects)
    embedded = embedded[~order.find(ids)[embedded]]
    rejected = content.rejects.column("row").to_numpy() - part.plan.first_row
    held = [list_values(one.column(ID_COLUMN)) for one in (content.embedded, content.rejects)]
    if [[repr(ids[row]) for row in rows] for rows in (embedded, rejected)] != [list(map(repr, one)) for one in held]:
        yield "ids"
    images = table.column(IMAGE_COLUMN)
    if [hash_bytes(images[int(row)].as_py() or b"") for row in embedded] != content.image_hashes.tolist():
        yield "pictures"
