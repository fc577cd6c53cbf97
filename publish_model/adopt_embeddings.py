"""Adopt an embeddings dataset that the reference implementation wrote, so that everything here works on it.

    python publish_model/adopt_embeddings.py OUTPUT --input packaged_images.parquet --model-id published

Embeds a sample of the pictures again and compares. If they agree, it writes each of OUTPUT/parts/*.parquet again with
provenance and rejects, then state.json, and keeps the old state in OUTPUT/_adopted/. A rerun resumes an interrupted
run. Takes no configuration.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

import numpy as np

from pipeline import cli
from pipeline.embeddings_dataset.appending import Appending
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.packaged_input import InputOptions, open_input
from pipeline.embeddings_dataset.parts import PartPlan, find_files
from pipeline.errors import InputError, Rejection
from pipeline.inference.precision import Precision
from pipeline.log import Progress, logger
from pipeline.reference.adoption import LEAST_COSINE, adopt, sample
from pipeline.workspace import writing_to
from publish_model.model_folder.published_model import PublishedModel, find_model
from publish_model.new_data.embed_options import (
    add_device_option,
    add_input_options,
    add_model_option,
    make_tool_parser,
)

STAGE = "adopt_embeddings"


def check_sample(store: Appending, foreign: list[PartPlan], model: PublishedModel) -> int:
    """Return the width of the model's embeddings.

    Raises InputError where it makes other embeddings of a sample of the pictures than the dataset holds.
    """
    embedder = model.load("float32")
    cosines = []
    for name, image, held in sample(store, foreign):
        try:
            embedding = embedder.embed([embedder.decode(image)])[0]
        except Rejection as rejection:
            raise InputError(f"{name}: embedded there, and cannot be read here ({rejection}): check --input") from None
        if embedding.shape != held.shape:
            raise InputError(f"{name}: {len(held)} numbers, the model gives {len(embedding)}: give its --model-id")
        cosines.append(float(np.dot(embedding, held)))
        if not cosines[-1] >= LEAST_COSINE:
            raise InputError(
                f"{name}: the cosine to what the model makes of it is {cosines[-1]:.4f}, at least {LEAST_COSINE} "
                "is expected: give the --model-id and --input that it was made with; nothing was written"
            )
    if not cosines:
        raise InputError(f"{store.dataset.folder}: holds no embedding that could be compared: run stage 8 elsewhere")
    logger.info("%d pictures embedded again: cosine %.6f and above", len(cosines), min(cosines))
    return embedder.width


def adopt_dataset(arguments: argparse.Namespace) -> cli.StageResult:
    """Adopt the dataset and return the counts of all of it.

    Raises InputError where it was not made from this input with this model, StaleOutputError where parts of ours
    among it are of another recipe.
    """
    source = open_input(
        InputOptions(
            input=arguments.input, filter_valid=arguments.filter_valid, read_batch_size=arguments.read_batch_size
        )
    )
    model = find_model(
        arguments.model_id, download=True, device=arguments.device, trust_remote_code=arguments.trust_remote_code
    )
    dataset = EmbeddingsDataset(arguments.output)
    store = Appending(dataset, source, model.model_id, model.name_version("float32"), Precision("float32"))
    files = find_files(dataset.folder)
    found, others = store.take_up(files), set(files.foreign)
    foreign = [plan for name, plan in store.plans.items() if dataset.path_of(name) in others]
    result = cli.StageResult(STAGE)
    if foreign:
        width = check_sample(store, foreign, model)
        kept = dataset.folder / "_adopted" / "state.json"
        if dataset.state_path.is_file() and files.state is None and not kept.exists():  # another program's
            with writing_to(kept) as temporary:
                temporary.write_bytes(dataset.state_path.read_bytes())
        with Progress(STAGE, sum(plan.num_rows for plan in foreign)) as progress:
            for plan in adopt(store, foreign, width):
                progress.advance(plan.num_rows)
        result.written.append(dataset.folder)
    elif not found:
        raise InputError(f"{dataset.folder}: holds no embeddings (parts/*.parquet): correct the path")
    else:
        result.kept.append(dataset.folder)
    state = store.write_state()
    for part in store.parts.values():
        result.add(part.counts, part.reasons)
    rest = "" if state["complete"] else "; stage 8 with the same input and model makes the rest"
    logger.info("dataset: %d of %d parts are there%s", state["parts_done"], state["parts_total"], rest)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_tool_parser(__doc__ or "")
    add_input_options(parser)
    add_model_option(parser)
    add_device_option(parser)
    arguments = parser.parse_args(argv)
    with EmbeddingsDataset(arguments.output).held():
        cli.run_logged(STAGE, lambda: adopt_dataset(arguments), None)


if __name__ == "__main__":
    cli.run_guarded(main)
