import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fingerprint_data import draw_table, write_run

from difficulty_metadata import compute_visual_neighbors
from difficulty_metadata.compute_visual_neighbors import main
from difficulty_metadata.neighbor_search import neighbor_parts
from difficulty_metadata.neighbor_search.neighbor_parts import PartStore
from pipeline.ids import Shard


@pytest.fixture
def make_run(tmp_path: Path, write_config: Callable[..., Path]) -> Callable[..., tuple[Path, Path]]:
    return partial(write_run, tmp_path, write_config)


def test_the_shards_parts_hold_every_row_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(neighbor_parts, "PART_ANCHORS", 4)
    for num_anchors in (1, 7, 24, 25):
        store = PartStore(tmp_path, num_anchors, 3, {})
        for count in (1, 2, 5, 30):
            shards = [Shard(index, count).take(list(store.parts)) for index in range(count)]
            rows = [store.anchors(part) for parts in shards for part in parts]
            assert sorted(np.concatenate(rows).tolist()) == list(range(num_anchors))
            assert all(0 < len(part) <= 4 for part in rows)


def test_parts_come_back_as_they_were_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(neighbor_parts, "PART_ANCHORS", 4)
    rows = np.arange(50).reshape(25, 2)
    distances = rows.astype(np.float32) / 7
    distances[5, 1] = np.inf
    store = PartStore(tmp_path, 25, 2, {"stage": "x"})
    for part in store.parts:
        anchors = store.anchors(part)
        store.write(part, rows[anchors], distances[anchors])
    assert (np.concatenate([store.read(part, "distances") for part in store.parts]) == distances).all()
    assert (np.concatenate([store.read(part, "rows") for part in store.parts]) == rows).all()


def search_whole(run_main: Callable, config: Path, output: Path, *options: str) -> bytes:
    """Return the output of a process that finds all neighbours, and remove it."""
    assert run_main(main, "--config", config, *options).code == 0
    whole = output.read_bytes()
    output.unlink()
    return whole


@pytest.mark.parametrize("backend", ["auto", "torch", "balltree"])
@pytest.mark.parametrize("num_shards", [2, 3, 7])
def test_shards_together_give_the_bytes_of_one_process(
    num_shards: int, backend: str, make_run: Callable, run_main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbor_parts, "PART_ANCHORS", 11)
    monkeypatch.setattr(compute_visual_neighbors, "MAX_NEIGHBORS_PER_GROUP", 12 * 7)
    config, output = make_run(draw_table(90))
    whole = search_whole(run_main, config, output, "--set", "difficulty.backend=torch")
    order = np.random.default_rng(num_shards).permutation(num_shards).tolist()
    for number, index in enumerate(order):
        assert not output.exists()
        shard = ("--shard", f"{index}/{num_shards}", "--set", f"difficulty.backend={backend}")
        outcome = run_main(main, "--config", config, *shard)
        assert outcome.code == 0
        if number < num_shards - 1:
            assert f"the last of the {num_shards} shards will write {output}" in outcome.stderr
            assert all(Path(line).parent.name == "_difficulty_parts" for line in outcome.stdout.splitlines())
    assert output.read_bytes() == whole
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "config.toml", "difficulty.parquet", "fingerprints", "logs",
    ]  # fmt: skip


def test_parts_searched_together_give_the_same_bytes(
    make_run: Callable, run_main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbor_parts, "PART_ANCHORS", 11)
    config, output = make_run(draw_table(90))
    whole = search_whole(run_main, config, output)
    monkeypatch.setattr(compute_visual_neighbors, "PARTS_AT_ONCE", {"cpu": 3})
    assert run_main(main, "--config", config).code == 0
    assert output.read_bytes() == whole


def test_more_shards_than_images_are_no_trouble(make_run: Callable, run_main: Callable) -> None:
    config, output = make_run(draw_table(3, images_per_building=1))
    for index in range(5):
        assert run_main(main, "--config", config, "--shard", f"{index}/5").code == 0
    assert pq.read_table(output).num_rows == 3


def test_a_late_shard_keeps_the_merged_output(make_run: Callable, run_main: Callable) -> None:
    config, output = make_run(draw_table(40))
    assert run_main(main, "--config", config).code == 0
    outcome = run_main(main, "--config", config, "--shard", "1/2")
    assert outcome.code == 0
    assert f"kept {output}" in outcome.stderr


def test_a_shard_that_is_done_is_kept(make_run: Callable, run_main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbor_parts, "PART_ANCHORS", 20)
    config, _ = make_run(draw_table(40))
    assert run_main(main, "--config", config, "--shard", "1/2").stdout
    outcome = run_main(main, "--config", config, "--shard", "1/2")
    assert (outcome.code, outcome.stdout) == (0, "")
    assert "20 in = 20 out + 0 rejected + 0 dropped; 0 written, 1 kept" in outcome.stderr


