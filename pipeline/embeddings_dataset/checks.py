"""Check a whole embeddings dataset: every row accounted for, nothing twice, all values as written."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.embeddings_dataset import set_aside
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset, count_parts
from pipeline.embeddings_dataset.deletions import read_order
from pipeline.embeddings_dataset.packaged_input import read_batches
from pipeline.embeddings_dataset.part_checks import check_against_input, check_part, open_part
from pipeline.embeddings_dataset.part_plans import plan_parts
from pipeline.embeddings_dataset.parts import ForeignError, Part, is_foreign_state, list_part_files, read_part
from pipeline.errors import DamagedError, InputError
from pipeline.log import logger

CHECKS = ("state", "parts", "rows", "rejects", "input")


@dataclass
class Findings:
    """What is wrong, by check; the files that are provably damaged; those that this project did not write.

    `sound` are the parts with which nothing is wrong, in input order.
    """

    problems: dict[str, list[str]] = field(default_factory=lambda: {check: [] for check in CHECKS})
    broken: set[Path] = field(default_factory=set)
    foreign: list[Path] = field(default_factory=list)
    sound: tuple[Part, ...] = ()

    def add(self, check: str, path: Path, what: str, *, broken: bool = True) -> None:
        """Note a problem of a file; `broken` says that it can be set aside and made again."""
        self.problems[check].append(f"{path}: {what}")
        if broken:
            self.broken.add(path)

    @property
    def count(self) -> int:
        """Number of problems."""
        return sum(map(len, self.problems.values()))


def check_dataset(dataset: EmbeddingsDataset, input_path: Path | None = None) -> Findings:
    """Read all of a dataset and return what is wrong; its parts are from then on those that are sound.

    Raises InputError where there is none, where a file or the input cannot be read now.
    """
    findings, state = Findings(), dataset.state
    paths = [dataset.path_of(name) for name in list_part_files(dataset.folder)]
    if not paths and not dataset.state_path.exists():
        raise InputError(f"{dataset.folder}: no embeddings dataset (neither state.json nor parts): correct the path")
    if state is None and is_foreign_state(dataset.state_path):
        findings.foreign.append(dataset.state_path)
        findings.add("state", dataset.state_path, "not written by this project", broken=False)
    elif state is None:
        what = "damaged" if dataset.state_path.exists() else "missing"
        findings.add("state", dataset.state_path, f"{what}: stage 8 makes it again from the parts")
    recipe = state or find_recipe(paths)
    parts = find_sound_parts(paths, recipe, findings)
    check_overlaps(parts, findings)
    check_rejects(dataset.folder, paths, findings)
    if input_path is not None and recipe:
        check_input(dataset, input_path, parts, recipe, findings)
    findings.sound = tuple(part for part in parts if part.path not in findings.broken)
    if state is not None:
        check_state(dataset, state, findings)
    dataset.use_parts(findings.sound)
    return findings


def repair(dataset: EmbeddingsDataset, findings: Findings) -> None:
    """Set aside what is provably damaged, each part with its rejects, and let the state say what is left."""
    set_aside.move(dataset.folder, findings.broken)
    dataset.update_state()


def find_recipe(paths: Sequence[Path]) -> dict[str, Any]:
    """Return what the first readable part was made from, where the state is lost."""
    for path in paths:
        try:
            return read_part(path).recipe
        except (DamagedError, ForeignError):
            continue
    return {}


def find_sound_parts(paths: Sequence[Path], recipe: dict[str, Any], findings: Findings) -> list[Part]:
    """Return the parts that hold what they say, in input order."""
    sound = []
    for path in paths:
        try:
            part = open_part(path, recipe)
        except ForeignError:
            findings.foreign.append(path)
            findings.add("parts", path, "not written by this project", broken=False)
            continue
        if isinstance(part, str):
            # Where nothing says whose the dataset is, a file that cannot be read is not ours to touch.
            findings.add("parts", path, part, broken=bool(recipe))
            continue
        problem = check_part(part)
        if problem is not None:
            findings.add("rows", path, problem)
        else:
            sound.append(part)
    return sorted(sound, key=lambda part: part.plan.first_row)


def check_overlaps(parts: Sequence[Part], findings: Findings) -> None:
    """Note parts that hold rows which another one holds too."""
    end = 0
    for part in parts:
        if part.plan.first_row < end:
            findings.add("rows", part.path, "holds rows that another part holds too")
        end = max(end, part.plan.first_row + part.plan.num_rows)


def check_rejects(folder: Path, paths: Sequence[Path], findings: Findings) -> None:
    """Note rejects without their part; a kill between the two leaves such, and a rerun writes both."""
    names = {path.name for path in paths}
    for path in sorted((folder / "_rejects").glob("rg*.parquet")):
        if path.name not in names:
            findings.add("rejects", path, "its part is missing")


def check_input(
    dataset: EmbeddingsDataset, input_path: Path, parts: Sequence[Part], recipe: dict[str, Any], findings: Findings
) -> None:
    """Compare parts with the rows of the input that they stand for.

    Raises InputError where the input cannot be read or is not the one of the dataset.
    """
    source = dataset.open_input(input_path, recipe)
    plans = {plan.name: plan for plan in plan_parts(source)}
    wanted: dict[int, dict[int, Part]] = {}
    for part in parts:
        if plans.get(part.path.name) != part.plan:
            findings.add("input", part.path, "stands for rows that the input does not have there")
        else:
            wanted.setdefault(part.plan.row_group, {})[part.plan.read_batch] = part
    for row_group, own in wanted.items():
        for read_batch, table in enumerate(read_batches(source, row_group, with_images=False)):
            if read_batch in own:
                problem = check_against_input(own[read_batch], table, source)
                if problem is not None:
                    findings.add("input", own[read_batch].path, problem)


def check_state(dataset: EmbeddingsDataset, state: dict[str, Any], findings: Findings) -> None:
    """Note where the state says more than the parts hold; one that is behind is put right by the next run."""
    path, parts = dataset.state_path, findings.sound
    counted = count_parts(parts)
    for key, value in counted.items():
        before = state.get(key, 0)
        if isinstance(value, int) and before > value:
            findings.add("state", path, f"{key} is {before}, the sound parts have {value}", broken=False)
    accounted = sum(part.record.counts["in"] for part in parts)
    if state.get("complete") and accounted != state.get("rows_total"):
        what = f"complete, but {accounted} of {state.get('rows_total')} rows are accounted for"
        findings.add("state", path, what, broken=False)
    if any(state.get(key, 0) < value for key, value in counted.items() if isinstance(value, int)):
        logger.info("%s: behind its parts: the next run of stage 8 sets it right", path)
    order = read_order(dataset.folder)
    if order is not None and not order.done:
        findings.add("state", path, "a deletion of ids was interrupted: run delete_ids.py again", broken=False)
