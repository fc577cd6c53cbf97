"""The benchmarks run at a tiny size and writes the rows that it promises; speed does not matter here."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import harness, inference, synthetic


def read_rows(path: Path) -> list[dict[str, object]]:
    content = json.loads(path.read_text())
    assert set(content["machine"]) == {"date", "gpu", "processor", "cores", "load", "versions"}
    return content["rows"]


def test_calls_take_turns_and_the_least_time_counts() -> None:
    order: list[str] = []
    seconds = harness.take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 3
    assert set(seconds) == {"a", "b"}
    assert max(seconds.values()) < 0.1


@pytest.mark.slow
def test_inference_fills_the_table(tmp_path, toy_backbone, capsys):
    path = tmp_path / "inference.json"
    arguments = ["--images", "24", "--side", "128", "--rounds", "1", "--cores", "1", "--backbone", str(toy_backbone)]
    inference.main([*arguments, "--output", str(path)])
    assert json.loads(capsys.readouterr().out) == json.loads(path.read_text())
    rows = read_rows(path)
    assert [row["what"] for row in rows] == [
        "stage 1, one core", "stage 4, one core", "stage 2, toy-dinov2, 1 cores",
    ]  # fmt: skip
    for row in rows:
        assert row["img/s"] > 0
        assert row["ratio"] == row["img/s"] / row["its img/s"]
        assert row["share of the limit"] == row["img/s"] / row["limit img/s"]


def test_pictures_are_as_large_as_real_ones():
    assert all(95_000 < len(data) < 120_000 for data in synthetic.draw_pictures(640)[:4])


def test_a_measurement_that_fails_says_why(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('error: no such folder')")
    with pytest.raises(SystemExit, match="^error: seven: error: no such folder$"):
        harness.run_child(str(script), "seven")


def test_drawn_buildings_have_real_numbers_of_images() -> None:
    buildings = synthetic.draw_buildings(np.random.default_rng(0), 100_000)
    assert len(buildings) == 100_000
    sizes = np.bincount(buildings)[:-1]
    assert (sizes.min(), sizes.max()) == (2, 7)
    assert sizes.mean() == pytest.approx(1116 / 320, rel=0.02)
