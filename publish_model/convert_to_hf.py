"""Stage 7: publish backbone and trained projector as one folder that transformers loads, offline and alone.

    python publish_model/convert_to_hf.py --config config.toml
    python publish_model/convert_to_hf.py --from-model old_model --output published

Reads checkpoint_dir/checkpoint_best.pt and the backbone. Writes published_model_dir/: config, weights, image processor,
code and model card. A projector that retrieves worse than the backbone's features as they are, PCA-whitened or whitened
within classes is refused unless --force is given. A rerun keeps a folder that was made from the same checkpoint and
backbone, and puts the results of stage 9, where there are any of this checkpoint, on its card.

With --from-model, a folder that the reference implementation published is published anew, to need nothing else:
of its weights and config.json alone, without checkpoint or splits.
"""

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.config import Config, EmbeddingModelSection
from pipeline.errors import ConfigError, InputError, PipelineError, one_line
from pipeline.files.tables import identify, make_provenance
from pipeline.files.units import Provenance, Unit, find_complete, read_recorded
from pipeline.files.workspace import writing_folder
from pipeline.files.writing import read_json_object
from pipeline.inference.model_files import embedding_settings, identify_model, locate_backbone, names_its_backbone
from pipeline.log import logger
from pipeline.stages import STAGES
from publish_model.model_folder.card_results import add_test_results
from publish_model.model_folder.model_card import is_measured, worse_than

if TYPE_CHECKING:
    from pipeline.retrieval.checkpoint import Checkpoint

STAGE = "convert_to_hf"
COUNTS = {"in": 1, "out": 1}  # models
EXPECTED_FILES = ("config.json", "preprocessor_config.json", "README.md", "modeling_spatial_embeddings.py")


@dataclass(frozen=True)
class PublishOptions(cli.Options):
    """What the command line asks for beyond the configuration."""

    checkpoint: Path | None = None
    from_model: Path | None = None
    output: Path | None = None
    force: bool = False
    push_to_hub: str | None = None
    public: bool = False
    dry_run: bool = False
    dtype: str | None = None


def name_backbone(config: Config) -> str:
    """Return what may be said of the backbone in public: its hub id, or a local folder's name, never its path."""
    name = config.embedding_model.model_name or ""
    folder = config.expand(name, "[embedding_model].model_name")
    return folder.name if folder.is_dir() else name


def list_units(config: Config) -> list[Unit]:
    """Return the one unit: the published folder."""
    checkpoint_path = config.path("checkpoint_dir") / "checkpoint_best.pt"
    output = STAGES[7].find_place(config)

    def describe_output(_: Unit) -> Provenance:
        folder = locate_backbone(config, download=False)
        model_id = identify_model(folder) if folder else find_model_id(output)
        return describe(config, PublishOptions(), checkpoint_path, model_id)

    return [make_unit(output, describe_output)]


def make_unit(output: Path, describe_output: Callable[[Unit], Provenance]) -> Unit:
    """Return a published folder as a unit; its own files say which weights and code it needs."""
    names = (*EXPECTED_FILES, *_list_weights(output), *_list_code(output))
    outputs = tuple(output / name for name in names)
    return Unit(STAGE, outputs, describe_output, check=lambda: check_place(output), marks=outputs[:1])


def describe(config: Config, options: PublishOptions, checkpoint_path: Path, model_id: str | None) -> Provenance:
    """Return the folder's provenance: checkpoint and backbone by content, and the settings that shape it.

    Raises InputError if the checkpoint is missing.
    """
    inputs = [identify(checkpoint_path), {"name": "backbone", "id": model_id}]
    settings = {**embedding_settings(config.embedding_model), "dtype": options.dtype or "as stored"}
    return make_provenance(STAGE, inputs, settings) | {"counts": COUNTS}


def find_model_id(output: Path) -> str | None:
    """Return the id of the backbone that a published folder holds, for where the backbone is not on this machine."""
    inputs = (read_recorded(output / EXPECTED_FILES[0]) or {}).get("inputs", [])
    return next((found["id"] for found in inputs if found["name"] == "backbone"), None)


