"""The table of stages: each one's script, paths, outputs, unit of work, and the stages it waits for.

A new stage is a script and one entry here; the script offers `run(config, options)`, which does the work, and
`list_units(config)`, which names its units (see pipeline/files/units.py).
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config

# The units that `--shard I/N` counts. WORKER: processes that share the work without being told apart; WHOLE: one.
TAR, ANCHOR, ROW_GROUP, WORKER, WHOLE = "tar", "anchor", "row group", "worker", "run"


@dataclass(frozen=True)
class Stage:
    """A stage. Paths are keys of [paths], or `section.key` elsewhere in the configuration.

    It needs the paths `reads` and `writes`, and may use `may_read`. It leaves `outputs` below `writes`, a per-tar stage
    one file a tar. The stages in `after` must be complete before it starts; of the stage `shard_after` the shard of
    the same number is enough.
    """

    number: int
    module: str
    reads: tuple[str, ...]
    writes: str
    outputs: tuple[str, ...] = ()
    unit: str = WHOLE
    after: tuple[int, ...] = ()
    shard_after: int | None = None
    uses_gpu: bool = False
    may_read: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The script's name; its logs, ledger line and jobs have it too."""
        return self.module.rpartition(".")[2]

    @property
    def label(self) -> str:
        """The stage's number, or "tune"."""
        return str(self.number or self.name)

    @property
    def is_array(self) -> bool:
        """Whether several processes may share its work."""
        return self.unit != WHOLE

    def list_outputs(self, config: Config) -> tuple[Path, ...]:
        """Return the outputs of a stage that does not work per tar."""
        place = config.path(self.writes)
        return tuple(place / name for name in self.outputs) or (place,)


STAGES = {
    stage.number: stage
    for stage in (
        Stage(
            1, "preprocess_raw_data.process_tar", ("raw_dir",), "intermediates_dir", ("{}.parquet",), TAR,
        ),
        Stage(
            2, "generate_embeddings.generate_embeddings", ("raw_dir", "intermediates_dir"), "embeddings_dir",
            ("{}_embeddings.parquet",), TAR, shard_after=1, uses_gpu=True, may_read=("embedding_model.model_name",),
        ),
        Stage(
            3, "preprocess_raw_data.merge_and_split", ("embeddings_dir",), "merged_dir",
            ("train.parquet", "val.parquet", "test.parquet"), after=(2,), may_read=("data.split_file",),
        ),
        Stage(
            4, "preprocess_raw_data.compute_fingerprints", ("raw_dir", "intermediates_dir"), "fingerprints_dir",
            ("{}_fingerprints.parquet",), TAR, shard_after=1,
        ),
        Stage(
            5, "difficulty_metadata.compute_visual_neighbors", ("fingerprints_dir",), "difficulty_metadata_path",
            unit=ANCHOR, after=(4,), uses_gpu=True,
        ),
        Stage(
            6, "train_specialized_embeddings.train", ("merged_dir",), "checkpoint_dir",
            ("checkpoint_best.pt", "checkpoint_final.pt", "metrics.jsonl", "provenance.json"), after=(3, 5),
            uses_gpu=True, may_read=("difficulty_metadata_path", "training.init_checkpoint"),
        ),
        Stage(
            7, "publish_model.convert_to_hf", ("checkpoint_dir",), "published_model_dir", ("config.json",), after=(6,),
            may_read=("embedding_model.model_name",),
        ),
        Stage(
            8, "publish_model.generate_embeddings_from_parquet", ("published_model_dir",), "new_data.output",
            unit=ROW_GROUP, after=(7,), uses_gpu=True, may_read=("new_data.input",),
        ),
        Stage(
            9, "evaluate_embeddings.evaluate", ("merged_dir", "checkpoint_dir"), "report_dir",
            ("metrics.json", "report.html"), after=(3, 6), uses_gpu=True,
        ),
    )
}  # fmt: skip

# Not a stage of the pipeline: the search for stage 6's settings, an array of workers on one study.
TUNE = Stage(
    0, "train_specialized_embeddings.tune", ("merged_dir",), "checkpoint_dir",
    ("_tune/best.toml",), WORKER, after=(3, 5), uses_gpu=True, may_read=("difficulty_metadata_path",),
)  # fmt: skip

BY_LABEL = {stage.label: stage for stage in (*STAGES.values(), TUNE)}


def has_new_data(config: Config) -> bool:
    return bool(config.new_data.input and config.new_data.output)


def choose_stages(config: Config, first: int, last: int) -> list[Stage]:
    """Return the stages from `first` to `last` that this configuration runs: stage 8 only where new data are set.

    Raises ConfigError naming every path that one of them lacks, so that nothing fails hours later.
    """
    asked = [stage for number, stage in STAGES.items() if first <= number <= last]
    chosen = [stage for stage in asked if stage.number != 8 or has_new_data(config)]
    if len(chosen) < len(asked):
        print("stage 8: [new_data].input and output are not set: passed over", file=sys.stderr)
    check_paths(config, chosen)
    for name in dict.fromkeys(name for stage in asked for name in (*stage.may_read, stage.writes)):
        config.find_path(name)
    return chosen


def check_paths(config: Config, stages: Iterable[Stage]) -> None:
    """Raise one ConfigError that names every key of [paths] that the stages need and the configuration lacks."""
    names = dict.fromkeys(name for stage in stages for name in (*stage.reads, stage.writes))
    config.require_paths(*(name for name in names if "." not in name))
