import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fingerprint_data import COMPONENTS, K0, WIDTH, K, draw_table, write_run

from difficulty_metadata.compute_visual_neighbors import draw_sample, main


@pytest.fixture
def make_run(tmp_path: Path, write_config: Callable[..., Path]) -> Callable[..., tuple[Path, Path]]:
    return partial(write_run, tmp_path, write_config)


def read_provenance(path: Path) -> Any:
    return json.loads(pq.read_schema(path).metadata[b"spatial_building_embeddings"])


def compute_slowly(tables: list[pa.Table], k: int, k0: int, num_components: int) -> tuple[list[dict], list[float]]:
    """The stage in the plainest form: numpy's SVD, sorting, and percentiles over all images."""
    rows = [row for table in tables for row in table.to_pylist()]
    values = np.array([row["fingerprint"] for row in rows]) / 255.0
    _, _, directions = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    points = (values - values.mean(axis=0)) @ directions[:num_components].T
    expected, ratios_of_all = [], []
    for anchor in rows:
        place = len(expected)
        distances = np.linalg.norm(points - points[place], axis=1)
        order = [
            other
            for other in sorted(range(len(rows)), key=lambda other: (round(distances[other], 6), other))
            if rows[other]["building_id"] != anchor["building_id"]
        ][:k]
        scale = distances[order[min(k0, len(order)) - 1]]
        ratios = distances[order] / scale
        ratios_of_all += ratios.tolist()
        buildings = [rows[other]["building_id"] for other in order]
        expected.append({"id": anchor["streetview_image_id"], "distances": distances[order], "buildings": buildings,
                         "ratios": ratios})  # fmt: skip
    return expected, np.percentile(ratios_of_all, [5, 10, 20, 40, 60, 85]).tolist()


def test_the_output_is_the_slowly_computed_one(make_run: Callable, run_main: Callable) -> None:
    tables = [draw_table(90), draw_table(61, dataset_id=2)]
    config, output = make_run(*tables)
    outcome = run_main(main, "--config", config)
    assert outcome.code == 0
    assert outcome.stdout == f"{output}\n"
    assert "compute_visual_neighbors: 151 in = 151 out + 0 rejected + 0 dropped" in outcome.stderr
    found = pq.read_table(output)
    assert found.schema.remove_metadata() == pa.schema(
        [
            ("target_coord_hash", pa.string()),
            ("neighbor_building_ids", pa.list_(pa.string())),
            ("neighbor_distances_meters", pa.list_(pa.float32())),
            ("neighbor_bands", pa.list_(pa.int32())),
        ]
    )
    expected, edges = compute_slowly(tables, K, K0, COMPONENTS)
    assert read_provenance(output)["band_edges"] == pytest.approx(edges, rel=1e-4)
    assert found["target_coord_hash"].to_pylist() == [row["id"] for row in expected]
    for row, wanted in zip(found.to_pylist(), expected, strict=True):
        assert row["neighbor_building_ids"] == wanted["buildings"]
        assert row["neighbor_distances_meters"] == pytest.approx(wanted["distances"], rel=1e-4, abs=1e-5)


def test_bands_follow_from_the_distances_and_edges_in_the_file(make_run: Callable, run_main: Callable) -> None:
    config, output = make_run(draw_table(120))
    run_main(main, "--config", config)
    edges = read_provenance(output)["band_edges"]
    for row in pq.read_table(output).to_pylist():
        distances = row["neighbor_distances_meters"]
        scale = distances[K0 - 1]
        by_hand = [sum(edge <= distance / scale for edge in edges) for distance in distances]
        assert row["neighbor_bands"] == by_hand
        assert distances == sorted(distances)