def check_place(folder: Path) -> None:
    """Raise InputError where something else lies in the place of a published folder; no option removes that."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    is_ours = read_json_object(folder / "config.json").get("model_type") == "spatial_embeddings"
    if not is_ours or names_its_backbone(folder):  # the latter is somebody's only copy of it
        raise InputError(f"{folder}: not empty, and not a model that was published here: give another --output")


def keep_published(output: Path, provenance: Provenance, overwrite: bool, result: cli.StageResult) -> bool:
    """Return whether the folder was published from these inputs and settings, is whole, and stays.

    Raises StaleOutputError where it was made from others and `overwrite` is off, InputError where something else
    lies there.
    """
    check_place(output)
    result.add(COUNTS)
    unit = make_unit(output, lambda _: provenance)
    if find_complete(unit, overwrite):
        logger.info("%s: kept %s, which is complete", STAGE, output)
        result.kept.append(output)
        return True
    missing = [path.name for path in unit.outputs if not path.is_file()]
    if missing and unit.marks[0].is_file() and not overwrite:
        logger.warning("%s: %s is missing: the folder is written again", output, missing[0])
    return False


def _list_weights(folder: Path) -> list[str]:
    index = read_json_object(folder / "model.safetensors.index.json")
    return sorted(set(index.get("weight_map", {}).values())) or ["model.safetensors"]


def _list_code(folder: Path) -> list[str]:
    """List the files that the published code imports; older code needs fewer."""
    path = folder / "modeling_spatial_embeddings.py"
    code = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [f"{name}.py" for name in re.findall(r"^from \.(\w+) import", code, re.MULTILINE)]


def check_embedded_alike(config: Config, checkpoint: "Checkpoint", model_id: str) -> None:
    """Raise InputError naming the difference where the checkpoint was trained on embeddings of another backbone, or
    made with other settings of it, than would be published; older checkpoints do not say."""
    wanted = {"model": model_id, **embedding_settings(config.embedding_model)}
    found = checkpoint.provenance.get("embedded_with")
    if not isinstance(found, dict):
        return
    compared = set(wanted) | set(found) - {"dtype", "embedding_dtype"}
    for key in sorted(compared):
        if found.get(key) != wanted.get(key):
            raise InputError(
                f"{checkpoint.path}: trained on embeddings made with {key} {found.get(key)!r}, the configuration says "
                f"{wanted.get(key)!r}: set [embedding_model] as it was, or run stages 2, 3 and 6 again"
            )


def check_worth(checkpoint: "Checkpoint", force: bool) -> dict[str, dict[str, float]]:
    """Return the validation metrics of projector and baselines, empty where there are none.

    Raises PipelineError if the projector's mAP is below a baseline's and `force` is off.
    """
    metrics = checkpoint.metrics.get("val")
    if not isinstance(metrics, dict) or not is_measured(metrics):
        logger.warning("%s: carries no validation metrics: published as not measured", checkpoint.path)
        return {}
    below = worse_than(metrics)
    if below:
        figures = ", ".join(f"{row} {metrics[row]['map']:.4f}" for row in (*below, "projector"))
        message = f"{checkpoint.path}: its projector retrieves worse than no training (validation mAP: {figures})"
        if not force:
            raise PipelineError(f"{message}: train on more data or with other settings, or publish it with --force")
        logger.warning("%s: published all the same, the model card says so", message)
    return {row: values for row, values in metrics.items() if isinstance(values, dict)}


def publish(
    config: Config, options: PublishOptions, checkpoint_path: Path, output: Path, result: cli.StageResult
) -> None:
    """Write the folder unless it is there already.

    Raises InputError if there is no checkpoint.
    """
    if not checkpoint_path.is_file():  # before a backbone of 27 GB is fetched for it
        raise InputError(f"{checkpoint_path}: no such checkpoint: run stage 6 (train), or correct the path")
    backbone_dir = locate_backbone(config, download=True)
    assert backbone_dir is not None  # it was to be fetched
    model_id = identify_model(backbone_dir)
    provenance = describe(config, options, checkpoint_path, model_id)
    if keep_published(output, provenance, options.overwrite, result):
        return
    from pipeline.retrieval.checkpoint import load_checkpoint
    from publish_model.model_folder.published_folder import Backbone, fill_folder
    from publish_model.model_folder.training_similarity import measure_training

    checkpoint = load_checkpoint(checkpoint_path, config.training_model)
    check_embedded_alike(config, checkpoint, model_id)
    metrics = check_worth(checkpoint, options.force)
    backbone = Backbone(backbone_dir, name_backbone(config), config.embedding_model)
    with writing_folder(output) as folder:
        fill_folder(
            folder, backbone, checkpoint, metrics, options.dtype, provenance, measure_training(config, checkpoint)
        )
    result.written.append(output)


def publish_anew(options: PublishOptions, source: Path, output: Path, result: cli.StageResult) -> None:
    """Write the folder, unless it is there already, from one that the reference implementation published.

    Raises InputError if `source` is of another kind, or cannot be read.
    """
    from publish_model.model_folder.reference_model import open_reference

    reference = open_reference(source, download=True)
    if reference is None:
        raise InputError(
            f"{source}: not a model that the reference implementation published (a config.json that names its backbone "
            "without settings of it): --from-model takes nothing else, a model of this project is whole as it is"
        )
    settings = {"dtype": options.dtype or "as stored"}
    provenance = make_provenance(STAGE, [{"name": "model", "id": reference.identify()}], settings) | {"counts": COUNTS}
    if keep_published(output, provenance, options.overwrite, result):
        return
    from publish_model.model_folder.published_folder import Backbone, fill_folder

    checkpoint = reference.read_projector()
    section = EmbeddingModelSection(pooling_type=reference.find_pooling())
    backbone = Backbone(reference.backbone_dir, reference.backbone_name, section, reference)
    with writing_folder(output) as folder:
        fill_folder(folder, backbone, checkpoint, {}, options.dtype, provenance)
    result.written.append(output)


def describe_push(folder: Path, repo_id: str, *, public: bool) -> None:
    """Log what `push_to_hub` would upload."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        logger.info("would upload %s (%d bytes)", path.relative_to(folder), path.stat().st_size)
    total = sum(path.stat().st_size for path in paths) / 1e6
    logger.info(
        "dry run: %d files, %.1f MB, to %s (%s): nothing was uploaded",
        len(paths), total, repo_id, "public" if public else "private",
    )  # fmt: skip


