"""Adopt an embeddings dataset that the reference implementation wrote, so that everything here works on it.

    python publish_model/adopt_embeddings.py OUTPUT --input packaged_images.parquet --model-id published

Embeds a sample of the pictures again and compares, then writes each of OUTPUT/parts/*.parquet again with what it was
made from, its rejects beside it, and state.json; the old state is kept in OUTPUT/_adopted/. Nothing is written where
the sample differs. A rerun goes on where an interrupted one stood. Takes no configuration.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

import numpy as np

from pipeline import cli
from pipeline.embeddings_dataset.appending import Appending
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.packaged_input import open_packaged
from pipeline.embeddings_dataset.part_plans import plan_parts
from pipeline.errors import InputError, Rejection
from pipeline.files.writing import writing_to
from pipeline.log import Progress, logger
from publish_model.model_folder.published_model import PublishedModel, find_model
from publish_model.new_data.adoption import LEAST_COSINE, Adoption
from publish_model.new_data.embed_options import DEFAULT_MODEL_ID, EmbedOptions, whole_number
from publish_model.new_data.model_record import record_model

STAGE = "adopt_embeddings"


def check_sample(adoption: Adoption, model: PublishedModel, options: EmbedOptions) -> int:
    """Return how many numbers the model gives.

    Raises InputError where it makes other embeddings of a sample of the pictures than the dataset holds.
    """
    from pipeline.inference.backbone import Embedder

    embedder = Embedder(
        model.prepare(), device=options.device, dtype="float32", batch_size=options.batch_size, trust_remote_code=True
    )
    cosines: dict[str, float] = {}
    for name, image, held in adoption.sample():
        try:
            embedding = embedder.embed([embedder.decode(image)])[0]
        except Rejection as rejection:
            raise InputError(f"{name}: embedded there, and cannot be read here ({rejection}): check --input") from None
        if embedding.shape != held.shape:
            raise InputError(f"{name}: {len(held)} numbers, the model gives {len(embedding)}: give its --model-id")
        cosines[name] = float(np.dot(embedding, held))
    if not cosines:
        raise InputError(f"{adoption.folder}: holds no embedding that could be compared: run stage 8 elsewhere")
    worst = min(cosines, key=lambda name: cosines[name])
    if not cosines[worst] >= LEAST_COSINE:
        raise InputError(
            f"{worst}: the cosine to what the model makes of this picture is {cosines[worst]:.4f}, at least "
            f"{LEAST_COSINE} is expected: give the --model-id and --input that it was made with; nothing was written"
        )
    logger.info("%d pictures embedded again: cosine %.6f and above", len(cosines), cosines[worst])
    return embedder.width


def keep_state(dataset: EmbeddingsDataset) -> None:
    """Keep the state that another program wrote, which is replaced at the end."""
    kept = dataset.folder / "_adopted" / "state.json"
    if dataset.state_path.is_file() and dataset.state is None and not kept.exists():
        with writing_to(kept) as temporary:
            temporary.write_bytes(dataset.state_path.read_bytes())


def adopt(options: EmbedOptions) -> cli.StageResult:
    """Adopt the dataset and return the counts of all of it.

    Raises InputError where it was not made from this input with this model, StaleOutputError where parts of ours
    among it are of another recipe.
    """
    source = open_packaged(options.input, filter_valid=options.filter_valid, read_batch_size=options.read_batch_size)
    model = find_model(options.model_id, download=True)
    dataset = EmbeddingsDataset(options.output)
    plans = plan_parts(source)
    # What is there is compared part by part, not taken for begun by stage 8.
    appending = Appending(dataset, source, record_model(options, None, source, model), overwrite=True)
    adoption = Adoption(appending, plans)
    result = cli.StageResult(STAGE)
    if adoption.foreign:
        width = check_sample(adoption, model, options)
        keep_state(dataset)
        with Progress(STAGE, sum(plan.num_rows for plan in adoption.foreign)) as progress:
            for plan in adoption.adopt(width):
                progress.advance(plan.num_rows)
        result.written.append(dataset.folder)
    elif not appending.find_parts():
        raise InputError(f"{dataset.folder}: holds no embeddings (parts/*.parquet): correct the path")
    else:
        result.kept.append(dataset.folder)
    state = appending.finish()
    for record in appending.find_parts().values():
        result.add(record.counts, record.reasons)
    logger.info("dataset: %d of %d parts are there", state["parts_done"], state["parts_total"])
    if not state["complete"]:
        logger.info("not complete: stage 8 with the same input and model makes the rest")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Adopt from a command line."""
    parser = cli.make_parser(__doc__ or "", config=False)
    add = parser.add_argument
    add("output", type=Path, metavar="OUTPUT", help="dataset directory (parts/rgNNNNN_rbNNNNN.parquet)")
    add("--input", "-i", type=Path, required=True, metavar="PATH", help="packaged images that it was made from")
    add(
        "--model-id", default=os.environ.get("MODEL_ID") or DEFAULT_MODEL_ID, metavar="ID",
        help=f"published model that made it: hub id or folder (default: $MODEL_ID, else {DEFAULT_MODEL_ID})",
    )  # fmt: skip
    add("--read-batch-size", type=whole_number, default=1000, metavar="N", help="rows of a part (1000)")
    add("--no-filter-valid", action="store_false", dest="filter_valid", help="rows with is_valid false are in it too")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where the sample is embedded (auto)")
    options = EmbedOptions(**vars(parser.parse_args(argv)), dtype="float32")
    cli.run_logged(STAGE, lambda: adopt(options), None)


if __name__ == "__main__":
    cli.run_guarded(main)
