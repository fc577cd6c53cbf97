"""Check an embeddings dataset, finished or not: every row accounted for, nothing twice, all values as written.

    python publish_model/verify_embeddings.py OUTPUT --input packaged_images.parquet

Reads what stage 8 wrote and prints a table of what was checked; exit code 1 where something is broken. With --input the
ids and pictures are compared with those of the input, row by row. --repair moves what is broken to OUTPUT/_removed/, so
that running stage 8 again makes just that; files that this project did not write stay.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.embeddings_dataset.checks import Findings, check_dataset
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.deletions import read_order
from pipeline.embeddings_dataset.parts import count_rows
from pipeline.errors import PipelineError
from pipeline.log import logger, logging_to
from publish_model.new_data.embed_options import make_tool_parser

SHOWN = 20


def report(dataset: EmbeddingsDataset, findings: Findings) -> None:
    for problem in findings.problems[:SHOWN]:
        logger.error("%s", problem)
    if len(findings.problems) > SHOWN:
        logger.error("... and %d more", len(findings.problems) - SHOWN)
    state, counted = dataset.state or {}, count_rows(findings.sound)
    rows = [
        ("parts", f"{len(findings.sound)} sound of {state.get('parts_total', 'unknown')}"),
        (
            "rows accounted for",
            f"{sum(part.counts['in'] for part in findings.sound)} of {state.get('rows_total', 'unknown')}",
        ),
        *((key.removeprefix("rows_"), value) for key, value in counted.items() if key.startswith("rows_")),
        ("embedding version", state.get("embedding_version", "unknown")),
        ("problems", len(findings.problems)),
    ]
    for name, value in rows:
        logger.info("%-20s %s", name, value)


def verify_dataset(output: Path, input_path: Path | None, repairing: bool) -> None:
    """Check a dataset, log its problems, and set broken files aside if `repairing`.

    Raises PipelineError if a problem remains.
    """
    dataset = EmbeddingsDataset(output)
    if repairing and not read_order(dataset.folder).done:
        raise PipelineError(
            f"{dataset.folder}: a deletion of ids was interrupted, so nothing is set aside: finish it with "
            f"delete_ids.py {dataset.folder} --delete-ids FILE, then run this again (where it stops at a broken file, "
            "remove that and the file of its name in parts/ or _rejects/ first)"
        )
    findings = check_dataset(dataset, input_path)
    report(dataset, findings)
    if not findings.problems:
        is_complete = (dataset.state or {}).get("complete")
        logger.info("%s: %s", dataset.folder, "complete" if is_complete else "sound so far, not complete yet")
        return
    if repairing:
        dataset.set_aside(sorted(findings.broken))
        dataset.update_state(findings.sound)
        logger.info("%s: %d broken files set aside: run stage 8 again", dataset.folder, len(findings.broken))
    if findings.foreign:
        raise PipelineError(
            f"{findings.foreign[0]}: not written by this project ({len(findings.foreign)} such files, which are left): "
            "adopt the dataset with adopt_embeddings.py, or move them away"
        )
    if not repairing:
        remedy = "--repair sets what is broken aside, then run stage 8 again" if findings.broken else "see the log"
        raise PipelineError(f"{dataset.folder}: {len(findings.problems)} problems: {remedy}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_tool_parser(__doc__ or "")
    add = parser.add_argument
    add("--input", "-i", type=Path, metavar="PATH", help="compare ids and pictures with those of this input too")
    add("--repair", action="store_true", help="set aside what is broken, so that a rerun makes just that")
    arguments = parser.parse_args(argv)
    with logging_to(None), EmbeddingsDataset(arguments.output).held() if arguments.repair else nullcontext():
        verify_dataset(arguments.output, arguments.input, arguments.repair)


if __name__ == "__main__":
    cli.run_guarded(main)
