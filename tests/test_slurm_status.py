"""What status.py finds in outputs, records and logs, with and without SLURM's answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.stages import STAGES
from pipeline.workspace import locked
from preprocess_raw_data import process_tar
from slurm import status
from slurm.control import scheduler, submit
from slurm.control.target import Target
from slurm.status import read_log, survey

REPO = Path(__file__).resolve().parents[1]
STAMP = "2026-01-01 00:00:00 INFO"


@pytest.fixture
def answers(monkeypatch):
    """What SLURM's commands answer; None where there is no SLURM."""
    found = {"squeue": None}
    monkeypatch.setattr(scheduler, "ask", lambda command: found.get(command[0]))
    return found


@pytest.fixture
def config(tmp_path, write_config, make_tar):
    """A configuration with four tars, of which stage 1 has done the first."""
    path = write_config(tmp_path / "with spaces")
    for number in (1, 2, 3, 4):
        make_tar(path.parent / "raw", number)
    process_tar.main(["--config", str(path), "--tar-file", str(path.parent / "raw/0001.tar")])
    return load_config(path)


def name_log(config, job, shard, number=1, shard_count=4):
    return f"{Target(config.log_dir, config).name_jobs(STAGES[number])}-{shard_count}-{job}_{shard}.log"


def write_log(config, job, shard, *lines):
    path = config.log_dir / "slurm" / name_log(config, job, shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def list_queue(config, *tasks):
    jobs = Target(config.log_dir, config).name_jobs(STAGES[1])
    return "".join(f"{job}|{shard}|{state}|{jobs}-4\n" for job, shard, state in tasks)


def states(config, number):
    (stage,) = [found for found in survey(config) if found["stage"] == number]
    return stage["shards"]


def test_without_records_the_outputs_alone_tell(config, answers):
    assert states(config, 1) == ["done", "not started", "not started", "not started"]
    assert states(config, 3) == ["not started"]


def test_queue_logs_and_outputs_are_put_together(config, answers):
    answers["squeue"] = list_queue(config, (70, 1, "RUNNING"), (70, 2, "PENDING"))
    write_log(config, 70, 1, f"{STAMP} 0002.tar: 5/10 img, 2.5 img/s, ETA 2 s")
    path = write_log(
        config,
        70,
        3,
        f"{STAMP} begin",
        "error: 0004.tar: truncated",
        "task: stage 1 shard 3 job 70 account group exit 1",
    )
    assert states(config, 1) == ["done", "running", "waiting", "failed"]
    stage = survey(config)[0]
    assert stage["failures"] == [
        {
            "shard": 3,
            "job": "70_3",
            "exit_code": 1,
            "error": "error: 0004.tar: truncated",
            "log": str(path),
            "account": "group",
        }
    ]
    text = status.format_status(survey(config))
    assert "error: 0004.tar: truncated" in text
    assert text.endswith(f"submit_stage.sh 1 --account=group --config '{config.file_path}' --array-size 4")


def test_an_output_of_other_inputs_has_failed_and_the_difference_is_named(config, answers, make_tar):
    make_tar(config.path("raw_dir"), 1, (5, 5))
    assert states(config, 1) == ["failed", "not started", "not started", "not started"]
    described = survey(config)[0]
    assert "input 0001.tar has changed" in described["failures"][0]["error"]
    text = status.format_status([described])
    assert ("input 0001.tar has changed" in text, "retry" in text) == (True, False)  # submit would refuse it


def test_the_last_job_of_a_shard_counts(config, answers):
    answers["squeue"] = ""
    write_log(config, 70, 3, "error: bad", "task: stage 1 shard 3 job 70 exit 1")
    assert states(config, 1)[3] == "failed"
    write_log(config, 100, 3, "error: worse", "task: stage 1 shard 3 job 100 exit 1")
    assert survey(config)[0]["failures"][0]["error"] == "error: worse"
    newest = write_log(config, 9, 3, "error: worst", "task: stage 1 shard 3 job 9 exit 1")  # job ids have begun anew
    os.utime(newest, (2**31, 2**31))
    assert survey(config)[0]["failures"][0]["error"] == "error: worst"
    answers["squeue"] = list_queue(config, (71, 3, "PENDING"))
    assert states(config, 1)[3] == "waiting"


def test_a_job_that_ended_without_a_word_has_failed(config, answers):
    """It was killed with its keeper, by the kernel or with its node."""
    write_log(config, 70, 2, f"{STAMP} begin")
    assert states(config, 1)[2] == "running"  # nobody to ask
    answers["squeue"] = ""
    assert states(config, 1)[2] == "failed"


def test_too_many_rejects_are_a_failure_although_the_output_is_there(config, answers, make_tar):
    answers["squeue"] = ""
    write_log(config, 70, 0, "error: too many", "task: stage 1 shard 0 job 70 exit 1")
    assert states(config, 1)[0] == "done"  # a run by hand has mended it since
    strict = load_config(config.file_path, ["data.max_reject_fraction=0"])
    raw = config.path("raw_dir") / "0001.tar"
    with open(raw, "rb") as file:
        content = file.read()
    config.path("intermediates_dir").joinpath("0001.parquet").unlink()
    raw.write_bytes(content)
    make_tar(config.path("raw_dir"), 1, (3,))
    add_lonely_image(raw)
    process_tar.main(["--config", str(config.file_path), "--set", "data.max_reject_fraction=1", "--tar-file", str(raw)])
    assert states(strict, 1)[0] == "failed"


def add_lonely_image(tar_path):
    import io
    import tarfile

    with tarfile.open(tar_path, "a") as tar:
        member = tarfile.TarInfo("0001/alone.jpg")
        tar.addfile(member, io.BytesIO(b""))


def test_a_log_is_read_from_its_end(tmp_path):
    path = tmp_path / "job.log"
    path.write_text(
        f"{STAMP} x: 1/10 img, 1.0 img/s, ETA 9 s\ntask: stage 2 shard 0 job 7 exit 143\n"
        f"task 7_0 goes back into the queue (try 2, 20 requeues at most)\n{STAMP} x: 5/10 img, 9.0 img/s, ETA unknown\n"
    )
    log = read_log(path)
    assert log["exit_code"] is None
    with open(path, "a", encoding="utf-8") as file:
        file.write("task: stage 2 shard 0 job 7 exit 143\nerror: task 7_0: begun 9 times already\n")
    log = read_log(path)
    assert (log["exit_code"], log["error"]) == (143, "error: task 7_0: begun 9 times already")
    assert read_log(tmp_path / "none.log") is None
    (tmp_path / "empty.log").write_text("")
    assert read_log(tmp_path / "empty.log")["error"] == ""


def test_json_has_every_stage_and_no_torch_is_imported(config, write_config):
    write_log(config, 70, 3, "error: bad", "task: stage 1 shard 3 job 70 exit 1")
    code = (
        "import sys; from slurm import status; status.main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'sklearn'} & set(sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "--config", str(config.file_path), "--json"],
        capture_output=True, text=True, check=False, cwd=REPO, env=os.environ | {"SLURM_CONF": "/nowhere", "PATH": "/"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    stages = json.loads(run.stdout)["stages"]
    assert [stage["stage"] for stage in stages] == [1, 2, 3, 4, 5, 6, 7, 9]
    assert {key: stages[0][key] for key in ("done", "running", "failed", "not_started", "total")} == {
        "done": 1, "running": 0, "failed": 1, "not_started": 2, "total": 4,
    }  # fmt: skip
    assert stages[0]["failures"][0]["error"] == "error: bad"


def test_the_logs_of_another_output_are_another_pipelines(config, tmp_path, answers):
    answers["squeue"] = ""
    write_log(config, 70, 3, "error: bad", "task: stage 1 shard 3 job 70 exit 1")
    elsewhere = load_config(config.file_path, [f"paths.intermediates_dir={tmp_path / 'other'}"])
    assert states(elsewhere, 1) == ["not started"] * 4


def test_two_submissions_at_a_time_are_refused(config, answers, run_main):
    answers["squeue"] = ""
    folder = config.log_dir / "slurm"
    with locked(folder, "submits", folder / ".lock"):
        outcome = run_main(submit.main, "stage", "1", "--config", config.file_path)
    assert outcome.code == 1
    assert "is submitting: wait for it" in outcome.stderr
