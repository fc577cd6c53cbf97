"""Stage 8: embed packaged images with the published model, into a dataset directory that can be resumed.

    python publish_model/generate_embeddings_from_parquet.py --input packaged_images.parquet --output embeddings

Reads a parquet of image_bytes and OSMID (is_valid false rows are skipped), a folder of such, or a folder of photographs
whose paths become the OSMID. Writes OUTPUT/parts/*.parquet with OSMID and embedding, OUTPUT/_rejects/ with the images
that cannot be read, OUTPUT/state.json and OUTPUT/_logs/. A rerun keeps the parts that are done. Takes no configuration:
it needs the published model alone.
"""

import atexit
import contextlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

import pyarrow as pa

from pipeline import VERSION, cli
from pipeline.config import Config
from pipeline.errors import ConfigError, InputError, PipelineError, Terminated, one_line
from pipeline.files.writing import write_failure
from pipeline.inference import launcher
from pipeline.inference.engine_watch import EngineWatch
from pipeline.inference.model_files import find_missing_files, identify_model, locate_hub_model
from pipeline.inference.workers import Background
from pipeline.log import Progress, logger
from publish_model.dataset.duplicates import find_duplicates
from publish_model.dataset.part_plans import PartContent, PartPlan, PartRecord, Recipe, make_recipe, plan_parts
from publish_model.dataset.parts import STAGE, EmbeddingsDataset, resolve_dataset_dir
from publish_model.new_data.embed_options import EmbedOptions, parse
from publish_model.new_data.packaged_input import (
    PackagedInput,
    carry_columns,
    embedded_rows,
    open_packaged,
    read_batches,
)

if TYPE_CHECKING:
    from publish_model.dataset.batch_embedding import BatchEmbedder


def locate_model(model_id: str) -> Path:
    """Return the folder of a published model: itself, or the hub's snapshot of it, fetched if need be.

    Raises InputError if there is none.
    """
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if model_id.startswith(("/", ".", "~")) or model_id.count("/") > 1:
        raise InputError(f"{folder}: no such model folder: give --model-id a folder that stage 7 wrote, or a hub id")
    located = locate_hub_model(model_id, download=True)
    assert located is not None  # it was to be fetched
    return located


def choose_recipe(
    options: EmbedOptions, source: PackagedInput, model_dir: Path, begun: dict[str, Any] | None
) -> Recipe:
    """Say what all parts have in common.

    The precision is what was asked for, else that in which the dataset was begun, else what suits the device. Only
    the last needs torch.
    """
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{model_dir}: not a model folder (config.json: {one_line(error)}): correct --model-id"
        ) from None
    if not isinstance(config, dict):
        raise InputError(f"{model_dir}: not a model folder (config.json holds no settings): correct --model-id")
    missing = find_missing_files(model_dir)
    if missing:  # found before a dataset is begun that bears the broken model's id
        raise InputError(f"{model_dir}: {missing[0]} is missing: fetch or copy the model folder again")
    pooling = str(config.get("pooling_type", "pooler_output"))
    precision = options.dtype if options.dtype != "auto" else (begun or {}).get("precision")
    if precision is None:
        from pipeline.inference.devices import choose_device

        precision = "bfloat16" if choose_device(options.device).type == "cuda" else "float32"
    return make_recipe(
        source, options.read_batch_size, options.filter_valid, identify_model(model_dir), pooling, precision
    )


def find_work(plans: list[PartPlan], records: dict[str, PartRecord], limit: int | None) -> dict[int, list[PartPlan]]:
    """Return the parts to make by row group: those that are missing, or hold fewer rows than the limit now allows."""
    work: dict[int, list[PartPlan]] = {}
    for plan in plans:
        rows = plan.rows_within(limit)
        record = records.get(plan.name)
        if rows and (record is None or record.counts["in"] < rows):
            work.setdefault(plan.row_group, []).append(plan)
    return work


def open_input(options: EmbedOptions) -> PackagedInput:
    """Open what the options name; see `open_packaged`."""
    return open_packaged(options.input, filter_valid=options.filter_valid, keep_columns=options.keep_columns)


