"""What SLURM has to know of each stage: its script, its job file, what it waits for and how it is cut."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.config import Config

TAR, ANCHOR, ROW_GROUP, WORKER, WHOLE = "tar", "anchor", "row group", "worker", "run"


@dataclass(frozen=True)
class Stage:
    """A stage as a job.

    `unit` is what `--shard` cuts, WHOLE where nothing is; workers share their work without it. `after` are the stages
    that must be complete before it; `shard_after` is the one whose shard of the same number is enough.
    """

    number: int
    script: str
    unit: str = WHOLE
    after: tuple[int, ...] = ()
    shard_after: int | None = None
    uses_gpu: bool = False

    @property
    def name(self) -> str:
        """The script's name, which the job has too."""
        return self.script.rpartition("/")[2].removesuffix(".py")

    @property
    def sbatch_path(self) -> str:
        """The job file, from the project's root."""
        folder = "publish_model/slurm" if self.number == 8 else "slurm"
        return f"{folder}/{self.name}.sbatch"

    @property
    def is_array(self) -> bool:
        """Whether it is cut into tasks."""
        return self.unit != WHOLE

    @property
    def label(self) -> str:
        """What a command line and a message call it: its number, or the name of what is no stage."""
        return str(self.number or self.name)


STAGES = {
    stage.number: stage
    for stage in (
        Stage(1, "preprocess_raw_data/process_tar.py", TAR),
        Stage(2, "generate_embeddings/generate_embeddings.py", TAR, shard_after=1, uses_gpu=True),
        Stage(3, "preprocess_raw_data/merge_and_split.py", after=(2,)),
        Stage(4, "preprocess_raw_data/compute_fingerprints.py", TAR, shard_after=1),
        Stage(5, "difficulty_metadata/compute_visual_neighbors.py", ANCHOR, after=(4,), uses_gpu=True),
        Stage(6, "train_specialized_embeddings/train.py", after=(3, 5), uses_gpu=True),
        Stage(7, "publish_model/convert_to_hf.py", after=(6,)),
        Stage(8, "publish_model/generate_embeddings_from_parquet.py", ROW_GROUP, after=(7,), uses_gpu=True),
        Stage(9, "evaluate_embeddings/evaluate.py", after=(3, 6)),
    )
}

# No stage of the pipeline: the search for stage 6's settings, whose array is of workers on one study.
TUNE = Stage(0, "train_specialized_embeddings/tune.py", WORKER, after=(3, 5), uses_gpu=True)


def find_stage(label: str) -> Stage:
    """Return the stage of a label.

    Raises ValueError where there is none.
    """
    for stage in (*STAGES.values(), TUNE):
        if stage.label == label:
            return stage
    raise ValueError(f"{label!r} must be 1 to 9 or {TUNE.label}")


def has_new_data(config: Config) -> bool:
    """Whether stage 8 is part of the pipeline."""
    return bool(config.new_data.input and config.new_data.output)


def format_shards(shards: Iterable[int]) -> str:
    """Write shard numbers as sbatch's --array does: `0-3,7`."""
    ranges: list[list[int]] = []
    for shard in sorted(set(shards)):
        if ranges and shard == ranges[-1][1] + 1:
            ranges[-1][1] = shard
        else:
            ranges.append([shard, shard])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in ranges)


def parse_shards(text: str) -> list[int]:
    """Read what `format_shards` writes, and what squeue shows of an array: `[0-3,7%4]`.

    Raises ValueError where it is something else.
    """
    shards: list[int] = []
    for part in re.sub(r"%\d+$", "", text.strip("[]")).split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise ValueError(f"{text!r} must read like 0-3,7")
        shards += range(int(match[1]), int(match[2] or match[1]) + 1)
    return sorted(set(shards))
