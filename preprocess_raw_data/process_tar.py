"""Stage 1: read raw tars, validate every image and its metadata, and write one parquet of both per tar.

    python preprocess_raw_data/process_tar.py --config config.toml

Reads raw_dir/NNNN.tar, streaming; nothing is extracted to disk. Writes intermediates_dir/NNNN.parquet and what was
rejected, with reasons, in intermediates_dir/_rejects/NNNN.parquet. A rerun keeps the tars that are done.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

import pyarrow as pa

from pipeline import cli
from pipeline.config import Config
from pipeline.errors import InputError, Rejection, catch_rejection
from pipeline.files.archive import Member, stream_members
from pipeline.files.identity import look_at, note_digest
from pipeline.files.tables import (
    INTERMEDIATE_SCHEMA,
    count_rejects,
    make_provenance,
    parquet_writer,
    rejects_path,
    write_rejects,
)
from pipeline.files.units import Provenance, TarUnit, do_tars, list_tar_units
from pipeline.ids import join_id
from pipeline.inference.images import check_image
from pipeline.log import Progress, Stopwatch, logger
from pipeline.stages import STAGES
from pipeline.threads import map_in_order
from preprocess_raw_data.tars.metadata import MAX_BYTES
from preprocess_raw_data.tars.tar_items import TarInventory, View

STAGE = "process_tar"
ROW_GROUP_ROWS = 16_384


def take_inventory(
    tar_path: Path, num_workers: int, digests: list[str], progress: Progress, watch: Stopwatch
) -> TarInventory:
    """Read a tar once, checking its images in parallel, and add its digest to `digests`.

    Raises InputError if the tar is damaged.
    """
    inventory = TarInventory()

    def read_wanted() -> Iterator[tuple[Member, bytes]]:
        for member in stream_members(tar_path, digests):
            if not inventory.wants(member):
                continue
            if member.is_image_name:
                with watch.measure("read"):
                    yield member, member.read()
            else:
                inventory.add_metadata(member, member.read(MAX_BYTES))

    def check(found: tuple[Member, bytes]) -> tuple[Member, Rejection | None]:
        return found[0], catch_rejection(check_image, found[1])

    for member, rejection in map_in_order(check, read_wanted(), num_workers, weigh=lambda found: len(found[1])):
        inventory.add_image(member, rejection)
        progress.advance()
    return inventory


def describe_view(view: View, unit: TarUnit) -> dict[str, Any]:
    """Return a view as a row of INTERMEDIATE_SCHEMA; the tar's name gives the dataset."""
    return asdict(view.record) | {
        "dataset_id": unit.dataset_id,
        "building_id": join_id(unit.dataset_id, view.record.target_id),
        "streetview_image_id": join_id(unit.dataset_id, view.record.patch_id),
        "image_path": view.image.name,
        "tar_file": unit.tar_path.name,
        "image_offset": view.image.offset,
        "image_size": view.image.size,
    }


def write_tar(unit: TarUnit, provenance: Provenance, config: Config, watch: Stopwatch) -> Provenance:
    """Make one tar's parquet and its rejects, and return the provenance with the counts.

    Raises InputError if the tar is damaged or holds nothing that looks like a view.
    """
    digests, seen = list[str](), look_at(unit.tar_path)
    with Progress(unit.tar_path.name, total=None) as progress:
        inventory = take_inventory(unit.tar_path, config.infrastructure.count_workers(), digests, progress, watch)
    views, rejects = inventory.judge()
    if not views and not rejects:
        raise InputError(f"{unit.tar_path}: holds no image and no metadata: is it a tar of the raw layout?")
    provenance["inputs"][0]["digest"] = note_digest(unit.tar_path, digests[0], seen, unit.note)
    ignored = ", ".join(f"{count} {what}" for what, count in sorted(inventory.ignored.items())) or "nothing"
    provenance = count_rejects(provenance, len(views) + len(rejects), (rejection for _, rejection in rejects))
    write_rejects(rejects_path(unit.output_path), rejects, provenance)
    with parquet_writer(unit.output_path, INTERMEDIATE_SCHEMA, provenance) as writer:
        for start in range(0, len(views), ROW_GROUP_ROWS):
            some = [describe_view(view, unit) for view in views[start : start + ROW_GROUP_ROWS]]
            writer.write_table(pa.Table.from_pylist(some, schema=INTERMEDIATE_SCHEMA))
    num_strange = sum(view.record.dataset_id != unit.dataset_id for view in views)
    log = logger.warning if num_strange else logger.info
    log("%s: %d views, %d of them name another dataset id; %d rejected; ignored %s",
        unit.tar_path.name, len(views), num_strange, len(rejects), ignored)  # fmt: skip
    return provenance


def list_units(config: Config, options: cli.Options = cli.NO_OPTIONS) -> list[TarUnit]:
    # No setting shapes a tar's table.
    return list_tar_units(STAGES[1], config, options, lambda unit: make_provenance(STAGE, unit.identify_tar(), {}))


def run(config: Config, options: cli.Options) -> cli.StageResult:
    """Validate every tar and return the counts.

    Raises InputError if a tar failed, PipelineError if too many items were rejected.
    """
    result = cli.StageResult(STAGE)
    do_tars(
        list_units(config, options), result, options.overwrite,
        make=lambda unit, provenance: write_tar(unit, provenance, config, result.watch),
    )  # fmt: skip
    result.check_reject_fraction(config.data.max_reject_fraction)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    cli.run_from_command_line(STAGE, run, __doc__, argv, cli.add_tar_options)


if __name__ == "__main__":
    cli.run_guarded(main)
