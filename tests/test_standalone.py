"""Stage 9 on anything: an embeddings dataset with labels, two models side by side, and how sure the answer is."""

import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded_datasets import unit_rows, write_dataset
from evaluation_data import make_table, make_workplace, write_checkpoint, write_split

from evaluate_embeddings.evaluate import main
from pipeline.files import tables
from pipeline.retrieval.labels import label_rows
from pipeline.retrieval.scores import normalise_rows, score_queries, summarize_scores

BUILDINGS = np.repeat(np.arange(12), 3)


def make_vectors(noise, seed=0):
    generator = np.random.default_rng(seed)
    return (np.eye(12)[BUILDINGS] + noise * generator.normal(size=(36, 12))).astype(np.float32)


@pytest.fixture
def dataset(tmp_path):
    """A dataset whose OSMID is the building."""
    return write_dataset(tmp_path / "one", pa.array(BUILDINGS), make_vectors(0.5))


@pytest.fixture
def labelled(tmp_path):
    """A dataset whose OSMID is the image, and labels of all but the last building, in another order."""
    folder = write_dataset(tmp_path / "images", pa.array(np.arange(36), pa.int32()), make_vectors(0.5))
    order = np.random.default_rng(0).permutation(33)
    labels = pa.table({"OSMID": pa.array(order, pa.int64()), "building_id": [f"b{BUILDINGS[row]}" for row in order]})
    tables.write_parquet(tmp_path / "labels.parquet", labels, {})
    return folder, tmp_path / "labels.parquet"


def evaluate(run_main, tmp_path, *arguments, code=0):
    outcome = run_main(main, *arguments, "--set", f"global.log_dir={tmp_path / 'logs'}")
    assert outcome.code == code, outcome.stderr
    assert outcome.stdout == ""
    return outcome.stderr


def read_verdict(text):
    """Return the last paragraph of the table as one line."""
    return " ".join(text.split("\n\n")[-2].split())


def check_width(text):
    table = text[text.index(" queries, gallery of") - 10 :].rsplit("\n\n", 1)[0]
    assert max(map(len, table.splitlines())) <= 80


# ------------------------------------------------------------------------------------------------ one dataset


def test_without_labels_the_osmid_says_which_images_belong_together(run_main, tmp_path, dataset):
    text = evaluate(run_main, tmp_path, "--embeddings", dataset)
    expected = summarize_scores(score_queries(normalise_rows(make_vectors(0.5)), BUILDINGS))
    row = re.search(r"^one +([\d. ]+)$", text, re.MULTILINE)[1].split()
    assert row == [f"{value:.3f}" for key, value in expected.items() if key != "recall_at_100"]
    assert "36 queries, gallery of 36 images, 12 buildings" in text
    assert read_verdict(text).startswith(f"one finds the building at first try for {expected['recall_at_1']:.1%}")
    check_width(text)


def test_labels_join_by_osmid_whatever_its_type_and_what_they_do_not_know_is_counted(run_main, tmp_path, labelled):
    folder, labels = labelled
    text = evaluate(run_main, tmp_path, "--embeddings", folder, "--labels", labels)
    expected = summarize_scores(score_queries(normalise_rows(make_vectors(0.5)[:33]), BUILDINGS[:33]))
    assert f"{expected['map']:.3f}" in text
    assert "36 in = 33 out + 0 rejected + 3 dropped (no_label 3)" in text


@pytest.mark.parametrize("blank", ["", " \t"])
def test_a_blank_label_is_none_and_a_blank_id_is_passed_over(run_main, tmp_path, labelled, blank):
    folder, path = labelled
    expected = evaluate(run_main, tmp_path, "--embeddings", folder, "--labels", path)
    rows = [(row, f"b{building}" if row < 33 else blank) for row, building in enumerate(BUILDINGS)]
    lines = [f"{row},{building}" for row, building in [*rows, (blank, "a"), (blank, "b"), (blank, blank)]]
    (tmp_path / "l.csv").write_text("\n".join(["OSMID,building_id", *lines]))
    text = evaluate(run_main, tmp_path, "--embeddings", folder, "--labels", tmp_path / "l.csv")
    assert "l.csv: 3 rows without an id are passed over" in text
    assert "36 in = 33 out + 0 rejected + 3 dropped (no_label 3)" in text
    assert read_verdict(text) == read_verdict(expected)
    columns = {"OSMID": [row for row, _ in rows], "building_id": [building for _, building in rows]}
    pq.write_table(pa.table(columns), tmp_path / "l.parquet")
    text = evaluate(run_main, tmp_path, "--embeddings", folder, "--labels", tmp_path / "l.parquet")
    assert "3 dropped (no_label 3)" in text
    (tmp_path / "l.csv").write_text("\n".join(["OSMID,building_id", *(f"{row},{blank}" for row in range(36))]))
    text = evaluate(run_main, tmp_path, "--embeddings", folder, "--labels", tmp_path / "l.csv", code=1)
    assert "names none of the images" in text.splitlines()[-1]


