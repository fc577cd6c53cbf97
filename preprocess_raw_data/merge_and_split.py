"""Stage 3: merge the embeddings of all tars, drop buildings with one image, and split the others by building.

    python preprocess_raw_data/merge_and_split.py --config config.toml

Reads embeddings_dir/*_embeddings.parquet. Writes merged_dir/{train,val,test}.parquet, rows grouped by building. A
rerun keeps them if embeddings and settings are the same. Memory is bounded by [data].memory_mb.
"""

import contextlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import cli
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.log import Progress, logger
from pipeline.tables import (
    FILE_COLUMNS,
    ID_COLUMNS,
    check_columns,
    embedding_width,
    hash_json,
    identify,
    is_complete,
    log_missing_provenance,
    make_provenance,
    open_parquet,
    parquet_writer,
    read_provenance,
)
from preprocess_raw_data.splits import SPLITS, assign_splits, hash_splits, read_split_file

STAGE = "merge_and_split"
BATCH_ROWS = 1024
# Rows of one row group of the output: at 4,096 dimensions 64 MB.
ROW_GROUP_ROWS = 4096
# What a row takes beside its embedding, roughly: ids, names, positions.
BYTES_BESIDE_EMBEDDING = 300
SINGLE = "single_image"


@dataclass(frozen=True)
class Inventory:
    """All ids of all files, without the embeddings: for each file the building code of each row."""

    paths: list[Path]
    codes: list[NDArray[np.int32]]
    building_ids: list[str]
    mean_lat: NDArray[np.float64]
    mean_lon: NDArray[np.float64]
    row_bytes: int
    schema: pa.Schema

    @property
    def images_per_building(self) -> NDArray[np.int64]:
        """The number of images of each building, (B,)."""
        return np.bincount(np.concatenate(self.codes), minlength=len(self.building_ids))

    def find_groups(self) -> list[list[int]]:
        """Return the files that must be merged together: each alone, unless a building lies in several."""
        buildings_of_files = sum(len(np.unique(codes)) for codes in self.codes)
        if buildings_of_files == len(self.building_ids):
            return [[number] for number in range(len(self.paths))]
        return [list(range(len(self.paths)))]


def list_embeddings(embeddings_dir: Path) -> list[Path]:
    """Return the embedding files by name.

    Raises InputError if there are none.
    """
    paths = sorted(path for path in embeddings_dir.glob("*_embeddings.parquet") if not path.name.startswith("."))
    if not paths:
        raise InputError(f"{embeddings_dir}: holds no *_embeddings.parquet: run stage 2, or correct the path")
    return paths


def take_inventory(paths: list[Path]) -> Inventory:
    """Read the ids of all files.

    Raises InputError if a file is damaged, of another shape or model than the first, or repeats an image.
    """
    schema = check_files(paths)
    columns = ["building_id", "target_lat", "target_lon", "streetview_image_id"]
    tables = [open_parquet(path).read(columns=columns) for path in paths]
    check_unique(paths, [table["streetview_image_id"] for table in tables])
    encoded = pc.dictionary_encode(
        pa.chunked_array([chunk.cast(pa.string()) for table in tables for chunk in table["building_id"].chunks])
    ).combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):  # of no rows, or of one chunk by some versions
        encoded = encoded.chunk(0)
    codes = encoded.indices.to_numpy().astype(np.int32)
    num_buildings = len(encoded.dictionary)
    counts = np.maximum(np.bincount(codes, minlength=num_buildings), 1)
    lat, lon = (
        np.bincount(codes, np.concatenate([table[name].to_numpy() for table in tables]), num_buildings) / counts
        for name in ("target_lat", "target_lon")
    )
    width = embedding_width(paths[0], schema)
    return Inventory(
        paths,
        np.split(codes, np.cumsum([len(table) for table in tables])[:-1]),
        encoded.dictionary.to_pylist(),
        lat,
        lon,
        width * 4 + BYTES_BESIDE_EMBEDDING,
        schema,
    )


def check_files(paths: list[Path]) -> pa.Schema:
    """Return the schema that all files share.

    Raises InputError naming the first file that differs from the first in columns, width or model.
    """
    schema, model = None, None
    for path in paths:
        found = open_parquet(path).schema_arrow.remove_metadata()
        check_columns(path, found, pa.schema(ID_COLUMNS))
        embedding_width(path, found)
        log_missing_provenance(path)
        settings = (read_provenance(path) or {}).get("settings")
        schema, model = schema or found, model or settings
        if not found.equals(schema):
            difference = next((field for field in found if field not in list(schema)), "a column is missing")
            raise InputError(f"{path}: not the columns of {paths[0].name} ({difference}): make one of them again")
        if settings and settings != model:
            raise InputError(f"{path}: embedded with {settings}, {paths[0].name} with {model}: make one of them again")
    assert schema is not None  # paths is never empty
    return schema


