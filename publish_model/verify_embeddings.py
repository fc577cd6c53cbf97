"""Check an embeddings dataset, finished or not: every row accounted for, nothing twice, all values as written.

    python publish_model/verify_embeddings.py OUTPUT --input packaged_images.parquet

Reads what stage 8 wrote and prints a table of what was checked; exit code 1 where something is broken. With --input the
ids are compared with those of the input, row by row. --repair removes what is broken, so that running stage 8 again
makes just that. It prints too which share of the images is less like the training images than 99 % of those that the
published model was tried on (--model-id, default: the model of the dataset where that is a folder on this machine).
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.errors import InputError, PipelineError, StaleOutputError, one_line
from pipeline.files.writing import write_json
from pipeline.log import logger, logging_to
from publish_model.dataset.deletions import read_order
from publish_model.dataset.drift import measure_drift
from publish_model.dataset.embedded_dataset import EmbeddedDataset, Part, list_part_paths
from publish_model.dataset.part_checks import check_against_input, check_part, open_part
from publish_model.dataset.part_plans import count_rows, plan_parts
from publish_model.dataset.parts import read_part_provenance, read_state, recipe_of, resolve_dataset_dir
from publish_model.new_data.packaged_input import open_packaged, read_batches

CHECKS = ("state", "parts", "rows", "rejects", "input")
SHOWN = 10
PART_NAME = re.compile(r"rg\d{5,}_rb\d{5,}\.parquet")


@dataclass
class Findings:
    """What is wrong, by check, and the files whose removal lets stage 8 put it right."""

    problems: dict[str, list[str]] = field(default_factory=lambda: {check: [] for check in CHECKS})
    broken: set[Path] = field(default_factory=set)

    def add(self, check: str, path: Path, what: str, *, broken: bool = True) -> None:
        """Note a problem of a file; `broken` says that it can be removed and made again."""
        self.problems[check].append(f"{path}: {what}")
        if broken:
            self.broken.add(path)

    @property
    def count(self) -> int:
        """Number of problems."""
        return sum(map(len, self.problems.values()))


def verify(folder: Path, input_path: Path | None, findings: Findings) -> EmbeddedDataset:
    """Check a dataset and return what of it is sound.

    Raises InputError where there is none, or the input cannot be read.
    """
    state = read_state(folder / "state.json")
    paths = list_part_paths(folder)
    if state is None and not paths:
        raise InputError(f"{folder}: no embeddings dataset (neither state.json nor parts): correct the path")
    if state is None:
        what = "damaged" if (folder / "state.json").exists() else "missing"
        findings.add("state", folder / "state.json", f"{what}: stage 8 makes it again from the parts")
    recipe = state or find_recipe(paths)
    parts = find_sound_parts(paths, recipe, findings)
    check_overlaps(parts, findings)
    check_rejects(folder, paths, findings)
    if input_path is not None:
        check_input(folder, input_path, parts, recipe, findings)
    sound = tuple(part for part in parts if part.path not in findings.broken)
    if state is not None:
        check_state(folder, state, sound, findings)
    return EmbeddedDataset(folder, state or {}, sound)


def find_recipe(paths: Sequence[Path]) -> dict[str, Any]:
    """Return what the first readable part was made from, where the state is lost."""
    for path in paths:
        try:
            provenance = read_part_provenance(path)
        except StaleOutputError:
            continue
        if provenance is not None:
            return recipe_of(provenance)
    return {}


def find_sound_parts(paths: Sequence[Path], recipe: dict[str, Any], findings: Findings) -> list[Part]:
    """Return the parts that hold what they say, in input order."""
    sound = []
    for path in paths:
        try:
            part = open_part(path, recipe)
        except StaleOutputError:
            # One changed byte in a part's footer may leave it without its provenance; its name is still a part's.
            if PART_NAME.fullmatch(path.name):
                findings.add("parts", path, "does not say what it was made from")
            else:
                findings.add("parts", path, "not made by stage 8: move it away", broken=False)
            continue
        if isinstance(part, str):
            findings.add("parts", path, part)
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
    folder: Path, input_path: Path, parts: Sequence[Part], recipe: dict[str, Any], findings: Findings
) -> None:
    """Compare parts with the rows of the input that they stand for.

    Raises InputError where the input cannot be read or is not the one of the dataset.
    """
    filter_valid = bool(recipe.get("filter_valid", True))
    source = open_packaged(input_path, filter_valid=filter_valid, keep_columns=recipe.get("keep_columns", []))
    if source.fingerprint != recipe.get("row_group_fingerprint"):
        raise InputError(f"{input_path}: not the input that {folder} was made from: give that one")
    batch_rows = int(recipe["read_batch_size"])
    plans = {plan.name: plan for plan in plan_parts(source, batch_rows)}
    wanted: dict[int, dict[int, Part]] = {}
    for part in parts:
        if plans.get(part.path.name) != part.plan:
            findings.add("input", part.path, "stands for rows that the input does not have there")
        else:
            wanted.setdefault(part.plan.row_group, {})[part.plan.read_batch] = part
    for row_group, own in wanted.items():
        batches = read_batches(source, row_group, batch_rows, with_valid=filter_valid, with_images=False)
        for read_batch, table in enumerate(batches):
            if read_batch in own:
                problem = check_against_input(own[read_batch], table, filter_valid)
                if problem is not None:
                    findings.add("input", own[read_batch].path, problem)


def check_state(folder: Path, state: dict[str, Any], parts: Sequence[Part], findings: Findings) -> None:
    """Note where the state says more than the parts hold; one that is behind is put right by the next run."""
    path = folder / "state.json"
    counted = count_parts(parts)
    for key, value in counted.items():
        before = state.get(key, 0)
        if isinstance(value, int) and before > value:
            findings.add("state", path, f"{key} is {before}, the sound parts have {value}", broken=False)
    accounted = sum(part.record.counts["in"] for part in parts)
    if state.get("complete") and accounted != state.get("rows_total"):
        findings.add(
            "state",
            path,
            f"complete, but {accounted} of {state.get('rows_total')} rows are accounted for",
            broken=False,
        )
    if any(state.get(key, 0) < value for key, value in counted.items() if isinstance(value, int)):
        logger.info("%s: behind its parts: the next run of stage 8 sets it right", path)
    order = read_order(folder)
    if order is not None and not order.done:
        findings.add("state", path, "a deletion of ids was interrupted: run delete_ids.py again", broken=False)


def count_parts(parts: Sequence[Part]) -> dict[str, Any]:
    """Add up what the parts say of themselves."""
    return count_rows((part.record, part.plan.num_rows) for part in parts)


def repair(dataset: EmbeddedDataset, findings: Findings) -> None:
    """Remove what is broken, each part with its rejects, and let the state say what is left."""
    for path in sorted(findings.broken):
        doomed = [path]
        if path.parent.name == "parts":
            doomed.append(dataset.folder / "_rejects" / path.name)
        for one in doomed:
            if one.exists():
                one.unlink()
                logger.info("removed %s", one)
    if dataset.state:
        counted = count_parts(dataset.parts)
        state = {key: value for key, value in dataset.state.items() if key != "rows_deleted"} | counted
        state["complete"] = counted["parts_done"] == state["parts_total"]
        write_json(dataset.folder / "state.json", state)


def report(dataset: EmbeddedDataset, findings: Findings) -> None:
    """Log the problems and the table of what was checked."""
    for problems in findings.problems.values():
        for problem in problems[:SHOWN]:
            logger.error("%s", problem)
        if len(problems) > SHOWN:
            logger.error("... and %d more of this kind", len(problems) - SHOWN)
    counted = count_parts(dataset.parts)
    total = dataset.state.get("rows_total")
    accounted = sum(part.record.counts["in"] for part in dataset.parts)
    unchecked = sum(part.checksum is None for part in dataset.parts)
    rows = [
        ("parts", f"{len(dataset.parts)} sound of {dataset.state.get('parts_total', 'unknown')}"),
        ("rows accounted for", f"{accounted} of {total if total is not None else 'unknown'}"),
        *((key.removeprefix("rows_"), str(value)) for key, value in counted.items() if key.startswith("rows_")),
        ("parts without a checksum", str(unchecked)),
        ("embedding version", str(dataset.state.get("embedding_version", "unknown"))),
        *((f"problems: {check}", str(len(problems))) for check, problems in findings.problems.items()),
    ]
    for name, value in rows:
        logger.info("%-26s %s", name, value)


def verify_dataset(output: Path, input_path: Path | None, repairing: bool, model_id: str | None) -> None:
    """Check a dataset, say what is wrong, and remove it where that is asked for.

    Raises PipelineError where something is wrong and is not repaired.
    """
    folder = resolve_dataset_dir(output)
    findings = Findings()
    dataset = verify(folder, input_path, findings)
    report(dataset, findings)
    if dataset.parts:
        try:
            logger.info("%s", measure_drift(dataset, model_id or str(dataset.state.get("model_id", ""))))
        except InputError as error:
            logger.info("likeness to the training images: not measured (%s)", one_line(error))
    if not findings.count:
        done = "complete" if dataset.state.get("complete") else "sound so far, not complete yet"
        logger.info("%s: %s", folder, done)
        return
    if not repairing:
        raise PipelineError(
            f"{folder}: {findings.count} problems: --repair removes what is broken, then run stage 8 again"
        )
    repair(dataset, findings)
    left = [problem for problems in findings.problems.values() for problem in problems if "move it away" in problem]
    if left:
        raise PipelineError(f"{left[0]}: it is not removed here")
    logger.info("%s: %d broken files removed: run stage 8 again to make them", folder, len(findings.broken))


def main(argv: Sequence[str] | None = None) -> None:
    """Verify from a command line."""
    parser = cli.make_parser(__doc__ or "", config=False)
    add = parser.add_argument
    add("output", type=Path, metavar="OUTPUT", help="dataset directory that stage 8 wrote")
    add("--input", "-i", type=Path, metavar="PATH", help="compare the ids with those of this input too")
    add("--repair", action="store_true", help="remove what is broken, so that a rerun makes just that")
    add("--model-id", metavar="ID", help="published model that carries the training statistics")
    arguments = parser.parse_args(argv)
    with logging_to(None):
        verify_dataset(arguments.output, arguments.input, arguments.repair, arguments.model_id)


if __name__ == "__main__":
    cli.run_guarded(main)
