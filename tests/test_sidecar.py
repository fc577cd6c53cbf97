"""The mapped copy of a merged split: made once, remade when the parquet changes, never half there."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError, PipelineError
from pipeline.files import sidecar, tables
from pipeline.files.tables import read_batches
from pipeline.retrieval.features import load_features


def write_split(folder: Path, count: int = 40, width: int = 8, seed: int = 0, **options: object) -> np.ndarray:
    """Write `folder/train.parquet` as stage 3 does and return its embeddings."""
    values = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    table = pa.table(
        {
            "streetview_image_id": [f"0001_{row}" for row in range(count)],
            "building_id": [f"0001_{row // 4}" for row in range(count)],
            "dataset_id": np.ones(count, np.int64),
            "street_view_id": np.arange(count),
            "target_lat": np.linspace(52, 53, count),
            "target_lon": np.linspace(0, 1, count),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width),
        }
    )
    folder.mkdir(exist_ok=True)
    with tables.parquet_writer(folder / "train.parquet", table.schema, {"stage": "merge_and_split"}) as writer:
        writer.write_table(table, **options)
    return values


def list_sidecars(folder: Path) -> list[Path]:
    return sorted((folder / sidecar.FOLDER).iterdir())


def test_embeddings_are_mapped_read_only_and_equal_the_parquet(tmp_path: Path) -> None:
    values = write_split(tmp_path)
    found = load_features(tmp_path / "train.parquet")
    assert isinstance(found.embeddings, np.memmap)
    assert found.embeddings.dtype == np.float32
    np.testing.assert_array_equal(found.embeddings, values)
    with pytest.raises(ValueError, match="read-only"):
        found.embeddings[0, 0] = 1
    for column in (found.building_codes, found.target_lat, found.street_view_ids):
        assert not column.flags.writeable


def test_a_second_opening_decodes_nothing_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_split(tmp_path)
    first = load_features(tmp_path / "train.parquet")
    monkeypatch.setattr(sidecar, "_make", lambda *_: pytest.fail("made again"))
    second = load_features(tmp_path / "train.parquet")
    np.testing.assert_array_equal(first.embeddings, second.embeddings)
    assert first.image_ids.equals(second.image_ids)
    assert first.building_ids.equals(second.building_ids)
    np.testing.assert_array_equal(first.building_codes, second.building_codes)


def test_opening_takes_no_memory_that_grows_with_the_rows(tmp_path: Path) -> None:
    write_split(tmp_path, count=20_000)
    load_features(tmp_path / "train.parquet")
    before = pa.total_allocated_bytes()
    found = load_features(tmp_path / "train.parquet")
    assert len(found) == 20_000
    assert pa.total_allocated_bytes() - before < 10_000


def test_another_parquet_gets_another_sidecar_and_the_old_one_goes(tmp_path: Path) -> None:
    write_split(tmp_path)
    old = load_features(tmp_path / "train.parquet")
    before = list_sidecars(tmp_path)
    kept = np.array(old.embeddings)
    values = write_split(tmp_path, count=44, seed=1)
    np.testing.assert_array_equal(load_features(tmp_path / "train.parquet").embeddings, values)
    assert len(before) == len(list_sidecars(tmp_path)) == 1
    assert before != list_sidecars(tmp_path)
    np.testing.assert_array_equal(old.embeddings, kept)  # whoever has it mapped keeps it


def test_a_copied_folder_needs_no_new_sidecar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = write_split(tmp_path / "a")
    load_features(tmp_path / "a" / "train.parquet")
    (tmp_path / "a").rename(tmp_path / "b")
    os.utime(tmp_path / "b" / "train.parquet", (1, 1))
    monkeypatch.setattr(sidecar, "_make", lambda *_: pytest.fail("made again"))
    np.testing.assert_array_equal(load_features(tmp_path / "b" / "train.parquet").embeddings, values)


@pytest.mark.parametrize("name", ["embeddings.npy", "ids.arrow"])
@pytest.mark.parametrize("content", [None, b"", b"\x93NUMPY damaged"])
def test_a_sidecar_that_is_cut_short_is_made_again(tmp_path: Path, name: str, content: bytes | None) -> None:
    values = write_split(tmp_path)
    load_features(tmp_path / "train.parquet")
    (folder,) = list_sidecars(tmp_path)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    np.testing.assert_array_equal(load_features(tmp_path / "train.parquet").embeddings, values)


def test_a_kill_half_way_leaves_nothing_that_is_taken_for_a_sidecar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = write_split(tmp_path)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pa.ipc, "new_file", die)
        with pytest.raises(KeyboardInterrupt):
            load_features(tmp_path / "train.parquet")
    assert list_sidecars(tmp_path) == []
    np.testing.assert_array_equal(load_features(tmp_path / "train.parquet").embeddings, values)


def test_where_the_folder_cannot_be_written_a_copy_serves_this_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    values = write_split(tmp_path / "merged")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(sidecar.tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(sidecar.os, "access", lambda *_: False)
    with caplog.at_level("WARNING", "spatial_building_embeddings"):
        found = load_features(tmp_path / "merged" / "train.parquet")
    assert f"{tmp_path}/merged cannot be written: the copy in {tmp_path}/scratch serves this run" in caplog.text
    np.testing.assert_array_equal(found.embeddings, values)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["train.parquet"]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_full_disk_is_one_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_split(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", refuse)
    with pytest.raises(PipelineError, match="cannot write .*No space left on device.*free space"):
        load_features(tmp_path / "train.parquet")
    assert list_sidecars(tmp_path) == []


def test_a_bad_row_far_behind_is_named_and_leaves_no_sidecar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "_BATCH_NUMBERS", 8 * 7)
    values = write_split(tmp_path)
    table = pq.read_table(tmp_path / "train.parquet").drop_columns(["embedding"])
    values[33] = 0
    table = table.append_column("embedding", pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 8))
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=9)
    with pytest.raises(InputError, match="the embedding of image 0001_33 is not finite or all zero"):
        load_features(tmp_path / "train.parquet")
    assert list_sidecars(tmp_path) == []


@pytest.mark.parametrize("row_group_size", [1, 9, 100])
def test_batches_come_in_order_whatever_the_row_groups(tmp_path: Path, row_group_size: int) -> None:
    values = write_split(tmp_path, row_group_size=row_group_size)
    batches = list(read_batches(tmp_path / "train.parquet", ["embedding", "target_lat"], 4))
    assert max(len(batch) for batch in batches) <= 4
    assert {tuple(batch.schema.names) for batch in batches} == {("embedding", "target_lat")}
    found = np.concatenate([batch.column(0).flatten().to_numpy() for batch in batches])
    np.testing.assert_array_equal(found.reshape(-1, 8), values)


def test_reading_batches_keeps_no_row_group_behind(tmp_path: Path) -> None:
    write_split(tmp_path, count=6000, width=256, row_group_size=100)
    held = []
    before = pa.total_allocated_bytes()
    for batch in read_batches(tmp_path / "train.parquet", ["embedding"], 100):
        assert len(batch)
        held.append(pa.total_allocated_bytes() - before)
    assert max(held) < 10 * 100 * 256 * 4