def read_work(
    options: EmbedOptions, source: PackagedInput, work: dict[int, list[PartPlan]]
) -> Iterator[tuple[PartPlan, pa.Table]]:
    """Yield the rows of each missing part, row group by row group.

    Raises InputError if the input cannot be read to where its footer says it goes.
    """
    for row_group, plans in work.items():
        wanted = {plan.read_batch: plan for plan in plans}
        batches = read_batches(source, row_group, options.read_batch_size, with_valid=options.filter_valid)
        for read_batch, table in enumerate(batches):
            plan = wanted.pop(read_batch, None)
            if plan is not None:
                yield plan, table.slice(0, plan.rows_within(options.limit))
            if not wanted:
                break
        if wanted:
            raise InputError(f"{source.path}: row group {row_group} ends too early: fetch the file again")


def embed_parts(
    options: EmbedOptions,
    source: PackagedInput,
    dataset: EmbeddingsDataset,
    embedder: "BatchEmbedder",
    work: dict[int, list[PartPlan]],
    progress: Progress,
) -> None:
    """Embed and write the missing parts, with the columns to keep; two or three read batches are held at a time.

    Raises InputError if the input cannot be read to where its footer says it goes.
    """
    from publish_model.dataset.batch_embedding import ReadBatch

    batches = (ReadBatch(plan, table) for plan, table in read_work(options, source, work))

    def write(batch: ReadBatch, content: PartContent) -> None:
        rows = embedded_rows(batch.table, batch.plan.first_row, content.rejects, options.filter_valid)
        kept = carry_columns(content.embedded, batch.table, rows, options.keep_columns)
        with embedder.watch.measure("write"):
            dataset.write_part(batch.plan, replace(content, embedded=kept))
            dataset.write_state_now_and_then()
        progress.advance(batch.table.num_rows)

    with contextlib.closing(Background()) as writer, contextlib.closing(embedder.embed_each(batches)) as parts:
        for batch, content in parts:
            writer.submit(partial(write, batch, content))


def make_missing_parts(
    options: EmbedOptions,
    source: PackagedInput,
    dataset: EmbeddingsDataset,
    model_dir: Path,
    work: dict[int, list[PartPlan]],
    rows_kept: int,
) -> EngineWatch:
    """Load the model, make the parts and return where the time went; an interrupted run leaves its state right."""
    watch = EngineWatch()
    with watch.measure("load"):
        from publish_model.dataset.batch_embedding import BatchEmbedder

        embedder = BatchEmbedder(
            model_dir, options.device, dataset.recipe.precision, options.batch_size, options.filter_valid, watch
        )
    rows = sum(plan.rows_within(options.limit) for plans in work.values() for plan in plans)
    try:
        with Progress(STAGE, rows_kept + rows, interval_seconds=options.progress_interval_seconds) as progress:
            progress.resume_at(rows_kept)
            embed_parts(options, source, dataset, embedder, work, progress)
    except (KeyboardInterrupt, Terminated):
        dataset.write_state()
        raise
    return watch


