"""Stage 2: embed every image of the intermediates with the pretrained backbone, one parquet per tar.

    python generate_embeddings/generate_embeddings.py --config config.toml

Reads intermediates_dir/NNNN.parquet and raw_dir/NNNN.tar, streaming; nothing is extracted to disk. Writes
embeddings_dir/NNNN_embeddings.parquet and rejects in embeddings_dir/_rejects. A rerun keeps the tars that are done
and goes on inside the one that was interrupted.
"""

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

import pyarrow as pa

from pipeline import cli
from pipeline.config import Config
from pipeline.errors import InputError, Rejection
from pipeline.files.archive import read_images
from pipeline.files.identity import hash_json, identify
from pipeline.files.list_columns import find_embedding
from pipeline.files.scratch import RowScratch
from pipeline.files.tables import (
    FILE_COLUMNS,
    ID_COLUMNS,
    count_rejects,
    make_provenance,
    parquet_writer,
    read_provenance,
    rejects_path,
    write_rejects,
)
from pipeline.files.units import Provenance, TarUnit, UnitState, do_tars, list_tar_units
from pipeline.inference.model_files import check_unchanged, embedding_settings, identify_model, locate_backbone
from pipeline.inference.precision import NUM_PICTURES, Precision, settle_precision
from pipeline.log import Progress, Stopwatch, logger
from pipeline.reference.tar_files import check_foreign_output, read_intermediate, read_old_rows
from pipeline.stages import STAGES
from pipeline.threads import Background

if TYPE_CHECKING:
    from pipeline.inference.backbone import Embedder

STAGE = "generate_embeddings"
# Rows of one row group: 16 MB of 4,096 floats, small enough to stream, large enough to compress.
ROW_GROUP_ROWS = 1024


class Embedding:
    """The backbone that all tars of a run share, loaded at its first use, and a thread that writes behind it.

    While one tar's parquet is written, the next tar is embedded.
    """

    def __init__(self, config: Config, units: list[TarUnit], folder: Path | None, watch: Stopwatch) -> None:
        self.config, self.watch = config, watch
        self.outputs = Background()
        self._units, self._folder = units, folder
        self.identity = identify_model(folder) if folder else None

    @functools.cached_property
    def precision(self) -> Precision:
        """The precision of the backbone: the same for all tars of one folder, whichever process embeds them."""
        assert self._folder is not None  # without it nothing is left to embed
        section = self.config.embedding_model
        name = hash_json({"model": self.identity, **embedding_settings(section)})[:16]
        trial = section.model_copy(update={"batch_size": NUM_PICTURES, "compile": False})
        load = functools.partial(load_embedder, self._folder, self.config.model_copy(update={"embedding_model": trial}))
        with self.watch.measure("load"):
            return settle_precision(
                section.dtype, self.config.infrastructure.device, load, self._list_pictures,
                self.config.path("embeddings_dir") / "_precision" / f"{name}.json",
            )  # fmt: skip

    @functools.cached_property
    def embedder(self) -> "Embedder":
        assert self._folder is not None
        mode = self.precision.mode
        with self.watch.measure("load"):
            embedder = load_embedder(self._folder, self.config, mode)
        check_unchanged(self._folder, self.identity)
        return embedder

    def _list_pictures(self) -> Iterator[bytes]:
        """Yield the images of the run; skip a tar that cannot be read, which fails when its turn comes."""
        for unit in self._units:
            with contextlib.suppress(InputError):
                yield from (
                    image.data for image in read_images(unit.tar_path, index_images(read_table(unit))) if image.data
                )


