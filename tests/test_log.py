"""Log lines, progress and where the time went."""

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.log import Progress, Stopwatch, logger, logging_to


def test_lines_go_to_stderr_and_are_appended_to_the_file(tmp_path, capsys):
    path = tmp_path / "new" / "folder" / "stage.log"
    for word in ("first", "second"):
        with logging_to(path):
            logger.info("the %s run", word)
    assert "the second run" in capsys.readouterr().err
    lines = path.read_text().splitlines()
    assert [line.split(" INFO ")[1] for line in lines] == ["the first run", "the second run"]


def test_a_file_only_line_stays_off_stderr(tmp_path, capsys):
    with logging_to(tmp_path / "a.log"):
        logger.error("for the file", extra={"file_only": True})
    assert "for the file" not in capsys.readouterr().err
    assert "ERROR for the file" in (tmp_path / "a.log").read_text()


def test_lines_below_the_level_are_left_out(tmp_path):
    with logging_to(tmp_path / "a.log", "WARNING"):
        logger.info("quiet")
        logger.warning("loud")
    assert (tmp_path / "a.log").read_text().split(" WARNING ")[1] == "loud\n"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("\x1b[2Ja", r"\x1b[2Ja"),
        ("a\n2026 INFO b", r"a\n2026 INFO b"),
        ("\x9b1mé\u202egpj", r"\x9b1mé\u202egpj"),
        ("é\t", "é\t"),
    ],
)
def test_control_characters_of_names_reach_neither_log_nor_terminal(tmp_path, capsys, name, shown):
    with logging_to(tmp_path / "a.log"):
        logger.info("read %s", name)
        logger.info("\n\n%s\n", f"table of {name}")
    lines = (tmp_path / "a.log").read_text().split("\n")
    assert lines[0].endswith(f"INFO read {shown}")
    assert capsys.readouterr().err.split("\n") == lines


def test_the_handlers_are_gone_after_a_failure(tmp_path):
    before = list(logger.handlers)
    with pytest.raises(ValueError, match="a bug"), logging_to(tmp_path / "a.log"):
        raise ValueError("a bug")
    assert logger.handlers == before


def test_a_log_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    complaint = r"cannot write the log .*file/a\.log \(.*\): set \[global\]\.log_dir to a writable folder"
    with pytest.raises(PipelineError, match=complaint), logging_to(tmp_path / "file" / "a.log"):
        pass


class Clock:
    """A clock that only moves when told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("pipeline.log.time.monotonic", lambda: self.now)


def test_off_a_terminal_progress_is_a_plain_line_every_thirty_seconds(monkeypatch, tmp_path):
    clock = Clock(monkeypatch)
    with logging_to(tmp_path / "a.log"), Progress("0001.tar", total=200) as progress:
        for _ in range(100):
            clock.now += 1.0
            progress.advance()
    assert [line.split(" INFO ")[1] for line in (tmp_path / "a.log").read_text().splitlines()] == [
        "0001.tar: 30/200 img, 1.0 img/s, ETA 170 s",
        "0001.tar: 60/200 img, 1.0 img/s, ETA 140 s",
        "0001.tar: 90/200 img, 1.0 img/s, ETA 110 s",
    ]


def test_what_an_earlier_run_did_counts_as_done_but_not_in_the_rate():
    progress = Progress("0001.tar", total=100)
    progress.resume_at(60)
    progress.advance(20)
    assert progress.describe(seconds=10.0) == "0001.tar: 80/100 img, 2.0 img/s, ETA 10 s"


def test_progress_without_a_total_or_a_rate_makes_nothing_up():
    assert Progress("x", total=None).describe(2.0) == "x: 0 img, 0.0 img/s"
    assert Progress("x", total=5).describe(2.0) == "x: 0/5 img, 0.0 img/s, ETA unknown"


def test_on_a_terminal_progress_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("0001.tar", total=4) as progress:
        progress.resume_at(1)
        progress.advance(3)
    assert "0001.tar: 100%" in capsys.readouterr().err


def test_a_terminal_that_does_not_say_its_size_gets_a_bar_too():
    ours, theirs = pty.openpty()  # 0 x 0
    script = "from pipeline.log import Progress\nwith Progress('0001.tar', total=4) as progress: progress.advance(4)"
    subprocess.run([sys.executable, "-c", script], stderr=theirs, check=True)
    assert b"4/4" in os.read(ours, 10_000)


def test_the_stopwatch_adds_up_by_part(monkeypatch):
    clock = Clock(monkeypatch)
    watch = Stopwatch()
    for _ in range(2):
        with watch.measure("read"):
            clock.now += 1.5
    watch.add("decode", 0.25)
    clock.now += 1.0
    assert watch.describe_parts() == " (read 3.0, decode 0.2)"
    assert Stopwatch().describe_parts() == ""


def test_a_stopwatch_measures_what_it_takes_to_get_each_item():
    watch = Stopwatch()

    def slow():
        for item in range(3):
            time.sleep(0.01)
            yield item

    assert list(watch.measure_each("read", slow())) == [0, 1, 2]
    assert list(watch.measure_each("nothing", [])) == []
    assert watch.seconds["read"] >= 0.03


def test_a_full_disk_under_the_log_hides_no_error_and_shows_no_traceback(capsys):
    def fail():
        with logging_to(Path("/dev/full")):
            logger.info("first")
            logger.info("second")
            raise PipelineError("the run's own")

    with pytest.raises(PipelineError, match="the run's own"):
        fail()
    lines = capsys.readouterr().err
    assert "Traceback" not in lines
    assert lines.count("warning: cannot write the log /dev/full ([Errno 28] No space left on device)") == 1
    assert "second" in lines


@pytest.mark.parametrize("link", ["out/_logs", "out/_logs/a.log", "hard", "pipe"])
def test_a_log_is_not_appended_to_what_a_link_leads_to(tmp_path, link):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a.log").write_text("mine")
    if link in ("hard", "pipe"):
        (tmp_path / "out/_logs").mkdir(parents=True)
        place = tmp_path / "out/_logs/a.log"
        os.mkfifo(place) if link == "pipe" else place.hardlink_to(tmp_path / "theirs" / "a.log")
    else:
        (tmp_path / link).parent.mkdir(parents=True)
        (tmp_path / link).symlink_to(tmp_path / "theirs" / ("a.log" if link.endswith("log") else ""))
    with pytest.raises(PipelineError, match="cannot write the log"), logging_to(tmp_path / "out/_logs/a.log"):
        logger.info("ours")
    assert (tmp_path / "theirs" / "a.log").read_text() == "mine"
