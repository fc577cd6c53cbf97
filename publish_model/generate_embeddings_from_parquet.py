"""Stage 8: embed packaged images with the published model, into a dataset directory that can be resumed.

    python publish_model/generate_embeddings_from_parquet.py --input packaged_images.parquet --output embeddings

Reads a parquet of image_bytes and OSMID (is_valid false rows are skipped), or a folder of such. Writes
OUTPUT/parts/*.parquet with OSMID and embedding, OUTPUT/_rejects/ with the images that cannot be read, OUTPUT/state.json
and OUTPUT/_logs/. A rerun keeps the parts that are done. Takes no configuration: it needs the published model alone.
"""

import contextlib
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from pipeline import VERSION, cli
from pipeline.config import Config
from pipeline.embeddings_dataset.appending import Appending
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.duplicates import describe_duplicates
from pipeline.embeddings_dataset.packaged_input import PackagedInput, list_pictures, open_input
from pipeline.embeddings_dataset.parts import STAGE, PartContent, find_files, plan_parts, read_planned
from pipeline.errors import ConfigError, StaleOutputError
from pipeline.files.units import Unit
from pipeline.inference.precision import NUM_PICTURES, Precision, settle_precision
from pipeline.log import Progress, Stopwatch, logger, logging_to
from pipeline.threads import Background
from pipeline.workspace import make_folder, naming_failures
from publish_model.model_folder.published_model import PublishedModel, find_model
from publish_model.new_data.embed_options import EmbedOptions, parse

if TYPE_CHECKING:
    from pipeline.inference.backbone import Embedder


def embed_dataset(options: EmbedOptions, source: PackagedInput) -> cli.StageResult:
    """Embed the rows that have no embedding yet and return the counts of this process's share of the dataset.

    Raises InputError for an input or a model that cannot be used, StaleOutputError where the output was made from
    others, PipelineError where another process needs the dataset alone.
    """
    logger.info(
        "%s %s, Python %s, pyarrow %s, torch %s, transformers %s, device %s", STAGE, VERSION, platform.python_version(),
        *(version(package) for package in ("pyarrow", "torch", "transformers")), options.device,
    )  # fmt: skip
    dataset = EmbeddingsDataset(options.output)
    if dataset.folder != options.output:
        logger.info("%s is a file or was written so before: %s is used instead", options.output, dataset.folder)
    with dataset.held(shared=not options.overwrite):
        model = find_model(
            options.model_id, download=True, device=options.device, batch_size=options.batch_size,
            trust_remote_code=options.trust_remote_code,
        )  # fmt: skip
        files = None if options.overwrite else find_files(dataset.folder)
        precision = choose_precision(model, options.dtype, source, files.begun if files else None)
        appending = Appending(dataset, source, model.model_id, model.name_version(precision.mode), precision)
        appending.find_work(files, options.shard, options.limit)
        result = cli.StageResult(STAGE)
        has_work = bool(appending.work)
        if has_work:
            with result.watch.measure("load"):
                embedder = model.load(precision.mode)
        appending.begin()  # a model that cannot be used has failed by now, and has left nothing behind
        try:
            if has_work:
                make_missing_parts(appending, embedder, result.watch)
        finally:
            state = appending.write_state()
        (result.written if has_work else result.kept).append(dataset.folder)
        for part in appending.parts.values():
            result.add(part.counts, part.reasons)
        if has_work and state["complete"]:
            for line in describe_duplicates([dataset.path_of(name) for name in appending.plans]):
                logger.warning("%s", line)
    logger.info(
        "dataset: %d of %d parts, %d of %d rows done, %s", state["parts_done"], state["parts_total"],
        sum(state.get(f"rows_{key}", 0) for key in ("embedded", "rejected", "skipped_invalid", "deleted")),
        state["rows_total"],
        "complete" if state["complete"] else "not complete yet",
    )  # fmt: skip
    return result


