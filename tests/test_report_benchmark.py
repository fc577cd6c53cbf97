"""The benchmark of stage 9's page runs and says what it measured."""

import json

import pytest


@pytest.mark.slow
def test_the_benchmark_times_numbers_and_page(tmp_path, run_script):
    outcome = run_script(
        "benchmarks/report.py", "--images", 600, "--width", 16, "--photos", 40, "--output", tmp_path / "figures.json"
    )
    assert outcome.code == 0, outcome.stderr
    assert "| page |" in outcome.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    parts = {row["part"]: row for row in figures["rows"]}
    assert {"load and embed", "score", "page"} <= set(parts)
    assert all(parts[part]["seconds"] > 0 and parts[part]["peak_mb"] > 50 for part in ("score", "page"))
    assert 0.1 < parts["page, MB"]["seconds"] < 15
