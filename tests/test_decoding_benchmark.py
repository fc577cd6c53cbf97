"""The benchmark of decoding runs, at a tiny size, and says what it says it says."""

import json

import pytest

from benchmarks import decoding


@pytest.mark.slow
def test_a_tiny_run_says_the_rates_and_what_holds_the_lock(tmp_path, capsys):
    path = tmp_path / "decoding.json"
    decoding.main(["--images", "24", "--side", "128", "--rounds", "1", "--output", str(path)])
    found = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out) == found
    rates = found["images_per_s"]
    assert set(rates) == {"one thread", "two threads", "two processes"}
    assert found["two_threads_to_two_processes"] == rates["two threads"] / rates["two processes"]
    assert 0 < found["share_with_the_lock_at_most"] < 1
    assert found["share_with_the_lock_at_most"] == found["outside_libjpeg"] / found["cpu_seconds_an_image"]
