"""The benchmark of inference runs, at a tiny size, and says what it says it says."""

import json

import pytest

from benchmarks import inference


@pytest.mark.slow
def test_a_tiny_run_fills_the_table(tmp_path, toy_backbone, capsys):
    path = tmp_path / "inference.json"
    arguments = ["--images", "24", "--side", "128", "--rounds", "1", "--cores", "1", "--backbone", str(toy_backbone)]
    inference.main([*arguments, "--output", str(path)])
    captured = capsys.readouterr()
    content = json.loads(path.read_text())
    assert json.loads(captured.out) == content
    rows = content["rows"]
    assert [row["what"] for row in rows] == [
        "stage 1, one core", "stage 4, one core", "stage 2, toy-dinov2, 1 cores", "stage 2, 2 processes on 2 cores",
    ]  # fmt: skip
    for row in rows:
        assert row["images_per_s"] > 0
        assert row["ratio"] == row["images_per_s"] / row["beside_images_per_s"]
        assert row["share_of_limit"] == row["images_per_s"] / row["limit_images_per_s"]
    assert 0 < rows[2]["matrix_units_share"] < 1
    assert "img/s, the CPU computed" in rows[2]["last_line"]
    assert set(content["machine"]) == {"date", "gpu", "processor", "cores", "load_at_start", "versions"}
    table = [line for line in captured.err.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows)
    assert {line.count("|") for line in table} == {10}


def test_pictures_are_as_large_as_real_ones():
    sizes = [len(data) for data in inference.draw_pictures(640)[:4]]
    assert all(95_000 < size < 120_000 for size in sizes)
