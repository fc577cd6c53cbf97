"""Rows of one building together, in memory that the configuration sets."""

import dataclasses
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from embedding_files import SIZES, make_rows, write

from pipeline.config import load_config
from preprocess_raw_data import merge_and_split
from preprocess_raw_data.merging import embedding_rows
from preprocess_raw_data.merging.embedding_rows import take_inventory
from preprocess_raw_data.merging.splits import SPLITS


@pytest.mark.parametrize("over_two_files", [False, True])
def test_in_several_passes_comes_the_same_as_in_one(tmp_path, write_config, monkeypatch, over_two_files):
    monkeypatch.setattr(merge_and_split, "ROW_GROUP_ROWS", 50)
    monkeypatch.setattr(embedding_rows, "BATCH_ROWS", 17)
    paths = [write(tmp_path, dataset, make_rows(dataset, SIZES, mixed=True)) for dataset in (1, 2, 3)]
    if over_two_files:
        table = make_rows(4, [2, 3])
        names = pa.array(["0001_1", "0002_2", "0003_3", "0001_1", "0009_9"])
        table = table.set_column(table.schema.get_field_index("building_id"), "building_id", names)
        paths.append(write(tmp_path, 4, table))
    inventory = take_inventory(paths)
    results = []
    for rows_at_a_time in (10_000, 100, 20, 1):
        folder = tmp_path / str(rows_at_a_time)
        config = load_config(write_config(tmp_path, paths={"merged_dir": str(folder)}, data={"memory_mb": 16}))
        sized = dataclasses.replace(inventory, row_bytes=16 * 1024**2 // rows_at_a_time)
        splits, provenances = merge_and_split.plan_splits(sized, {"stage": "x"}, config)
        merge_and_split.write_splits(sized, splits, provenances, config)
        assert sorted(path.name for path in folder.iterdir()) == ["test.parquet", "train.parquet", "val.parquet"]
        results.append([(folder / f"{split}.parquet").read_bytes() for split in SPLITS])
    assert all(result == results[0] for result in results[1:])


def test_pieces_stay_as_small_as_asked_but_for_one_building(tmp_path):
    inventory = take_inventory([write(tmp_path, 1, make_rows(1, [5] * 100, mixed=True))])
    keep = np.ones(100, bool)
    for rows_at_a_time in (1, 7, 40):
        pieces = list(embedding_rows.read_by_building(inventory, keep, rows_at_a_time))
        assert sum(len(order) for _, order, _ in pieces) == 500
        assert max(len(piece.embeddings) for piece, _, _ in pieces) < rows_at_a_time + 5
        for piece, order, codes in pieces:
            names = piece.take(order, inventory.schema)["building_id"].to_pylist()
            assert [inventory.buildings.ids[code].as_py() for code in codes] == names


def test_a_file_is_read_once_unless_it_is_large_or_shares_a_building(tmp_path, monkeypatch):
    paths = [write(tmp_path, dataset, make_rows(dataset, [3, 3])) for dataset in (1, 2, 3, 4)]
    table = make_rows(5, [2, 2])
    names = pa.array(["0002_1", "0005_7", "0004_2", "0005_7"])
    table = table.set_column(table.schema.get_field_index("building_id"), "building_id", names)
    paths.append(write(tmp_path, 5, table))
    read, read_rows = [], embedding_rows.read_rows
    monkeypatch.setattr(
        embedding_rows, "read_rows", lambda column, *rest: read.append(column.path) or read_rows(column, *rest)
    )
    inventory = take_inventory(paths)
    keep = np.ones(len(inventory.buildings), bool)
    pieces = list(embedding_rows.read_by_building(inventory, keep, 8))
    assert [len(order) for _, order, _ in pieces] == [6, 7, 6, 7, 2]
    assert [path.name[:4] for path in read] == ["0001", "0002", "0005", "0003", "0004", "0005", "0005"]
    assert len({code for _, _, codes in pieces for code in set(codes.tolist())}) == 9
    assert [len(order) for _, order, _ in embedding_rows.read_by_building(inventory, keep, 20)] == [19, 9]


@pytest.mark.parametrize("num_files", [1, 8])
def test_memory_does_not_grow_with_the_number_of_embeddings(tmp_path, write_config, monkeypatch, num_files):
    monkeypatch.setattr(merge_and_split, "ROW_GROUP_ROWS", 500)
    merged = str(tmp_path / "merged")
    config = load_config(write_config(tmp_path, paths={"merged_dir": merged}, data={"memory_mb": 16}))
    peaks = []
    for count in (8_000, 32_000):  # 8 and 32 MB
        sizes = [4] * (count // 4 // num_files)
        paths = [write(tmp_path, number, make_rows(number, sizes, 256, mixed=True)) for number in range(num_files)]
        inventory = dataclasses.replace(take_inventory(paths), row_bytes=16 * 1024**2 // 1000)
        splits, provenances = merge_and_split.plan_splits(inventory, {"stage": "x"}, config)
        before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
        pa.set_memory_pool(pool)
        tracemalloc.start()
        try:
            merge_and_split.write_splits(inventory, splits, provenances, config)
            peaks.append(pool.max_memory() + tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
            pa.set_memory_pool(before)
    assert peaks[1] < 1.2 * peaks[0] + 3 * 2**20
