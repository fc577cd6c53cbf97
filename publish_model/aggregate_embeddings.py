"""Average the embeddings of an embeddings dataset by id: one L2-normalised mean for each.

    python publish_model/aggregate_embeddings.py OUTPUT --by OSMID

Reads what stage 8 wrote. Writes OUTPUT/_aggregated/OSMID.parquet (or --output): the columns of --by, num_images,
mean_pairwise_similarity (null for one image) and embedding. --by OSMID,year takes a further column that stage 8 was
told to keep. --geometry FILE joins a parquet of OSMID and geometry (WKB), and the output is GeoParquet 1.1. Memory is
bounded by reading the dataset several times where it has many ids; a rerun goes on at the interrupted pass.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.hashes import hash_ids
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN
from pipeline.embeddings_dataset.parts import EMBEDDING_COLUMN
from pipeline.errors import ConfigError, InputError
from pipeline.files.tables import (
    hash_json,
    identify,
    is_complete,
    make_provenance,
    open_parquet,
    parquet_writer,
    read_provenance,
    write_parquet,
)
from pipeline.log import Progress, logger
from publish_model.derived.embedding_groups import Groups, Key, keys_of
from publish_model.derived.geometry import GEO_KEY, GEOMETRY_COLUMN, GeometryFile, wkb_type

STAGE = "aggregate_embeddings"
# Groups of one pass over the dataset: their sums take 2 KB each at 256 numbers, so half a gigabyte.
GROUPS_PER_PASS = 250_000
# Groups are counted by the keys whose hash is divisible by this: an error of 1 % at a million.
COUNT_SAMPLE = 64


def choose_num_passes(dataset: EmbeddingsDataset, by: Sequence[str]) -> int:
    """Return how often the dataset has to be read so that no pass holds more groups than memory is meant for."""
    if dataset.num_rows <= GROUPS_PER_PASS:
        return 1
    sampled: set[int] = set()
    for part in dataset.parts:
        sampled |= {value for value in hash_ids(keys_of(part.read(list(by)), by)) if value % COUNT_SAMPLE == 0}
    return max(1, -(-len(sampled) * COUNT_SAMPLE // GROUPS_PER_PASS))


def output_schema(dataset: EmbeddingsDataset, by: Sequence[str]) -> pa.Schema:
    """Return the columns of the output, without geometry."""
    kept = [dataset.schema.field(name) for name in by]
    measured = [pa.field("num_images", pa.int64()), pa.field("mean_pairwise_similarity", pa.float64())]
    return pa.schema([*kept, *measured, dataset.schema.field(EMBEDDING_COLUMN)])


def group_pass(dataset: EmbeddingsDataset, by: Sequence[str], number: int, num_passes: int) -> Groups:
    """Sum the embeddings of the groups that belong to one pass; images without an id belong to none."""
    groups = Groups(by, dataset.schema.field(EMBEDDING_COLUMN).type.list_size)
    with Progress(f"{STAGE} {number + 1}/{num_passes}", dataset.num_rows) as progress:
        for part in dataset.parts:
            table = part.read([*by, EMBEDDING_COLUMN])
            keys = keys_of(table, by)
            groups.add(table, keys, rows_of_pass(keys, by, number, num_passes))
            progress.advance(table.num_rows)
    return groups


def rows_of_pass(keys: Sequence[Key], by: Sequence[str], number: int, num_passes: int) -> Any:
    """Return which rows belong to a pass, by the hash of their key."""
    place = list(by).index(ID_COLUMN)
    own = np.array([key[place] is not None for key in keys], dtype=bool)
    if num_passes > 1:
        own &= np.array([value // COUNT_SAMPLE % num_passes == number for value in hash_ids(keys)], dtype=bool)
    return np.flatnonzero(own)


def join_geometry(table: pa.Table, geometry: GeometryFile) -> pa.Table:
    """Add the geometry of each id, null where the file has none.

    Raises InputError where the file has two geometries for one id.
    """
    ids = [key[0] for key in keys_of(table, [ID_COLUMN])]
    wanted = set(ids)
    shapes: dict[object, bytes] = {}
    for identifier, shape in geometry.read():
        if identifier in wanted and shapes.setdefault(identifier, shape) != shape:
            raise InputError(f"{geometry.path}: two geometries for {identifier}: leave one")
    return table.append_column(GEOMETRY_COLUMN, pa.array([shapes.get(one) for one in ids], pa.binary()))


def make_pass(
    path: Path, dataset: EmbeddingsDataset, by: Sequence[str], place: tuple[int, int], geometry: GeometryFile | None
) -> pa.Table:
    """Return the rows of pass `place` (number, of how many), kept at `path` until the output is written."""
    provenance = make_provenance(STAGE, [dataset.identify()], {"pass": list(place)})
    if not (path.is_file() and read_provenance(path) == provenance):
        table = group_pass(dataset, by, *place).to_table(output_schema(dataset, by))
        write_parquet(path, table, provenance)
    with open_parquet(path) as file:
        table = file.read().replace_schema_metadata()
    return table if geometry is None else join_geometry(table, geometry)


def describe_geometry(tables: Iterator[pa.Table], geometry: GeometryFile) -> tuple[bytes, int]:
    """Return the `geo` metadata of the output, and how many rows have no geometry.

    Raises InputError if a geometry is not well-known binary.
    """
    types: set[str] = set()
    missing = 0
    for table in tables:
        missing += table.column(GEOMETRY_COLUMN).null_count
        for shape in table.column(GEOMETRY_COLUMN).to_pylist():
            try:
                types |= {wkb_type(shape)} if shape is not None else set()
            except ValueError as error:
                raise InputError(f"{geometry.path}: a geometry is {error}: write the file again") from None
    return geometry.describe(types), missing


def aggregate(
    dataset: EmbeddingsDataset, by: Sequence[str], target: Path | None, geometry_path: Path | None, overwrite: bool
) -> cli.StageResult:
    """Write the means and return the counts of the images: in, averaged, and dropped as they have no id.

    Raises InputError for a dataset or geometries that cannot be used, StaleOutputError where the output was made of
    others.
    """
    missing = [name for name in by if name not in dataset.schema.names]
    if missing:
        raise InputError(f"{dataset.folder}: has no column {missing[0]}: run stage 8 with --keep-columns {missing[0]}")
    geometry = GeometryFile(geometry_path, dataset.schema.field(ID_COLUMN).type) if geometry_path else None
    path = target or dataset.folder / "_aggregated" / f"{'_'.join(by)}{'.geo' if geometry else ''}.parquet"
    inputs = [dataset.identify(), *([identify(geometry_path)] if geometry_path else [])]
    provenance = make_provenance(STAGE, inputs, {"by": list(by)})
    result = cli.StageResult(STAGE)
    if is_complete(path, provenance, overwrite):
        result.kept.append(path)
        with open_parquet(path) as file:
            counted = sum(batch.column(0).to_numpy().sum() for batch in file.iter_batches(columns=["num_images"]))
        result.add(_counts(dataset, int(counted)))
        return result
    work_dir = path.parent / f".{path.stem}.{hash_json(provenance)[:12]}"
    num_passes = choose_num_passes(dataset, by)

    def read_passes() -> Iterator[pa.Table]:
        for number in range(num_passes):
            yield make_pass(work_dir / f"{number:05d}.parquet", dataset, by, (number, num_passes), geometry)

    metadata = {}
    if geometry:
        metadata[GEO_KEY], num_missing = describe_geometry(read_passes(), geometry)
        logger.info("%d ids have no geometry in %s", num_missing, geometry.path)
    num_images, num_groups = write_passes(path, read_passes(), provenance, metadata)
    shutil.rmtree(work_dir, ignore_errors=True)
    logger.info("%d groups of %d images", num_groups, num_images)
    result.written.append(path)
    result.add(_counts(dataset, num_images))
    return result


def write_passes(
    path: Path, tables: Iterator[pa.Table], provenance: dict[str, Any], metadata: dict[bytes, bytes]
) -> tuple[int, int]:
    """Write the passes as one parquet; return how many images and groups they hold."""
    first = next(tables)
    num_images = num_groups = 0
    with parquet_writer(path, first.schema, provenance, metadata) as writer:
        table: pa.Table | None = first
        while table is not None:
            writer.write_table(table)
            num_images += int(table.column("num_images").to_numpy().sum())
            num_groups += table.num_rows
            table = next(tables, None)
    return num_images, num_groups


def _counts(dataset: EmbeddingsDataset, num_images: int) -> dict[str, int]:
    return {"in": dataset.num_rows, "out": num_images, "dropped": dataset.num_rows - num_images}


def parse_columns(text: str) -> list[str]:
    """Read the names of `--by`.

    Raises ConfigError unless OSMID is one of them and each stands there once.
    """
    names = [name.strip() for name in text.split(",")]
    if ID_COLUMN not in names or len(set(names)) < len(names) or not all(names) or EMBEDDING_COLUMN in names:
        raise ConfigError(f"--by {text}: give {ID_COLUMN}, or {ID_COLUMN} and kept columns, once each")
    return names


def main(argv: Sequence[str] | None = None) -> None:
    """Aggregate from a command line."""
    parser = cli.make_parser(__doc__ or "", config=False)
    add = parser.add_argument
    add("output", type=Path, metavar="OUTPUT", help="dataset directory that stage 8 wrote")
    add("--by", default=ID_COLUMN, metavar="OSMID[,COLUMN]", help="columns that make a group (OSMID)")
    add("--geometry", type=Path, metavar="FILE", help="parquet of OSMID and geometry (WKB) to join")
    add("--output", "-o", type=Path, dest="target", metavar="FILE", help="parquet to write (in OUTPUT/_aggregated)")
    add("--overwrite", action="store_true", help="make again what is there already")
    arguments = parser.parse_args(argv)
    by = parse_columns(arguments.by)
    dataset = EmbeddingsDataset(arguments.output)
    if not dataset.folder.is_dir():
        raise InputError(f"{dataset.folder}: no embeddings dataset: run stage 8 first, or correct the path")
    cli.run_logged(
        STAGE,
        lambda: aggregate(dataset, by, arguments.target, arguments.geometry, arguments.overwrite),
        dataset.folder / "_logs" / f"{STAGE}.log",
    )


if __name__ == "__main__":
    cli.run_guarded(main)
