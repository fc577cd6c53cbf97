"""Take ids out of an embeddings dataset for good: takedowns.

    python publish_model/delete_ids.py OUTPUT --delete-ids ids.txt

Reads the ids, one a line or the column OSMID of a parquet, and rewrites the parts and rejects that hold one of them,
each in one piece; state.json counts what is gone. Hashes of the ids are kept in OUTPUT/_deleted/, so that stage 8
leaves them out too when it makes a part again. What was made of the dataset inside OUTPUT (aggregates, exports) is
removed. A rerun goes on where a run was interrupted. Run it while nothing else writes to the dataset.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.errors import InputError
from pipeline.files.tables import open_parquet, read_provenance, write_parquet
from pipeline.files.writing import write_json
from pipeline.log import logger
from publish_model.dataset.deletions import DeletionOrder, read_order, stay_rows, without_ids, write_order
from publish_model.dataset.embedded_dataset import EmbeddedDataset, as_written, open_dataset
from publish_model.dataset.hashes import hash_ids
from publish_model.dataset.part_plans import count_rows
from publish_model.dataset.parts import resolve_dataset_dir, write_part_files
from publish_model.new_data.packaged_input import ID_COLUMN, plain_values

STAGE = "delete_ids"
DERIVED = ("_aggregated", "_exports")
DESCRIBED_BY_THE_PART = ("cut", "counts", "reasons", "checksum")


def read_ids_to_delete(path: Path, kind: pa.DataType) -> list[object]:
    """Return the ids of a list, as plain values of the dataset's type.

    Raises InputError if it cannot be read, is empty, or a line is not of that type.
    """
    if path.suffix == ".parquet":
        with open_parquet(path) as file:
            if ID_COLUMN not in file.schema_arrow.names:
                raise InputError(f"{path}: column {ID_COLUMN} is missing")
            column = file.read([ID_COLUMN]).column(0).combine_chunks()
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read as text ({error})") from None
        column = pa.array([line.strip() for line in lines if line.strip()], pa.string())
    if not len(column):
        raise InputError(f"{path}: holds no ids")
    values_type = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return plain_values(column.cast(values_type))
    except pa.ArrowException as error:
        raise InputError(
            f"{path}: not all of its ids are {values_type}, as those of the dataset are ({error})"
        ) from None


def delete(output: Path, list_path: Path) -> cli.StageResult:
    """Rewrite a dataset without some ids and return the counts of its rows.

    Raises InputError where the dataset or the list cannot be read.
    """
    dataset = open_dataset(output)
    folder = dataset.folder
    ids = read_ids_to_delete(list_path, dataset.schema.field(ID_COLUMN).type)
    before = read_order(folder)
    wanted = frozenset(hash_ids(ids)) | (before.id_hashes if before else frozenset())
    if before is None or before.id_hashes != wanted:
        write_order(folder, DeletionOrder(wanted, done=False))
    result = cli.StageResult(STAGE)
    num_deleted = rewrite_parts(dataset, wanted)
    dataset = open_dataset(output)
    for part in dataset.parts:
        result.add(part.record.counts, part.record.reasons)
    if dataset.state:
        counted = count_rows((part.record, part.plan.num_rows) for part in dataset.parts)
        write_json(folder / "state.json", dataset.state | counted)
    for name in DERIVED:
        if num_deleted and (folder / name).is_dir():
            shutil.rmtree(folder / name)
            logger.warning("%s: removed, as it was made with the ids: make it again", folder / name)
    write_order(folder, DeletionOrder(wanted, done=True))
    logger.info("%d rows deleted; %d ids are left out from now on", num_deleted, len(wanted))
    (result.written if num_deleted else result.kept).append(folder)
    return result


def rewrite_parts(dataset: EmbeddedDataset, id_hashes: frozenset[int]) -> int:
    """Write every part that holds one of the ids again without it, and return how many rows that takes out."""
    num_deleted = 0
    for part in dataset.parts:
        promised = read_provenance(part.rejects_path) or {}
        if promised.get("checksum") != part.checksum:
            # Killed between the rejects and their part: the rejects are the new ones and say what the part is to hold.
            embedded = as_written(part.read())
            write_parquet(part.path, embedded.filter(pa.array(stay_rows(embedded, id_hashes))), promised)
            num_deleted += promised["counts"].get("deleted", 0) - part.record.counts.get("deleted", 0)
            continue
        content = part.read_content()
        left = without_ids(content, id_hashes)
        if left is not content:
            provenance = {key: value for key, value in part.provenance.items() if key not in DESCRIBED_BY_THE_PART}
            write_part_files(dataset.folder, part.plan, left, provenance)
            num_deleted += left.deleted - content.deleted
    return num_deleted


def main(argv: Sequence[str] | None = None) -> None:
    """Delete from a command line."""
    parser = cli.make_parser(__doc__ or "", config=False)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="dataset directory that stage 8 wrote")
    parser.add_argument(
        "--delete-ids", type=Path, required=True, metavar="FILE", help="ids, one a line, or a parquet with OSMID"
    )
    arguments = parser.parse_args(argv)
    folder = resolve_dataset_dir(arguments.output)
    if not folder.is_dir():
        raise InputError(f"{folder}: no embeddings dataset: correct the path")
    log_path = folder / "_logs" / f"{STAGE}.log"
    cli.run_logged(STAGE, lambda: delete(arguments.output, arguments.delete_ids), log_path)


if __name__ == "__main__":
    cli.run_guarded(main)
