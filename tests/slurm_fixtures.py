"""Submit scripts run where there is no SLURM."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


def dry_run(*arguments, script="slurm/submit_pipeline.sh", cwd="/", **environment):
    """Run a submit script where there is no SLURM, and return its sbatch commands."""
    clean = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, **environment}
    run = subprocess.run(
        [REPO / script, "--dry-run", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=clean,
    )
    assert run.returncode == 0, run.stderr
    return [shlex.split(line) for line in run.stdout.splitlines()]


@pytest.fixture
def slurmless(tmp_path):
    """A PATH without SLURM's commands, wherever they are installed."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "env", "readlink", "dirname", "cat", "make"):
        (folder / name).symlink_to(shutil.which(name))
    return str(folder)


@pytest.fixture
def dry_run_here(run_main, monkeypatch, slurmless):
    """Return the sbatch commands of a submission as `dry_run` does, in this process."""

    def run(main, *arguments, **environment):
        for name, value in {"PATH": slurmless, **environment}.items():
            monkeypatch.setenv(name, value)
        outcome = run_main(main, *arguments, "--dry-run")
        assert outcome.code == 0, outcome.stderr
        return [shlex.split(line) for line in outcome.stdout.splitlines()]

    return run
