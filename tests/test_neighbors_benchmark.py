import json
from collections.abc import Callable
from pathlib import Path

import pytest

SIZES = ["--sizes", "500", "--anchors", "70", "--rounds", "1", "--images", "300", "--buildings", "400",
         "--memory-sizes", "300", "900", "--host-images", "700"]  # fmt: skip


@pytest.mark.slow
def test_the_benchmark_times_every_engine_and_weighs_the_output(tmp_path: Path, run_script: Callable) -> None:
    outcome = run_script("benchmarks/neighbors.py", *SIZES, "--output", tmp_path / "figures.json")
    assert outcome.code == 0, outcome.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert sorted(figures["seconds"]["500"]) == ["balltree", "faiss", "product", "torch"]
    assert all(seconds > 0 for seconds in figures["seconds"]["500"].values())
    assert 2.0 < figures["output"]["bytes_a_neighbor"] < 12.0
    assert figures["memory"]["900"] > 1e8
    parts = ["read", "points", "group", "write", "merge"]
    assert {kind: list(seconds) for kind, seconds in figures["host"].items()} == {"clock": parts, "processors": parts}
    assert "bytes a neighbour" in outcome.stderr
