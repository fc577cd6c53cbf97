"""File names are bytes, and read as UTF-8: a locale under which Python would read them otherwise is refused."""

import os
import subprocess
import sys

import pyarrow.parquet as pq
from conftest import REPO
from published_models import make_photographs
from raw_tars import make_view, write_tar


def run(*command, **environment):
    """Run a command and return its exit code, stdout and stderr, which have to be UTF-8."""
    done = subprocess.run(command, capture_output=True, env=os.environ | environment, check=False, cwd=REPO)
    return done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")


def test_a_folder_whose_name_is_not_utf_8_is_refused_with_one_line(tmp_path, write_config):
    folder = tmp_path / "caf\udce9"
    config = write_config(folder)
    write_tar(folder / "raw" / "0001.tar", make_view("a", 1, 1))
    code, _, stderr = run(sys.executable, "preprocess_raw_data/process_tar.py", "--config", config, LC_ALL="C.UTF-8")
    assert code == 1
    assert stderr.splitlines()[-1].startswith(f"error: {tmp_path}/caf\\xe9/")
    assert stderr.splitlines()[-1].endswith(
        ": not UTF-8, so it cannot be read or written: rename that, then run this again"
    )
    assert "Traceback" not in stderr


def test_paths_are_utf_8_under_the_c_locale_and_a_locale_that_is_not_utf_8_is_refused(tmp_path):
    names = ["Straße.jpg", "Ж/日本.jpg", "a.jpg"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(make_photographs(3)[number])
    rows = "".join(f"{number},{name}\n" for number, name in enumerate(names))
    (tmp_path / "images.csv").write_text(f"OSMID,path\n{rows}", encoding="utf-8")
    command = [sys.executable, "publish_model/package_images.py", "--input", tmp_path / "images.csv"]
    command += ["--output", tmp_path / "out"]
    code, stdout, stderr = run(*command, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (code, stdout) == (1, "")
    assert stderr.startswith("error: the locale is not UTF-8, so file names would be misread: export LC_ALL=C.UTF-8")
    code, _, stderr = run(*command, LC_ALL="C")
    assert code == 0, stderr
    table = pq.read_table(tmp_path / "out", columns=["OSMID", "path", "image_bytes", "is_valid"])
    assert table["path"].to_pylist() == names
    assert table["is_valid"].to_pylist() == [True] * 3
    assert table["image_bytes"].to_pylist() == list(make_photographs(3))


def test_a_closed_stdout_and_a_removed_current_folder_are_said_in_one_line(tmp_path):
    script = f"{sys.executable} {REPO}/publish_model/embed_images.py --help"
    (tmp_path / "gone").mkdir()
    for command, problem in (
        (f"{script} >&-", "stdout is closed"),
        (f"cd {tmp_path}/gone && rmdir ../gone && {script}", "the current folder was removed"),
    ):
        code, _, stderr = run("bash", "-c", command)
        assert (code, stderr.startswith(f"error: {problem}"), stderr.count("\n")) == (1, True, 1)
