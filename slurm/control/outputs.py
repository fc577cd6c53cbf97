"""Which outputs a stage is to leave, unit by unit, and how far an unfinished one is; torch is not needed for that."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cli import Options
from pipeline.config import Config
from pipeline.embeddings_dataset.packaged_input import PackagedInput, open_packaged
from pipeline.files.units import TarUnit, list_units
from pipeline.ids import Shard
from slurm.control.stages import ROW_GROUP, TAR, TUNE, Stage

SPLITS = ("train", "val", "test")
TAR_OUTPUTS = {
    1: ("intermediates_dir", ""),
    2: ("embeddings_dir", "_embeddings"),
    4: ("fingerprints_dir", "_fingerprints"),
}


@dataclass(frozen=True)
class Unit:
    """One unit of a stage's work: a tar, a row group, or all of it; `outputs` are there once it is done."""

    name: str
    outputs: tuple[Path, ...]

    def is_there(self) -> bool:
        """Whether all outputs are."""
        return all(path.exists() for path in self.outputs)


def list_tar_units(stage: Stage, config: Config) -> list[TarUnit]:
    """Return a per-tar stage's units in the order in which shards take them.

    Raises InputError where there is no tar.
    """
    key, suffix = TAR_OUTPUTS[stage.number]
    config.require_paths("raw_dir", "intermediates_dir", key)
    return list_units(config, Options(), key, suffix)


def list_row_group_units(source: PackagedInput, output: Path) -> list[Unit]:
    """Return stage 8's units, one a row group; their parts are named by row group and read batch."""
    units = []
    for group, rows in enumerate(source.row_group_rows):
        num_parts = -(-rows // source.read_batch_size)
        names = [f"rg{group:05d}_rb{batch:05d}.parquet" for batch in range(num_parts)]
        units.append(Unit(f"rg{group:05d}", tuple(output / "parts" / name for name in names)))
    return units


def dataset_dir(output: Path) -> Path:
    """Return the folder that stage 8 writes for an OUTPUT: OUTPUT.parts where the contract says so."""
    sidecar = output.with_name(output.name + ".parts")
    if output.is_file() or (not output.exists() and (sidecar / "state.json").exists()):
        return sidecar
    return output


def new_data_paths(config: Config) -> tuple[Path, Path]:
    """Return stage 8's input and output."""
    new_data = config.new_data
    return (
        config.expand(new_data.input or "", "[new_data].input"),
        config.expand(new_data.output or "", "[new_data].output"),
    )


def list_stage_units(stage: Stage, config: Config) -> list[Unit]:
    """Return a stage's units; a stage that takes no shards, or shards of no fixed output, is one unit.

    Raises InputError where the input that tells the number is not there yet.
    """
    if stage.unit == TAR:
        return [Unit(unit.tar_path.name, (unit.output_path,)) for unit in list_tar_units(stage, config)]
    if stage.unit == ROW_GROUP:
        input_path, output = new_data_paths(config)
        return list_row_group_units(open_packaged(input_path), dataset_dir(output))
    return [Unit(stage.name, list_final_outputs(stage, config))]


def list_final_outputs(stage: Stage, config: Config) -> tuple[Path, ...]:
    """Return the files that are there when a stage that is no per-tar stage is complete."""
    if stage.number == 3:
        return tuple(config.path("merged_dir") / f"{split}.parquet" for split in SPLITS)
    if stage.number == 5:
        return (config.path("difficulty_metadata_path"),)
    if stage.number == 6:
        names = ("checkpoint_best.pt", "checkpoint_final.pt", "metrics.jsonl", "provenance.json")
        return tuple(config.path("checkpoint_dir") / name for name in names)
    if stage == TUNE:
        return (config.path("checkpoint_dir") / "_tune" / "best.toml",)
    if stage.number == 7:
        return (config.path("published_model_dir") / "config.json",)
    return tuple(config.path("report_dir") / name for name in ("report.html", "metrics.json"))


def take_mark(stage: Stage, config: Config | None, shard: Shard, arguments: list[str]) -> Any:
    """Return plain values that change whenever a shard gets further in a way that a next try builds on.

    Stage 8 has no configuration, so its `arguments` are looked at.
    """
    if stage.unit == ROW_GROUP:
        output = dataset_dir(Path(arguments[arguments.index("--output") + 1]))
        names = sorted(path.name for path in (output / "parts").glob("rg*_rb*.parquet"))
        return [name for name in names if int(name[2:7]) % shard.count == shard.index]
    assert config is not None
    if stage.unit == TAR:
        units = shard.take(list_stage_units(stage, config))
        return [[unit.name, unit.is_there(), _read_seen(unit.outputs[0])] for unit in units]
    if stage.number == 5:
        path = config.path("difficulty_metadata_path")
        parts = path.with_name(f"_{path.stem}_parts")
        return sorted(str(part.relative_to(parts)) for part in parts.rglob("*.parquet") if part.name[0] != ".")
    if stage == TUNE:  # the study, in which every worker's epochs are noted
        study = config.path("checkpoint_dir") / "_tune"
        return {path.name: path.stat().st_size for path in (study / "journal.log", study / "study.db") if path.exists()}
    if stage.number == 6:
        metrics = config.path("checkpoint_dir") / "metrics.jsonl"
        return metrics.read_text(encoding="utf-8").count("\n") if metrics.exists() else 0
    return [path.exists() for path in list_final_outputs(stage, config)]


def _read_seen(output: Path) -> int:
    """Return how many images of an unfinished output are kept beside it (see pipeline/files/scratch.py)."""
    try:
        text = output.with_name(f".{output.name}.progress.json").read_text(encoding="utf-8")
        return int(json.loads(text)["seen"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
