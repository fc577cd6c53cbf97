"""Stage 3: merge the embeddings of all tars, drop buildings with one image, and split the others by building.

    python preprocess_raw_data/merge_and_split.py --config config.toml

Reads embeddings_dir/*_embeddings.parquet. Writes merged_dir/{train,val,test}.parquet, rows grouped by building. A
rerun keeps them if embeddings and settings are the same. Memory is bounded by [data].memory_mb.
"""

import contextlib
import sys
from collections.abc import Sequence
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
from pipeline.files.identity import hash_json, identify
from pipeline.files.listing import list_outputs
from pipeline.files.tables import make_provenance, parquet_writer, read_provenance
from pipeline.files.units import Unit, keep_complete, refuse_missing
from pipeline.log import Progress, logger
from pipeline.retrieval.features import check_split_names
from pipeline.stages import STAGES
from pipeline.workspace import discard, make_folder, move, remove, sync_folder
from preprocess_raw_data.merging.embedding_rows import Inventory, Piece, read_by_building, take_inventory
from preprocess_raw_data.merging.splits import SPLITS, assign_splits, hash_splits, measure_leakage, read_split_file

STAGE = "merge_and_split"
# Rows of one row group of the output: at 4,096 dimensions 64 MB.
ROW_GROUP_ROWS = 4096
# The folder in merged_dir for the splits until all are complete.
UNFINISHED = ".unfinished"


class SplitWriter:
    """Writes one split's rows in row groups of a fixed size."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        self._writer, self._schema, self._waiting = writer, schema, schema.empty_table()

    def add(self, piece: Piece, rows: NDArray[np.int64]) -> None:
        """Add some of a piece's rows, copying at most a row group at a time."""
        while len(rows):
            room = ROW_GROUP_ROWS - len(self._waiting)
            self._waiting = pa.concat_tables([self._waiting, piece.take(rows[:room], self._schema)])
            rows = rows[room:]
            if len(self._waiting) == ROW_GROUP_ROWS:
                self.finish()

    def finish(self) -> None:
        """Write the waiting rows as one piece, so that the bytes do not depend on their arrival."""
        if len(self._waiting):
            self._writer.write_table(self._waiting.combine_chunks())
            self._waiting = self._schema.empty_table()