def push_to_hub(folder: Path, repo_id: str, *, public: bool) -> None:
    """Upload a published folder to the hub, into a private repository unless it is to be public or there already.

    The token comes from $HF_TOKEN alone. Raises PipelineError where there is none or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    token = os.environ.get("HF_TOKEN")
    if not token:
        raise PipelineError(f"{repo_id}: no token to publish with: export HF_TOKEN, and run this again")
    try:
        api = HfApi(token=token)
        api.create_repo(repo_id, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Publish the model")
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = one_line(error).replace(token, "(token)")[:200]
        raise PipelineError(
            f"{repo_id}: cannot publish to the hub ({reason}): correct the name, the token or the network, and run "
            "this again"
        ) from None
    logger.info("%s: published as %s", folder, repo_id)


def run(config: Config, options: cli.Options) -> cli.StageResult:
    """Publish the model, and push it where that is asked for; the row of the ledger is one model.

    Raises InputError for a checkpoint or backbone that cannot be used or do not fit, StaleOutputError where the
    folder was made from others, PipelineError for a projector that is worse than no training.
    """
    own = options if isinstance(options, PublishOptions) else PublishOptions(overwrite=options.overwrite)
    output = own.output or config.path("published_model_dir")
    result = cli.StageResult(STAGE)
    if own.from_model:
        publish_anew(own, own.from_model.resolve(), output.resolve(), result)
    else:
        checkpoint_path = own.checkpoint or config.path("checkpoint_dir") / "checkpoint_best.pt"
        publish(config, own, checkpoint_path.resolve(), output.resolve(), result)
    if config.paths.report_dir is not None:
        add_test_results(output.resolve(), config.path("report_dir") / "metrics.json")
    if own.push_to_hub:
        (describe_push if own.dry_run else push_to_hub)(output, own.push_to_hub, public=own.public)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Publish from a command line."""
    parser = cli.make_parser(__doc__ or "")
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="PATH", help="checkpoint (default: checkpoint_dir/checkpoint_best.pt)")
    add("--from-model", type=Path, metavar="DIR", help="publish this model of the reference implementation anew")
    add("--output", type=Path, metavar="DIR", help="folder to write (default: published_model_dir)")
    add("--force", action="store_true", help="publish a projector that retrieves worse than no training too")
    add("--push-to-hub", metavar="REPO_ID", help="upload the folder too, to a private repository ($HF_TOKEN)")
    add("--public", action="store_true", help="with --push-to-hub: make a new repository public")
    add("--dry-run", action="store_true", help="with --push-to-hub: list what would be uploaded, upload nothing")
    add("--dtype", choices=("float32", "bfloat16"), help="type of the published weights (default: the stored one)")
    arguments = parser.parse_args(argv)
    if arguments.checkpoint and arguments.from_model:
        raise ConfigError("--checkpoint and --from-model: two models: give one of them")
    options = PublishOptions(
        overwrite=arguments.overwrite,
        checkpoint=arguments.checkpoint,
        from_model=arguments.from_model,
        output=arguments.output,
        force=arguments.force,
        push_to_hub=arguments.push_to_hub,
        public=arguments.public,
        dry_run=arguments.dry_run,
        dtype=arguments.dtype,
    )
    cli.run_stage(STAGE, run, cli.config_from(arguments), options)


if __name__ == "__main__":
    cli.run_guarded(main)
