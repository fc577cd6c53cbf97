"""Delete ids from an embeddings dataset for good.

    python publish_model/delete_ids.py OUTPUT --delete-ids ids.txt

Reads the ids, one a line or the column OSMID of a CSV or parquet, and rewrites the parts and rejects that hold one of
them, each in one piece; state.json counts what is gone. Hashes of the ids are kept in OUTPUT/_deleted/, so that stage 8
leaves them out too when it makes a part again. Aggregates, clusters, logs and set-aside parts inside OUTPUT
are removed. Files of others and other datasets there stay and are named, and the exit code is 1. If an id
matches nothing it is 1 too (0 with --allow-missing); the others are deleted. A rerun resumes an interrupted run.
Refused while another process writes to the dataset. It writes no log file, which would name ids.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.deletions import delete_ids, list_naming_columns
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN
from pipeline.errors import PipelineError
from pipeline.log import logger
from publish_model.new_data.embed_options import make_tool_parser, run_tool
from publish_model.new_data.id_lists import name_id, plain_ids, read_id_list

STAGE = "delete_ids"
NUM_EXAMPLES = 5


def delete(dataset: EmbeddingsDataset, list_path: Path, allow_missing: bool) -> cli.StageResult:
    """Rewrite a dataset without some ids and return the counts of its rows.

    Raises InputError where the dataset or the list cannot be read; once all is done, PipelineError where ids match
    nothing, unless that is allowed, or files of others may hold the ids.
    """
    listed, kind = read_id_list(list_path), dataset.schema.field(ID_COLUMN).type
    num_rows, distinct, missing, others = delete_ids(dataset, plain_ids(listed, kind, list_path))
    result = cli.StageResult(STAGE)
    for part in dataset.parts:
        result.add(part.counts, part.reasons)
    (result.written if num_rows else result.kept).append(dataset.folder)
    logger.info("%d rows deleted; the %d ids of the list are left out from now on", num_rows, len(distinct))
    problems = []
    if len(missing):
        examples = ", ".join(repr(name_id(listed[place])) for place in missing[:NUM_EXAMPLES])
        problem = (
            f"{list_path}: {len(missing)} of its {len(distinct)} ids match nothing in {dataset.folder} "
            f"({examples}): correct them, or give --allow-missing; the others are deleted"
        )
        logger.warning("%s", problem)
        problems += [] if allow_missing else [problem]
    for path in others:
        whose = "another embeddings dataset" if path.is_dir() else "not written by this project"
        logger.warning("%s: %s: it stays, and may hold the ids", path, whose)
    if others:
        problems.append(
            f"{dataset.folder}: the ids are gone but for {len(others)} files or datasets that are not its own (named "
            "above), which may hold them: delete the ids there too and move them away"
        )
    naming, counting = list_naming_columns(dataset)
    if counting:
        logger.warning(
            "%s: numbers in the kept columns %s equal deleted ids, maybe by chance",
            dataset.folder, ", ".join(map(repr, counting)),
        )  # fmt: skip
    if naming:
        problems.append(
            f"{dataset.folder}: rows that stay name deleted ids in the kept columns {', '.join(map(repr, naming))}: "
            "embed the input without these columns (--keep-columns) into another folder, and remove this one"
        )
    if problems:
        raise PipelineError(problems[-1], result)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_tool_parser(__doc__ or "")
    parser.add_argument(
        "--delete-ids", type=Path, required=True, metavar="FILE", help="ids, one a line, or a CSV or parquet with OSMID"
    )
    parser.add_argument("--allow-missing", action="store_true", help="exit 0 where ids match nothing, too")
    arguments = parser.parse_args(argv)
    run_tool(
        STAGE, arguments.output, lambda dataset: delete(dataset, arguments.delete_ids, arguments.allow_missing),
        alone=True,
    )  # fmt: skip


if __name__ == "__main__":
    cli.run_guarded(main)
