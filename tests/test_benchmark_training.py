"""The benchmark of stage 6 runs and says what it measured; how fast it is is no matter here."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import training
from pipeline.config import TrainingSection


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let every case run here, on little data."""

    def spawn_case(case: str, arguments: argparse.Namespace, width: int, images: int) -> dict[str, float]:
        small = {"case": case, "width": width, "images": images, "batch_size": 64, "seconds": 0.05}
        return training.run_case(argparse.Namespace(**vars(arguments) | small))

    monkeypatch.setattr(training, "spawn_case", spawn_case)
    monkeypatch.setattr(training, "FULL_BUILDINGS", 500)
    monkeypatch.setattr(training, "count_cores", lambda: 1)


def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    output = tmp_path / "result.json"
    fixed = [
        "--folder",
        str(tmp_path),
        "--output",
        str(output),
        "--start-up-images",
        "400",
        "--validation-images",
        "80",
    ]
    monkeypatch.setattr(sys, "argv", ["training.py", *fixed, *arguments])
    training.main()
    assert list(tmp_path.iterdir()) == [output]
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def test_every_case_is_measured_beside_the_plain_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = measure(tmp_path, monkeypatch, "--widths", "8", "--numbers", "9600")
    cases = result["training"]["8"]
    assert list(cases) == training.CASES
    for case, row in cases.items():
        assert row["anchors"] > 0
        assert row["rss_gb"] > 0
        images_per_anchor = row["images"] / row["anchors"]
        assert images_per_anchor == pytest.approx(3) if case == "plain" else 1 < images_per_anchor < 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [["8", case] for case in training.CASES]
    assert lines[1].split()[3] == "1.0"  # the plain trainer beside itself
    start = result["start"]["8"]
    assert start["processor_seconds"] > 0
    assert start["signed_entry_error"] < 1e-12  # so narrow a table is summed up in float64


def test_the_start_up_is_scaled_up_to_the_full_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = measure(tmp_path, monkeypatch, "--widths")
    start_up = result["start-up"]
    assert start_up["seconds_5.8M"] == pytest.approx(start_up["seconds"] * 5_800_000 / 400)
    assert 3.4 < start_up["peak_gb_5.8M"] < 10  # 870 million codes of 4 bytes and more
    assert result["validation"]["seconds"] > 0


def test_the_plain_trainer_trains_what_the_projects_own_does() -> None:
    data = training.PlainTriplets(training.make_features(60, 4))
    for row in range(60):
        anchor, positive, negative, band = data[row]
        assert 0 <= band < training.NUM_BANDS
        assert anchor.tolist() == data.rows[row].tolist()
        assert {len(part) for part in (anchor, positive, negative)} == {4}
    assert TrainingSection().min_negative_distance_m < 50  # or the made-up buildings would have no negatives
