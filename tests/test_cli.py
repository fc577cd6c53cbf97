"""The command line as a user meets it: help, exit codes, signals, streams, log files."""

import argparse
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.cli import Options, StageResult, add_tar_options, make_parser, options_from, parse_shard, run_guarded
from pipeline.config import load_config
from pipeline.errors import ConfigError, InputError, PipelineError, Terminated
from pipeline.ids import Shard
from publish_model import generate_embeddings_from_parquet, package_images

SCRIPT = "preprocess_raw_data/process_tar.py"


@pytest.mark.parametrize(("text", "shard"), [("0/1", Shard(0, 1)), ("2/3", Shard(2, 3)), ("07/10", Shard(7, 10))])
def test_a_shard_is_read(text, shard):
    assert parse_shard(text) == shard


@pytest.mark.parametrize("text", ["3/3", "4/3", "-1/3", "1", "1/", "/3", "a/b", "1/0", "1/2/3", "1.0/2", " 1/2", ""])
def test_a_shard_of_another_form_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"must read I/N with 0 <= I < N"):
        parse_shard(text)


def test_the_first_line_of_help_says_the_number_and_all_options_follow():
    parser = make_parser("Stage 1: do it.\n\nMore.")
    add_tar_options(parser)
    text = parser.format_help()
    assert text.splitlines()[0] == "Stage 1: do it."
    for option in (
        "--config PATH",
        "--set SECTION.KEY=VALUE",
        "--overwrite",
        "--tar-file PATH",
        "--shard I/N",
        "--help",
    ):
        assert option in text


def test_options_gather_what_the_command_line_says():
    parser = make_parser("x")
    add_tar_options(parser)
    options = options_from(parser.parse_args(["--overwrite", "--shard", "1/4", "--tar-file", "a", "--tar-file", "b"]))
    assert (options.overwrite, options.shard, [str(path) for path in options.tar_files]) == (
        True,
        Shard(1, 4),
        ["a", "b"],
    )
    assert options_from(make_parser("x").parse_args([])) == Options()


def test_half_an_options_name_is_no_option():
    with pytest.raises(ConfigError, match="unrecognized arguments: --over"):
        make_parser("x").parse_args(["--over"])


def test_a_results_line_adds_up():
    result = StageResult("stage", watch=cli.Stopwatch())
    result.add({"in": 10, "out": 6, "rejected": 3, "dropped": 1}, {"b": 3, "a": 1})
    result.add({"in": 2, "out": 2}, None)
    assert result.describe() == "stage: 12 in = 8 out + 3 rejected + 1 dropped (a 1, b 3); 0 written, 0 kept"


