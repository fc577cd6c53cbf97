"""Read the counts of every stage's rows from the provenance that its outputs carry."""

from pathlib import Path

from pipeline.cli import StageResult
from pipeline.config import Config
from pipeline.errors import ConfigError, InputError
from pipeline.files.units import read_recorded
from pipeline.stages import STAGES, Stage

# The outputs that carry the counts where that is not every output: each split has the counts of all three.
COUNTED = {3: "test.parquet", 6: "provenance.json", 8: "parts/*.parquet"}


def read_ledger(config: Config) -> list[StageResult]:
    """Return the counts of the stages that handle rows, from the files that are there; read no row and no pixel.

    `kept` names the files that were counted.
    """
    results = []
    for stage in (stage for number, stage in STAGES.items() if number not in (7, 9)):
        result = StageResult(stage.name)
        for path in _list_outputs(stage, config):
            try:
                recorded = read_recorded(path) or {}
            except InputError:  # a damaged file is for its own stage to report
                continue
            if isinstance(recorded.get("counts"), dict):
                result.add(recorded["counts"], recorded.get("reasons"))
                result.kept.append(path)
        if result.kept:
            results.append(result)
    return results


def _list_outputs(stage: Stage, config: Config) -> list[Path]:
    try:
        place = stage.find_place(config)
    except ConfigError:  # its path is not set
        return []
    pattern = COUNTED.get(stage.number) or next(iter(stage.outputs), "").replace("{}", "*")
    paths = sorted(place.glob(pattern)) if pattern else [place]
    return [path for path in paths if path.is_file() and not path.name.startswith(".")]


def find_path(config: Config, key: str) -> Path | None:
    """Return a path of the configuration, None if it is not set: the page does without it."""
    try:
        return config.path(key)
    except ConfigError:
        return None
