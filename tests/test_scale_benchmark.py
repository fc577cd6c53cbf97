"""The scale benchmark does what it says, at sizes that say nothing about speed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from benchmarks import scale, synthetic  # noqa: E402


@pytest.mark.slow
def test_every_measurement_runs_and_the_table_names_it(tmp_path: Path) -> None:
    output = tmp_path / "o.json"
    arguments = ["--merge", "600", "--width", "16", "--search", "300", "--tars", "12", "--members", "20"]
    done = subprocess.run(
        [sys.executable, REPO / "benchmarks/scale.py", *arguments, "--folder", tmp_path, "--output", output],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads(output.read_text())
    names = [row["what"] for row in content["rows"]]
    merged = [scale.COPY, "stage 3", scale.SIDECAR, scale.VIEW]
    assert names == [*merged, "stage 5", "stage 1", "stage 2", "stage 4", scale.TINY]
    for row in content["rows"]:
        assert row["seconds"] > 0
        assert row["peak"] > 2**20
    copy, stage, made, opened = content["rows"][:4]
    assert copy["written"] > 600 * 16
    assert made["written"] > 0.5 * 600 * 16 * 4
    assert opened["written"] == 0
    assert stage["images"] == 600
    assert "| stage 3 | 600 |" in done.stdout
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.slow
def test_a_measurement_that_fails_says_why(tmp_path: Path) -> None:
    synthetic.make_config(tmp_path)
    with pytest.raises(SystemExit, match=r"error: stage 3 at 7: .*embeddings: no such folder: run stage 2"):
        scale.measure("stage 3", tmp_path, 7)


def test_the_exponent_is_that_of_the_power_law_beyond_the_start() -> None:
    sizes = (1, 1000, 5000, 20_000)
    rows = [{"what": "stage 5", "images": size, "seconds": 2 + 3e-9 * (size - (size == 1)) ** 1.7} for size in sizes]
    fit = scale.fit_growth(rows)
    assert fit["start"] == 2
    assert fit["exponent"] == pytest.approx(1.7)
    assert fit["at_full"] == pytest.approx(2 + 3e-9 * scale.FULL**1.7)
    assert scale.fit_growth(rows[:2]) == {"start": 2, "exponent": None, "at_full": None, "at_raw": None}
    rows = [row | {"peak": 2**20, "read": 1e6, "written": 0} for row in rows]
    table = scale.format_tables(rows, {"stage 5": fit})
    assert f"| stage 5 | 2.00 s | 1.70 | {fit['at_full']:,.0f} s | {fit['at_raw']:,.0f} s |" in table
    assert f"| stage 5 | 20,000 | {rows[3]['seconds']:.2f} | {3e3 * 20_000**0.7 / 1e6:.1f} | 1 | 1.0 | 0.0 |" in table


def test_drawn_buildings_have_the_development_set_s_numbers_of_images() -> None:
    buildings = synthetic.draw_buildings(np.random.default_rng(0), 100_000)
    assert len(buildings) == 100_000
    sizes = np.bincount(buildings)[:-1]
    assert (sizes.min(), sizes.max()) == (2, 7)
    assert sizes.mean() == pytest.approx(1116 / 320, rel=0.02)