@pytest.mark.parametrize(
    ("raised", "code", "lines"),
    [
        (None, 0, ""),
        (InputError("x: missing"), 1, "error: x: missing\n"),
        (InputError("two\nlines"), 1, "error: two lines\n"),
        (ConfigError(["one", "two"]), 2, "error: one\nerror: two\n"),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: cannot use /x (Permission denied): correct that"),
        (OSError("odd"), 1, "error: cannot use (odd): correct that"),
        (MemoryError("malloc failed"), 1, "error: out of memory (malloc failed): give more of it"),
        (KeyboardInterrupt(), 130, "error: interrupted: what was finished is kept"),
        (Terminated(), 143, "error: terminated: what was finished is kept"),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_every_end_has_its_exit_code_and_its_line(raised, code, lines, run_main, monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back after the broken pipe

    def main(_):
        if raised is not None:
            raise raised

    outcome = run_main(main)
    assert outcome.code == code
    assert outcome.stderr.startswith(lines)
    assert "Traceback" not in outcome.stderr


def test_control_characters_of_names_do_not_reach_the_terminal_in_an_error(run_main):
    def fail(_):
        raise PipelineError("a\x1b[2J\u202e\rb: no")

    assert run_main(fail).stderr == "error: a\\x1b[2J\\u202e b: no\n"


def test_a_bug_is_not_caught():
    def main(_):
        raise AttributeError("a bug")

    with pytest.raises(AttributeError, match="a bug"):
        run_guarded(main)


@pytest.fixture
def config(tmp_path, write_config):
    return load_config(write_config(tmp_path))


def test_a_stage_prints_only_the_paths_it_wrote_and_logs_the_rest(tmp_path, config, capsys):
    def story(_config, _options):
        return StageResult(
            "stage", Counter({"in": 5, "out": 4, "rejected": 1}), written=[tmp_path / "a"], kept=[tmp_path / "b"]
        )

    result = cli.run_stage("stage", story, config, Options(shard=Shard(1, 2)))
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path}/a\n"
    first, last = (tmp_path / "logs" / "stage.1of2.log").read_text().splitlines()
    assert "Python" in first
    assert "seed 42" in first
    assert "stage: 5 in = 4 out + 1 rejected + 0 dropped; 1 written, 1 kept; 0.0 s" in last
    assert result.seconds >= 0


def test_a_stage_that_fails_still_counts_and_prints_what_it_finished(tmp_path, config, capsys):
    def story(_config, _options):
        error = InputError("0002.tar: damaged")
        error.result = StageResult("stage", Counter({"in": 5, "out": 5}), written=[tmp_path / "a"])
        raise error

    with pytest.raises(InputError):
        cli.run_stage("stage", story, config, Options())
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path}/a\n"
    assert "damaged" not in printed.err  # the run guard says it, once
    log = (tmp_path / "logs" / "stage.log").read_text().splitlines()
    assert log[-2].endswith("ERROR 0002.tar: damaged")
    assert "stage: 5 in = 5 out + 0 rejected + 0 dropped" in log[-1]


def test_an_interrupted_stage_notes_it_in_its_log(tmp_path, config):
    def story(_config, _options):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cli.run_stage("stage", story, config, Options())
    assert "stage: interrupted; what was finished is kept" in (tmp_path / "logs" / "stage.log").read_text()


# ------------------------------------------------------------------------------------------------ as a user types it


def test_a_wrong_command_line_is_exit_code_two_and_one_line(run_script, tmp_path):
    for arguments in (["--nonsense"], ["--shard", "3/3"], ["--config", tmp_path / "none.toml"], ["--set", "data.x=1"]):
        outcome = run_script(SCRIPT, *arguments, cwd=tmp_path)
        assert outcome.code == 2
        assert outcome.stdout == ""
        (line,) = outcome.stderr.splitlines()
        assert line.startswith("error: ")


def test_an_undefined_variable_in_a_path_that_is_used_is_exit_code_two(run_script, write_config, tmp_path):
    config = write_config(tmp_path, paths={"raw_dir": "$NOWHERE_AT_ALL/raw", "merged_dir": "$NOT_USED"})
    outcome = run_script(SCRIPT, "--config", config)
    assert outcome.code == 2
    assert [line for line in outcome.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: {config}: [paths].raw_dir: $NOWHERE_AT_ALL in '$NOWHERE_AT_ALL/raw' is unset or empty: export it"
    ]


def test_a_run_from_another_folder_writes_where_the_config_says(run_script, write_config, make_tar, tmp_path):
    config = write_config(tmp_path / "project")
    make_tar(tmp_path / "project" / "raw")
    (tmp_path / "elsewhere").mkdir()
    outcome = run_script(SCRIPT, "--config", config, cwd=tmp_path / "elsewhere")
    assert outcome.code == 0
    assert outcome.stdout == f"{tmp_path}/project/intermediates/0001.parquet\n"
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert (tmp_path / "project" / "logs" / "process_tar.log").read_text() == outcome.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("times", [1, 2])  # a terminal and a launcher both send it
def test_a_signal_in_the_midst_of_the_work_keeps_what_was_finished(
    start_script, run_script, write_config, make_tar, tmp_path, number, code, times
):
    config = write_config(tmp_path)
    make_tar(tmp_path / "raw", 1)
    endless = tarfile.TarInfo("0002/endless.bin")
    endless.size = 2**36  # of zeros, which take no room: the stage reads until the signal comes
    with open(tmp_path / "raw" / "0002.tar", "wb") as tar:
        tar.write(endless.tobuf())
        tar.truncate(2 * endless.size)
    process = start_script(SCRIPT, "--config", config)
    log = tmp_path / "logs" / "process_tar.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and "0002.tar (2 of 2)" in log.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.1)
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.03)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1].endswith("the same command goes on from there")
    names = {path.name for path in (tmp_path / "intermediates").iterdir()}
    assert names == {"0001.parquet", "_inputs", "_rejects"}
    (tmp_path / "raw" / "0002.tar").unlink()
    make_tar(tmp_path / "raw", 2)
    outcome = run_script(SCRIPT, "--config", config)
    assert outcome.code == 0
    assert "1 written, 1 kept" in outcome.stderr


def test_ctrl_c_also_stops_what_a_script_started_in_the_background():
    code = "import time; from pipeline import cli; cli.run_guarded(lambda _: (print('up', flush=True), time.sleep(60)))"
    ignoring = ["sh", "-c", 'trap \'\' INT; exec "$0" "$@"', sys.executable, "-c", code]  # as a shell does behind an &
    process = subprocess.Popen(ignoring, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_a_reader_of_stdout_that_has_gone_is_no_traceback():
    code = "from pipeline import cli; cli.run_guarded(lambda _: [print('x' * 1000, flush=True) for _ in range(10_000)])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 1
    process.stderr.close()


def test_a_user_who_does_not_exist_makes_no_folder_of_that_name(run_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photographs").mkdir()
    arguments = ("--input", tmp_path / "photographs", "--output", "~nosuchuser/x")
    for main in (package_images.main, generate_embeddings_from_parquet.main):
        outcome = run_main(main, *arguments)
        assert (outcome.code, "'~nosuchuser/x' names a user who does not exist" in outcome.stderr) == (2, True)
    outcome = run_main(generate_embeddings_from_parquet.main, "-i", "a", "-o", "b", "--model-id", "~nosuchuser/x")
    assert (outcome.code, "names a user who does not exist" in outcome.stderr) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["photographs"]
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    parser = cli.make_parser("x", config=False)
    parser.add_argument("--output", type=Path)
    assert parser.parse_args(["--output", "~/x"]).output == tmp_path / "home" / "x"
    assert parser.parse_args(["--output", "./~x"]).output == Path("./~x")