def choose_precision(
    model: PublishedModel, dtype: str, source: PackagedInput, begun: dict[str, Any] | None
) -> Precision:
    """Return the precision that was asked for, else the dataset's, else one that suits the device.

    That one is measured on the first pictures of the input, whichever of them this process embeds.
    """
    if dtype == "auto" and begun is not None and "precision" in begun:
        return Precision(begun["precision"], **begun.get("fidelity", {}))
    return settle_precision(
        dtype, model.device, replace(model, batch_size=NUM_PICTURES).load, partial(list_pictures, source)
    )


def make_missing_parts(appending: Appending, embedder: "Embedder", watch: Stopwatch) -> None:
    """Make the parts; `watch` adds up where the time went.

    Two or three read batches are held at a time. Raises InputError if the input ends before the place that its footer
    names.
    """
    from publish_model.new_data.batch_embedding import ReadBatch, embed_batches

    rows_kept, rows = appending.num_rows
    tables = read_planned(appending.source, appending.work)
    batches = (ReadBatch(plan, table.slice(0, plan.rows_within(appending.limit))) for plan, table in tables)

    def write(batch: ReadBatch, content: PartContent) -> None:
        with watch.measure("write"):
            appending.write_part(batch.plan, content)
        progress.advance(batch.table.num_rows)

    with (
        Progress(STAGE, rows_kept + rows) as progress,
        contextlib.closing(Background()) as writer,
        contextlib.closing(embed_batches(embedder, appending.source, batches, watch)) as parts,
    ):
        progress.resume_at(rows_kept)
        for batch, content in parts:
            writer.submit(partial(write, batch, content))


def list_units(config: Config) -> list[Unit]:
    """Return the row groups of `[new_data].input`."""
    return list_row_groups(read_options(config))


def list_row_groups(options: EmbedOptions) -> list[Unit]:
    """Return the row groups of an input, each with its parts.

    Raises InputError where the input is missing or cannot be used.
    """
    source, dataset = open_input(options), EmbeddingsDataset(options.output)

    @cache
    def check() -> None:
        if (dataset.state or {}).get("row_group_fingerprint", source.fingerprint) != source.fingerprint:
            raise StaleOutputError(
                f"{dataset.state_path}: begun from another input than {source.path}: give another output, or remove it"
            )

    outputs: dict[int, list[Path]] = {group: [] for group in range(len(source.row_group_rows))}
    for plan in plan_parts(source):
        outputs[plan.row_group].append(dataset.path_of(plan.name))
    return [Unit(f"rg{group:05d}", tuple(paths), check=check) for group, paths in outputs.items()]


def read_options(config: Config, overwrite: bool = False) -> EmbedOptions:
    """Return the options that `[new_data]` and the published model give.

    Raises ConfigError where they are not set.
    """
    new_data = config.new_data
    if new_data.input is None or new_data.output is None:
        raise ConfigError(f"{config.file_path}: [new_data].input and output: both are needed to embed new data")
    return EmbedOptions(
        input=config.expand(new_data.input, "[new_data].input"),
        output=config.expand(new_data.output, "[new_data].output"),
        model_id=str(config.path("published_model_dir")),
        device=config.infrastructure.device,
        dtype=config.embedding_model.dtype,
        overwrite=overwrite,
    )


def run(config: Config, options: cli.Options) -> cli.StageResult:
    """Embed `[new_data].input` into `[new_data].output` with the model that stage 7 has published."""
    own = read_options(config, options.overwrite)
    return embed_dataset(own, open_input(own))


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(__doc__ or "", argv)
    with logging_to(None):
        source = open_input(options)  # a mistyped path leaves no folder behind
    folder = EmbeddingsDataset(options.output).folder
    with naming_failures(folder):
        make_folder(folder)
    cli.run_logged(
        STAGE,
        lambda: embed_dataset(options, source),
        folder / "_logs" / cli.log_name(STAGE, options.shard),
        max_reject_fraction=options.max_reject_fraction,
    )


if __name__ == "__main__":
    cli.run_guarded(main)