def embed_dataset(options: EmbedOptions) -> cli.StageResult:
    """Embed what is not embedded yet and return the counts of this process's share of the dataset.

    Raises InputError for an input or a model that cannot be used, StaleOutputError where the output was made from
    others, PipelineError where more images are bad than allowed.
    """
    source = open_input(options)
    model_dir = locate_model(options.model_id)
    folder = resolve_dataset_dir(options.output)
    if folder != options.output:
        logger.info("%s is a file or was written so before: %s is used instead", options.output, folder)
    plans = plan_parts(source, options.read_batch_size)
    dataset = EmbeddingsDataset(folder, source, plans)
    begun = None if options.overwrite else dataset.find_begun()
    recipe = choose_recipe(options, source, model_dir, begun)
    if options.overwrite:
        dataset.remove()
    dataset.begin(recipe, options.model_id, begun)

    row_groups = set(options.shard.take(list(range(len(source.row_group_rows)))))
    own = {plan.name: plan for plan in plans if plan.row_group in row_groups}
    records = dataset.find_parts(own)
    work = find_work(list(own.values()), records, options.limit)
    result = cli.StageResult(STAGE)
    if work:
        redone = {plan.name for plans in work.values() for plan in plans}
        rows_kept = sum(record.counts["in"] for name, record in records.items() if name not in redone)
        result.watch = make_missing_parts(options, source, dataset, model_dir, work, rows_kept)
        records = dataset.find_parts(own)
    state = dataset.write_state()
    (result.written if work else result.kept).append(folder)
    for record in records.values():
        result.add(record.counts, record.reasons)
    if work and state["complete"]:
        warn_of_duplicates([dataset.path(plan) for plan in plans], state["rows_embedded"])
    report(result, state, options.max_reject_fraction)
    return result


def warn_of_duplicates(part_paths: list[Path], num_images: int) -> None:
    """Say how many images are byte for byte the same under different ids."""
    duplicates = find_duplicates(part_paths, num_images)
    if duplicates.num_images:
        logger.warning("%s", duplicates.describe())


def report(result: cli.StageResult, state: dict[str, Any], max_reject_fraction: float) -> None:
    """Log how far the whole dataset is.

    Raises PipelineError where more of the images were rejected than allowed.
    """
    logger.info(
        "dataset: %d of %d parts, %d of %d rows done, %s", state["parts_done"], state["parts_total"],
        sum(state.get(f"rows_{key}", 0) for key in ("embedded", "rejected", "skipped_invalid", "deleted")),
        state["rows_total"],
        "complete" if state["complete"] else "not complete yet",
    )  # fmt: skip
    tried = result.rows_out + result.rejected
    if tried and result.rejected / tried > max_reject_fraction:
        raise PipelineError(
            f"{result.rejected} of {tried} images were rejected, more than --max-reject-fraction "
            f"{max_reject_fraction:g} allows: read the _rejects folder, correct the input, or raise the fraction"
        )


def run(config: Config, options: cli.Options) -> cli.StageResult:
    """Embed `[new_data].input` into `[new_data].output` with the model that stage 7 has published."""
    new_data = config.new_data
    if new_data.input is None or new_data.output is None:
        raise ConfigError(f"{config.file_path}: [new_data].input and output: both are needed to embed new data")
    return embed_dataset(
        EmbedOptions(
            input=config.expand(new_data.input, "[new_data].input"),
            output=config.expand(new_data.output, "[new_data].output"),
            model_id=str(config.path("published_model_dir")),
            device=config.infrastructure.device,
            dtype=config.embedding_model.dtype,
            overwrite=options.overwrite,
            progress_interval_seconds=config.logging.progress_interval_seconds,
        )
    )


def use_private_module_cache() -> None:
    """Keep the published model's code, which transformers copies before it imports it, apart from other processes'.

    Array tasks that start at once would copy over one another's files in the shared home.
    """
    if "HF_MODULES_CACHE" not in os.environ and "transformers" not in sys.modules:
        os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="spatial-embeddings-modules-")
        atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Embed from a command line."""
    options = parse(__doc__ or "", argv)
    open_input(options)  # a mistyped path leaves no folder behind
    if launcher.launch(__file__, argv, options.processes, is_sharded=not options.shard.is_whole):
        return
    folder = resolve_dataset_dir(options.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(folder, error) from None
    use_private_module_cache()

    def tell() -> cli.StageResult:
        logger.info(
            "%s %s, Python %s, pyarrow %s, torch %s, transformers %s, device %s",
            STAGE, VERSION, platform.python_version(),
            *(cli.installed_version(package) for package in ("pyarrow", "torch", "transformers")), options.device,
        )  # fmt: skip
        return embed_dataset(options)

    cli.run_logged(STAGE, tell, folder / "_logs" / cli.log_name(STAGE, options.shard))


if __name__ == "__main__":
    cli.run_guarded(main)
