"""The kernels run here on Triton's interpreter, in a process of its own; what they are compiled to is only compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_neighbors import CASES

pytest.importorskip("triton", reason="the GPU's kernels need triton")

from triton.errors import TritonError

from difficulty_metadata.neighbor_search import neighbors, triton_filter
from difficulty_metadata.neighbor_search.engines import TiledEngine
from difficulty_metadata.neighbor_search.neighbors import NeighborSearch
from difficulty_metadata.neighbor_search.triton_filter import TritonEngine

OTHERS = ["lists too short", "room too small", "two levels", "wide points", "huge numbers", "tiny numbers"]


@pytest.fixture(scope="module")
def results(make_once: Any) -> Any:
    return json.loads((make_once("interpreted search", search) / "found.json").read_text())


def search(folder: Path) -> None:
    script = Path(__file__).with_name("interpreted_search.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    outcome = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    (folder / "found.json").write_text(outcome.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *OTHERS])
def test_the_kernels_find_what_the_reference_finds_to_the_last_bit(case: str, results: Any) -> None:
    assert results[case]["wrong"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *OTHERS])
def test_no_point_is_nearer_than_the_bound_of_the_unseen(case: str, results: Any) -> None:
    assert results[case]["broken_bounds"] == 0


@pytest.mark.slow
def test_ordinary_points_are_proven_by_half_precision_alone(results: Any) -> None:
    for case in ("ordinary", "two levels", "wide points", "huge numbers", "tiny numbers"):
        assert results[case]["redone"] == 0
        assert results[case]["num_bounded"] == 14
    assert results["ordinary"]["num_levels"] == 3
    assert results["two levels"]["num_levels"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lists too short", "room too small"])
def test_a_list_that_overflows_has_its_query_searched_again(case: str, results: Any) -> None:
    assert results[case]["redone"] > 0


# Longer than what a short warning has room for.
KERNEL_ERROR = "ptxas exited with error code 127" + " and more" * 40 + ", at the end why"


def test_a_gpu_without_triton_or_whose_kernel_fails_searches_by_tiles(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(neighbors, "_MIN_TRITON_POINTS", 100)
    monkeypatch.setattr(neighbors.logger, "propagate", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(TritonEngine, "search", lambda *_: None)
    search = NeighborSearch.__new__(NeighborSearch)
    search.backend, search.device, search._num_neighbors = "torch", torch.device("cuda"), 5

    def choose(num_points: int, num_dims: int) -> type:
        search._points, search._point_codes = torch.rand(num_points, num_dims), torch.arange(num_points).int()
        return type(search._make_engine())

    assert [choose(100, 5), choose(99, 5), choose(100, 65)] == [TritonEngine, TiledEngine, TiledEngine]
    with caplog.at_level("INFO"):
        monkeypatch.setitem(sys.modules, "difficulty_metadata.neighbor_search.triton_filter", None)
        assert choose(100, 5) is TiledEngine
        assert "triton is not installed" in caplog.text

        def fail(*_: object) -> None:
            raise TritonError(KERNEL_ERROR)

        monkeypatch.setattr(TritonEngine, "search", fail)
        monkeypatch.setitem(sys.modules, "difficulty_metadata.neighbor_search.triton_filter", triton_filter)
        assert choose(100, 5) is TiledEngine
        assert f"the GPU's kernel: {KERNEL_ERROR}" in caplog.text


@pytest.mark.parametrize("offset", [0.0, 3.0, 1_000.0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_every_point_within_a_threshold_scores_the_limit(offset: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    points = (torch.randn(600, 24, generator=generator) + offset) * scale
    engine = TritonEngine(points, torch.arange(600, dtype=torch.int32))
    thresholds = torch.rand(100, generator=generator) * 50 * scale**2
    limits = engine._score_limits(points[:100], thresholds)
    scaled = points.double() * engine._scale
    # The kernel's arithmetic with the products summed by torch in float32, and the norms' half taken off last.
    product = (points[:100] * engine._scale).half().float() @ (points * engine._scale).half().float().T
    scores = product - (scaled.square().sum(dim=1) / 2).float()
    true = (points[:100, None].double() - points[None].double()).square().sum(dim=2)
    is_near = true <= thresholds[:, None]
    assert is_near.sum() > 1_000 or offset / scale > 1
    assert (scores >= limits[:, None])[is_near].all()
    if offset == 0:
        assert (scores >= limits[:, None]).sum() < 1.1 * is_near.sum()  # and few others do


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_the_kernels_compile_for_gpus_and_use_their_tensor_cores(capability: int, tmp_path: Path) -> None:
    """Triton compiles for a GPU that is not there."""
    script = Path(__file__).with_name("compiled_kernels.py")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, script, str(capability)]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    kernels = json.loads(outcome.stdout)
    assert len(kernels) == 2
    for kernel in kernels:
        assert not kernel["has_atomics"]
        assert kernel["product"] == (
            None if kernel["name"] == "measure_groups" else "wgmma" if capability >= 90 else "mma"
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_what_the_cpu_finds_to_the_last_bit() -> None:
    generator = np.random.default_rng(0)
    codes = (np.arange(100_000) // 5).astype(np.int32)
    centres = generator.standard_normal((20_000, 32), np.float32)
    points = centres[codes] + 0.3 * generator.standard_normal((100_000, 32), np.float32)
    points[::100] = 0.25  # grey tiles
    anchors = generator.choice(100_000, 3_000, replace=False)
    searches = [NeighborSearch(points, codes, 150, "torch", torch.device(name)) for name in ("cuda", "cpu")]
    assert isinstance(searches[0]._engine, TritonEngine)
    (rows, distances), (expected_rows, expected_distances) = (search.find(anchors) for search in searches)
    assert (rows == expected_rows).all()
    assert (distances == expected_distances).all()