def test_a_rerun_keeps_the_output_and_says_so(make_run: Callable, run_main: Callable) -> None:
    config, output = make_run(draw_table(40))
    run_main(main, "--config", config)
    before = output.read_bytes(), output.stat().st_mtime_ns
    outcome = run_main(main, "--config", config, "--set", "difficulty.backend=balltree")
    assert (outcome.code, outcome.stdout) == (0, "")
    assert f"kept {output}, which is complete" in outcome.stderr
    assert "40 in = 40 out" in outcome.stderr
    assert (output.read_bytes(), output.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    ("setting", "difference"),
    [
        ("difficulty.neighbors=9", "neighbors was 12 and is now 9"),
        ("difficulty.k0_for_local_scale=3", "k0_for_local_scale was 5 and is now 3"),
        ("difficulty.sample_fraction_for_bands=0.5", "sample_fraction_for_bands was 1.0 and is now 0.5"),
        ("difficulty.pca_components=4", "pca_components was 6 and is now 4"),
        ("difficulty.exclude_within_m=10.0", "exclude_within_m was 0.0 and is now 10.0"),
        ("global.seed=7", "seed was 42 and is now 7"),
    ],
)
def test_other_settings_are_refused_by_name(
    setting: str, difference: str, make_run: Callable, run_main: Callable
) -> None:
    config, output = make_run(draw_table(40))
    run_main(main, "--config", config)
    before = output.read_bytes()
    outcome = run_main(main, "--config", config, "--set", setting)
    assert outcome.code == 1
    assert f"error: {output}: made from other inputs or settings ({difference})" in outcome.stderr
    assert "--overwrite" in outcome.stderr
    assert output.read_bytes() == before
    assert run_main(main, "--config", config, "--set", setting, "--overwrite").code == 0
    assert output.read_bytes() != before
    bare = ("--set", "paths.difficulty_metadata_path=bare")  # a parquet, though its name does not say so
    assert [run_main(main, "--config", config, *bare, *own).code for own in ((), (), ("--set", setting))] == [0, 0, 1]


def test_another_fingerprint_file_is_refused_by_name(make_run: Callable, run_main: Callable) -> None:
    config, _ = make_run(draw_table(40))
    run_main(main, "--config", config)
    make_run(draw_table(40), draw_table(40, dataset_id=2))
    outcome = run_main(main, "--config", config)
    assert outcome.code == 1
    assert "input 0002_fingerprints.parquet was not among its inputs" in outcome.stderr


# ------------------------------------------------------------------------------------------------ degenerate inputs