def check_unique(paths: list[Path], ids: list[pa.ChunkedArray]) -> None:
    """Raise InputError if an image is there twice, naming one and its files."""
    together = pa.chunked_array([chunk.cast(pa.string()) for column in ids for chunk in column.chunks], pa.string())
    if pc.count_distinct(together).as_py() == len(together):
        return
    counts = pc.value_counts(together)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0]
    names = [path.name for path, column in zip(paths, ids, strict=True) if pc.is_in(repeated, column).as_py()]
    raise InputError(f"{paths[0].parent}: image {repeated} is there more than once, in {', '.join(names)}: remove one")


def order_rows(codes: NDArray[np.int32], keep: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the kept rows, building by building in the order of first appearance, each building's in their order."""
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first[inverse], kind="stable")
    return order[keep[order]]


def cut_buckets(ordered_codes: NDArray[np.int32], rows_at_a_time: int) -> NDArray[np.int64]:
    """Return the positions that cut ordered rows into pieces of about `rows_at_a_time`, never inside a building."""
    starts = np.flatnonzero(np.diff(ordered_codes, prepend=-1))
    buckets = starts // rows_at_a_time
    return np.append(starts[np.flatnonzero(np.diff(buckets, prepend=-1))], len(ordered_codes))


def read_in_order(
    inventory: Inventory, group: list[int], keep: NDArray[np.bool_], rows_at_a_time: int, scratch_dir: Path
) -> Iterator[tuple[pa.Table, NDArray[np.int32]]]:
    """Yield a group's kept rows and their building codes, grouped by building, about `rows_at_a_time` at a time.

    A group that is larger goes once through files on disk, one per piece of the output.
    """
    codes = np.concatenate([inventory.codes[number] for number in group])
    order = order_rows(codes, keep[codes])
    if len(codes) <= rows_at_a_time:
        tables = [open_parquet(inventory.paths[number]).read() for number in group]
        yield pa.concat_tables(tables).replace_schema_metadata(None).take(pa.array(order)), codes[order]
        return
    cuts = cut_buckets(codes[order], rows_at_a_time)
    bucket_of_row = np.full(len(codes), -1, np.int64)
    bucket_of_row[order] = np.repeat(np.arange(len(cuts) - 1), np.diff(cuts))
    spilled = spill(inventory, group, bucket_of_row, scratch_dir)
    for bucket, path in enumerate(spilled):
        with pa.OSFile(str(path)) as file:
            table = pa.ipc.open_stream(file).read_all()
        path.unlink()
        spilled_rows = np.flatnonzero(bucket_of_row == bucket)
        wanted_rows = order[cuts[bucket] : cuts[bucket + 1]]
        yield table.take(pa.array(np.searchsorted(spilled_rows, wanted_rows))), codes[wanted_rows]


def spill(inventory: Inventory, group: list[int], bucket_of_row: NDArray[np.int64], scratch_dir: Path) -> list[Path]:
    """Write every kept row to the file of its bucket, in one pass over the group."""
    paths = [scratch_dir / f"{bucket:06d}.arrow" for bucket in range(int(bucket_of_row.max(initial=-1)) + 1)]
    start = 0
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(pa.ipc.new_stream(str(path), inventory.schema)) for path in paths]
        for number in group:
            for batch in open_parquet(inventory.paths[number]).iter_batches(BATCH_ROWS):
                buckets = bucket_of_row[start : start + len(batch)]
                start += len(batch)
                for bucket in np.unique(buckets[buckets >= 0]):
                    rows = batch.filter(pa.array(buckets == bucket))
                    writers[bucket].write_batch(rows.replace_schema_metadata(None))
    return paths


