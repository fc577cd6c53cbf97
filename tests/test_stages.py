"""The table of stages, and what holds between it and the stages' scripts."""

import ast
import importlib
from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.stages import STAGES, TUNE, choose_stages

REPO = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("stage", [*STAGES.values(), TUNE], ids=lambda stage: stage.name)
def test_a_stage_is_what_its_script_says(stage):
    module = importlib.import_module(stage.module)
    assert (REPO / f"{stage.module.replace('.', '/')}.py").is_file()
    assert stage.name == module.STAGE
    assert callable(module.run)
    assert callable(module.list_units)
    if stage != TUNE:
        assert module.__doc__.startswith(f"Stage {stage.number}: ")


def test_stages_wait_for_earlier_ones_only():
    for stage in STAGES.values():
        assert all(number < stage.number for number in (*stage.after, stage.shard_after or 0))


def test_one_class_only_is_called_stage():
    folders = [path for path in REPO.iterdir() if path.is_dir() and path.name not in {"tests", ".venv", ".git"}]
    files = [*REPO.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    found = [
        path.relative_to(REPO).as_posix()
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name == "Stage"
    ]
    assert found == ["pipeline/stages.py"]


def test_stage_8_needs_its_path_only_where_it_runs(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("")
    config = load_config(path)
    assert choose_stages(config, 8, 8) == []
    config = load_config(path, ["new_data.input=a.parquet", "new_data.output=b"])
    with pytest.raises(ConfigError, match=r"\[paths\]\.published_model_dir: not set"):
        choose_stages(config, 8, 8)
