"""The README's commands, typed as they stand, in a copy of the tree."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".venv", ".git", "demo_output", "__pycache__", ".*_cache", "*.egg-info")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the project in which the demo has run."""
    copy = tmp_path_factory.mktemp("clone") / "project"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    return copy, run_demo(copy)


def run_demo(tree, *arguments):
    return run(tree, [sys.executable, "sample_data/run_demo.py", *arguments])


def run(tree, command):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    outcome = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    return outcome


def read_blocks(language):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.slow
def test_the_demo_ends_with_a_ledger_that_adds_up_the_metrics_and_the_page(tree):
    copy, outcome = tree
    page = copy / "demo_output" / "report" / "report.html"
    assert outcome.stdout.splitlines()[-1] == str(page)
    assert page.stat().st_size > 100_000
    ledger = outcome.stderr[outcome.stderr.rindex("\nstage  ") :].split("\n\n")[0].strip().splitlines()
    assert len(ledger) == 10
    for line in ledger[1:]:
        rows_in, rows_out, rejected, dropped = (int(word) for word in line.split()[1:5])
        assert rows_in == rows_out + rejected + dropped > 0
    metrics = json.loads((copy / "demo_output" / "report" / "metrics.json").read_text())
    assert metrics["projector"]["map"] > metrics["pca_whitened"]["map"] > metrics["raw"]["map"]


@pytest.mark.slow
def test_a_second_demo_redoes_nothing_and_says_so(tree):
    copy, first = tree
    pages = {path: path.stat().st_mtime_ns for path in (copy / "demo_output").rglob("*.parquet")}
    second = run_demo(copy)
    assert "every stage is complete and up to date: nothing was redone" in second.stderr
    assert second.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in (copy / "demo_output").rglob("*.parquet")} == pages


@pytest.mark.slow
def test_the_demo_takes_tars_of_ones_own(tree):
    copy, _ = tree
    own = copy.parent / "my tars"
    shutil.copytree(copy / "demo_output" / "raw", own)
    outcome = run_demo(copy, "--raw", str(own))
    page = Path(outcome.stdout.splitlines()[-1])
    assert page.is_file()
    assert page.parents[1].name.startswith("my tars-")


@pytest.mark.slow
def test_the_readmes_snippets_run(tree):
    copy, _ = tree
    (snippet,) = read_blocks("python")
    run(copy, [sys.executable, "-c", f"{snippet}\nassert embedding.shape == (1, 256), embedding.shape"])
    (command,) = (block for block in read_blocks("bash") if "generate_embeddings_from_parquet" in block)
    run(copy, ["bash", "-c", command])
    assert json.loads((copy / "demo_output" / "my_embeddings" / "state.json").read_text())["complete"] is True