def read_lists(path: Path) -> list[tuple[list, list, list]]:
    return [tuple(row.values())[1:] for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("backend", ["auto", "torch", "balltree"])
@pytest.mark.parametrize("num_images", [1, 30])
def test_without_a_second_building_every_list_is_empty(
    num_images: int, backend: str, make_run: Callable, run_main: Callable
) -> None:
    config, output = make_run(draw_table(num_images, images_per_building=100), backend=backend)
    outcome = run_main(main, "--config", config)
    assert outcome.code == 0
    assert "no image of the sample has a neighbour" in outcome.stderr
    assert read_lists(output) == [([], [], [])] * num_images
    assert read_provenance(output)["band_edges"] == [1.0] * 6


def test_images_that_are_all_the_same_are_hardest_for_each_other(make_run: Callable, run_main: Callable) -> None:
    table = draw_table(6, images_per_building=2)
    same = pa.FixedSizeListArray.from_arrays(pa.array(np.full(6 * WIDTH, 7, dtype=np.uint8)), WIDTH)
    config, output = make_run(table.set_column(4, table.schema.field(4), same))
    outcome = run_main(main, "--config", config)
    assert outcome.code == 0
    assert "PCA: 1 of 48 dimensions" in outcome.stderr
    b0, b1, b2 = (f"0001_{building}" for building in range(3))
    assert [ids for ids, _, _ in read_lists(output)] == [[b1, b1, b2, b2]] * 2 + [[b0, b0, b2, b2]] * 2 + [
        [b0, b0, b1, b1]
    ] * 2
    assert all(distances == [0.0] * 4 and bands == [0] * 4 for _, distances, bands in read_lists(output))


def test_fewer_images_than_neighbours_give_shorter_lists(make_run: Callable, run_main: Callable) -> None:
    config, output = make_run(draw_table(8, images_per_building=2), k0_for_local_scale=50)
    assert run_main(main, "--config", config).code == 0
    for ids, distances, bands in read_lists(output):
        assert len(ids) == len(distances) == len(bands) == 6


def test_more_components_than_there_are_is_said_and_done(make_run: Callable, run_main: Callable) -> None:
    config, output = make_run(draw_table(9, images_per_building=2), pca_components=32)
    outcome = run_main(main, "--config", config)
    assert outcome.code == 0
    assert re.search(r"PCA: \d+ of 48 dimensions", outcome.stderr)
    assert output.exists()


def test_targets_within_the_exclusion_are_no_neighbours(make_run: Callable, run_main: Callable) -> None:
    # Buildings stand 1e-4 degrees of latitude apart, which is 11.1 m: 40 m leaves out three on either side.
    config, output = make_run(draw_table(80), exclude_within_m=40.0)
    assert run_main(main, "--config", config).code == 0
    for row, (ids, _, _) in enumerate(read_lists(output)):
        assert len(ids) == K
        assert all(abs(int(building.split("_")[1]) - row // 4) > 3 for building in ids)


def test_an_empty_file_among_others_adds_nothing(make_run: Callable, run_main: Callable) -> None:
    config, output = make_run(draw_table(40), draw_table(40).slice(0, 0))
    assert run_main(main, "--config", config).code == 0
    assert pq.read_table(output).num_rows == 40


def test_large_strings_and_hidden_files_are_no_trouble(make_run: Callable, run_main: Callable) -> None:
    table = draw_table(40)
    config, output = make_run(table.set_column(1, "building_id", table["building_id"].cast(pa.large_string())))
    (output.parent / "fingerprints" / ".0009_fingerprints.parquet").write_bytes(b"half written")
    assert run_main(main, "--config", config).code == 0
    assert pq.read_schema(output).field("neighbor_building_ids").type == pa.list_(pa.string())


def test_the_sample_is_drawn_from_the_seed_and_has_its_size() -> None:
    assert draw_sample(400_000, 0.05, 42).sum() == 20_000
    assert draw_sample(30_000, 0.05, 42).sum() == 10_000
    assert draw_sample(9_000, 0.05, 42).all()
    assert draw_sample(30_000, 1.0, 42).all()
    assert (draw_sample(30_000, 0.05, 42) == draw_sample(30_000, 0.05, 42)).all()
    assert (draw_sample(30_000, 0.05, 42) != draw_sample(30_000, 0.05, 43)).any()


@pytest.mark.parametrize("where", ["_make_engine", "find"])
def test_a_gpu_too_small_for_the_search_is_one_line_with_its_remedy(
    where: str, make_run: Callable, run_main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from difficulty_metadata.neighbor_search.neighbors import NeighborSearch

    def refuse(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    config, output = make_run(draw_table(40))
    with monkeypatch.context() as patch:
        patch.setattr(NeighborSearch, where, refuse)
        outcome = run_main(main, "--config", config)
    assert (outcome.code, output.exists()) == (1, False)
    assert outcome.stderr.splitlines()[-1] == (
        "error: the GPU cannot hold the search among 40 images: end what else runs on it (nvidia-smi), or set "
        "[infrastructure].device to cpu"
    )
    assert run_main(main, "--config", config).code == 0


def test_the_command_line_ends_with_its_codes_and_prints_what_was_written(
    make_run: Callable, run_main: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, output = make_run(draw_table(40))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    outcome = run_main(main, "--config", config)
    assert (outcome.code, outcome.stdout) == (0, f"{output}\n")
    kept = run_main(main, "--config", config)
    assert (kept.code, kept.stdout) == (0, "")
    refused = run_main(main, "--config", config, "--set", "difficulty.neighbors=2")
    assert refused.code == 1
    assert "Traceback" not in refused.stderr
    assert run_main(main, "--config", config, "--set", "difficulty.neighbours=2").code == 2
    assert run_main(main, "--help").stdout.startswith("Stage 5: ")
    assert not list(elsewhere.iterdir())


def test_a_kept_output_costs_no_heavy_import(make_run: Callable, run_main: Callable, run_script: Callable) -> None:
    config, _ = make_run(draw_table(40))
    run_main(main, "--config", config)
    outcome = run_script(
        "difficulty_metadata/compute_visual_neighbors.py", "--config", config, PYTHONPROFILEIMPORTTIME="1"
    )
    assert outcome.code == 0
    imported = {line.split("|")[-1].strip() for line in outcome.stderr.splitlines() if line.startswith("import time")}
    assert "pyarrow" in imported
    assert not imported & {"torch", "sklearn", "faiss", "scipy"}
