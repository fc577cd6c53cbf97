"""Stage 3: merging, dropping, splitting and grouping, in memory and through the disk."""

import shutil
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_files import SETTINGS, SIZES, make_rows, place_of, read_splits, stage_3, write

from pipeline import workspace
from pipeline.config import DataSection
from pipeline.errors import StaleOutputError
from pipeline.files import tables
from pipeline.files.identity import identify
from pipeline.retrieval.features import check_one_run
from preprocess_raw_data.merge_and_split import UNFINISHED
from preprocess_raw_data.merging.splits import SPLITS, choose_split, read_split_file


@pytest.fixture
def stage(tmp_path, write_config, run_main):
    return stage_3(run_main, write_config(tmp_path))


@pytest.fixture
def city(tmp_path):
    """Three files of sixty buildings with one to five images each."""
    return {dataset: make_rows(dataset, SIZES, mixed=dataset == 2) for dataset in (1, 2, 3)} | {
        "paths": [write(tmp_path, dataset, make_rows(dataset, SIZES, mixed=dataset == 2)) for dataset in (1, 2, 3)]
    }


def test_every_row_is_in_one_split_or_dropped_as_a_single_and_unchanged(tmp_path, stage, city):
    outcome = stage()
    assert outcome.code == 0
    assert outcome.stdout.splitlines() == [f"{tmp_path}/merged/{split}.parquet" for split in SPLITS]
    expected = {}
    for dataset in (1, 2, 3):
        rows = city[dataset].drop_columns(["image_path", "tar_file"]).to_pylist()
        images = Counter(row["building_id"] for row in rows)
        expected |= {row["streetview_image_id"]: row for row in rows if images[row["building_id"]] >= 2}
    found = {}
    for split, table in read_splits(tmp_path).items():
        assert table.schema.names == [name for name in city[1].schema.names if name not in ("image_path", "tar_file")]
        for row in table.to_pylist():
            assert row["streetview_image_id"] not in found
            found[row["streetview_image_id"]] = row
            data = DataSection()
            assert SPLITS[choose_split(42, row["building_id"], data)] == split
    assert found == expected
    singles = SIZES.count(1) * 3
    total = sum(SIZES) * 3
    line = f"{total} in = {total - singles} out + 0 rejected + {singles} dropped (single_image {singles})"
    assert line in outcome.stderr.splitlines()[-1]


def test_rows_are_grouped_by_building_and_keep_their_order_inside(tmp_path, stage, city):
    stage()
    for table in read_splits(tmp_path).values():
        buildings = table["building_id"].to_pylist()
        changes = 1 + sum(before != after for before, after in zip(buildings, buildings[1:], strict=False))
        assert changes == len(set(buildings)) > 1
        for building in set(buildings):
            mask = pa.array([name == building for name in buildings])
            patches = table.filter(mask)["patch_id"].to_pylist()
            assert patches == sorted(patches)


def test_provenance_says_counts_and_who_is_where(tmp_path, stage, city):
    stage()
    found = [tables.read_provenance(tmp_path / "merged" / f"{split}.parquet") for split in SPLITS]
    assert [provenance["split"] for provenance in found] == list(SPLITS)
    assert sum(provenance["rows"] for provenance in found) == found[0]["counts"]["out"]
    assert {str(one["embedded_with"]) + one["split_hash"] for one in found} == {str(SETTINGS) + found[0]["split_hash"]}
    assert [item["name"] for item in found[0]["inputs"]] == [path.name for path in city["paths"]]


def test_new_tars_never_move_old_buildings(tmp_path, stage, city):
    stage()
    before = place_of(tmp_path)
    write(tmp_path, 4, make_rows(4, SIZES))
    assert stage("--overwrite").code == 0
    after = place_of(tmp_path)
    assert len(after) > len(before)
    assert {building: after[building] for building in before} == before


def test_a_split_file_wins_for_those_it_names_and_its_hash_is_recorded(tmp_path, stage, city):
    stage()
    before = place_of(tmp_path)
    moved = {building: SPLITS[number % 3] for number, building in enumerate(sorted(before)[::4])}
    (tmp_path / "old.csv").write_text(
        "\n".join(["building_id,split", *map(",".join, moved.items()), "9999_1,test", ""])
    )
    outcome = stage("data.split_file=old.csv")
    assert outcome.code == 1  # another split is not taken for the old one
    assert "split_file was None and is now" in outcome.stderr
    assert stage("data.split_file=old.csv", "--overwrite").code == 0
    assert place_of(tmp_path) == before | moved
    assert tables.read_provenance(tmp_path / "merged" / "val.parquet")["settings"]["split_file"]
    assert stage("data.split_file=old.csv").stderr.count("nothing redone") == 1
    pq.write_table(pa.table({"split": list(moved.values()), "building_id": list(moved)}), tmp_path / "old.parquet")
    assert stage("data.split_file=old.parquet", "--overwrite").code == 0
    assert place_of(tmp_path) == before | moved


