"""Which units of a stage are complete, by the same provenance that the stage itself looks at."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difficulty_metadata import compute_visual_neighbors
from difficulty_metadata.neighbor_search.fingerprints import list_fingerprint_files
from evaluate_embeddings import evaluate
from generate_embeddings import generate_embeddings
from pipeline.config import Config
from pipeline.embeddings_dataset.packaged_input import PackagedInput, open_packaged
from pipeline.errors import InputError, StaleOutputError
from pipeline.files.tables import identify, is_complete, make_provenance, matches, read_provenance
from pipeline.files.units import TarUnit
from pipeline.files.writing import read_json_object
from pipeline.inference.model_files import identify_model, locate_backbone
from preprocess_raw_data import compute_fingerprints, merge_and_split, process_tar
from preprocess_raw_data.merging.embedding_inventory import list_embeddings
from publish_model import convert_to_hf
from slurm.control.outputs import (
    dataset_dir,
    list_final_outputs,
    list_stage_units,
    list_tar_units,
    new_data_paths,
)
from slurm.control.stages import ROW_GROUP, TAR, Stage
from train_specialized_embeddings import train
from train_specialized_embeddings.training.run_files import RunFiles

Provenance = dict[str, Any]


@dataclass(frozen=True)
class UnitState:
    """Whether a unit is complete, and how many of its rows were rejected."""

    is_done: bool
    rows_in: int = 0
    rejected: int = 0


def shards_done(states: list[UnitState], shard_count: int, max_reject_fraction: float) -> list[bool]:
    """Return for each shard whether it is done: all units are, and not too many of their rows were rejected.

    With too many the stage exits with 1 although its outputs are there, and what follows must not be made from them.
    """
    done = []
    for shard in range(shard_count):
        own = states[shard::shard_count]
        rows_in, rejected = sum(state.rows_in for state in own), sum(state.rejected for state in own)
        done.append(all(state.is_done for state in own) and rejected <= max_reject_fraction * rows_in)
    return done


def find_states(stage: Stage, config: Config) -> list[UnitState]:
    """Return for each unit of a stage whether it is complete and was made from these inputs with these settings.

    Raises StaleOutputError, naming the difference, where an output was made from others: the job would refuse it too,
    but at night.
    """
    if stage.unit == TAR:
        describe = tar_provenance(stage, config)
        return [find_tar_state(unit, describe) for unit in list_tar_units(stage, config)]
    if stage.unit == ROW_GROUP:
        input_path, output = new_data_paths(config)
        check_dataset(open_packaged(input_path), output)
        return [UnitState(unit.is_there()) for unit in list_stage_units(stage, config)]
    if not all(path.exists() for path in list_final_outputs(stage, config)):
        return [UnitState(False)]
    try:
        return [UnitState(WHOLE_CHECKS[stage.number](config))]
    except InputError:
        return [UnitState(False)]  # an input is not there yet, or no more: the stage says which


def tar_provenance(stage: Stage, config: Config) -> Callable[[TarUnit], Provenance]:
    """Return what gives the provenance that a tar's output must have."""
    if stage.number == 1:
        return process_tar.describe_output
    if stage.number == 4:
        return lambda unit: compute_fingerprints.describe_output(unit, config)
    folder = locate_backbone(config, download=False)
    model_id = identify_model(folder) if folder else None
    return lambda unit: generate_embeddings.describe_output(unit, config, model_id)


def find_tar_state(unit: TarUnit, describe: Callable[[TarUnit], Provenance]) -> UnitState:
    """Return the state of a tar's output; a damaged or missing input is for the stage to report."""
    if not unit.output_path.exists():
        return UnitState(False)
    try:
        is_done = is_complete(unit.output_path, describe(unit), overwrite=False)
    except InputError:
        return UnitState(False)
    return read_tar_state(unit.output_path) if is_done else UnitState(False)


def read_tar_state(output_path: Path) -> UnitState:
    """Return the state that an output that is there reports, whatever it was made from.

    Raises InputError if it is damaged.
    """
    counts = (read_provenance(output_path) or {}).get("counts", {})
    return UnitState(True, counts.get("in", 0), counts.get("rejected", 0))


def check_dataset(source: PackagedInput, output: Path) -> None:
    """Raise StaleOutputError where stage 8's dataset was begun from another input."""
    state_path = dataset_dir(output) / "state.json"
    begun = read_json_object(state_path).get("row_group_fingerprint")
    if begun is not None and begun != source.fingerprint:
        raise StaleOutputError(
            f"{state_path.parent}: begun from another input than {source.path}: give another output, or remove it"
        )


def _are_splits_done(config: Config) -> bool:
    embeddings = list_embeddings(config.path("embeddings_dir"))
    settings = merge_and_split.describe_settings(config)
    wanted = make_provenance(merge_and_split.STAGE, map(identify, embeddings), settings)
    paths = [config.path("merged_dir") / f"{split}.parquet" for split in ("train", "val", "test")]
    return all(is_complete(path, wanted, overwrite=False) for path in paths)


def _are_neighbors_done(config: Config) -> bool:
    fingerprints = list_fingerprint_files(config.path("fingerprints_dir"))
    settings = compute_visual_neighbors.data_settings(config)
    wanted = make_provenance(compute_visual_neighbors.STAGE, [identify(path) for path in fingerprints], settings)
    return is_complete(config.path("difficulty_metadata_path"), wanted, overwrite=False)


def _is_training_done(config: Config) -> bool:
    return RunFiles(config.path("checkpoint_dir")).is_complete(train.describe_run(config, train.list_inputs(config)))


def _is_model_published(config: Config) -> bool:
    backbone_dir = locate_backbone(config, download=False)
    if backbone_dir is None:
        return True  # it cannot be told without the weights, and the folder holds a copy of them
    checkpoint_path = config.path("checkpoint_dir") / "checkpoint_best.pt"
    wanted = convert_to_hf.describe(config, convert_to_hf.PublishOptions(), checkpoint_path, backbone_dir)
    return convert_to_hf.is_published(config.path("published_model_dir"), wanted, overwrite=False)


def _is_evaluated(config: Config) -> bool:
    metrics_path = config.path("report_dir") / "metrics.json"
    found = read_json_object(metrics_path).get("provenance")
    return matches(metrics_path, found, evaluate.describe_inputs(config, None))


WHOLE_CHECKS: dict[int, Callable[[Config], bool]] = {
    3: _are_splits_done,
    5: _are_neighbors_done,
    6: _is_training_done,
    7: _is_model_published,
    9: _is_evaluated,
}