def embed_tar(unit: TarUnit, provenance: Provenance, stage: Embedding, adds_missing: bool) -> Provenance:
    """Embed one tar's images, have them and the rejects written, and return the provenance with the counts.

    With `adds_missing` the rows of an output of another program are kept.
    Raises InputError if the tar or its intermediate is missing or damaged.
    """
    started = time.monotonic()
    if not unit.tar_path.is_file():  # before a backbone of 27 GB is loaded for it
        raise InputError(f"{unit.tar_path}: no such tar: correct the path")
    if provenance["settings"]["model"] != stage.identity:
        raise InputError("the backbone was replaced meanwhile: run this again")
    table = read_table(unit)
    image_ids = table["streetview_image_id"].combine_chunks()
    old_rows, old_values = read_old_rows(unit.output_path, image_ids) if adds_missing else ([], None)
    if old_values is not None:
        provenance["taken_over"] = len(old_rows)
    # Another device may choose another precision: what it has begun is thrown away.
    scratch = RowScratch(unit.output_path, hash_json({**provenance, "precision": stage.precision.mode}))
    with contextlib.ExitStack() as held:
        held.callback(scratch.close)
        if old_values is not None:
            scratch.write(old_rows, old_values)
        missing = fill_scratch(unit.tar_path, table, scratch, stage, set(old_rows))
        embedding_type = pa.list_(
            pa.type_for_alias(stage.config.embedding_model.embedding_dtype), scratch.width or stage.embedder.width
        )
        held.pop_all()  # the thread that writes closes it
    rejects = scratch.rejects | {row: Rejection("missing_image", f"not in {unit.tar_path.name}") for row in missing}
    made_in = {"precision": stage.precision.mode, **stage.precision.fidelity}
    provenance = count_rejects(provenance, len(table), rejects.values()) | made_in

    def write() -> None:
        with contextlib.closing(scratch), stage.watch.measure("write"):
            write_outputs(unit, table, scratch, rejects, provenance, embedding_type)
            scratch.remove()

    stage.outputs.submit(write)
    count = len(table) - len(rejects)
    logger.info("%s: %d embedded, %d rejected, %.1f img/s",
                unit.tar_path.name, count, len(rejects), count / (time.monotonic() - started))  # fmt: skip
    return provenance


def read_table(unit: TarUnit) -> pa.Table:
    """Return stage 1's table of a tar, its ids first."""
    return read_intermediate(unit, pa.schema(ID_COLUMNS + FILE_COLUMNS), with_others=True)


def index_images(table: pa.Table) -> dict[str, int]:
    return {name: row for row, name in enumerate(table["image_path"].to_pylist())}


def fill_scratch(
    tar_path: Path, table: pa.Table, scratch: RowScratch, stage: Embedding, done_rows: Container[int]
) -> list[int]:
    """Embed the table's images in the order of the tar, from where the scratch stands, and return the rows not found.

    Leaves out `done_rows`. Raises PipelineError naming an image whose embedding is not finite, zero or of another
    width.
    """
    from pipeline.inference.backbone import check_embeddings
    from pipeline.inference.engine import embed_stream

    left = {name: row for name, row in index_images(table).items() if row not in done_rows}
    embedder, seen = stage.embedder, scratch.seen
    stream = embed_stream(
        embedder, read_images(tar_path, left, seen), lambda image: embedder.decode(image.data),
        stage.config.infrastructure.count_workers(), stage.watch,
    )  # fmt: skip
    with contextlib.closing(stream) as passes, Progress(tar_path.name, len(table)) as progress:
        progress.resume_at(seen)
        try:
            for done in passes:
                seen += done.taken
                scratch.rejects |= {image.row: rejection for image, rejection in done.rejected}
                if done.embeddings is not None:
                    check_embeddings(done.embeddings, [image.name for image in done.items], scratch.width)
                    with stage.watch.measure("write"):
                        scratch.write([image.row for image in done.items], done.embeddings)
                        if done.is_full:  # a resumed run then forms the same passes, and gets the same values
                            scratch.advance(seen)
                progress.advance(done.taken)
        except KeyboardInterrupt:
            scratch.save()
            raise
    return sorted(left.values())


