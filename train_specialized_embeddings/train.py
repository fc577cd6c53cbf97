"""Stage 6: train the projector from backbone embeddings to building embeddings, with banded negatives.

    python train_specialized_embeddings/train.py --config config.toml

Reads merged_dir/train.parquet and val.parquet and, if set, difficulty_metadata_path. Writes to checkpoint_dir
checkpoint_best.pt (by validation mAP, the start included), checkpoint_final.pt, checkpoint_epoch_N.pt, metrics.jsonl
and provenance.json. A rerun keeps a complete run and resumes a killed one: the weights are the same.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.files import identity, tables
from pipeline.files.units import Unit, keep_complete
from pipeline.stages import STAGES
from pipeline.workspace import locked, replacing
from train_specialized_embeddings.training import run_files

STAGE = "train"
WARM_START = "init_checkpoint"
BUSY = "is training there: wait for it, or set another [paths].checkpoint_dir"


def list_inputs(config: Config) -> dict[str, Path]:
    """Return the files that the stage reads.

    Raises ConfigError where a path is not set, or the run would replace the checkpoint that it starts from.
    """
    config.require_paths("merged_dir", "checkpoint_dir")
    inputs = {split: config.path("merged_dir") / f"{split}.parquet" for split in ("train", "val")}
    if config.paths.difficulty_metadata_path is not None:
        inputs["difficulty"] = config.path("difficulty_metadata_path")
    if config.training.init_checkpoint is not None:
        where = "[training].init_checkpoint"
        inputs[WARM_START] = path = config.expand(config.training.init_checkpoint, where)
        if path.parent == config.path("checkpoint_dir"):
            raise ConfigError(
                f"{config.file_path}: {where}: {path} lies in [paths].checkpoint_dir, which this run writes: set "
                "another checkpoint_dir"
            )
    return inputs


def describe_run(config: Config, inputs: dict[str, Path]) -> dict[str, Any]:
    """Return the provenance of the run: its inputs, and every setting that shapes the weights.

    Leaves out input_dim, which can only be the width of the data, and the name of the checkpoint to start from, which
    counts by its content. Raises InputError if an input is missing.
    """
    settings: dict[str, Any] = {"seed": config.global_.seed} | {
        f"{name}.{key}": value
        for name, section in (("training", config.training), ("training_model", config.training_model))
        for key, value in section.model_dump(exclude={"input_dim", WARM_START}).items()
    }
    identities = [
        identity.identify(path) | ({"name": name} if name == WARM_START else {}) for name, path in inputs.items()
    ]
    provenance = tables.make_provenance(STAGE, identities, settings)
    merged = tables.read_provenance(inputs["train"]) or {}
    return provenance | {key: merged.get(key) for key in ("split_hash", "embedded_with")}


def list_units(config: Config) -> list[Unit]:
    folder = config.path("checkpoint_dir")
    check, outputs = partial(run_files.check_outputs, folder), STAGES[6].list_outputs(config)
    return [Unit(STAGE, outputs, lambda _: describe_run(config, list_inputs(config)), check=check)]


def run(config: Config, options: cli.Options) -> cli.StageResult:
    """Train, resume, or keep a complete run; the result counts the images of train and val.

    Raises StaleOutputError where the folder holds a run from other inputs or settings, InputError where an input
    cannot be trained on, PipelineError where another process is training into the folder.
    """
    inputs = list_inputs(config)
    (unit,) = list_units(config)
    result = cli.StageResult(STAGE)
    if keep_complete(unit, result, options.overwrite):
        return result
    folder, provenance = config.path("checkpoint_dir"), describe_run(config, inputs)
    if not (folder / "_replaced").exists():  # where a killed run left the mark
        run_files.check_marked(folder)
    from train_specialized_embeddings.training.fitting import fit  # torch, which a kept run does without

    with locked(folder, BUSY, folder / ".lock"):
        # The mark first, so that a half-removed run does not look complete.
        marks = [folder / name for name in (run_files.PROVENANCE, run_files.LATEST, *run_files.LOG_FOLDERS)]
        with replacing(folder, [*marks, *run_files.list_outputs(folder)] if options.overwrite else []):
            result.add(fit(config, inputs, provenance, folder, result.watch))
    result.written += [*run_files.list_outputs(folder), folder / run_files.PROVENANCE]
    return result


def main(argv: Sequence[str] | None = None) -> None:
    cli.run_from_command_line(STAGE, run, __doc__, argv)


if __name__ == "__main__":
    cli.run_guarded(main)
