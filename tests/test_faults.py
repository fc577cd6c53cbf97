"""A seeded subset of the campaign of faults; `make faults` runs the whole."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_campaign(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "tests" / "faults" / "run.py", *arguments],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


def test_what_is_disturbed_is_refused_or_comes_out_as_undisturbed():
    words = ["SIGKILL", "two writers", "disk full at", "takedown killed", "another program", "stages 1 to 4"]
    done = run_campaign("--tries", "2", "--seed", "7", *(option for word in words for option in ("--only", word)))
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines()[2:] if line]
    assert [any(word in row[1] for row in rows) for word in words] == [True] * len(words)
    for _, name, tries, recovered, refused, failed, _ in rows[:-1]:
        assert int(tries) == int(recovered) + int(refused) > 0, name
        assert failed == "0"


@pytest.mark.slow
def test_a_loss_is_noticed(tmp_path):
    """The campaign itself can fail: here the rerun is kept from making what is missing."""
    script = tmp_path / "blind.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests' / 'faults')!r})\n"
        "import run\n"
        "from pipeline.embeddings_dataset import appending as stage\n"
        "plain = stage.Appending.find_work\n"
        "def begin_blindly(appending, *arguments, **options):\n"
        "    plain(appending, *arguments, **options)\n"
        "    appending.work = [] if appending.parts else appending.work\n"
        "stage.Appending.find_work = begin_blindly\n"
        "sys.argv = ['run.py', '--tries', '1', '--only', 'input that changes']\n"
        "sys.exit(run.main())\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "not as undisturbed" in done.stderr


@pytest.mark.slow
def test_the_whole_campaign_passes():
    done = run_campaign("--tries", "20", "--seed", "1")
    assert done.returncode == 0, done.stderr