def test_a_building_over_two_files_is_one_building(tmp_path, stage):
    first, second = make_rows(1, [2, 1, 1]), make_rows(1, [1, 1, 3])
    renamed = pa.array([f"0001_{patch}" for patch in range(100, 105)])
    second = second.set_column(second.schema.get_field_index("streetview_image_id"), "streetview_image_id", renamed)
    write(tmp_path, 1, first)
    write(tmp_path, 2, second)
    assert stage().code == 0
    images = Counter(
        building for table in read_splits(tmp_path).values() for building in table["building_id"].to_pylist()
    )
    assert images == {"0001_1": 3, "0001_2": 2, "0001_3": 4}
    for table in read_splits(tmp_path).values():
        buildings = table["building_id"].to_pylist()
        assert len(set(buildings)) == sum(1 for a, b in zip([None, *buildings], buildings, strict=False) if a != b)


def test_embeddings_are_split_by_byte_in_the_file(tmp_path, stage, city):
    stage()
    metadata = pq.read_metadata(tmp_path / "merged" / "train.parquet")
    columns = [metadata.row_group(0).column(index) for index in range(metadata.num_columns)]
    (embedding,) = [column for column in columns if column.path_in_schema == "embedding.list.element"]
    assert "BYTE_STREAM_SPLIT" in embedding.encodings
    assert {column.compression for column in columns} == {"ZSTD"}


@pytest.mark.parametrize("where", ["row", "number"])
def test_an_embedding_that_is_missing_is_refused(tmp_path, stage, where):
    table = make_rows(1, [3, 3]).drop_columns("embedding")
    rows = [[1.0, 2.0]] * 6
    rows[4] = None if where == "row" else [1.0, None]
    write(tmp_path, 1, table.append_column("embedding", pa.array(rows, pa.list_(pa.float32(), 2))))
    outcome = stage()
    assert outcome.code == 1
    what = "is empty or has not 2 numbers" if where == "row" else "holds an empty value"
    assert f"0001_embeddings.parquet: column embedding: row 4 {what}" in outcome.stderr


@pytest.mark.parametrize(
    ("second", "settings", "complaint"),
    [
        (make_rows(2, [3, 3], width=9), None, "files before it (embeddings of 9 numbers)"),
        (
            make_rows(2, [3, 3]).set_column(10, "heading", [["x"] * 6]),
            None,
            "heading has incompatible types: double vs string",
        ),
        (make_rows(2, [3, 3]).drop_columns("embedding"), None, "column embedding is missing"),
        (make_rows(2, [3, 3]).drop_columns("target_lat"), None, "column target_lat is missing"),
        (make_rows(2, [3, 3]), SETTINGS | {"model": "other"}, "0001_embeddings.parquet with"),
        (make_rows(1, [3]), None, "image 0001_0 is there more than once, in 0001_embeddings.parquet, 0002_embeddings"),
    ],
)
def test_files_that_cannot_go_together_are_refused_by_name(tmp_path, stage, second, settings, complaint):
    write(tmp_path, 1, make_rows(1, [3, 3]))
    write(tmp_path, 2, second, settings)
    outcome = stage()
    assert outcome.code == 1
    line = outcome.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert complaint in line
    assert "0002_embeddings.parquet" in line
    assert not (tmp_path / "merged").exists()


def test_an_empty_value_is_refused_by_column(tmp_path, stage):
    table = make_rows(1, [3])
    table = table.set_column(table.schema.get_field_index("building_id"), "building_id", pa.array(["a", None, "a"]))
    write(tmp_path, 1, table)
    outcome = stage()
    assert outcome.code == 1
    assert "0001_embeddings.parquet: column building_id has empty values" in outcome.stderr


def test_no_files_and_files_without_rows_are_errors_but_one_empty_file_is_not(tmp_path, stage):
    assert "no such folder: run stage 2" in stage().stderr
    (tmp_path / "embeddings").mkdir()
    assert "holds no *_embeddings.parquet: run stage 2" in stage().stderr
    write(tmp_path, 1, make_rows(1, []))
    outcome = stage()
    assert outcome.code == 1
    assert "its 1 files hold no rows" in outcome.stderr
    write(tmp_path, 2, make_rows(2, [2, 2, 2]))
    assert stage().code == 0


def test_buildings_of_one_image_alone_give_three_empty_files_and_a_warning(tmp_path, stage):
    write(tmp_path, 1, make_rows(1, [1, 1, 1]))
    outcome = stage()
    assert outcome.code == 0
    assert "train is empty" in outcome.stderr
    assert [len(table) for table in read_splits(tmp_path).values()] == [0, 0, 0]
    assert "3 in = 0 out + 0 rejected + 3 dropped" in outcome.stderr


