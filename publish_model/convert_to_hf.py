"""Stage 7: publish backbone and trained projector as one folder that transformers loads, offline and alone.

    python publish_model/convert_to_hf.py --config config.toml

Reads checkpoint_dir/checkpoint_best.pt and the backbone. Writes published_model_dir/: config, weights, image processor,
code and model card. Refuses, without --force, a projector that retrieves worse than the backbone's features as they
are, PCA-whitened or whitened within classes. A rerun keeps a folder that was made from the same checkpoint and
backbone, and puts the results of stage 9 on its card, if there are any of this checkpoint.
"""

import glob
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.config import Config
from pipeline.errors import InputError, PipelineError, StaleOutputError, one_line
from pipeline.files.identity import identify
from pipeline.files.outputs import check_outside_datasets
from pipeline.files.tables import PROVENANCE_KEY, make_provenance, read_provenance
from pipeline.files.units import Provenance, Unit, find_complete
from pipeline.inference.model_files import (
    check_unchanged,
    embedding_settings,
    identify_model,
    is_within,
    list_changed,
    locate_backbone,
)
from pipeline.log import logger
from pipeline.stages import STAGES
from pipeline.workspace import pin, read_json_object, writing_folder
from publish_model.model_folder.model_card import add_test_results
from publish_model.model_folder.published_model import CODE_PATHS

STAGE = "convert_to_hf"
COUNTS = {"in": 1, "out": 1}  # models
CONFIG_NAME = "config.json"
# The names of files in a published folder; --overwrite leaves others alone.
MADE = (
    r"config\.json|preprocessor_config\.json|pair_rates\.json|"
    r"README\.md|model(-.*)?\.safetensors(\.index\.json)?|(LICEN[CS]E|NOTICE|COPYING|license|notice).*|"
    + "|".join(path.name for path in CODE_PATHS)
)


@dataclass(frozen=True)
class PublishOptions(cli.Options):
    """The command line's options beyond the configuration."""

    checkpoint: Path | None = None
    output: Path | None = None
    force: bool = False
    push_to_hub: str | None = None
    dtype: str | None = None


def describe_published(config: Config, checkpoint_path: Path, backbone_id: str | None, dtype: str | None) -> Provenance:
    """Return the folder's provenance: checkpoint and backbone by content, and the settings that shape it.

    `dtype` of the weights None stands for the stored one.
    """
    settings = embedding_settings(config.embedding_model) | {"dtype": dtype or "as stored"}
    inputs = [identify(checkpoint_path), {"name": "backbone", "id": backbone_id}]
    return make_provenance(STAGE, inputs, settings) | {"counts": COUNTS}


def list_units(config: Config) -> list[Unit]:
    checkpoint_path = config.path("checkpoint_dir") / "checkpoint_best.pt"
    output = config.path(STAGES[7].writes)

    def describe(_: Unit) -> Provenance:
        folder = locate_backbone(config, download=False)
        inputs = (read_provenance(output / CONFIG_NAME) or {}).get("inputs", [])  # on a machine without the backbone
        recorded = next((item["id"] for item in inputs if item["name"] == "backbone"), None)
        return describe_published(config, checkpoint_path, identify_model(folder) if folder else recorded, None)

    return [make_unit(output, describe)]


def make_unit(output: Path, describe: Callable[[Unit], Provenance]) -> Unit:
    """Return a published folder as a unit; its index, if there is one, names the files of its weights."""
    named = read_json_object(output / "model.safetensors.index.json").get("weight_map")
    weights = sorted(set(map(str, named.values()))) if isinstance(named, dict) else ["model.safetensors"]
    code = [path.name for path in CODE_PATHS]
    outputs = tuple(output / name for name in (CONFIG_NAME, "preprocessor_config.json", "README.md", *code, *weights))
    return Unit(STAGE, outputs, describe, check=lambda: check_place(output))


