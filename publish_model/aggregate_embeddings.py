"""Average the embeddings of an embeddings dataset by id: one L2-normalised mean for each.

    python publish_model/aggregate_embeddings.py OUTPUT --by OSMID

Reads what stage 8 wrote. Writes OUTPUT/_aggregated/OSMID.parquet: the columns of --by, num_images,
mean_pairwise_similarity (null for one image) and embedding. --by OSMID,year takes a further column that stage 8 was
told to keep. --geometry FILE joins a parquet of OSMID and geometry (WKB), and the output is GeoParquet 1.1. Memory is
bounded by reading the dataset once for each 500,000 images.
"""

import sys
from collections.abc import Sequence
from itertools import chain, compress
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.embeddings_dataset.columns import check_names, filter_rows, hash_ids, plain_values
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN
from pipeline.embeddings_dataset.parts import EMBEDDING_COLUMN, read_table
from pipeline.errors import ConfigError, InputError
from pipeline.files.identity import identify
from pipeline.files.outputs import check_replaceable
from pipeline.files.tables import is_complete, make_provenance, parquet_writer
from pipeline.log import logger
from publish_model.derived.embedding_groups import MEASURED, Key, average_rows, with_whole_keys
from publish_model.derived.geometry import GEO_KEY, GEOMETRY_COLUMN, GeometryFile
from publish_model.new_data.embed_options import make_tool_parser, run_tool

STAGE = "aggregate_embeddings"
# About so many images are held in a pass: with their sums they take up to 2 GB at 256 numbers.
ROWS_PER_PASS = 500_000


def average_pass(dataset: EmbeddingsDataset, by: Sequence[str], number: int, num_passes: int) -> pa.Table:
    """Average the rows that belong to one pass by the hash of their key; rows without id belong to none."""
    place, tables, keys = list(by).index(ID_COLUMN), [], list[Key]()
    for part in dataset.parts:
        table = with_whole_keys(part.read([*by, EMBEDDING_COLUMN]), by)
        found: list[Key] = list(zip(*(plain_values(table[name]) for name in by), strict=True))
        own = np.array([key[place] is not None for key in found], dtype=bool)
        if num_passes > 1:
            own &= hash_ids(found) % num_passes == number
        tables.append(filter_rows(table, own))
        keys += compress(found, own)
    return average_rows(pa.concat_tables(tables).unify_dictionaries(), keys, by)


def aggregate(
    dataset: EmbeddingsDataset, by: Sequence[str], geometry_path: Path | None, overwrite: bool
) -> cli.StageResult:
    """Write the means and return the counts of the images: in, averaged, and dropped as they have no id.

    Raises InputError for a dataset or geometries that cannot be used, StaleOutputError where the output was made of
    others.
    """
    name = "_".join(quote(one, safe="").replace("_", "%5F").replace(".", "%2E") for one in by)
    path = dataset.folder / "_aggregated" / f"{name}{'.geo' if geometry_path else ''}.parquet"
    check_replaceable(path, STAGE, [geometry_path])
    for name in by:
        if name not in dataset.schema.names:
            raise InputError(f"{dataset.folder}: has no column {name}: run stage 8 with --keep-columns {name}")
        if pa.types.is_nested(dataset.schema.field(name).type):
            raise ConfigError(f"--by {name}: a column of lists or structs: give columns of numbers or text")
    geometry = GeometryFile(geometry_path, dataset.schema.field(ID_COLUMN).type) if geometry_path else None
    inputs = [dataset.identify(), *([identify(geometry_path)] if geometry_path else [])]
    provenance = make_provenance(STAGE, inputs, {"by": list(by)})
    result = cli.StageResult(STAGE)
    if is_complete(path, provenance, overwrite):
        result.kept.append(path)
    else:
        num_passes = max(1, -(-dataset.num_rows // ROWS_PER_PASS))
        means = (average_pass(dataset, by, number, num_passes) for number in range(num_passes))
        tables = (geometry.join(table) if geometry else table for table in means)
        first = next(tables)
        with parquet_writer(path, first.schema, provenance) as writer:
            for table in chain([first], tables):
                writer.write_table(table)
            if geometry:
                writer.add_key_value_metadata({GEO_KEY: geometry.describe()})
        result.written.append(path)
    counts = read_table(path, ["num_images"])["num_images"].to_numpy()
    num_images = int(counts.sum())
    logger.info("%d groups of %d images", len(counts), num_images)
    result.add({"in": dataset.num_rows, "out": num_images, "dropped": dataset.num_rows - num_images})
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_tool_parser(__doc__ or "")
    add = parser.add_argument
    add("--by", default=ID_COLUMN, metavar="OSMID[,COLUMN]", help="columns that make a group (OSMID)")
    add("--geometry", type=Path, metavar="FILE", help="parquet of OSMID and geometry (WKB) to join")
    add("--overwrite", action="store_true", help="make again what is there already")
    arguments = parser.parse_args(argv)
    by = [name.strip() for name in arguments.by.split(",")]
    if ID_COLUMN not in by or not all(by):
        raise ConfigError(f"--by {arguments.by}: give {ID_COLUMN}, or {ID_COLUMN} and kept columns")
    check_names(f"--by {arguments.by}", [*MEASURED.names, EMBEDDING_COLUMN, GEOMETRY_COLUMN], by)
    run_tool(STAGE, arguments.output, lambda dataset: aggregate(dataset, by, arguments.geometry, arguments.overwrite))


if __name__ == "__main__":
    cli.run_guarded(main)