def test_a_damaged_page_is_named_and_leaves_nothing(tmp_path, stage):
    path = write(tmp_path, 1, make_rows(1, [4] * 50, width=64))
    column = pq.read_metadata(path).row_group(0).column(11)
    assert column.path_in_schema.startswith("embedding")
    whole = bytearray(path.read_bytes())
    start = column.data_page_offset
    whole[start : start + 400] = bytes(400)
    path.write_bytes(whole)
    outcome = stage()
    assert outcome.code == 1
    assert f"error: {path}: damaged (" in outcome.stderr.splitlines()[-1]
    assert list((tmp_path / "merged").iterdir()) == []


def test_a_foreign_input_is_logged_and_taken(tmp_path, stage):
    table = make_rows(1, [3, 3, 3])
    (tmp_path / "embeddings").mkdir()
    pq.write_table(table, tmp_path / "embeddings" / "0001_embeddings.parquet")
    outcome = stage()
    assert outcome.code == 0
    assert "0001_embeddings.parquet carries no provenance" in outcome.stderr


def test_embeddings_of_an_earlier_intermediate_or_of_a_tar_with_two_numbers_are_named(tmp_path, stage):
    for dataset in (1, 2, 3):
        source = tmp_path / f"intermediates/{dataset:04d}.parquet"
        source.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"target_id": [dataset]}), source)
        inputs = [{"name": f"{dataset:04d}.tar", "digest": "abc"[dataset // 2]}, identify(source)]
        write(tmp_path, dataset, make_rows(dataset, [2, 2, 2]), inputs=inputs)
    outcome = stage()
    assert outcome.code == 0
    assert outcome.stderr.count("WARNING") == 1 + outcome.stderr.count("is empty")
    assert "0002_embeddings.parquet, 0003_embeddings.parquet: made from one tar under two numbers" in outcome.stderr
    pq.write_table(pa.table({"target_id": [7, 8]}), tmp_path / "intermediates/0002.parquet")
    for option in ([], ["--overwrite"]):
        stderr = stage(*option).stderr
        assert "0002_embeddings.parquet: made from an earlier 0002.parquet: run the stage that makes it again" in stderr
        assert stderr.count("an earlier") == 1


def test_a_rerun_keeps_and_another_setting_or_input_is_refused_by_name(tmp_path, stage, city):
    stage()
    outcome = stage("data.memory_mb=32", "infrastructure.num_workers=1")
    assert (outcome.code, outcome.stdout) == (0, "")
    assert "nothing redone" in outcome.stderr
    outcome = stage("global.seed=7")
    assert outcome.code == 1
    assert "train.parquet: made from other inputs or settings (seed was 42 and is now 7)" in outcome.stderr
    write(tmp_path, 3, make_rows(3, [2, 2]))
    assert "(input 0003_embeddings.parquet has changed)" in stage().stderr
    city["paths"][2].unlink()
    assert "(input 0003_embeddings.parquet is gone)" in stage().stderr


def test_splits_under_each_others_names_are_named(tmp_path, stage, city):
    stage()
    train, test = (tmp_path / "merged" / f"{split}.parquet" for split in ("train", "test"))
    train.rename(tmp_path / "train.parquet")
    test.rename(train)
    (tmp_path / "train.parquet").rename(test)
    complaint = f"{train}: holds the split test: rename it, or run stage 3 with --overwrite"
    assert complaint in stage().stderr
    with pytest.raises(StaleOutputError, match=complaint):  # stages 6 and 9
        check_one_run(train, test)
    with pytest.raises(StaleOutputError, match=complaint):
        read_split_file(tmp_path / "merged")
    assert stage("--overwrite").code == 0
    check_one_run(train, test)


def test_a_folder_in_the_place_of_a_split_is_refused_and_stays(tmp_path, stage, city):
    assert stage().code == 0
    train, test = (tmp_path / "merged" / f"{split}.parquet" for split in ("train", "test"))
    before = train.read_bytes()
    test.unlink()
    test.mkdir()
    (test / "photograph.jpg").write_text("mine")
    outcome = stage("--overwrite")
    assert outcome.code == 1
    assert f"{test} (a folder of yours, where this project writes a file)" in outcome.stderr
    assert (test / "photograph.jpg").read_text() == "mine"
    assert train.read_bytes() == before


def test_a_run_killed_between_the_renames_is_completed(tmp_path, stage, city, monkeypatch):
    stage("paths.merged_dir=undisturbed")
    replace = workspace.os.replace
    renamed = []

    def die_at_the_second(name, target, **folders):
        renamed.append(target)
        if len(renamed) == 5:  # each has had its name in the unfinished folder before
            raise SystemExit(9)
        return replace(name, target, **folders)

    for first_run in (True, False):  # also over older files
        renamed.clear()
        with monkeypatch.context() as patch:
            patch.setattr(workspace.os, "replace", die_at_the_second)
            assert stage(*([] if first_run else ["--overwrite"])).code == 9
        assert len(list((tmp_path / "merged").glob("*.parquet"))) == 1
        outcome = stage()
        assert outcome.code == 0
        for split in SPLITS:
            name = f"{split}.parquet"
            assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
        assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == sorted(f"{s}.parquet" for s in SPLITS)


def test_what_a_killed_run_has_begun_is_cleared_away(tmp_path, stage, city):
    shutil.copytree(tmp_path / "embeddings", tmp_path / "merged" / UNFINISHED)
    assert stage().code == 0
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == sorted(f"{s}.parquet" for s in SPLITS)


def test_half_floats_stay_half_floats(tmp_path, stage):
    table = make_rows(1, [4] * 20, kind=pa.float16())
    write(tmp_path, 1, table)
    assert stage().code == 0
    merged = pa.concat_tables(read_splits(tmp_path).values())
    assert merged.schema.field("embedding").type == pa.list_(pa.float16(), 8)
    assert sorted(merged["embedding"].to_pylist()) == sorted(table["embedding"].to_pylist())


# ---------------------------------------------------------------------------------------- files of other writers


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.list_(pa.float32()), pa.large_list(pa.float32())])
def test_lists_of_any_float_give_the_same_splits(tmp_path, stage, kind):
    for dataset in (1, 2):
        write(tmp_path, dataset, make_rows(dataset, SIZES))
    assert stage().code == 0
    shutil.move(tmp_path / "merged", tmp_path / "expected")
    for dataset in (1, 2):  # the second one stays as this project writes it
        table = make_rows(dataset, SIZES)
        if dataset == 1:
            column = pa.array(table["embedding"].to_pylist(), kind)
            table = table.set_column(table.schema.get_field_index("embedding"), "embedding", column)
        pq.write_table(table, tmp_path / "embeddings" / f"{dataset:04d}_embeddings.parquet")
    assert stage().code == 0
    for split, expected in read_splits(tmp_path, "expected").items():
        assert read_splits(tmp_path)[split].equals(expected)


@pytest.mark.parametrize("dataset", [1, 2])
def test_columns_that_a_file_lacks_are_null_in_its_rows(tmp_path, stage, dataset):
    for number in (1, 2):
        table = make_rows(number, [3, 3, 3])
        write(tmp_path, number, table.drop_columns("heading") if number == dataset else table)
    outcome = stage()
    assert outcome.code == 0
    assert f"000{dataset}_embeddings.parquet has no heading: null in its rows" in outcome.stderr
    rows = pa.concat_tables(read_splits(tmp_path).values())
    assert len(rows) == 18
    for id_, heading in zip(rows["dataset_id"].to_pylist(), rows["heading"].to_pylist(), strict=True):
        assert (heading is None) == (id_ == dataset)


def test_composite_ids_that_a_file_lacks_are_made_of_its_numbers(tmp_path, stage):
    table = make_rows(1, SIZES)
    write(tmp_path, 1, table)
    assert stage().code == 0
    shutil.move(tmp_path / "merged", tmp_path / "expected")
    write(tmp_path, 1, table.drop_columns(["building_id", "streetview_image_id"]))
    assert stage().code == 0
    for split, expected in read_splits(tmp_path, "expected").items():
        assert read_splits(tmp_path)[split].equals(expected)


@pytest.mark.parametrize(
    ("row", "what"),
    [([1.0] * 7, "has not 8 numbers"), (None, "is empty"), ([1.0] * 7 + [None], "holds an empty value"),
     ([1.0] * 7 + [float("nan")], "not finite"), ([1e300] * 8, "not finite")],
)  # fmt: skip
def test_a_row_that_does_not_fit_is_refused_by_its_number_in_the_file(tmp_path, stage, row, what):
    table = make_rows(1, [3] * 500)
    rows = table["embedding"].to_pylist()
    rows[1234] = row
    table = table.set_column(table.schema.get_field_index("embedding"), "embedding", pa.array(rows))
    (tmp_path / "embeddings").mkdir()
    pq.write_table(table, tmp_path / "embeddings" / "0001_embeddings.parquet", row_group_size=100)
    outcome = stage()
    assert outcome.code == 1
    error = outcome.stderr.splitlines()[-1]
    assert "0001_embeddings.parquet: column embedding: row 1234 " in error
    assert what in error
    assert list((tmp_path / "merged").iterdir()) == []