def write_outputs(
    unit: TarUnit,
    table: pa.Table,
    scratch: RowScratch,
    rejects: dict[int, Rejection],
    provenance: dict[str, Any],
    embedding_type: pa.DataType,
) -> None:
    """Write the embedded rows in the intermediate's order, and the rejects."""
    from pipeline.inference.backbone import check_embeddings

    names = table["image_path"]
    listed = [(names[row].as_py(), rejects[row]) for row in sorted(rejects)]
    write_rejects(rejects_path(unit.output_path), listed, provenance)
    schema = table.schema.append(pa.field("embedding", embedding_type))
    dtype = embedding_type.value_type.to_pandas_dtype()
    with parquet_writer(unit.output_path, schema, provenance) as writer:
        for start in range(0, len(table), ROW_GROUP_ROWS):
            rows = table.slice(start, ROW_GROUP_ROWS)
            kept = [place for place in range(len(rows)) if start + place not in rejects]
            if kept:
                rows, values = rows.take(kept), scratch.read(start, start + len(rows))[kept].astype(dtype)
                check_embeddings(values, rows["image_path"].to_pylist())
                embedding = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=embedding_type)
                writer.write_table(rows.append_column(schema.field("embedding"), embedding))


def list_units(config: Config, options: cli.Options = cli.NO_OPTIONS) -> list[TarUnit]:
    @functools.cache
    def find_model() -> str | None:
        folder = locate_backbone(config, download=False)
        return identify_model(folder) if folder else None

    def take_over(unit: TarUnit) -> UnitState | None:
        state = check_foreign_output(unit, find_embedding(unit.output_path), "stage 2 with --add-missing embeds them")
        return None if options.add_missing and state.counts["dropped"] else state

    return list_tar_units(
        STAGES[2], config, options, lambda unit: describe_output(unit, config, find_model()), take_over
    )


def run(config: Config, options: cli.Options) -> cli.StageResult:
    """Embed every tar and return the counts.

    Raises InputError if a tar failed, PipelineError if too many images were rejected.
    """
    result = cli.StageResult(STAGE)
    units = list_units(config, options)
    all_there = all(unit.output_path.exists() for unit in units) and not (options.overwrite or options.add_missing)
    folder = locate_backbone(config, download=not all_there)
    stage = Embedding(config, units, folder, result.watch)
    with contextlib.closing(stage.outputs):  # what it holds is written
        do_tars(
            units, result, options.overwrite,
            make=lambda unit, provenance: embed_tar(unit, provenance, stage, options.add_missing),
        )  # fmt: skip
    result.check_reject_fraction(config.data.max_reject_fraction)
    return result


def load_embedder(folder: Path, config: Config, mode: str | None = None) -> "Embedder":
    """Load the backbone as the configuration says, to compute in a mode (see `precision`) if one is given."""
    from pipeline.inference.backbone import Embedder

    section = config.embedding_model
    return Embedder(
        folder,
        pooling_type=section.pooling_type,
        image_size=section.input_size,
        scales=section.scales,
        flip=section.flip,
        device=config.infrastructure.device,
        dtype=mode or section.dtype,
        batch_size=section.batch_size,
        compile_model=section.compile,
        trust_remote_code=section.trust_remote_code,
    )


def describe_output(unit: TarUnit, config: Config, model_id: str | None) -> Provenance:
    """Return the provenance that a tar's embeddings must have; batch size and device do not shape them.

    Where the backbone is not on this machine, what is there already is taken to be made with it.
    """
    model_id = model_id or (read_provenance(unit.output_path) or {}).get("settings", {}).get("model")
    section = config.embedding_model
    settings = {"dtype": section.dtype, "embedding_dtype": section.embedding_dtype, **embedding_settings(section)}
    inputs = [*unit.identify_tar(), identify(unit.intermediate_path)]
    return make_provenance(STAGE, inputs, {"model": model_id, **settings})


def add_options(parser: argparse.ArgumentParser) -> None:
    cli.add_tar_options(parser)
    parser.add_argument(
        "--add-missing", action="store_true", help="embed the images that embeddings of another program lack"
    )


def main(argv: Sequence[str] | None = None) -> None:
    cli.run_from_command_line(STAGE, run, __doc__, argv, add_options)


if __name__ == "__main__":
    cli.run_guarded(main)
