"""The files of a training run: the lock that keeps two out of one folder, and what passes for a run's own."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_data import SETTINGS, fill_workspace, run

from pipeline.errors import PipelineError, StaleOutputError
from pipeline.retrieval.checkpoint import load_checkpoint
from pipeline.workspace import locked
from train_specialized_embeddings.train import BUSY

HOLDER = """
import sys
from pathlib import Path
from pipeline.workspace import locked
from train_specialized_embeddings.train import BUSY
with locked(Path(sys.argv[1]), BUSY, Path(sys.argv[1]) / ".lock"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process that holds the lock of `tmp_path / "checkpoint"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "checkpoint")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_training_is_refused_naming_process_and_host_and_changes_nothing(
    tmp_path: Path, write_config: Callable[..., Path], holder: Any
) -> None:
    fill_workspace(tmp_path)
    write_config(tmp_path, **SETTINGS)
    (tmp_path / "checkpoint/metrics.jsonl").write_text("the other's\n")
    for overwrite in (False, True):
        (tmp_path / "checkpoint/.checkpoint_latest.pt").write_bytes(b"the other's")
        with pytest.raises(PipelineError, match=rf"checkpoint: process {holder.pid} on \S+ is training there: wait"):
            run(tmp_path, overwrite=overwrite)
    assert (tmp_path / "checkpoint/metrics.jsonl").read_text() == "the other's\n"


def test_a_killed_training_leaves_no_lock(tmp_path: Path, holder: Any) -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / "checkpoint/.lock").exists()
    with locked(tmp_path / "checkpoint", BUSY, tmp_path / "checkpoint/.lock"):
        first = (tmp_path / "checkpoint/.lock").read_text().splitlines()[0]  # what is behind is of a longer number
        assert re.fullmatch(rf"process {os.getpid()} on \S+", first)
    assert list((tmp_path / "checkpoint").iterdir()) == []


def test_files_of_another_run_do_not_pass_for_those_of_this_one(
    workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    run(workspace)
    caplog.clear()
    for name in ("checkpoint_best.pt", "checkpoint_final.pt"):
        path = workspace / "checkpoint" / name
        own = path.read_bytes()
        path.write_bytes(own + b" ")
        with pytest.raises(StaleOutputError, match=f"{name}: not the one that this run wrote: put that back"):
            run(workspace)
        path.write_bytes(own)
    assert run(workspace).kept
    best = workspace / "checkpoint/checkpoint_best.pt"
    own = best.read_bytes()
    load_checkpoint(best)
    assert not caplog.messages
    best.write_bytes(path.read_bytes())
    load_checkpoint(best)
    (workspace / "checkpoint/provenance.json").unlink()
    (workspace / "checkpoint/.checkpoint_latest.pt").write_bytes(own)
    load_checkpoint(best)
    assert [message.removeprefix(f"{best}: ") for message in caplog.messages] == [
        "not the one that the training in its folder wrote: put that back",
        "of a training that has not finished: run stage 6 again to finish it",
    ]
    path.write_bytes(b"")
    assert run(workspace, overwrite=True).written
