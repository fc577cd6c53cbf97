"""SIGKILL at random moments, then a rerun: the same data as an undisturbed run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from config_files import write_config

from pipeline.config import load_config
from sample_data import convert_lite0, render_streets

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = {
    "paths": {"difficulty_metadata_path": "difficulty/difficulty_metadata.parquet"},
    "embedding_model": {"model_name": "backbone"},
    "data": {"train_ratio": 0.6, "val_ratio": 0.2, "test_ratio": 0.2},
    "difficulty": {"neighbors": 20, "k0_for_local_scale": 10},
    "training_model": {"hidden_dim": 32, "output_dim": 64},
    "training": {"num_epochs": 6, "save_every_n_epochs": 2},
}
SCRIPTS = {
    1: "preprocess_raw_data/process_tar.py",
    2: "generate_embeddings/generate_embeddings.py",
    3: "preprocess_raw_data/merge_and_split.py",
    4: "preprocess_raw_data/compute_fingerprints.py",
    5: "difficulty_metadata/compute_visual_neighbors.py",
    6: "train_specialized_embeddings/train.py",
    7: "publish_model/convert_to_hf.py",
    8: "publish_model/generate_embeddings_from_parquet.py",
}
OUTPUTS = {
    1: "intermediates",
    2: "embeddings",
    3: "merged",
    4: "fingerprints",
    5: "difficulty",
    6: "checkpoint",
    8: "new_embeddings",
}


# The log line behind which a stage is at work; importing torch before it takes seconds in which nothing can be lost.
AT_WORK = {2: "images a pass", 6: "epoch", 8: "images a pass"}


def command(stage: int, workspace: Path) -> list[str]:
    script = [sys.executable, str(ROOT / SCRIPTS[stage])]
    if stage == 8:
        paths = ["--input", "packaged.parquet", "--output", "new_embeddings", "--model-id", "published_model"]
        return [*script, *paths, "--read-batch-size", "8", "--device", "cpu"]
    # The toy training set says nothing about what is worth publishing.
    return [*script, "--config", str(workspace / "config.toml"), *(["--force"] if stage == 7 else [])]


def run_to_the_end(stage: int, workspace: Path) -> float:
    """Run a stage and return how many seconds it was at work."""
    process = start(stage, workspace)
    wait_for_work(stage, process)
    started = time.monotonic()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return time.monotonic() - started


def start(stage: int, workspace: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command(stage, workspace), cwd=workspace, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def wait_for_work(stage: int, process: subprocess.Popen) -> None:
    """Return at the log line that says the stage is at work, or when it has ended without one."""
    for line in process.stderr:
        if AT_WORK.get(stage, "") in line:
            return


def kill_after(seconds: float, stage: int, workspace: Path) -> bool:
    """Start a stage, kill it so long after it set to work, and return whether it was still at it."""
    process = start(stage, workspace)
    wait_for_work(stage, process)
    time.sleep(seconds)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    return alive


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, float]]:
    """A workspace in which stages 1 to 8 ran to their end, and how long each one worked."""
    workspace = tmp_path_factory.mktemp("undisturbed")
    write_config(workspace, **SECTIONS)
    render_streets.main(["--output", str(workspace / "raw"), "--buildings", "36", "--size", "96"])
    convert_lite0.main([str(workspace / "backbone")])
    seconds = {}
    for stage in SCRIPTS:
        if stage == 8:
            from sample_data.run_demo import package_split

            package_split(load_config(workspace / "config.toml"), "test", workspace / "packaged.parquet")
        seconds[stage] = run_to_the_end(stage, workspace)
    return workspace, seconds


def read_data(folder: Path) -> dict[str, object]:
    """Return everything of an output folder that must be the same: tables, weights, counters; hidden files too."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name.startswith("_logs"):
            continue
        if path.suffix == ".parquet":
            found[name] = pq.read_table(path)
        elif path.suffix == ".pt":
            found[name] = summarize_checkpoint(path)
        elif path.suffix == ".jsonl":
            found[name] = [drop_seconds(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name == "state.json":
            state = json.loads(path.read_text())
            found[name] = {key: value for key, value in state.items() if key != "input_path"}
        else:
            found[name] = "there"
    return found


def drop_seconds(record: dict) -> dict:
    return {key: value for key, value in record.items() if "seconds" not in key}


def summarize_checkpoint(path: Path) -> dict[str, list]:
    import torch

    content = torch.load(path, weights_only=True)
    return {name: tensor.tolist() for name, tensor in content["projector"].items()}


def check_kills(stage: int, num_kills: int, undisturbed: tuple[Path, dict[int, float]], tmp_path: Path) -> None:
    source, seconds = undisturbed
    workspace = tmp_path / "workspace"
    shutil.copytree(source, workspace, ignore=shutil.ignore_patterns(OUTPUTS[stage], "logs"))
    generator = random.Random(stage)
    killed, longest = 0, seconds[stage]
    for _ in range(num_kills + 20):
        if killed == num_kills:
            break
        if kill_after(generator.uniform(0, longest), stage, workspace):
            killed += 1
        else:  # a rerun has less to do, or the machine is faster now, and it was through by then: begin anew
            shutil.rmtree(workspace / OUTPUTS[stage])
            longest /= 2
    run_to_the_end(stage, workspace)
    assert read_data(workspace / OUTPUTS[stage]) == read_data(source / OUTPUTS[stage])
    assert killed == num_kills, "too few kills met the stage at work"


@pytest.mark.slow
@pytest.mark.parametrize("stage", sorted(OUTPUTS))
def test_ten_kills_and_a_rerun_give_what_an_undisturbed_run_gives(stage, undisturbed, tmp_path):
    check_kills(stage, 10, undisturbed, tmp_path)
