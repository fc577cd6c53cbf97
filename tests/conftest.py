"""What the tests share: tars, configurations, a toy backbone, and scripts run as a user runs them."""

import fcntl
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from config_files import write_config
from raw_tars import make_city, write_tar

from pipeline import cli

# `pytest --numprocesses` gives each core a process; threads of torch beside them would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = [
    "stage6_fixtures",
    "stage7_fixtures",
    "stage8_fixtures",
    "takedown_fixtures",
    "package_fixtures",
    "slurm_fixtures",
]

REPO = Path(__file__).resolve().parents[1]


def pytest_collection_finish() -> None:
    """Spare the garbage collector what the test files have imported: a full round over it takes a third of a second."""
    gc.freeze()


class Outcome(NamedTuple):
    """How a run ended."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of development data beside the project; skips where it is not there."""
    folder = REPO.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("no development data (../shared) beside the project")
    return folder


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[..., Path]:
    """Have a folder filled once a run: the first test process that asks for the name fills it, the others wait."""
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        folder, made = base / name, base / f"{name}.made"
        with open(base / f"{name}.lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                folder.mkdir(exist_ok=True)
                fill(folder)
                made.touch()
        return folder

    return make


@pytest.fixture
def make_tar() -> Callable[..., Path]:
    """Write `folder/NNNN.tar` with one building for each number, which says how many images it has."""

    def make(folder: Path, dataset_id: int = 1, images_of_buildings: Sequence[int] = (3, 2, 1)) -> Path:
        return write_tar(folder / f"{dataset_id:04d}.tar", make_city(dataset_id, images_of_buildings))

    return make


@pytest.fixture(name="write_config")
def write_config_fixture() -> Callable[..., Path]:
    """Write `folder/config.toml` with every path below that folder; `section={key: value}` adds to it or replaces."""
    return write_config


@pytest.fixture(scope="session")
def toy_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 of toy size with seeded random weights, and its image processor."""
    import torch
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("models") / "toy-dinov2"
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """Undo what the run guard leaves behind: the processes of later tests would inherit ignored signals."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run_main(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a script's main in this process, under its run guard."""

    def run(main: Callable[..., None], *arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.run_guarded(main, [str(argument) for argument in arguments])
        return Outcome(int(stop.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def start_script() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a script of the project by its path; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str, *arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(REPO / script), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env=os.environ | environment,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def run_script(start_script: Callable[..., subprocess.Popen[str]]) -> Callable[..., Outcome]:
    """Run a script of the project by its path, as a user does, and wait for it."""

    def run(script: str, *arguments: object, cwd: Path | None = None, **environment: str) -> Outcome:
        process = start_script(script, *arguments, cwd=cwd, **environment)
        stdout, stderr = process.communicate(timeout=120)
        return Outcome(process.returncode, stdout, stderr)

    return run
