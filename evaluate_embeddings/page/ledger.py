"""What became of every row, stage by stage, as the files that are there say of their own making."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.cli import StageResult
from pipeline.config import Config
from pipeline.errors import ConfigError, InputError
from pipeline.files.tables import read_provenance
from pipeline.files.writing import read_json_object


def read_ledger(config: Config) -> list[StageResult]:
    """Return the counts of stages 1 to 8, as far as their files are there; no pixel and no row is read.

    `kept` names the files that were counted.
    """
    folder = find_path(config, "checkpoint_dir")
    mark = folder and folder / "provenance.json"
    found = [
        _add_up("process_tar", _parquets(config, "intermediates_dir", "*.parquet")),
        _add_up("generate_embeddings", _parquets(config, "embeddings_dir", "*_embeddings.parquet")),
        # Each split says the counts of all three.
        _add_up("merge_and_split", _parquets(config, "merged_dir", "test.parquet")),
        _add_up("compute_fingerprints", _parquets(config, "fingerprints_dir", "*_fingerprints.parquet")),
        _add_up("compute_visual_neighbors", _parquets(config, "difficulty_metadata_path", "")),
        _add_up("train", [(mark, read_json_object(mark))] if mark else []),
        _add_up("generate_embeddings_from_parquet", _parquets_of_new_data(config)),
    ]
    return [result for result in found if result.kept]


def _add_up(stage: str, provenances: Iterable[tuple[Path, dict[str, Any] | None]]) -> StageResult:
    result = StageResult(stage)
    for path, provenance in provenances:
        counts = (provenance or {}).get("counts")
        if isinstance(counts, dict):
            result.add(counts, (provenance or {}).get("reasons") or {})
            result.kept.append(path)
    return result


def find_path(config: Config, key: str) -> Path | None:
    """Return a path of the configuration where it is set: the page can do without."""
    try:
        return config.path(key)
    except ConfigError:
        return None


def _parquets(config: Config, key: str, pattern: str) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    place = find_path(config, key)
    if place is not None:
        yield from _read_all([place] if not pattern else sorted(place.glob(pattern)))


def _parquets_of_new_data(config: Config) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    try:
        output = config.new_data.output and config.expand(config.new_data.output, "[new_data].output")
    except ConfigError:
        return
    if output:
        yield from _read_all(sorted((output / "parts").glob("*.parquet")))


def _read_all(paths: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    for path in paths:
        if path.is_file() and not path.name.startswith("."):
            try:
                yield path, read_provenance(path)
            except InputError:  # a damaged file of another stage is that stage's affair
                yield path, None