def write_splits(
    inventory: Inventory, splits: NDArray[np.int8], provenances: list[dict[str, Any]], config: Config
) -> None:
    """Write the three files; `splits` gives each building's, -1 for those that are dropped."""
    schema, paths, new_dir = inventory.schema, STAGES[3].list_outputs(config), config.path("merged_dir") / UNFINISHED
    rows_at_a_time = max(1, config.data.memory_mb * 1024**2 // inventory.row_bytes)
    remove(new_dir)  # of a killed run
    try:
        make_folder(new_dir)
        with contextlib.ExitStack() as stack:
            writers = [
                SplitWriter(stack.enter_context(parquet_writer(new_dir / path.name, schema, provenance)), schema)
                for path, provenance in zip(paths, provenances, strict=True)
            ]
            progress = stack.enter_context(Progress(STAGE, len(inventory.codes)))
            for piece, order, codes in read_by_building(inventory, splits >= 0, rows_at_a_time):
                for split, writer in enumerate(writers):
                    writer.add(piece, order[splits[codes] == split])
                progress.advance(len(order))
                del piece  # before the next one is read
            for writer in writers:
                writer.finish()
        for path in paths:  # earlier files stay until now; a kill leaves a gap, never a mixture of old and new
            remove(path)
        for path in paths:
            move(new_dir / path.name, path)
        sync_folder(new_dir.parent)
    finally:
        discard(new_dir)


def list_units(config: Config) -> list[Unit]:
    paths = STAGES[3].list_outputs(config)
    return [Unit(STAGE, paths, lambda _: describe_output(config), check=lambda: check_split_names(paths))]


def describe_output(config: Config) -> dict[str, Any]:
    """Return the provenance that the splits must have, without the counts; a split file counts by its content."""
    inputs = map(identify, list_outputs(config.path("embeddings_dir"), 2, "_embeddings"))
    settings = config.data.model_dump(include={"train_ratio", "val_ratio", "test_ratio", "split_cell_m"})
    split_file = hash_json(read_named(config)) if config.data.split_file else None
    return make_provenance(STAGE, inputs, settings | {"seed": config.global_.seed, "split_file": split_file})


def run(config: Config, options: cli.Options) -> cli.StageResult:
    """Merge, split and write, and return the counts.

    Raises InputError if there is nothing to merge, a file is not fit, or a tar has no embeddings.
    """
    config.require_paths("embeddings_dir", "merged_dir")
    result = cli.StageResult(STAGE)
    paths = list_outputs(config.path("embeddings_dir"), 2, "_embeddings")
    refuse_missing(config, paths, "embeddings")
    (unit,) = list_units(config)
    if keep_complete(unit, result, options.overwrite):
        remove(config.path("merged_dir") / UNFINISHED)  # of a run that was killed behind the last rename
        return result
    inventory = take_inventory(paths)
    embedded_with = next(filter(None, ((read_provenance(path) or {}).get("settings") for path in paths)), None)
    splits, provenances = plan_splits(inventory, describe_output(config) | {"embedded_with": embedded_with}, config)
    write_splits(inventory, splits, provenances, config)
    result.add(provenances[0]["counts"], provenances[0]["reasons"])
    result.written = list(unit.outputs)
    return result


def read_named(config: Config) -> dict[str, str]:
    path = config.data.split_file
    return read_split_file(config.expand(path, "[data].split_file")) if path else {}


def _compare_named(split_file: str, named: dict[str, str], building_ids: pa.StringArray) -> None:
    """Warn of named buildings that are not among the embeddings; raise InputError if none is."""
    names = pa.array(named, pa.string())
    strangers = names.filter(pc.invert(pc.is_in(names, value_set=building_ids)))
    what = f"{len(strangers)} of {len(names)} buildings that the split file names are not among the embeddings"
    if len(strangers) == len(names):
        raise InputError(
            f"{split_file}: {what}: write them as in the embeddings, such as {building_ids[0].as_py()!r} (the "
            "dataset's id in four digits, _, the building's id), or leave out [data].split_file"
        )
    if len(strangers):
        logger.warning("%s: %s, such as %r", split_file, what, strangers[0].as_py())


def plan_splits(
    inventory: Inventory, wanted: dict[str, Any], config: Config
) -> tuple[NDArray[np.int8], list[dict[str, Any]]]:
    """Return each building's split, -1 for those with one image, and the provenance of each file with its counts."""
    buildings = inventory.buildings
    images = np.bincount(inventory.codes, minlength=len(buildings))
    is_kept = images >= 2  # a building with one image has no positive
    named = read_named(config)
    if config.data.split_file:
        _compare_named(config.data.split_file, named, buildings.ids)
    splits = assign_splits(buildings, config.data, config.global_.seed, named)
    splits[~is_kept] = -1
    total, dropped = int(images.sum()), int((~is_kept).sum())
    common = wanted | {
        "counts": {"in": total, "out": total - dropped, "dropped": dropped},
        "reasons": {"single_image": dropped} if dropped else {},
        "split_hash": hash_splits(buildings.ids.filter(pa.array(is_kept)), splits[is_kept]),
        "leakage": measure_leakage(buildings, splits),
    }
    provenances = []
    for number, split in enumerate(SPLITS):
        rows, num_buildings = int(images[splits == number].sum()), int((splits == number).sum())
        logger.info("%s: %d images of %d buildings", split, rows, num_buildings)
        if not rows:
            logger.warning("%s is empty: there are too few buildings, or its ratio is 0", split)
        provenances.append(common | {"split": split, "rows": rows, "buildings": num_buildings})
    return splits, provenances


def main(argv: Sequence[str] | None = None) -> None:
    cli.run_from_command_line(STAGE, run, __doc__, argv)


if __name__ == "__main__":
    cli.run_guarded(main)
