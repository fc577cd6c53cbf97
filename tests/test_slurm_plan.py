"""Which jobs are submitted, with which dependencies and which sbatch lines; no SLURM is needed."""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from slurm_fixtures import dry_run

from generate_embeddings import generate_embeddings
from pipeline.config import load_config
from pipeline.errors import ConfigError, PipelineError, StaleOutputError
from pipeline.files.units import UnitState
from pipeline.stages import STAGES, TUNE, WHOLE, WORKER, choose_stages
from preprocess_raw_data import process_tar
from slurm.control import scheduler, submission, submit
from slurm.control.scheduler import QueuedTask, format_shards
from slurm.control.submission import Plan, check_secrets, count_shards, find_active, format_dependency, name_job_file
from slurm.control.target import Target
from slurm.status import survey

REPO = Path(__file__).resolve().parents[1]
SHELL_FILES = sorted(
    [
        path
        for folder in ("slurm", "publish_model/slurm", "preprocess_raw_data", "tests", ".ci")
        for path in (REPO / folder).glob("*.s[hb]*")
    ]
    + [REPO / ".ci/run"]
)
SBATCH_FILES = [REPO / name_job_file(stage) for stage in (*STAGES.values(), TUNE)]


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch):
    """Whatever this machine has, these tests see no SLURM and no settings of a user's."""
    monkeypatch.setattr(scheduler, "ask", lambda _command: None)
    for name in [name for name in os.environ if name.startswith(("SBATCH_", "SLURM_", "HF_TOKEN"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def config(tmp_path, write_config, make_tar):
    """A configuration with three tars."""
    path = write_config(tmp_path, embedding_model={"model_name": "backbone"})
    for number in (1, 2, 3):
        make_tar(tmp_path / "raw", number)
    return load_config(path)


def plan(config, first=1, last=9, active=None, **cut):
    stages = choose_stages(config, first, last) or [TUNE]
    return Plan(Target(config.log_dir, config), stages, active or {}, **cut)


def summarize(found):
    """Return stage, shards and dependency of every job, jobs by their place in the plan."""
    ids = {job: f"j{number}" for number, job in enumerate(found.jobs)}
    return [(job.stage.number, format_shards(job.shards), format_dependency(job, ids)) for job in found.jobs]


# ------------------------------------------------------------------------------------------------ the chain


def test_every_stage_waits_for_what_it_reads_and_for_nothing_else(config):
    assert summarize(plan(config)) == [
        (1, "0-2", ""),
        (2, "0-2", "aftercorr:j0"),
        (3, "0", "afterok:j1"),
        (4, "0-2", "aftercorr:j0"),
        (5, "0", "afterok:j3"),
        (6, "0", "afterok:j2:j4"),
        (7, "0", "afterok:j5"),
        (9, "0", "afterok:j2:j5"),
    ]


def test_tuning_is_an_array_of_workers_behind_what_training_reads(config):
    assert summarize(plan(config, 0, 0, array_size=4)) == [(0, "0-3", "")]
    under_way = {3: [QueuedTask("7", 0, 1)], 5: [QueuedTask("8_0", 0, 1)]}
    assert summarize(plan(config, 0, 0, under_way)) == [(0, "0", "afterok:7:8_0")]
    workers = {0: [QueuedTask("9_1", 1, 3)]}
    assert summarize(plan(config, 0, 0, workers, array_size=3)) == [(0, "0,2", "")]
    anchors = {5: [QueuedTask("9_1", 1, 3)]}
    assert summarize(plan(config, 5, 5, anchors, array_size=3)) == [(5, "0,2", "")]


def test_stage_8_is_there_where_new_data_are_set(tmp_path, write_config):
    config = load_config(write_config(tmp_path, new_data={"input": "new.parquet", "output": "new"}))
    assert (8, "0", "afterok:j6") in summarize(plan(config, array_size=1))


def test_part_of_the_chain_waits_for_what_of_the_rest_is_in_the_queue(config):
    active = {2: [QueuedTask("70_1", 1, 3)], 5: [QueuedTask("71_0", 0, 1)]}
    assert summarize(plan(config, 6, 7, active)) == [(6, "0", "afterok:71_0"), (7, "0", "afterok:j0")]


# ------------------------------------------------------------------------------------------------ what is done


def test_only_the_shards_that_are_not_done_are_submitted(config):
    done = [f"--tar-file={config.path('raw_dir')}/{number:04d}.tar" for number in (1, 3)]
    process_tar.main(["--config", str(config.file_path), *done])
    found = summarize(plan(config, 1, 4))
    # The shards whose tars are validated wait for nothing.
    assert found == [
        (1, "1", ""),
        (2, "0,2", ""),
        (2, "1", "aftercorr:j0"),
        (3, "0", "afterok:j1:j2"),
        (4, "0,2", ""),
        (4, "1", "aftercorr:j0"),
    ]


def test_a_complete_stage_is_not_submitted(config, capsys):
    process_tar.main(["--config", str(config.file_path)])
    found = plan(config, 1, 1)
    assert found.jobs == []
    assert capsys.readouterr().err.endswith("stage 1 process_tar: of 3: 3 done, 0 in the queue, 0 to submit\n")


def test_an_output_of_another_input_is_refused_with_the_difference_named(config, make_tar):
    process_tar.main(["--config", str(config.file_path)])
    make_tar(config.path("raw_dir"), 2, (5, 5, 5, 5, 5))
    with pytest.raises(StaleOutputError, match=r"0002.parquet: .*input 0002.tar has changed"):
        plan(config, 1, 1)


def test_an_output_of_the_reference_program_is_done_for_the_stage_submit_and_status_alike(config, run_main):
    options = ["--config", str(config.file_path)]
    process_tar.main(options)
    for number in (1, 2):
        table = pq.read_table(config.path("intermediates_dir") / f"{number:04d}.parquet").replace_schema_metadata(None)
        column = pa.array([[0.5, 1.0]] * len(table), pa.list_(pa.float64()))
        path = config.path("embeddings_dir") / f"{number:04d}_embeddings.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(table.append_column("embedding", column), path)
        raw = config.path("raw_dir") / f"{number:04d}.tar"
        assert "1 kept" in run_main(generate_embeddings.main, *options, "--tar-file", str(raw)).stderr
    assert summarize(plan(config, 2, 2)) == [(2, "2", "")]
    (stage,) = [state for state in survey(config) if state["stage"] == 2]
    assert stage["shards"] == ["done", "done", "not started"]


def test_a_shard_with_too_many_rejects_is_not_done_although_its_outputs_are_there(config):
    is_done = Target(config.log_dir, config).is_shard_done
    states = [UnitState(True, {"in": 10, "rejected": rejected}) for rejected in (1, 5, 0)] + [UnitState()]
    assert [is_done([state]) for state in states] == [True, False, True, False]
    assert [is_done(states[shard::2]) for shard in (0, 1)] == [True, False]
    assert is_done(states[:3])  # 6 of 30


# ------------------------------------------------------------------------------------------------ the queue


def test_what_is_in_the_queue_is_not_submitted_again_and_the_rest_waits_for_it(config):
    active = {1: [QueuedTask(f"70_{shard}", shard, 3) for shard in (0, 1)], 2: [QueuedTask("71_0", 0, 3)]}
    assert summarize(plan(config, 1, 3, active)) == [
        (1, "2", ""),
        (2, "1", "aftercorr:70"),
        (2, "2", "aftercorr:j0"),
        (3, "0", "afterok:71_0:j1:j2"),
    ]


def test_the_queue_settles_into_how_many_shards_the_per_tar_stages_are_cut(config):
    active = {2: [QueuedTask("71_0", 0, 2)]}
    assert [job.shard_count for job in plan(config, 1, 4, active).jobs] == [2, 2, 1, 2]
    with pytest.raises(ConfigError, match="cut it into 2 shards, not 3"):
        plan(config, 1, 4, active, array_size=3)


# ------------------------------------------------------------------------------------------------ the cut


def test_arrays_are_cut_at_the_number_of_tars():
    assert count_shards(STAGES[1], 5000, 64, []) == 64
    assert count_shards(STAGES[1], 10, 64, []) == 10
    assert count_shards(STAGES[2], None, 64, []) == 64
    assert count_shards(STAGES[2], None, None, []) == 1
    assert [count_shards(STAGES[2], tars, None, []) for tars in (4, 5000)] == [4, 64]
    assert count_shards(STAGES[5], 1, None, []) == 1
    assert count_shards(STAGES[5], 1, 4, []) == 4
    assert count_shards(STAGES[8], 500, None, []) == 1
    assert count_shards(STAGES[6], 1, 64, []) == 1


def test_the_array_size_of_a_chain_cuts_no_search_for_neighbours(config):
    assert [job.shard_count for job in plan(config, array_size=3).jobs if job.stage.number == 5] == [1]
    assert [job.shard_count for job in plan(config, 5, 5, array_size=3).jobs] == [3]


@pytest.mark.parametrize(("shards", "text"), [([0], "0"), ([0, 1, 2], "0-2"), ([3, 1, 7, 2], "1-3,7"), ([5, 9], "5,9")])
def test_shards_are_written_as_sbatch_reads_them(shards, text):
    assert format_shards(shards) == text


def test_the_queue_is_read_task_by_task_and_the_targets_jobs_are_told_by_their_name(config, tmp_path, monkeypatch):
    target = Target(config.log_dir, config)
    other = load_config(config.file_path, [f"paths.intermediates_dir={tmp_path / 'other'}"])
    mine, others = target.name_jobs(STAGES[1]), Target(config.log_dir, other).name_jobs(STAGES[1])
    lines = [
        "CLUSTER: a",
        f"70|3|RUNNING|{mine}-5",
        f"70|4|PENDING|{mine}-5",
        f"71|N/A|PENDING|{others}-1",
        "72|N/A|RUNNING|jupyter",
    ]
    monkeypatch.setattr(scheduler, "ask", lambda _command: "\n".join(lines))
    assert find_active(target)[1] == [QueuedTask("70_3", 3, 5, mine, False), QueuedTask("70_4", 4, 5, mine, True)]
    assert find_active(Target(config.log_dir, other))[1] == [QueuedTask("71", 0, 1, others, True)]


def test_a_queued_job_of_other_overrides_is_no_job_of_this_command(config, monkeypatch):
    target, other = (Target(config.log_dir, config, (f"global.seed={seed}",)) for seed in (1, 2))
    name = f"{other.name_jobs(STAGES[3])}-{other.settings}-1"
    monkeypatch.setattr(scheduler, "ask", lambda _command: f"83|N/A|PENDING|{name}")
    arguments = argparse.Namespace(array_size=None)
    assert submission.plan_now(submission.Request(other, [STAGES[3]], arguments, [], [])).jobs == []
    with pytest.raises(
        ConfigError, match=r"job 83 in the queue makes merge_and_split's output with other --set options"
    ):
        submission.plan_now(submission.Request(target, [STAGES[3]], arguments, [], []))


# ------------------------------------------------------------------------------------------------ the command line


def test_a_dry_run_needs_no_slurm_no_tars_and_no_torch(slurmless, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('not to be imported')")
    commands = dry_run("--account", "a", PATH=slurmless, PYTHONPATH=str(tmp_path))
    assert [Path(found).stem for command in commands for found in command if found.endswith(".sbatch")] == [
        stage.name for stage in STAGES.values() if stage.number != 8
    ]
    assert all(command[:3] == ["sbatch", "--parsable", "--account=a"] for command in commands)
    arrays = [word for command in commands for word in command if word.startswith("--array")]
    assert arrays == ["--array=0-0"] * 4
    assert all("--kill-on-invalid-dep=yes" in command for command in commands if "--dependency" in " ".join(command))
    assert sum("--dependency" in " ".join(command) for command in commands) == 7


def test_sizes_and_unknown_options_reach_every_sbatch_line(dry_run_here):
    commands = dry_run_here(
        submit.main, "pipeline", "--array-size", 64, "--max-concurrent", 8, "--from-stage", 2, "--to-stage", 4,
        "--qos=high", "--partition", "gpu", SBATCH_OPTIONS="--mail-type=FAIL", SBATCH_OPTIONS_2="--time=9:00:00",
    )  # fmt: skip
    assert [word for command in commands for word in command if word.startswith("--array")] == ["--array=0-63%8"] * 2
    for command in commands:
        script = next(number for number, word in enumerate(command) if word.endswith(".sbatch"))
        assert {"--qos=high", "--partition", "gpu", "--mail-type=FAIL"} < set(command[:script])
    assert ["--time=9:00:00" in command for command in commands] == [True, False, False]


def test_options_behind_two_dashes_go_to_the_stage(slurmless):  # by way of the script, which passes them on
    (command,) = dry_run("7", "--time=5", "--", "--force", script="slurm/submit_stage.sh", PATH=slurmless)
    script = next(number for number, word in enumerate(command) if word.endswith("convert_to_hf.sbatch"))
    assert command.index("--time=5") < script < command.index("--force")


def test_the_folder_that_a_chain_is_submitted_from_brings_no_code(slurmless, tmp_path):
    for name in ("pyarrow", "pydantic", "numpy"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')\nraise ImportError")
    assert dry_run("3", script="slurm/submit_stage.sh", PATH=slurmless, cwd=tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("as_one_word", [True, False])
def test_another_environment_runs_the_submission_and_the_jobs(slurmless, tmp_path, as_one_word):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/usr/bin/env bash\necho "$PYTHON" >"{tmp_path}/seen"\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    option = ["--venv-path=venv"] if as_one_word else ["--venv-path", "venv"]
    (command,) = dry_run("3", *option, script="slurm/submit_stage.sh", PATH=slurmless, cwd=tmp_path)
    assert not any("venv-path" in word for word in command)
    assert (tmp_path / "seen").read_text() == f"{python}\n"  # exported, so that the jobs find it too


def test_tuning_is_submitted_by_its_name(dry_run_here):
    (command,) = dry_run_here(submit.main, "stage", "tune", "--array-size", "4", SBATCH_OPTIONS_tune="--time=9")
    script = next(number for number, word in enumerate(command) if word.endswith("tune.sbatch"))
    assert {"--array=0-3", "--time=9"} < set(command[:script])
    assert "--shards" not in command[script:]  # the workers are not told apart


def test_log_folders_with_percent_signs_and_spaces_are_no_patterns(tmp_path, write_config, dry_run_here):
    (command,) = dry_run_here(submit.main, "stage", "3", "--config", write_config(tmp_path / "100% mine"))
    assert f"--output={tmp_path}/100%% mine/logs/slurm/%x-%j.log" in command
    assert any(word.startswith("--job-name=merge_and_split-") and word.endswith("-1") for word in command)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--overwrite"], "remove the outputs of the stage instead"),
        (["--from-stage", "5", "--to-stage", "3"], "--from-stage 5 lies behind --to-stage 3"),
        (["--array-size", "0"], "'0' must be a whole number above 0"),
        (["--", "--force"], "give them to submit_stage.sh"),
        (["--dry-run", "--export=ALL,HF_TOKEN=hf_x"], "a token or password on an sbatch line would be kept"),
    ],
)
def test_a_wrong_command_line_is_refused_with_one_line(run_main, arguments, complaint):
    outcome = run_main(submit.main, "pipeline", *arguments)
    assert outcome.code == 2
    assert complaint in outcome.stderr.splitlines()[-1]
    assert outcome.stdout == ""


def test_without_slurm_nothing_is_submitted(run_main, config):
    outcome = run_main(submit.main, "pipeline", "--config", config.file_path)
    assert outcome.code == 1
    assert outcome.stderr.splitlines()[-1].startswith("error: squeue does not answer here")


def test_a_token_never_reaches_a_command_or_a_jobs_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "HF_TOKEN" not in scheduler.clean_environment()
    with pytest.raises(ConfigError, match="token"):
        check_secrets(["--comment=hf_secret"])


@pytest.mark.parametrize(
    "words",
    [
        ["--", "--storage", "postgresql://me:s3cret@host/db"],
        ["--", "--storage=mysql+pymysql://me:s3cret@host/db"],
        ["--", "--storage", "postgresql://host/db?user=me&password=s3cret"],
        ["--", "--storage", "redis://:s3cret@host/0"],
        ["--export=ALL,WANDB_API_KEY=s3cret"],
        ["--export", "NONE,PGPASSWORD=s3cret"],
    ],
)
def test_a_password_never_reaches_an_sbatch_line(run_main, config, words):
    outcome = run_main(submit.main, "stage", "tune", "--config", config.file_path, "--dry-run", *words)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert "a token or password on an sbatch line would be kept" in outcome.stderr
    assert "s3cret" not in outcome.stderr


def test_what_names_no_password_goes_to_sbatch_and_the_stage(run_main, config):
    words = ["--export=ALL,DATA=/scratch/a", "--", "--storage", "postgresql://me@host/db", "--set", "a.key=b"]
    outcome = run_main(submit.main, "stage", "tune", "--config", config.file_path, "--dry-run", *words)
    assert (outcome.code, "postgresql://me@host/db" in outcome.stdout) == (0, True)


def test_the_users_settings_of_slurm_neither_hide_jobs_nor_break_the_chain(monkeypatch):
    names = {"SQUEUE_PARTITION", "SQUEUE_FORMAT", "SCONTROL_ALL", "SBATCH_ARRAY_INX", "SBATCH_WAIT", "SBATCH_ERROR",
             "SBATCH_OUTPUT", "SBATCH_OPEN_MODE", "SBATCH_SIGNAL", "SBATCH_CLUSTERS", "SBATCH_DEPENDENCY"}  # fmt: skip
    kept = {"SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_QOS", "SBATCH_WAIT4SWITCH", "SLURM_CONF"}
    for name in names | kept:
        monkeypatch.setenv(name, "x")
    assert not names & scheduler.clean_environment().keys()
    assert kept <= scheduler.clean_environment().keys()


@pytest.mark.parametrize("answer", ["", "wrapped\n"])
def test_an_answer_without_a_job_id_is_an_error(answer):
    with pytest.raises(PipelineError, match="in place of a job id"):
        scheduler.read_job_id(answer)
    assert scheduler.read_job_id("sbatch: a note\n70;cluster\n") == "70"


# ------------------------------------------------------------------------------------------------ the files


@pytest.mark.parametrize("path", SBATCH_FILES, ids=lambda path: path.stem)
def test_a_job_file_asks_for_what_it_must_and_holds_no_logic(path):
    text = path.read_text(encoding="utf-8")
    options = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in text.splitlines()
        if "#SBATCH --" in line and "=" in line
    )
    stage = next(stage for stage in (*STAGES.values(), TUNE) if name_job_file(stage).endswith(path.name))
    assert {"mem", "time", "signal", "open-mode", "cpus-per-task"} <= options.keys()
    assert (options["signal"], options["open-mode"]) == ("B:USR1@120", "append")
    assert "#SBATCH --requeue\n" in text
    assert ("gpus-per-node" in options) == stage.uses_gpu
    assert not {"account", "partition"} & options.keys()
    assert options["job-name"] == stage.name
    how = "run_task" if stage.unit in (WHOLE, WORKER) else "run_shard"
    assert text.rstrip().endswith(f'\n{how} {stage.label} {stage.module.replace(".", "/")}.py "$@"')
    assert len(text.splitlines()) <= 25


@pytest.mark.slow
def test_every_shell_file_passes_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    assert len(SHELL_FILES) >= 15
    run = subprocess.run(["shellcheck", "-x", *SHELL_FILES], cwd=REPO, capture_output=True, text=True, check=False)
    assert run.stdout == ""
