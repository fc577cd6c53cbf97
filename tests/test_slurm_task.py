"""What a job does on its node: its shard, its device, and when it goes back into the queue."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


# A Python that stands in for the stage: it says when it runs, keeps what it has on TERM, or does not listen.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
    "-P -c "*) exit 0 ;;
esac
echo "stage $HF_HUB_OFFLINE ${HF_TOKEN:-no token}"
if [ "$STUBBORN" = 1 ]; then trap '' TERM; else trap 'echo kept; exit 143' TERM; fi
echo ready >"$READY"
for _ in $(seq "$TENTHS"); do sleep 0.1; done
exit "$CODE"
"""


def run_job(tmp_path, number=None, stubborn=0, code=0, tenths=100, **variables):
    """Run common.sh's run_task with a stand-in for Python, send it a signal, and return exit code and output."""
    stand_in, ready = tmp_path / "python", tmp_path / "ready"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    ready.unlink(missing_ok=True)
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "scontrol $*"\n')
    (tmp_path / "scontrol").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": str(stand_in), "READY": str(ready), "STUBBORN": str(stubborn),
        "CODE": str(code), "TENTHS": str(tenths), "GRACE_SECONDS": "1", "HF_TOKEN": "secret", "SLURM_JOB_ID": "7",
        "PIPELINE_MODULES": "a b", **variables,
    }  # fmt: skip
    job = subprocess.Popen(
        ["bash", "-c", f'root={REPO}; source "$root/slurm/control/common.sh" ; run_task 2 a.py --config "a b"'],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if number is not None:
        deadline = time.monotonic() + 20
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(job.pid, number)
    output, _ = job.communicate(timeout=30)
    return job.returncode, output


@pytest.mark.parametrize(
    ("call", "array", "expected"),
    [
        ("run_shard 1 a.py --shards 8 --config x", {"ID": "5", "MAX": "6"}, "4 a.py --config x --shard 5/8"),
        ("run_shard 1 a.py --config x", {"ID": "5", "MAX": "6"}, "4 a.py --config x --shard 5/7"),  # by hand
        ("run_shard 1 a.py --config x", {}, "4 a.py --config x --shard 0/1"),
        ("run_task tune a.py --trials 3", {"ID": "3", "MAX": "3"}, "4 a.py --trials 3"),
    ],
)
def test_a_task_is_the_shard_of_its_number(tmp_path, call, array, expected):
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/usr/bin/env bash\ncase "$*" in -P*) exit 0 ;; esac\necho "$OMP_NUM_THREADS $*"\n')
    stand_in.chmod(0o755)
    variables = {"PATH": "/usr/bin:/bin", "PYTHON": str(stand_in), "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4"}
    run = subprocess.run(
        ["bash", "-c", f'root={REPO}; source "$root/slurm/control/common.sh"; {call}'], check=True, text=True,
        capture_output=True, env=variables | {f"SLURM_ARRAY_TASK_{name}": value for name, value in array.items()},
    )  # fmt: skip
    assert run.stdout.splitlines()[0] == expected.replace("a.py", f"{REPO}/a.py")


def test_a_stages_exit_code_is_the_jobs(tmp_path):
    code, output = run_job(tmp_path, code=3, tenths=1)
    assert code == 3
    assert output.splitlines() == ["stage 1 no token", "task: stage 2 shard 0 job 7 exit 3"]


def test_a_warned_job_lets_the_stage_keep_what_it_has_and_requeues(tmp_path):
    code, output = run_job(tmp_path, signal.SIGUSR1)
    assert output.splitlines()[1:] == [
        "kept", "task: stage 2 shard 0 job 7 exit 143",
        "task 7 goes back into the queue (try 2, 8 requeues at most)", "scontrol requeue 7",
    ]  # fmt: skip
    assert code == 143


def test_an_array_task_goes_back_by_its_own_number_as_often_as_it_may(tmp_path):
    array = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3", "MAX_REQUEUES": "2"}
    code, output = run_job(tmp_path, signal.SIGUSR1, SLURM_RESTART_COUNT="1", **array)
    assert (code, output.splitlines()[-1]) == (143, "scontrol requeue 70_3")
    code, output = run_job(tmp_path, signal.SIGUSR1, SLURM_RESTART_COUNT="2", **array)
    assert (code, "scontrol" in output) == (1, False)
    assert "error: task 70_3: begun 3 times already (MAX_REQUEUES is 2)" in output.splitlines()[-1]


def test_a_stage_that_does_not_listen_is_killed_in_time_and_requeued(tmp_path):
    started = time.monotonic()
    code, output = run_job(tmp_path, signal.SIGUSR1, stubborn=1)
    assert (code, output.splitlines()[-1]) == (137, "scontrol requeue 7")
    assert time.monotonic() - started < 9


def test_a_cancelled_job_does_not_come_back(tmp_path):
    code, output = run_job(tmp_path, signal.SIGTERM)
    assert (code, "kept" in output, "requeue" in output) == (143, True, False)


def test_preparing_a_cluster_names_the_backbones_folder(tmp_path, write_config):
    (tmp_path / "backbone").mkdir()
    path = write_config(tmp_path, embedding_model={"model_name": "backbone"})
    run = subprocess.run(
        [REPO / "slurm/prepare.sh", "--no-install", "--config", path],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHON": sys.executable},
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (0, f"{tmp_path / 'backbone'}\n"), run.stderr
