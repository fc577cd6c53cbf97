import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from difficulty_metadata.neighbor_search import engines, neighbors
from difficulty_metadata.neighbor_search.engines import TiledEngine, bound_unseen
from difficulty_metadata.neighbor_search.neighbors import Exclusion, NeighborSearch, group_points, measure_squared
from pipeline.errors import InputError
from pipeline.inference.devices import full_precision
from pipeline.retrieval.geography import distances_m

BACKENDS = ["balltree", "torch"]
CPU = torch.device("cpu")

Case = tuple[np.ndarray, np.ndarray]


def search_by_loops(
    points: np.ndarray, codes: np.ndarray, k: int, is_near: Callable[[int, int], bool] = lambda _a, _b: False
) -> tuple[np.ndarray, np.ndarray]:
    """The slow oracle: for each image, sort all images of other buildings by distance, then by row."""
    rows = np.full((len(points), k), -1, dtype=np.int64)
    distances = np.full((len(points), k), np.inf, dtype=np.float32)
    exact = points.astype(np.float64)
    for anchor in range(len(points)):
        squared = ((exact - exact[anchor]) ** 2).sum(axis=1)
        others = [
            (squared[other], other)
            for other in range(len(points))
            if codes[other] != codes[anchor] and not is_near(anchor, other)
        ]
        for place, (square, other) in enumerate(sorted(others)[:k]):
            rows[anchor, place] = other
            distances[anchor, place] = math.sqrt(square)
    return rows, distances


