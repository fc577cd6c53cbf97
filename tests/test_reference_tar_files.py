"""What other writers left is taken over: paths with other folders, files without provenance beside ours."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_tars import Entry, draw_view, encode, make_city, write_tar
from reference_files import NEWER_COLUMNS, age

from generate_embeddings import generate_embeddings
from pipeline.errors import InputError
from pipeline.reference.tar_files import match_members
from preprocess_raw_data import compute_fingerprints, merge_and_split, process_tar

SIZES = (3, 2, 4)
STAGES = {
    "process_tar": process_tar, "generate_embeddings": generate_embeddings, "merge_and_split": merge_and_split,
    "compute_fingerprints": compute_fingerprints,
}  # fmt: skip


@pytest.fixture
def stage(tmp_path, write_config, toy_backbone, run_main):
    """Run a stage by its name."""
    config = write_config(tmp_path, embedding_model={"model_name": str(toy_backbone)})
    return lambda name, *arguments: run_main(STAGES[name].main, "--config", config, *arguments)


def write_city(folder, dataset_id, strip=0):
    """Write a tar whose members stand `2 - strip` folders deep."""
    entries = [
        Entry(entry.name.split("/", strip)[-1], entry.data) for entry in make_city(dataset_id, SIZES)
    ]  # fmt: skip
    return write_tar(folder / f"{dataset_id:04d}.tar", entries)


def read(path):
    return pq.read_table(path).replace_schema_metadata(None)


# ---------------------------------------------------------------------------------------------- image paths


@pytest.mark.parametrize("strip", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "output"),
    [("generate_embeddings", "embeddings/0001_embeddings"), ("compute_fingerprints", "fingerprints/0001_fingerprints")],
)
def test_an_old_intermediate_gives_what_a_new_one_gives(tmp_path, stage, strip, name, output):
    write_city(tmp_path / "raw", 1, strip)
    assert stage("process_tar").code == 0
    assert stage(name).code == 0
    expected = read(tmp_path / f"{output}.parquet")
    (tmp_path / f"{output}.parquet").unlink()
    # The two folders are there whatever the tar has, and the composite ids are not.
    prefix = "0001/0001/"[: 5 * strip]
    age(tmp_path / "intermediates/0001.parquet", without=("building_id", "streetview_image_id"), prefix=prefix)
    outcome = stage(name)
    assert outcome.code == 0, outcome.stderr
    assert ("9 image paths have other folders there: matched" in outcome.stderr) == (strip > 0)
    found = read(tmp_path / f"{output}.parquet")
    common = [column for column in expected.column_names if column not in NEWER_COLUMNS]
    assert found.column_names == common
    assert found.equals(expected.select(common))


def write_members(folder, *names):
    return write_tar(folder / "0088.tar", [Entry(name, encode(draw_view(1))) for name in names])


def test_the_very_name_wins_over_one_in_other_folders(tmp_path):
    tar = write_members(tmp_path, "x.jpg", "0088/x.jpg", "0088/0088/y.jpg", "./z.jpg", "0089/w.jpg")
    paths = ["0088/x.jpg", "y.jpg", "0088/0088/z.jpg", "w.jpg", "0088/gone.jpg"]
    assert match_members(tar, 88, paths) == ["0088/x.jpg", "0088/0088/y.jpg", "./z.jpg", "w.jpg", "0088/gone.jpg"]


def test_a_path_that_may_be_either_of_two_members_is_refused(tmp_path):
    tar = write_members(tmp_path, "x.jpg", "0088/x.jpg")
    with pytest.raises(InputError, match=r"0088.tar: image_path 0088/0088/x.jpg may be 0088/x.jpg or x.jpg: make"):
        match_members(tar, 88, ["0088/0088/x.jpg"])


def test_paths_of_two_rows_that_differ_in_folders_alone_match_by_their_very_names_only(tmp_path):
    tar = write_members(tmp_path, "x.jpg")
    assert match_members(tar, 88, ["x.jpg", "0088/x.jpg"]) == ["x.jpg", "0088/x.jpg"]
    assert match_members(tar, 88, ["0088/0088/x.jpg", "0088/x.jpg"]) == ["0088/0088/x.jpg", "0088/x.jpg"]


# ---------------------------------------------------------------------------------------------- old and new outputs


@pytest.fixture
def workplace(tmp_path, stage):
    """Three validated tars, of which the first two are embedded by another writer."""
    for dataset_id in (1, 2, 3):
        write_city(tmp_path / "raw", dataset_id)
    assert stage("process_tar").code == 0
    assert stage("generate_embeddings").code == 0
    paths = [tmp_path / f"embeddings/000{dataset_id}_embeddings.parquet" for dataset_id in (1, 2, 3)]
    for path in paths[:2]:
        age(path)
    paths[2].unlink()
    return paths


def test_embeddings_without_provenance_are_kept_and_the_other_tars_embedded(tmp_path, stage, workplace):
    before = [path.read_bytes() for path in workplace[:2]]
    outcome = stage("generate_embeddings")
    assert outcome.code == 0
    assert (
        f"kept {workplace[0]}: it carries no provenance, but has 9 of the 9 images of 0001.parquet, 24 numbers each"
        in (outcome.stderr)
    )
    assert "27 in = 27 out + 0 rejected + 0 dropped; 1 written, 2 kept" in outcome.stderr
    assert [path.read_bytes() for path in workplace[:2]] == before
    assert outcome.stdout == f"{workplace[2]}\n"
    assert stage("merge_and_split").code == 0
    rows = pa.concat_tables([read(path) for path in (tmp_path / "merged").glob("*.parquet")])
    assert len(rows) == 27
    is_new = np.array(rows["dataset_id"]) == 3
    np.testing.assert_array_equal(np.array(rows["heading"].is_valid()), is_new)
    np.testing.assert_array_equal(np.array(rows["image_offset"].is_valid()), is_new)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda table: table.slice(0, 0), "it has no rows"),
        (lambda table: pa.concat_tables([table, table.slice(0, 1)]), "1 images are there twice"),
        (lambda table: table.drop_columns("embedding"), "column embedding is missing"),
        (
            lambda table: table.set_column(
                7, "streetview_image_id", pa.array([f"0009_{row}" for row in range(9)])
            ),
            "9 images are in 0002_embeddings.parquet only, as 0009_0",
        ),
    ],
)  # fmt: skip
def test_embeddings_of_other_images_are_refused_and_the_other_tars_done(stage, workplace, change, problem):
    pq.write_table(change(pq.read_table(workplace[1])), workplace[1])
    before = workplace[1].read_bytes()
    outcome = stage("generate_embeddings", "--add-missing")
    assert outcome.code == 1
    error = outcome.stderr.splitlines()[-1]
    assert error.startswith(f"error: 1 of 3 tars failed, the others are done: {workplace[1]}: ")
    assert problem in error
    assert workplace[2].is_file()
    assert workplace[1].read_bytes() == before


def test_images_that_were_not_embedded_are_counted_and_made_when_asked_for(tmp_path, stage, workplace):
    whole = pq.read_table(workplace[1])
    pq.write_table(whole.take([5, 0, 7, 3]), workplace[1])
    before = workplace[1].read_bytes()
    outcome = stage("generate_embeddings")
    assert outcome.code == 0
    said = (
        "0002_embeddings.parquet: it carries no provenance, but has 4 of the 9 images of 0002.parquet, 24 numbers each"
    )
    assert said in outcome.stderr
    assert (
        "; 5 images were not embedded by whoever wrote the file: stage 2 with --add-missing embeds them"
        in outcome.stderr
    )
    assert "27 in = 22 out + 0 rejected + 5 dropped" in outcome.stderr
    assert workplace[1].read_bytes() == before
    marked = np.stack(whole["embedding"].to_numpy()) + 1  # which tells what is kept from what is made
    rows = whole.set_column(whole.column_names.index("embedding"), "embedding", pa.array(marked.tolist()))
    pq.write_table(rows.take([5, 0, 7, 3]), workplace[1])
    outcome = stage("generate_embeddings", "--add-missing")
    assert outcome.code == 0, outcome.stderr
    assert "27 in = 27 out + 0 rejected + 0 dropped" in outcome.stderr
    made = pq.read_table(workplace[1])
    assert made["streetview_image_id"].to_pylist() == whole["streetview_image_id"].to_pylist()
    expected = np.stack(whole["embedding"].to_numpy())
    expected[[5, 0, 7, 3]] += 1
    np.testing.assert_allclose(np.stack(made["embedding"].to_numpy()), expected, atol=1e-5)
    assert "0 written, 3 kept" in stage("generate_embeddings", "--add-missing").stderr


def test_the_dataset_is_the_tars_where_no_column_names_it(tmp_path, stage, workplace):
    lost = ("dataset_id", "building_id", "streetview_image_id")
    for dataset_id, path in enumerate(workplace[:2], 1):
        age(tmp_path / f"intermediates/{dataset_id:04d}.parquet", without=lost)
        pq.write_table(pq.read_table(path).drop_columns(list(lost)), path)
    assert stage("generate_embeddings").code == 0
    assert stage("compute_fingerprints").code == 0
    ids = pq.read_table(tmp_path / "fingerprints/0002_fingerprints.parquet")["streetview_image_id"].to_pylist()
    assert ids == [f"0002_{number}" for number in range(1, 10)]
    assert stage("merge_and_split").code == 0
    rows = pa.concat_tables([read(path) for path in sorted((tmp_path / "merged").glob("*.parquet"))])
    assert sorted(rows["dataset_id"].to_pylist()) == [1] * 9 + [2] * 9 + [3] * 9
    assert "tar_file" not in rows.column_names
    assert set(rows["building_id"].to_pylist()) >= {"0001_1", "0002_1", "0003_1"}


def test_overwrite_makes_them_again(stage, workplace):
    assert stage("generate_embeddings", "--overwrite").code == 0
    assert all(b"spatial_building_embeddings" in path.read_bytes() for path in workplace)


def test_fingerprints_without_provenance_are_kept_where_their_size_is_the_one_asked_for(tmp_path, stage, workplace):
    assert stage("compute_fingerprints").code == 0
    path = age(tmp_path / "fingerprints/0001_fingerprints.parquet")
    outcome = stage("compute_fingerprints")
    assert outcome.code == 0
    assert f"kept {path}: it carries no provenance, but has 9 of the 9 images" in outcome.stderr
    outcome = stage(
        "compute_fingerprints", "--set", "fingerprints.image_size=8", "--tar-file", tmp_path / "raw/0001.tar"
    )
    assert outcome.code == 1
    assert "fingerprints of 768 values, [fingerprints].image_size = 8 gives 192: correct the setting" in outcome.stderr
