"""The pipeline on a real SLURM of one node, which tests/local-slurm.sh starts on this machine."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from config_files import write_config
from test_kills import SECTIONS as KILLS_SECTIONS
from test_kills import read_data

from pipeline.config import load_config
from sample_data.run_demo import package_split

REPO = Path(__file__).resolve().parents[1]
LOCAL_SLURM = REPO / "tests" / "local-slurm.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")
SECTIONS = KILLS_SECTIONS | {
    "new_data": {"input": "packaged.parquet", "output": "new embeddings"},
    "data": {"train_ratio": 0.5, "val_ratio": 0.25, "test_ratio": 0.25},
    "training": {"num_epochs": 3},
    "infrastructure": {"num_workers": 1},
}
OUTPUTS = (
    "intermediates", "embeddings", "merged", "fingerprints", "difficulty", "checkpoint", "published_model",
    "new embeddings",
)  # fmt: skip
INPUTS = ("raw", "backbone", "packaged.parquet", "config.toml")
# One thread: sums then have one order, so that the jobs' floats can be compared, and jobs beside each other fit here.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def find_missing_programs() -> list[str]:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(find_missing_programs()), reason="no SLURM here (tests/local-slurm.sh install, as root, installs Debian's)"
    ),
]


class Cluster:
    """A running cluster and its commands."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            **ENVIRONMENT,
            "SLURM_CONF": str(folder / "etc" / "slurm.conf"),
            "SLURM_LOCAL_DIR": str(folder),
            "SLURM_LOCAL_PORT": str(port),
            "PYTHON": sys.executable,
        }
        for name in ("SBATCH_ACCOUNT", "PIPELINE_ROOT", "MODEL_ID", "HF_HUB_OFFLINE"):
            self.environment.pop(name, None)

    def run(self, *command: object, code: int = 0, cwd: Path | None = None, **environment: str) -> str:
        """Run a command, check its exit code and return what it prints."""
        run = subprocess.run(
            [str(part) for part in command],
            capture_output=True, text=True, check=False, cwd=cwd, timeout=120, env=self.environment | environment,
        )  # fmt: skip
        assert run.returncode == code, run.stdout + run.stderr
        return run.stdout

    def local(self, command: str) -> None:
        self.run(LOCAL_SLURM, command)

    def queue(self) -> list[str]:
        return self.run("squeue", "-h", "-r", "-o", "%F_%K %T %a").splitlines()

    def wait_until_empty(self, seconds: float = 150) -> None:
        self.wait_for(lambda: not self.queue(), seconds, lambda: "\n".join(self.queue()))

    @staticmethod
    def wait_for(condition: Callable[[], bool], seconds: float, describe: Callable[[], str] = str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, describe()
            time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(worker_id: str) -> Iterator[Cluster]:
    # Its sockets' paths must be short, so not below pytest's folder.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    worker = int(worker_id.removeprefix("gw")) if worker_id.startswith("gw") else 0
    found = Cluster(folder, 16817 + 30 * worker)
    try:
        found.local("start")
        yield found
    finally:
        subprocess.run([LOCAL_SLURM, "stop"], env=found.environment, check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def local_run(make_once: Callable[..., Path]) -> Path:
    """A folder in which the whole pipeline ran without SLURM."""
    return make_once("slurm local run", make_local_run)


def make_local_run(folder: Path) -> None:
    write_config(folder, **SECTIONS)
    config = ["--config", str(folder / "config.toml")]
    for command in (
        ["sample_data/render_streets.py", "--output", f"{folder}/raw", "--buildings", "40", "--size", "128"],
        ["sample_data/convert_lite0.py", f"{folder}/backbone"],
        ["run_pipeline.py", *config, "--to-stage", "7"],
        ["run_pipeline.py", *config, "--from-stage", "8"],
    ):
        if "8" in command:
            package_split(load_config(folder / "config.toml"), "test", folder / "packaged.parquet")
        run = subprocess.run(
            [sys.executable, str(REPO / command[0]), *command[1:]],
            env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr


@pytest.fixture
def workspace(local_run: Path, tmp_path: Path) -> Path:
    """A folder outside the project, with spaces in its name, that holds the inputs and a configuration."""
    folder = tmp_path / "scratch of the group" / "my run"
    folder.mkdir(parents=True)
    for name in INPUTS:
        source = local_run / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    return folder


def check_equal(workspace: Path, local_run: Path, *names: str) -> None:
    for name in names or OUTPUTS:
        found, expected = read_data(workspace / name), read_data(local_run / name)
        if "state.json" in found:
            found["state.json"].pop("model_id"), expected["state.json"].pop("model_id")  # their paths
        assert found.keys() == expected.keys()
        assert [key for key in found if found[key] != expected[key]] == [], name


def read_status(cluster: Cluster, workspace: Path) -> dict[int, dict]:
    text = cluster.run(
        sys.executable, REPO / "slurm/status.py", "--config", workspace / "config.toml", "--json", cwd=workspace
    )
    return {stage["stage"]: stage for stage in json.loads(text)["stages"]}


def read_job_logs(workspace: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((workspace / "logs/slurm").glob("*.log")))


def test_the_whole_chain_gives_what_a_local_run_gives(cluster, workspace, local_run):
    submit = [REPO / "slurm/submit_pipeline.sh", "--config", "config.toml", "--array-size", "2"]
    # What a user has set for commands of their own hides no job, makes no array and waits for nothing.
    others = {"SQUEUE_PARTITION": "other", "SQUEUE_FORMAT": "%i", "SBATCH_ARRAY_INX": "0-1", "SBATCH_WAIT": "1"}
    others |= {"SBATCH_ERROR": "/dev/null", "SBATCH_ACCOUNT": "from-the-environment", "HF_TOKEN": "hf_secret"}
    table = cluster.run(*submit, cwd=workspace, **others)
    assert len(table.splitlines()) == 10
    queue = cluster.queue()
    assert all(line.endswith(" from-the-environment") for line in queue)
    assert "nothing to submit" in cluster.run(*submit, cwd=workspace, **others)
    assert "nothing to submit" in cluster.run(*submit[:3], cwd=workspace)  # the queue's array size holds
    assert {line.split()[0] for line in cluster.queue()} <= {line.split()[0] for line in queue}
    running = read_status(cluster, workspace)
    assert all(stage["failed"] == 0 for stage in running.values())
    assert running[9]["not_started"] == 1
    cluster.wait_until_empty()
    logs = read_job_logs(workspace)
    assert logs.count(" exit 0") == 12, logs
    check_equal(workspace, local_run)
    assert "nothing to submit" in cluster.run(*submit, cwd=workspace)
    done = read_status(cluster, workspace)
    assert {stage["done"] for number, stage in done.items() if number in (1, 2, 4)} == {2}
    assert sum(stage["not_started"] + stage["running"] + stage["failed"] for stage in done.values()) == 0
    everything = logs + cluster.run("scontrol", "show", "job", "-d")
    assert "hf_secret" not in everything


def test_a_damaged_tar_holds_up_its_own_shard_and_is_retried_alone(cluster, workspace, local_run):
    tar_path = workspace / "raw/0004.tar"
    whole = tar_path.read_bytes()
    tar_path.write_bytes(whole[: len(whole) // 2])
    config = workspace / "config.toml"
    submit = [REPO / "slurm/submit_pipeline.sh", "--account", "a", "--config", config, "--to-stage", "5"]
    cluster.run(*submit)
    cluster.wait_until_empty()
    status = read_status(cluster, workspace)
    assert (status[1]["done"], status[1]["failed"]) == (3, 1)
    # The other tars went on; what needs all of them was taken out of the queue.
    assert [(status[stage]["done"], status[stage]["not_started"]) for stage in (2, 4)] == [(3, 1), (3, 1)]
    assert [(status[stage]["done"], status[stage]["failed"], status[stage]["not_started"]) for stage in (3, 5)] == [
        (0, 0, 1),
        (0, 0, 1),
    ]
    (failure,) = status[1]["failures"]
    assert failure["shard"] == 3
    assert "0004.tar: truncated" in failure["error"]
    assert "0004.tar: truncated" in Path(failure["log"]).read_text()
    text = cluster.run(sys.executable, REPO / "slurm/status.py", "--config", config)
    assert status[1]["retry"] in text
    retry = shlex.split(status[1]["retry"])
    assert retry[-2:] == ["--array-size", "4"]

    tar_path.write_bytes(whole)
    table = cluster.run(*retry)
    assert table.splitlines()[1].split() == ["1", "process_tar", table.splitlines()[1].split()[2], "3", "of", "4", "-"]
    table = cluster.run(*submit)  # behind what is retried, whether that has ended or not
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["2", "3", "4", "5"]
    assert [line.split()[3:6] for line in table.splitlines()[1:] if line[0] in "24"] == [["3", "of", "4"]] * 2
    cluster.wait_until_empty()
    check_equal(workspace, local_run, "intermediates", "embeddings", "merged", "fingerprints", "difficulty")


def start_stage_2(cluster: Cluster, workspace: Path, local_run: Path) -> tuple[str, Path]:
    """Submit stage 2 as one task and return its job and its log once it is within a tar."""
    shutil.copytree(local_run / "intermediates", workspace / "intermediates")
    table = cluster.run(REPO / "slurm/submit_stage.sh", "2", "--config", workspace / "config.toml", "--array-size", "1")
    job = table.splitlines()[1].split()[2]
    logs = workspace / "logs/slurm"
    cluster.wait_for(lambda: "images a pass" in read_job_logs(workspace), 60)
    (log_path,) = logs.glob(f"generate_embeddings-*-1-{job}_0.log")
    return job, log_path


def test_a_task_that_is_warned_keeps_what_it_has_and_goes_on_behind_it(cluster, workspace, local_run):
    job, log_path = start_stage_2(cluster, workspace, local_run)
    cluster.wait_for((workspace / "embeddings/0001_embeddings.parquet").exists, 60)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_0")
    cluster.wait_until_empty()
    log = log_path.read_text()
    assert "terminated: what was finished is kept" in log
    assert f"task {job}_0 goes back into the queue (try 2" in log
    assert log.index("exit 143") < log.index("embeddings/0001_embeddings.parquet, which is complete")
    assert log.rstrip().endswith("exit 0")
    assert log.count("0001.tar: 39 embedded") == 1
    check_equal(workspace, local_run, "embeddings")


def test_a_killed_node_costs_no_more_than_the_tar_it_was_in(cluster, workspace, local_run):
    job, log_path = start_stage_2(cluster, workspace, local_run)
    cluster.wait_for((workspace / "embeddings/0001_embeddings.parquet").exists, 60)
    kill_node(cluster)
    time.sleep(8)  # a job younger than 7 s is not missed yet
    cluster.local("node")
    cluster.wait_until_empty()
    log = log_path.read_text()
    assert "embeddings/0001_embeddings.parquet, which is complete" in log
    assert log.rstrip().endswith("exit 0")
    assert "Restarts=1" in cluster.run("scontrol", "show", "job", job)
    check_equal(workspace, local_run, "embeddings")


def kill_node(cluster: Cluster) -> None:
    """SIGKILL slurmd, the job's keeper and the job, each by its number."""
    lines = cluster.run("scontrol", "listpids").splitlines()[1:]
    processes = [int(line.split()[0]) for line in lines if int(line.split()[0]) > 0]
    keepers = {read_parent(number) for number in processes} - set(processes)
    names = {Path(f"/proc/{number}/comm").read_text().strip() for number in keepers}
    assert names == {"slurmstepd"}
    for number in [int((cluster.folder / "run/slurmd.pid").read_text()), *keepers, *processes]:
        os.kill(number, signal.SIGKILL)


def read_parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def test_new_data_are_embedded_by_an_array_without_a_configuration(cluster, workspace, local_run):
    shutil.copytree(local_run / "published_model", workspace / "the model")
    submit = [REPO / "publish_model/slurm/submit_embeddings_from_parquet.sh", "--account", "a", "--input"]
    submit += ["packaged.parquet", "--output", "new embeddings", "--model-id", "the model", "--batch-size", "8"]
    submit += ["--array-size", "2", "--time=10"]  # what is not known goes to sbatch
    assert "0 of 1" in cluster.run(*submit, cwd=workspace)  # one row group, so one shard
    assert cluster.run("squeue", "-h", "-o", "%l").split() == ["10:00"]
    assert "nothing to submit" in cluster.run(*submit, cwd=workspace)
    cluster.wait_until_empty()
    assert "nothing to submit" in cluster.run(*submit, cwd=workspace)
    found, expected = (read_data(folder / "new embeddings/parts") for folder in (workspace, local_run))
    assert found["rg00000_rb00000.parquet"]["OSMID"] == expected["rg00000_rb00000.parquet"]["OSMID"]
    assert json.loads((workspace / "new embeddings/state.json").read_text())["complete"]


def test_a_job_without_the_weights_says_which_command_fetches_them(cluster, workspace, tmp_path):
    submit = [REPO / "slurm/submit_stage.sh", "2", "--config", workspace / "config.toml", "--array-size", "1"]
    missing = ["--set", "embedding_model.model_name=somebody/some-model"]
    home = {"HF_HOME": str(tmp_path / "empty")}
    assert cluster.run(*submit, *missing, code=1, **home) == ""  # refused before the night
    (workspace / "logs/slurm").mkdir(parents=True, exist_ok=True)
    cluster.run(
        "sbatch", "--array=0-0", f"--output={workspace}/logs/slurm/by-hand.log", "slurm/generate_embeddings.sbatch",
        "--config", workspace / "config.toml", *missing, cwd=REPO, **home,
    )  # fmt: skip
    cluster.wait_until_empty()
    assert "slurm/prepare.sh --model-id somebody/some-model" in read_job_logs(workspace)


def test_two_workers_tune_on_one_study(cluster, workspace, local_run):
    pytest.importorskip("optuna")
    for name in ("merged", "difficulty"):
        shutil.copytree(local_run / name, workspace / name)
    submit = [REPO / "slurm/submit_stage.sh", "tune", "--config", workspace / "config.toml", "--array-size", "2"]
    table = cluster.run(*submit, "--", "--trials", "4")
    assert table.splitlines()[1].split()[1] == "tune"
    assert "nothing to submit" in cluster.run(*submit)
    cluster.wait_until_empty()
    logs = read_job_logs(workspace)
    assert logs.count(" exit 0") == 2, logs
    study = workspace / "checkpoint/_tune"
    assert len((study / "trials.csv").read_text().splitlines()) - 1 in (4, 5)  # two workers may do one more
    assert (study / "best.toml").exists()
    assert not list((workspace / "checkpoint").glob("*.pt"))