class SplitWriter:
    """Writes one split's rows in row groups of a fixed size, however they come."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0

    def add(self, rows: pa.Table) -> None:
        """Add rows."""
        self._waiting.append(rows)
        self._num_waiting += len(rows)
        if self._num_waiting >= ROW_GROUP_ROWS:
            whole = self._num_waiting - self._num_waiting % ROW_GROUP_ROWS
            together = pa.concat_tables(self._waiting)
            self._writer.write_table(together.slice(0, whole), row_group_size=ROW_GROUP_ROWS)
            self._waiting, self._num_waiting = [together.slice(whole)], len(together) - whole

    def finish(self) -> None:
        """Write what is left."""
        if self._num_waiting:
            self._writer.write_table(pa.concat_tables(self._waiting), row_group_size=ROW_GROUP_ROWS)


def write_splits(
    inventory: Inventory, splits: NDArray[np.int8], merged_dir: Path, provenances: list[dict[str, Any]], config: Config
) -> None:
    """Write the three files; `splits` gives each building's, -1 for those that are dropped."""
    schema = inventory.schema
    for name, _ in FILE_COLUMNS:
        index = schema.get_field_index(name)
        schema = schema if index < 0 else schema.remove(index)
    rows_at_a_time = max(1, config.data.memory_mb * 1024**2 // inventory.row_bytes)
    targets = [merged_dir / f"{split}.parquet" for split in SPLITS]
    scratch_dir = merged_dir / ".spill"
    shutil.rmtree(scratch_dir, ignore_errors=True)  # of a killed run
    scratch_dir.mkdir(parents=True)
    interval = config.logging.progress_interval_seconds
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, scratch_dir, ignore_errors=True)
        writers = [
            SplitWriter(stack.enter_context(parquet_writer(path, schema, provenance)))
            for path, provenance in zip(targets, provenances, strict=True)
        ]
        progress = stack.enter_context(Progress(STAGE, sum(map(len, inventory.codes)), interval_seconds=interval))
        for group in inventory.find_groups():
            for table, codes in read_in_order(inventory, group, splits >= 0, rows_at_a_time, scratch_dir):
                for split, writer in enumerate(writers):
                    writer.add(table.select(schema.names).filter(pa.array(splits[codes] == split)))
                progress.advance(len(table))
        for writer in writers:
            writer.finish()
        for path in targets:  # all three are renamed below: a kill in between leaves a gap, never a mixture
            path.unlink(missing_ok=True)


def run(config: Config, options: cli.Options) -> cli.StageResult:
    """Merge, split and write, and return the counts.

    Raises InputError if there is nothing to merge or a file is not fit.
    """
    config.require_paths("embeddings_dir", "merged_dir")
    result = cli.StageResult(STAGE)
    paths = list_embeddings(config.path("embeddings_dir"))
    targets = [config.path("merged_dir") / f"{split}.parquet" for split in SPLITS]
    wanted = make_provenance(STAGE, map(identify, paths), describe_settings(config))
    # Each file is compared before any is judged, so that a mixture of two runs is refused, not half replaced.
    complete = [is_complete(target, wanted, options.overwrite) for target in targets]
    if all(complete):
        found = read_provenance(targets[0]) or {}
        result.add(found.get("counts", {}), found.get("reasons"))
        result.kept = targets
        return result
    inventory = take_inventory(paths)
    splits, provenances = plan_splits(inventory, wanted, config)
    write_splits(inventory, splits, config.path("merged_dir"), provenances, config)
    result.add(provenances[0]["counts"], provenances[0]["reasons"])
    result.written = targets
    return result


def describe_settings(config: Config) -> dict[str, Any]:
    """Return the settings that shape the splits; a split file counts by its content."""
    data = config.data
    named = read_split_file(split_file_path(config)) if data.split_file else None
    return {
        "seed": config.global_.seed,
        "train_ratio": data.train_ratio,
        "val_ratio": data.val_ratio,
        "test_ratio": data.test_ratio,
        "split_cell_m": data.split_cell_m,
        "split_file": hash_json(named) if named is not None else None,
    }


def split_file_path(config: Config) -> Path:
    """Return the path of the split file."""
    return config.expand(config.data.split_file or "", "[data].split_file")


def plan_splits(
    inventory: Inventory, wanted: dict[str, Any], config: Config
) -> tuple[NDArray[np.int8], list[dict[str, Any]]]:
    """Return each building's split, -1 for those with one image, and the provenance of each file with its counts."""
    named = read_split_file(split_file_path(config)) if config.data.split_file else {}
    images = inventory.images_per_building
    kept = np.flatnonzero(images >= 2)  # a building with one image has no positive
    splits = np.full(len(images), -1, np.int8)
    kept_ids = [inventory.building_ids[code] for code in kept]
    splits[kept] = assign_splits(
        kept_ids, inventory.mean_lat[kept], inventory.mean_lon[kept], config.data, config.global_.seed, named
    )
    total, dropped = int(images.sum()), int((images < 2).sum())
    common = wanted | {
        "counts": {"in": total, "out": total - dropped, "dropped": dropped},
        "reasons": {SINGLE: dropped} if dropped else {},
        "split_hash": hash_splits(kept_ids, splits[kept]),
    }
    provenances = []
    for number, split in enumerate(SPLITS):
        rows, buildings = int(images[splits == number].sum()), int((splits == number).sum())
        logger.info("%s: %d images of %d buildings", split, rows, buildings)
        if not rows:
            logger.warning("%s is empty: there are too few buildings, or its ratio is 0", split)
        provenances.append(common | {"split": split, "rows": rows, "buildings": buildings})
    return splits, provenances


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage from a command line."""
    arguments = cli.make_parser(__doc__).parse_args(argv)
    cli.run_stage(STAGE, run, cli.config_from(arguments), cli.options_from(arguments))


if __name__ == "__main__":
    cli.run_guarded(main)