def test_a_merged_split_will_do_for_labels(tmp_path):
    split = make_table(2, num_buildings=4)
    tables.write_parquet(tmp_path / "test.parquet", split, {})
    ids = split["streetview_image_id"].combine_chunks()
    found = label_rows(pa.concat_arrays([ids[::-1], pa.array(["stranger"])]), tmp_path / "test.parquet")
    assert found.to_pylist() == [*split["building_id"].to_pylist()[::-1], None]


def test_ignored_pairs_are_left_out_here_too(run_main, tmp_path, dataset):
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("building_id_a,building_id_b\n0,1\n2,3\n0,99\n")
    text = evaluate(run_main, tmp_path, "--embeddings", dataset, "--ignore-pairs", pairs)
    assert "2 pairs of buildings ignored" in text


def test_a_dataset_that_lacks_a_part_is_scored_and_said_to_be_unfinished(run_main, tmp_path):
    ours = write_dataset(tmp_path / "ours", pa.array(np.arange(20) // 4), unit_rows(1, 20))
    (ours / "parts" / "rg00000_rb00000.parquet").unlink()
    assert "is not complete: 10 of 20 rows are embedded" in evaluate(run_main, tmp_path, "--embeddings", ours)


def test_a_part_of_another_dataset_or_a_copy_under_another_name_is_not_scored(run_main, tmp_path):
    ours, other = (
        write_dataset(tmp_path / name, pa.array(np.arange(20) // 4), unit_rows(seed, 20), **columns)
        for seed, (name, columns) in enumerate({"ours": {}, "other": {"year": np.arange(20)}}.items())
    )
    first, second = (ours / "parts" / f"rg00000_rb0000{number}.parquet" for number in (0, 1))
    shutil.copy(other / "parts" / second.name, second)
    text = evaluate(run_main, tmp_path, "--embeddings", ours, code=1)
    assert f"{second.name}: made with another keep_columns than the dataset" in text
    shutil.copy(first, second)
    assert f"{second.name}: damaged" in evaluate(run_main, tmp_path, "--embeddings", ours, code=1)


# ------------------------------------------------------------------------------------------------ two models


def test_a_better_model_beats_a_worse_one_and_not_the_other_way_round(run_main, tmp_path, dataset):
    better = write_dataset(tmp_path / "two", pa.array(BUILDINGS), make_vectors(0.2, seed=5), 18)
    text = evaluate(run_main, tmp_path, "--embeddings", dataset, "--compare", better)
    one, two = (score_queries(normalise_rows(make_vectors(*a)), BUILDINGS) for a in ((0.5, 0), (0.2, 5)))
    gain = two.average_precision.mean() - one.average_precision.mean()
    assert read_verdict(text).startswith(f"B (two) beats A (one): mAP {gain:+.3f}, 95% interval +")
    check_width(text)
    text = evaluate(run_main, tmp_path, "--embeddings", better, "--compare", dataset)
    assert read_verdict(text).startswith(f"B (one) is worse than A (two): mAP {-gain:+.3f}")


def test_a_model_beside_itself_cannot_be_told_from_it(run_main, tmp_path, dataset):
    text = evaluate(run_main, tmp_path, "--embeddings", dataset, "--compare", dataset)
    assert "cannot be told from" in read_verdict(text)
    assert "mAP +0.000, 95% interval +0.000 to +0.000; Recall@1 +0.000." in read_verdict(text)


@pytest.mark.parametrize(
    ("ids", "what"), [(BUILDINGS[::-1], "in another order than"), (BUILDINGS + 1, "not"), (BUILDINGS[:-1], "not")]
)
def test_datasets_of_other_images_or_in_another_order_cannot_be_compared(run_main, tmp_path, dataset, ids, what):
    other = write_dataset(tmp_path / "two", pa.array(ids), make_vectors(0.5)[: len(ids)])
    text = evaluate(run_main, tmp_path, "--embeddings", dataset, "--compare", other, code=1)
    assert f"two: its ids are {what} those of {dataset}: embed the same input with both models" in text


@pytest.fixture
def workplace(tmp_path):
    return make_workplace(tmp_path / "work", photos=False)


def test_two_checkpoints_are_compared_on_the_test_split_and_nothing_is_written(run_main, tmp_path, workplace):
    other = tmp_path / "other.pt"
    write_checkpoint(other, seed=1, trained_on=None)
    text = evaluate(run_main, tmp_path, "--config", workplace, "--compare", other)
    assert "A = checkpoint_best.pt" in text
    assert "B = other.pt" in text
    assert "Mind: other.pt does not name its training buildings, and nothing tells" in text
    assert "Mind: checkpoint_best.pt" not in text
    assert re.match(r"B \(other\.pt\) (beats|is worse than|cannot be told from) A", read_verdict(text))
    assert not (workplace.parent / "report").exists()
    check_width(text)
    assert "no such checkpoint" in evaluate(run_main, tmp_path, "--config", workplace, "--compare", tmp_path, code=1)


# ------------------------------------------------------------------------------------------------ failures


def test_options_that_do_not_go_together_are_exit_code_2(run_main, tmp_path, dataset):
    for arguments, words in ((["--labels", "x.parquet"], "--labels belongs to --embeddings"),):
        assert words in evaluate(run_main, tmp_path, *arguments, code=2)


def test_what_cannot_be_scored_is_exit_code_1_with_one_line(run_main, tmp_path, dataset, labelled):
    folder, labels = labelled
    empty = tmp_path / "empty"
    empty.mkdir()
    tables.write_parquet(tmp_path / "twice.parquet", pa.table({"OSMID": [1, 1], "building_id": ["a", "b"]}), {})
    tables.write_parquet(tmp_path / "others.parquet", pa.table({"OSMID": [99], "building_id": ["a"]}), {})
    tables.write_parquet(tmp_path / "plain.parquet", pa.table({"OSMID": [1]}), {})
    zero = write_dataset(tmp_path / "zero", pa.array(BUILDINGS), np.zeros((36, 4), np.float32))
    cases = [
        (["--embeddings", tmp_path / "nowhere"], "nowhere: holds no embeddings (parts/*.parquet)"),
        (["--embeddings", empty], "empty: holds no embeddings (parts/*.parquet)"),
        (["--embeddings", zero], "zero: embeddings: row 0 is not finite or all zero"),
        (["--embeddings", folder], "every image has an OSMID of its own: give --labels"),
        (["--embeddings", folder, "--labels", tmp_path / "twice.parquet"], "OSMID 1 has two buildings"),
        (["--embeddings", folder, "--labels", tmp_path / "others.parquet"], "names none of the images"),
        (["--embeddings", folder, "--labels", tmp_path / "plain.parquet"], "no column building_id"),
        (["--embeddings", folder, "--labels", tmp_path / "no.parquet"], "no.parquet: no such file"),
        (["--embeddings", dataset, "--compare", labels], "holds no embeddings (parts/*.parquet)"),
    ]
    for arguments, words in cases:
        last = evaluate(run_main, tmp_path, *arguments, code=1).splitlines()[-1]
        assert last.startswith("error: "), last
        assert words in last


def test_a_split_of_another_width_refuses_the_other_checkpoint(run_main, tmp_path, workplace):
    write_split(workplace.parent, "test", make_table(2, width=9))
    write_checkpoint(workplace.parent / "checkpoints" / "checkpoint_best.pt", width=9)
    write_checkpoint(tmp_path / "other.pt")
    text = evaluate(run_main, tmp_path, "--config", workplace, "--compare", tmp_path / "other.pt", code=1)
    assert "other.pt: its projector takes embeddings of 16 numbers, these have 9" in text
