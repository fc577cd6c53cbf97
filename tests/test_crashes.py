"""A picture whose decoder ends the process is rejected by the next run, by name."""

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from raw_tars import Entry, make_city, write_tar

from pipeline.files.tables import rejects_path
from preprocess_raw_data import process_tar

REPO = Path(__file__).resolve().parents[1]
# A decoder that meets a fatal error in C, or the kernel's killer, at one picture.
DRIVER = """
import ctypes, importlib, os, signal, sys
from pipeline.inference import images
read_header = images.read_header
def crash(data):
    if data.endswith(b"CRASH"):
        ctypes.string_at(0) if sys.argv[2] == "crash" else os.kill(os.getpid(), signal.SIGKILL)
    return read_header(data)
if sys.argv[2] != "sound":
    images.read_header = crash
importlib.import_module(sys.argv[1]).main(["--config", sys.argv[3]])
"""


def run_stage(module: str, how: str, config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", DRIVER, module, how, str(config)], capture_output=True, text=True, check=False, cwd=REPO
    )


@pytest.fixture
def config(tmp_path, write_config) -> Path:
    """A configuration with a tar whose sixth member is the bad picture."""
    entries = make_city(1, (3, 2, 2))
    bad = sorted(entry.name for entry in entries if entry.name.endswith(".jpg"))[2]
    write_tar(
        tmp_path / "raw/0001.tar",
        [Entry(entry.name, entry.data + b"CRASH" if entry.name == bad else entry.data) for entry in entries],
    )
    (tmp_path / "bad").write_text(bad)
    return write_config(tmp_path, data={"max_reject_fraction": 0.5})


@pytest.mark.parametrize("number", [1, 4])
def test_a_picture_that_crashed_its_decoder_is_rejected_by_name_in_the_next_runs(number, config, tmp_path, run_main):
    module = f"preprocess_raw_data.{'process_tar' if number == 1 else 'compute_fingerprints'}"
    if number == 4:
        assert run_main(process_tar.main, "--config", config).code == 0
    crashed = run_stage(module, "crash", config)
    assert crashed.returncode == -11, crashed.stderr
    again = run_stage(module, "crash", config)
    assert again.returncode == 0, again.stderr
    assert "an earlier run crashed on a picture of" in again.stderr
    assert "7 in = 6 out + 1 rejected" in again.stderr
    output = tmp_path / ("intermediates/0001.parquet" if number == 1 else "fingerprints/0001_fingerprints.parquet")
    name = (tmp_path / "bad").read_text()
    assert pq.read_table(rejects_path(output)).to_pylist() == [
        {"member": name.removesuffix(".jpg") if number == 1 else name, "reason": "unreadable_image",
         "detail": "its decoder crashed an earlier run"}
    ]  # fmt: skip
    output.unlink()
    assert "7 in = 6 out + 1 rejected" in run_stage(module, "crash", config).stderr  # and in the one behind it
    (known,) = (tmp_path / "logs").glob(".*.decoding")
    known.write_bytes(b"cut")
    output.unlink()
    assert "7 in = 7 out + 0 rejected" in run_stage(module, "sound", config).stderr
    assert not list((tmp_path / "logs").glob(".*"))


def test_a_killed_process_leaves_no_picture_under_suspicion(config):
    assert run_stage("preprocess_raw_data.process_tar", "kill", config).returncode == -9
    sound = run_stage("preprocess_raw_data.process_tar", "sound", config)
    assert sound.returncode == 0, sound.stderr
    assert "7 in = 7 out + 0 rejected" in sound.stderr