def check_place(folder: Path) -> None:
    """Raise InputError if something else than a folder of ours lies in its place; no option removes that."""
    check_outside_datasets(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if PROVENANCE_KEY.decode() not in read_json_object(folder / CONFIG_NAME):
        raise InputError(f"{folder}: not empty, and not a model that was published here: give another --output")


def push_to_hub(folder: Path, repo_id: str) -> None:
    """Upload a published folder to the hub; a new repository is private.

    Other files in the folder, and links out of it, stay here. The token comes from $HF_TOKEN alone.
    Raises PipelineError if there is none or the hub refuses.
    """
    listed = sorted(folder.iterdir())
    names = [path.name for path in listed if re.fullmatch(MADE, path.name) and is_within(path)]
    if left := [path.name for path in listed if path.name not in names]:
        logger.warning("%s: not uploaded: no file of a published model, or a link", ", ".join(left))
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    token = os.environ.get("HF_TOKEN")
    if not token:
        raise PipelineError(f"{repo_id}: no token to publish with: export HF_TOKEN, and run this again")
    try:
        api = HfApi(token=token)
        api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Publish the model",
            allow_patterns=[glob.escape(name) for name in names],
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = one_line(error).replace(token, "(token)")[:200]
        raise PipelineError(
            f"{repo_id}: cannot publish to the hub ({reason}): correct the name, the token or the network, and run "
            "this again"
        ) from None
    logger.info("%s: published as %s", folder, repo_id)


def run(config: Config, options: cli.Options) -> cli.StageResult:
    """Publish the model, and push it if that is asked for; the ledger counts one model.

    Raises InputError if an input is missing or does not fit the others, StaleOutputError if the folder was made from
    others, and PipelineError if the projector is worse than no training.
    """
    own = options if isinstance(options, PublishOptions) else PublishOptions(overwrite=options.overwrite)
    output = (own.output or config.path("published_model_dir")).resolve()
    checkpoint_path = (own.checkpoint or config.path("checkpoint_dir") / "checkpoint_best.pt").resolve()
    if not checkpoint_path.is_file():  # before a backbone of 27 GB is fetched for it
        raise InputError(f"{checkpoint_path}: no such checkpoint: run stage 6 (train), or correct the path")
    backbone_dir = locate_backbone(config, download=True)
    assert backbone_dir is not None  # it was to be fetched
    for path in sorted(backbone_dir.iterdir()):
        if path.suffix in (".json", ".safetensors") and not is_within(path):
            raise InputError(f"{path}: a link out of the model's folder would be published: put the file itself there")
    provenance = describe_published(config, checkpoint_path, identify_model(backbone_dir), own.dtype)
    check_place(output)
    result = cli.StageResult(STAGE)
    result.add(COUNTS)
    if find_complete(make_unit(output, lambda _: provenance), own.overwrite):
        if changed := list_changed(output):
            raise StaleOutputError(
                f"{output}: changed since it was published ({changed}): give --overwrite to publish it again, or "
                "another --output"
            )
        result.kept.append(output)
    else:
        from publish_model.model_folder.published_folder import fill_folder, read_parts

        model = read_parts(config, checkpoint_path, backbone_dir, own.force)
        with writing_folder(output, made=MADE) as folder:
            fill_folder(pin(folder), model, own.dtype, provenance)
            check_unchanged(backbone_dir, provenance["inputs"][1]["id"])
        result.written.append(output)
    if config.paths.report_dir is not None:
        add_test_results(output, config.path("report_dir") / "metrics.json")
    if own.push_to_hub:
        push_to_hub(output, own.push_to_hub)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(__doc__ or "")
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="PATH", help="checkpoint (default: checkpoint_dir/checkpoint_best.pt)")
    add("--output", type=Path, metavar="DIR", help="folder to write (default: published_model_dir)")
    add("--force", action="store_true", help="publish a projector that retrieves worse than no training too")
    add("--push-to-hub", metavar="REPO_ID", help="upload the folder too, to a private repository ($HF_TOKEN)")
    add("--dtype", choices=("float32", "bfloat16"), help="type of the published weights (default: the stored one)")
    arguments = parser.parse_args(argv)
    cli.run_stage(STAGE, run, cli.config_from(arguments), cli.options_from(arguments, PublishOptions))


if __name__ == "__main__":
    cli.run_guarded(main)