def draw_points(num_points: int, num_dims: int = 8, images_per_building: int = 5, seed: int = 0) -> Case:
    generator = np.random.default_rng(seed)
    codes = (np.arange(num_points) // images_per_building).astype(np.int32)
    centres = generator.normal(size=(codes.max() + 1, num_dims))
    points = centres[codes] + 0.3 * generator.normal(size=(num_points, num_dims))
    return points.astype(np.float32), codes


def shuffled(points: np.ndarray, codes: np.ndarray) -> Case:
    order = np.random.default_rng(9).permutation(len(points))
    return points[order], codes[order]


def many_duplicates() -> Case:
    """A third of the images are one grey tile, of many buildings; another building has three tiles of its own."""
    points, codes = draw_points(600)
    points[::3] = 0.25
    points[11:14] = 4.0
    codes[11:14] = 7
    return points, codes


def identical_images_of_one_building() -> Case:
    points, codes = draw_points(400)
    codes[50:350] = 10_000
    points[50:350] = points[50]
    return shuffled(points, codes)


def building_larger_than_the_neighbours() -> Case:
    points, codes = draw_points(500, seed=3)
    codes[:300] = 0
    points[:300] *= 0.01  # and nearer to each other than to anything else
    return shuffled(points, codes)


def equidistant_grid() -> Case:
    """Hundreds of distinct points at exactly the same distance: only the row number decides."""
    side = np.arange(8, dtype=np.float32)
    points = np.stack(np.meshgrid(side, side, side), axis=-1).reshape(-1, 3)
    return shuffled(points, (np.arange(512) // 4).astype(np.int32))


def dense_cluster_far_from_the_origin() -> Case:
    """Differences of 1e-4 at a distance of 100: the float32 matrix product cannot tell the neighbours apart."""
    points, codes = draw_points(500, seed=4)
    points[:250] = 100 + np.float32(2e-5) * np.random.default_rng(0).integers(-8, 9, (250, 8))
    return shuffled(points.astype(np.float32), codes)


def few_images() -> Case:
    return draw_points(12)


CASES = {
    "ordinary": lambda: shuffled(*draw_points(700)),
    "many duplicates": many_duplicates,
    "identical images of one building": identical_images_of_one_building,
    "a building larger than the neighbours": building_larger_than_the_neighbours,
    "equidistant grid": equidistant_grid,
    "dense cluster far from the origin": dense_cluster_far_from_the_origin,
    "fewer images than neighbours": few_images,
    "one image": lambda: draw_points(1),
    "one building": lambda: (draw_points(30)[0], np.zeros(30, dtype=np.int32)),
    "all identical": lambda: (np.zeros((300, 4), dtype=np.float32), (np.arange(300) // 2).astype(np.int32)),
    "negative zero": lambda: (np.array([[0.0], [-0.0], [0.0]], dtype=np.float32), np.arange(3, dtype=np.int32)),
}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and blocks that no size here is a multiple of, so that every path of the torch engine is walked."""
    monkeypatch.setattr(engines, "CPU_TILE", (13, 37))
    monkeypatch.setattr(engines, "SAMPLE_STRIDE", 4)
    monkeypatch.setattr(neighbors, "SPARE_CANDIDATES", 3)
    monkeypatch.setattr(neighbors, "_BLOCK_ANCHORS", {"cpu": 101})
    monkeypatch.setattr(neighbors, "_MAX_COORDINATES", {"cpu": 3_000})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_every_engine_finds_what_loops_find_to_the_last_bit(case: str, backend: str, small_tiles: None) -> None:
    points, codes = CASES[case]()
    rows, distances = NeighborSearch(points, codes, 20, backend, CPU).find(np.arange(len(points)))
    expected_rows, expected_distances = search_by_loops(points, codes, 20)
    # Loops add in another order, which can turn float32's last bit, but no test point's order.
    assert np.allclose(distances, expected_distances, rtol=3e-7, atol=0)
    assert (rows == expected_rows).all()
    assert rows.dtype == np.int64
    assert distances.dtype == np.float32


@pytest.mark.parametrize("case", ["ordinary", "many duplicates", "dense cluster far from the origin"])
def test_the_engines_agree_bit_for_bit_also_with_tiles_of_full_size(case: str) -> None:
    points, codes = CASES[case]()
    found = [NeighborSearch(points, codes, 20, backend, CPU).find(np.arange(len(points))) for backend in BACKENDS]
    for rows, distances in found[1:]:
        assert (rows == found[0][0]).all()
        assert (distances == found[0][1]).all()


def test_a_search_through_full_tiles_is_exact() -> None:
    points, codes = draw_points(9_692, num_dims=12, seed=5)
    anchors = np.random.default_rng(0).choice(len(points), 300, replace=False)
    search = NeighborSearch(points, codes, 30, "torch", CPU)
    rows, distances = search.find(anchors)
    exact = points.astype(np.float64)
    for place, anchor in enumerate(anchors):
        squared = ((exact - exact[anchor]) ** 2).sum(axis=1)
        squared[codes == codes[anchor]] = np.inf
        order = np.argsort(squared, kind="stable")[:30]
        assert (rows[place] == order).all()
        assert np.allclose(distances[place], np.sqrt(squared[order]), rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_found_for_an_anchor_does_not_depend_on_the_other_anchors(backend: str, small_tiles: None) -> None:
    points, codes = many_duplicates()
    search = NeighborSearch(points, codes, 20, backend, CPU)
    whole_rows, whole_distances = search.find(np.arange(len(points)))
    anchors = np.random.default_rng(2).permutation(len(points))[:77]
    rows, distances = search.find(anchors)
    assert (rows == whole_rows[anchors]).all()
    assert (distances == whole_distances[anchors]).all()


def test_a_dense_cluster_is_searched_again_in_float64() -> None:
    points, codes = dense_cluster_far_from_the_origin()
    search = NeighborSearch(points, codes, 20, "torch", CPU)
    search.find(np.arange(len(points)))
    assert search.num_redone > 0


def test_grey_tiles_cost_no_second_search() -> None:
    """Thousands of identical images are one point to the engines."""
    points, codes = draw_points(3_000)
    points[::3] = 0.25
    search = NeighborSearch(points, codes, 20, "torch", CPU)
    rows, distances = search.find(np.arange(len(points)))
    assert search.num_redone == 0
    assert (distances[0] == 0).all()
    tiles = np.arange(0, len(points), 3)
    assert rows[0].tolist() == tiles[codes[tiles] != codes[0]][:20].tolist()


def test_progress_hears_of_every_anchor() -> None:
    points, codes = draw_points(300)
    heard: list[int] = []
    NeighborSearch(points, codes, 5, "torch", CPU).find(np.arange(7, 300), heard.append)
    assert sum(heard) == 293


def test_a_gpu_whose_memory_runs_out_is_asked_of_fewer_anchors_at_a_time_and_finds_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    points, codes = draw_points(9_000)
    expected = NeighborSearch(points, codes, 20, "torch", CPU).find(np.arange(len(points)))
    asked, search_whole, heard = [], TiledEngine.search, []
    fits = 1_100

    def search_within(engine: TiledEngine, queries: torch.Tensor, *arguments: Any) -> Any:
        asked.append(len(queries))
        if len(queries) > fits:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return search_whole(engine, queries, *arguments)

    monkeypatch.setattr(TiledEngine, "search", search_within)
    search = NeighborSearch(points, codes, 20, "torch", CPU)
    found = search.find(np.arange(len(points)), heard.append)
    assert asked[:4] == [4_096, 2_048, 1_024, 1_024]
    assert sum(heard) == len(points)
    assert "the search: the GPU's memory ran out: going on with 1024 rows at a time" in caplog.text
    for one, other in zip(found, expected, strict=True):
        assert (one == other).all()
    fits = 1_000
    with pytest.raises(torch.cuda.OutOfMemoryError):
        search.find(np.arange(len(points)))


# ------------------------------------------------------------------------------------------------ on the ground


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["ordinary", "many duplicates", "all identical"])
def test_targets_too_near_on_the_ground_are_left_out_exactly(case: str, backend: str, small_tiles: None) -> None:
    points, codes = CASES[case]()
    generator = np.random.default_rng(1)
    # About a third of all pairs stand within 100 m of each other, far more than the spare candidates make up for.
    latitudes = 48.0 + generator.random(len(points)) * 0.002
    longitudes = 2.0 + generator.random(len(points)) * 0.002
    near = distances_m(latitudes[:, None], longitudes[:, None], latitudes, longitudes) < 100.0
    assert 0.2 < near.mean() < 0.7
    search = NeighborSearch(points, codes, 20, backend, CPU, Exclusion(latitudes, longitudes, 100.0))
    rows, distances = search.find(np.arange(len(points)))
    expected_rows, expected_distances = search_by_loops(points, codes, 20, lambda a, b: near[a, b])
    assert (rows == expected_rows).all()
    assert np.allclose(distances, expected_distances, rtol=3e-7)


def test_a_target_exactly_at_the_limit_stays() -> None:
    limit = float(distances_m(48.0, 2.0, 48.001, 2.0))
    exclusion = Exclusion(np.array([48.0, 48.001]), np.array([2.0, 2.0]), limit)
    assert exclusion.is_near(np.array([0]), np.array([[0, 1]])).tolist() == [[True, False]]


@pytest.mark.parametrize("latitude", [np.nan, 139.7])
def test_what_is_no_position_is_refused(latitude: float) -> None:
    with pytest.raises(InputError, match="exclude_within_m"):
        Exclusion(np.array([48.0, latitude]), np.array([2.0, 2.0]), 10.0)


# ------------------------------------------------------------------------------------------------ parts


def test_identical_points_are_grouped_in_the_order_of_their_first_rows() -> None:
    points = np.array([[3, 1], [2, 2], [3, 1], [0, 0], [2, 2], [3, 1]], dtype=np.float32)
    groups = group_points(points, np.array([4, 5, 4, 6, 7, 4], dtype=np.int32))
    assert groups.points.tolist() == [[3, 1], [2, 2], [0, 0]]
    assert groups.codes.tolist() == [4, -1, 6]
    assert groups.group_of_row.tolist() == [0, 1, 0, 2, 1, 0]
    assert [rows.tolist() for rows in np.split(groups.rows, groups.starts[1:-1])] == [[0, 2, 5], [1, 4], [3]]


@pytest.mark.parametrize("num_dims", [1, 2, 3, 5, 8, 31, 32])
def test_squared_distances_are_those_of_the_formula(num_dims: int) -> None:
    generator = np.random.default_rng(num_dims)
    points = torch.from_numpy(generator.normal(size=(40, num_dims)).astype(np.float32))
    candidates = torch.from_numpy(generator.integers(0, 40, (6, 9)))
    squared = measure_squared(points, points[:6], candidates)
    for query in range(6):
        for place in range(9):
            other = candidates[query, place]
            by_hand = sum((float(a) - float(b)) ** 2 for a, b in zip(points[query], points[other], strict=True))
            assert float(squared[query, place]) == pytest.approx(by_hand, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 3.0, 1_000.0])
def test_the_bound_holds_for_every_distance_that_a_product_gives(dtype: torch.dtype, offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    points = (torch.randn(400, 32, generator=generator) * 0.01 + offset).to(dtype)
    queries = points[:50]
    norms = points.square().sum(dim=1)
    computed = norms[None] - 2 * queries @ points.T + queries.double().square().sum(dim=1, keepdim=True)
    true = torch.cdist(queries.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    for column in range(400):
        assert (true[:, column] >= bound_unseen(computed[:, column].double(), queries, dtype)).all()


def test_the_bound_is_tight_where_the_numbers_are_ordinary() -> None:
    queries = torch.ones(1, 32)
    bound = float(bound_unseen(torch.tensor([4.0], dtype=torch.float64), queries, torch.float32))
    assert 3.999 < bound < 4.0


def test_matrix_products_are_not_left_to_lower_precision() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_auto_is_the_tiled_engine() -> None:
    points, codes = draw_points(20)
    assert isinstance(NeighborSearch(points, codes, 3, "auto", CPU)._engine, TiledEngine)
