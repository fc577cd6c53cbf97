"""Write a compact copy of an embeddings dataset, and measure the recall of its nearest neighbours.

    python publish_model/export_embeddings.py OUTPUT --export float16

Reads what stage 8 wrote. Writes OUTPUT/_exports/float16/ (or int8): a part for each part, with the same
columns, and export.json with recall@10 against the exact embeddings. float16 halves the numbers; int8 quarters them,
each row with its `scale` (embedding = scale * int8). A rerun keeps the parts that are done.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.embeddings_dataset.columns import check_names
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset, gather_blocks
from pipeline.embeddings_dataset.parts import EMBEDDING_COLUMN, embeddings_of, read_table
from pipeline.errors import StaleOutputError
from pipeline.files.outputs import check_replaceable
from pipeline.files.tables import is_complete, make_provenance, write_parquet
from pipeline.files.workspace import read_json_object, write_json
from pipeline.log import logger
from pipeline.own_folders import remove
from publish_model.derived.dataset_tool import make_tool_parser, run_tool
from publish_model.derived.similarity_search import find_nearest

STAGE = "export_embeddings"
SCALE_COLUMN = "scale"
# What is written beside the parts, and how it is told.
EXPORT_SUMMARY, EXPORT_MARK = "export.json", '"recall_at_10"'
NUM_NEAREST = 10
# Rows whose neighbours are looked for, spread over the dataset: recall is known to about 0.002 by 1,000 x 10 of them.
NUM_QUERIES = 1000


def compress(table: pa.Table, kind: str) -> pa.Table:
    """Return a part's rows with compact embeddings: float16, or int8 and the column `scale`."""
    embeddings = embeddings_of(table)  # (N, D)
    place = table.schema.get_field_index(EMBEDDING_COLUMN)
    scale = np.abs(embeddings).max(axis=1, initial=0.0) / 127  # (N,)
    if kind == "float16":
        numbers = embeddings.astype(np.float16)
    else:
        numbers = np.rint(embeddings / np.where(scale > 0, scale, 1)[:, None]).astype(np.int8)
        table = table.append_column(SCALE_COLUMN, pa.array(scale.astype(np.float32)))
    return table.set_column(
        place, EMBEDDING_COLUMN, pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), embeddings.shape[1])
    )


def expand(table: pa.Table, kind: str) -> NDArray[np.float32]:
    """Return the embeddings (N, D) that a compact part stands for."""
    embeddings = embeddings_of(table)
    return embeddings if kind == "float16" else embeddings * table.column(SCALE_COLUMN).to_numpy()[:, None]


def measure_recall(dataset: EmbeddingsDataset, paths: Sequence[Path], kind: str) -> tuple[float, int]:
    """Return the share of the 10 nearest that the compact copy finds too, and the number of queries.

    A query is not its own neighbour.
    """
    step = max(1, -(-dataset.num_rows // NUM_QUERIES))
    rows = np.arange(0, dataset.num_rows, step)
    columns, found = [EMBEDDING_COLUMN, *([SCALE_COLUMN] if kind == "int8" else [])], []
    for blocks in (
        dataset.read_blocks, lambda: gather_blocks(expand(read_table(path, columns), kind) for path in paths)
    ):  # fmt: skip
        queries = np.concatenate([block[(-first) % step :: step] for first, block in blocks()])
        _, nearest = find_nearest(queries, blocks(), NUM_NEAREST + 1)
        found.append(
            [[row for row in line if row != own][:NUM_NEAREST] for line, own in zip(nearest, rows, strict=True)]
        )
    hits = sum(len(set(exact) & set(compact)) for exact, compact in zip(*found, strict=True))
    return hits / max(1, sum(map(len, found[0]))), len(rows)


def export(dataset: EmbeddingsDataset, kind: str, overwrite: bool) -> cli.StageResult:
    """Write the compact copy and return the counts of its rows.

    Raises InputError for a dataset that cannot be read, StaleOutputError for a copy of another one.
    """
    check_names(f"--export {kind}", [SCALE_COLUMN] if kind == "int8" else [], dataset.schema.names)
    folder = dataset.folder / "_exports" / kind
    result = cli.StageResult(STAGE)
    summary_path, paths = folder / EXPORT_SUMMARY, [folder / "parts" / part.path.name for part in dataset.parts]
    check_replaceable(summary_path, EXPORT_MARK, is_default=True)
    others = sorted({*(folder / "parts").glob("*.parquet")} - {*paths})
    for path in [*paths, *others]:
        check_replaceable(path, STAGE, is_default=True)
    if others and not overwrite:
        raise StaleOutputError(f"{others[0]}: made of no part of this dataset: give --overwrite to make the copy again")
    for part, path in zip(dataset.parts, paths, strict=True):
        source = {"name": part.path.name, "checksum": part.checksum}
        provenance = make_provenance(STAGE, [source], {"export": kind})
        if not is_complete(path, provenance, overwrite):
            write_parquet(path, compress(part.read(), kind), provenance)
            result.written.append(path)
        else:
            result.kept.append(path)
        result.add({"in": part.counts["out"], "out": part.counts["out"]})
    for path in others:
        remove(path)
    before, after = (sum(path.stat().st_size for path in own) for own in ([part.path for part in dataset.parts], paths))
    wanted = {"export": kind, "source": dataset.identify()}
    if result.written or read_json_object(summary_path).get("source") != wanted["source"]:
        recall, num_queries = measure_recall(dataset, paths, kind)
        write_json(summary_path, wanted | {"recall_at_10": recall, "num_queries": num_queries, "bytes": after})
        result.written = [folder]
    summary = read_json_object(summary_path)
    logger.info(
        "%s: recall@10 %.4f against exact (%d queries), %.1f MB of %.1f MB",
        kind, summary["recall_at_10"], summary["num_queries"], after / 1e6, before / 1e6,
    )  # fmt: skip
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_tool_parser(__doc__ or "")
    add = parser.add_argument
    add("--export", choices=("float16", "int8"), required=True, help="type of the copy's numbers")
    add("--overwrite", action="store_true", help="write again what is there already")
    arguments = parser.parse_args(argv)
    run_tool(STAGE, arguments.output, lambda dataset: export(dataset, arguments.export, arguments.overwrite))


if __name__ == "__main__":
    cli.run_guarded(main)
