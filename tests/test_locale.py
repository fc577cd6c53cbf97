"""File names are bytes: a Latin-1 locale changes neither ids nor paths, and ends nothing in a traceback."""

import os
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from conftest import REPO
from published_models import make_photographs
from raw_tars import make_view, write_tar


@pytest.fixture(scope="session")
def latin1(tmp_path_factory):
    """The environment of a Latin-1 locale; skips where none can be made."""
    folder = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef") is None:
        pytest.skip("no localedef here")
    command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", folder / "en_US.ISO-8859-1"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("localedef has no sources of locales here")
    environment = {"LOCPATH": str(folder), "LC_ALL": "en_US.ISO-8859-1"}
    code = "import sys; print(sys.getfilesystemencoding())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert found.stdout == "iso8859-1\n"
    return environment


def run(latin1, *command):
    """Run a command and return its exit code, stdout and stderr, which have to be UTF-8."""
    done = subprocess.run(command, capture_output=True, env=os.environ | latin1, check=False, cwd=REPO)
    return done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")


def test_stage_1_writes_the_same_paths_and_ids_under_a_latin_1_locale(tmp_path, write_config, latin1):
    folder = tmp_path / "Straße Ž"
    config = write_config(folder)
    write_tar(folder / "raw" / "0001.tar", [*make_view("grün Ж", 1, 1), *make_view("f\udce9e", 1, 2)])
    code, stdout, stderr = run(latin1, sys.executable, "preprocess_raw_data/process_tar.py", "--config", config)
    assert (code, stdout) == (0, f"{folder}/intermediates/0001.parquet\n")
    table = pq.read_table(folder / "intermediates" / "0001.parquet")
    assert table["image_path"].to_pylist() == ["grün Ж.jpg", "f\\xe9e.jpg"]
    for text in (stderr, (folder / "logs" / "process_tar.log").read_text(encoding="utf-8")):
        assert f"config {config}" in text


@pytest.mark.parametrize("environment", [{}, {"LC_ALL": "C.UTF-8"}])
def test_a_folder_whose_name_is_not_utf_8_is_refused_with_one_line(tmp_path, write_config, latin1, environment):
    folder = tmp_path / "caf\udce9"
    config = write_config(folder)
    write_tar(folder / "raw" / "0001.tar", make_view("a", 1, 1))
    code, _, stderr = run(
        latin1 | environment, sys.executable, "preprocess_raw_data/process_tar.py", "--config", config
    )
    assert code == 1
    assert stderr.splitlines()[-1].startswith(f"error: {tmp_path}/caf\\xe9/")
    assert stderr.splitlines()[-1].endswith(
        ": not UTF-8, so it cannot be read or written: rename that, then run this again"
    )
    assert "Traceback" not in stderr


def test_the_ids_of_photographs_are_their_names_as_utf_8(tmp_path, latin1):
    for name in ("Straße.jpg", "Ж.jpg", "caf\udce9.jpg"):
        (tmp_path / name).write_bytes(b"x")
    code = (
        "import sys; from pathlib import Path; from pipeline.ids import decode_name\n"
        "from pipeline.embeddings_dataset.packaged_input import list_data\n"
        "print(ascii([decode_name(name) for name in list_data(Path(sys.argv[1]))[1]]))"
    )
    code, stdout, _ = run(latin1, sys.executable, "-c", code, tmp_path)
    assert (code, stdout) == (0, ascii(["Straße.jpg", "caf\\xe9.jpg", "Ж.jpg"]) + "\n")


@pytest.mark.parametrize(
    "environment", [{}, {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_the_paths_of_a_csv_are_utf_8_under_every_locale(tmp_path, latin1, environment):
    names = ["Straße.jpg", "Ж/日本.jpg", "a.jpg"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(make_photographs(3)[number])
    rows = "".join(f"{number},{name}\n" for number, name in enumerate(names))
    (tmp_path / "images.csv").write_text(f"OSMID,path\n{rows}", encoding="utf-8")
    script, *arguments = "publish_model/package_images.py", "--input", tmp_path / "images.csv"
    code, _, stderr = run(latin1 | environment, sys.executable, script, *arguments, "--output", tmp_path / "out")
    assert code == 0, stderr
    table = pq.read_table(tmp_path / "out", columns=["OSMID", "path", "image_bytes", "is_valid"])
    assert table["path"].to_pylist() == names
    assert table["is_valid"].to_pylist() == [True] * 3
    assert table["image_bytes"].to_pylist() == list(make_photographs(3))


def test_a_submission_prints_its_paths_under_a_latin_1_locale(tmp_path, write_config, latin1):
    config = write_config(tmp_path / "Straße Ž")
    code, stdout, stderr = run(latin1, "slurm/submit_pipeline.sh", "--config", config, "--to-stage", "1", "--dry-run")
    assert (code, "Straße Ž/config.toml" in stdout) == (0, True), stderr