def test_an_interrupted_search_goes_on_from_its_last_part(
    make_run: Callable, run_main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbor_parts, "PART_ANCHORS", 10)
    config, output = make_run(draw_table(45))
    whole = search_whole(run_main, config, output)
    made: list[int] = []
    limit = 2
    write = PartStore.write

    def write_up_to_limit(store: PartStore, part: int, *arrays: np.ndarray) -> None:
        if len(made) == limit:
            raise KeyboardInterrupt
        made.append(part)
        write(store, part, *arrays)

    monkeypatch.setattr(PartStore, "write", write_up_to_limit)
    assert run_main(main, "--config", config).code == 130
    assert not output.exists()
    assert len(list((output.parent / "_difficulty_parts").iterdir())) == 2
    limit = 5
    assert run_main(main, "--config", config).code == 0
    assert made == [0, 1, 2, 3, 4]
    assert output.read_bytes() == whole


def test_an_interrupted_search_goes_on_with_another_number_of_shards(
    make_run: Callable, run_main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbor_parts, "PART_ANCHORS", 10)
    config, output = make_run(draw_table(45))
    whole = search_whole(run_main, config, output)
    assert len(run_main(main, "--config", config, "--shard", "1/2").stdout.splitlines()) == 2
    outcome = run_main(main, "--config", config)
    assert " for 3 parts: " in outcome.stderr
    assert output.read_bytes() == whole


def test_parts_of_other_settings_are_refused_and_overwritten(
    make_run: Callable, run_main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbor_parts, "PART_ANCHORS", 20)
    config, output = make_run(draw_table(40))
    run_main(main, "--config", config, "--shard", "0/2")
    changed = ("--config", config, "--set", "difficulty.neighbors=9")
    for shard in ("0/2", "1/2"):
        outcome = run_main(main, *changed, "--shard", shard)
        assert outcome.code == 1
        assert "000000.parquet: made from other inputs or settings" in outcome.stderr
        assert "neighbors was 12 and is now 9" in outcome.stderr
    # The last of them finds another's stale part: it waits for that shard to be made again.
    assert run_main(main, *changed, "--shard", "1/2", "--overwrite").code == 0
    assert not output.exists()
    assert run_main(main, *changed, "--shard", "0/2", "--overwrite").code == 0
    assert len(pq.read_table(output)["neighbor_bands"][20]) == 9


@pytest.mark.parametrize("moment", ["unit", "read"])
def test_parts_that_another_process_has_merged_meanwhile_are_no_failure(
    moment: str, make_run: Callable, run_main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, output = make_run(draw_table(40))
    run_main(main, "--config", config)
    finished = output.read_bytes()
    output.unlink()
    method = getattr(PartStore, moment)

    def be_overtaken(store: PartStore, *arguments: object) -> object:
        if store.path(0).exists():  # it is made, and the question is whether all are
            output.write_bytes(finished)
            shutil.rmtree(store.folder)
        return method(store, *arguments)

    monkeypatch.setattr(PartStore, moment, be_overtaken)
    outcome = run_main(main, "--config", config)
    assert outcome.code == 0
    assert f"kept {output}" in outcome.stderr
    assert output.read_bytes() == finished


def cut_the_end(content: bytes) -> bytes:
    return content[:-100]


def wipe_the_beginning(content: bytes) -> bytes:
    return content[:4] + bytes(400) + content[404:]


def flip_a_bit_of_a_number(content: bytes) -> bytes:
    return content[:500] + bytes([content[500] ^ 1]) + content[501:]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (cut_the_end, "not a readable parquet file"),
        (wipe_the_beginning, "damaged"),
        (flip_a_bit_of_a_number, "damaged"),
    ],
)
def test_a_damaged_part_is_named_with_the_remedy(
    damage: Callable[[bytes], bytes],
    problem: str,
    make_run: Callable,
    run_main: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(neighbor_parts, "PART_ANCHORS", 20)
    config, output = make_run(draw_table(40))
    run_main(main, "--config", config, "--shard", "0/2")
    (part,) = (output.parent / "_difficulty_parts").iterdir()
    part.write_bytes(damage(part.read_bytes()))
    outcome = run_main(main, "--config", config, "--shard", "1/2")
    assert outcome.code == 1
    assert f"error: {part}: {problem}" in outcome.stderr
    assert "remove it" in outcome.stderr
    part.unlink()
    for shard in ("0/2", "1/2"):
        assert run_main(main, "--config", config, "--shard", shard).code == 0
    assert output.exists()
