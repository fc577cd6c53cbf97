"""Checking a dataset: what is sound, what is seen, what a repair removes."""

import errno
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded_datasets import unit_rows, write_dataset
from published_models import list_parts, make_photographs, read_bytes, write_packaged
from stage8_fixtures import read_state

from pipeline.embeddings_dataset.checks import check_dataset
from pipeline.embeddings_dataset.columns import checksum_tables
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.parts import read_part
from pipeline.errors import InputError
from pipeline.files.identity import identify
from publish_model import (
    aggregate_embeddings,
    delete_ids,
    search_embeddings,
    verify_embeddings,
)
from publish_model.model_folder import published_model


@pytest.fixture
def verify(run_main):
    return lambda output, *arguments: run_main(verify_embeddings.main, output, *arguments)


@pytest.fixture
def dataset(embed, tmp_path):
    """A dataset of 20 pictures, of which one has no bytes, one is damaged and one is marked invalid."""
    images = make_photographs(20)
    images[3], images[8] = None, images[8][:50]
    source = write_packaged(
        tmp_path / "in.parquet", images, row_group_size=10, is_valid=[row != 5 for row in range(20)]
    )
    assert embed(source, tmp_path / "out").code == 0
    return tmp_path / "out"


def check_seen(outcome, *texts):
    assert outcome.code == 1
    assert "Traceback" not in outcome.stderr
    assert outcome.stderr.splitlines()[-1].startswith("error: ")
    for text in texts:
        assert text in outcome.stderr


@pytest.mark.parametrize(
    "wrong", [{"read_batch_size": None}, {"keep_columns": [1]}, {"id_column": 1}, {"rows_embedded": "4"}]
)
def test_a_state_with_values_of_other_types_is_seen_as_damaged(verify, embed, dataset, tmp_path, wrong):
    state = read_state(dataset)
    (dataset / "state.json").write_text(json.dumps(state | wrong))
    check_seen(verify(dataset, "--input", tmp_path / "in.parquet"), "state.json")
    assert embed(tmp_path / "in.parquet", dataset).code == 0
    assert read_state(dataset) == state


def rewrite(path, change):
    """Change a part's rows and keep what it says of itself."""
    table = pq.read_table(path)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)


def rewrite_whole(path, row, values):
    """Write a part as stage 8 would, checksum included, with another embedding."""
    part = read_part(path)
    content = part.read_content()
    part.rewrite(replace(content, embedded=set_embedding(content.embedded, row, values)))


def set_embedding(table, row, values):
    embeddings = table["embedding"].to_pylist()
    embeddings[row] = values
    return table.set_column(1, table.schema.field(1), pa.array(embeddings, table.schema.field(1).type))


def test_a_sound_dataset_passes_with_and_without_its_input(verify, dataset, tmp_path):
    for arguments in ([], ["--input", tmp_path / "in.parquet"], ["--repair"]):
        before = read_bytes(dataset)
        outcome = verify(dataset, *arguments)
        assert (outcome.code, outcome.stdout) == (0, "")
        assert "20 of 20" in outcome.stderr
        assert f"{dataset}: complete" in outcome.stderr
        assert read_bytes(dataset) == before


def test_an_unfinished_dataset_passes_as_not_complete(verify, embed, packaged, tmp_path):
    assert embed(packaged, tmp_path / "out", "--limit", 10).code == 0
    outcome = verify(tmp_path / "out", "-i", packaged)
    assert outcome.code == 0
    assert "10 of 37" in outcome.stderr
    assert "sound so far, not complete yet" in outcome.stderr


def test_a_state_behind_its_parts_is_no_problem_as_a_kill_leaves_it_so(verify, dataset):
    state = read_state(dataset)
    (dataset / "state.json").write_text(json.dumps(state | {"rows_embedded": 2, "parts_done": 1, "complete": False}))
    assert verify(dataset).code == 0


DAMAGE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-30]), "not a readable parquet file"),
    "not finite": (lambda path: rewrite_whole(path, 1, [np.nan] * 256), "embedding 1 has norm nan"),
    "not unit": (lambda path: rewrite_whole(path, 2, [0.5] * 256), "embedding 2 has norm 8.0000"),
    "another unit vector": (
        lambda path: rewrite(path, lambda t: set_embedding(t, 0, [1.0] + [0.0] * 255)), "not those of its checksum",
    ),
    "a row less": (lambda path: rewrite(path, lambda t: t.slice(1)), "but says"),
    "a row twice": (lambda path: rewrite(path, lambda t: pa.concat_tables([t, t.slice(0, 1)])), "but says"),
    "another id": (
        lambda path: rewrite(path, lambda t: t.set_column(0, "OSMID", pa.array(["x"] * len(t)))),
        "not those of its checksum",
    ),
    "no provenance": (
        lambda path: pq.write_table(pq.read_table(path).replace_schema_metadata(), path),
        "does not say in full what it was made from",
    ),
    "rejects gone": (lambda path: (path.parents[1] / "_rejects" / path.name).unlink(), "no such file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_seen_and_a_repair_and_a_rerun_undo_it(verify, embed, dataset, tmp_path, kind):
    before = read_bytes(dataset)
    act, text = DAMAGE[kind]
    act(list_parts(dataset)[3])
    check_seen(verify(dataset), text, "--repair")
    outcome = verify(dataset, "--repair")
    assert outcome.code == 0, outcome.stderr
    assert read_state(dataset)["complete"] is False
    assert not list_parts(dataset)[3:] or list_parts(dataset)[3].name != "rg00001_rb00000.parquet"
    assert verify(dataset).code == 0
    assert embed(tmp_path / "in.parquet", dataset).code == 0
    assert read_bytes(dataset) == before
    assert read_state(dataset)["complete"] is True


def test_a_part_under_another_name_is_seen(verify, dataset):
    one, other = list_parts(dataset)[:2]
    shutil.copy(one, other)
    check_seen(verify(dataset), "holds the rows of rg00000_rb00000.parquet")


def test_rejects_under_another_name_are_seen_even_if_none_of_them_lists_a_row(verify, dataset):
    one, other = (dataset / "_rejects" / path.name for path in list_parts(dataset)[3:5])
    assert pq.read_metadata(one).num_rows == pq.read_metadata(other).num_rows == 0
    shutil.copy(one, other)
    check_seen(verify(dataset), "its rejects are those of another part or run")


def test_a_lost_part_of_a_complete_dataset_is_seen(verify, dataset):
    list_parts(dataset)[2].unlink()
    check_seen(verify(dataset), "complete, but 18 of 20 rows are accounted for", "its part is missing")


def test_ids_that_are_not_those_of_the_input_are_seen_with_the_input_alone(verify, dataset, tmp_path):
    """The part is consistent in itself: only the input tells."""
    part = read_part(list_parts(dataset)[0])
    content = part.read_content()
    ids = pa.array(["way/999", *content.embedded["OSMID"].to_pylist()[1:]])
    embedded = content.embedded.set_column(0, content.embedded.schema.field(0), ids)
    changed = type(content)(embedded, content.rejects, content.skipped, content.image_hashes)
    part.rewrite(changed)
    assert verify(dataset).code == 0
    check_seen(verify(dataset, "--input", tmp_path / "in.parquet"), "its ids are not those of the input's rows")


def test_a_picture_that_another_program_exchanged_is_seen_with_the_input_alone(verify, embed, dataset, tmp_path):
    """A picture of the same length takes its place: the footer stays as it was."""
    source = tmp_path / "in.parquet"
    footer, end = identify(source), make_photographs(5)[4][-40:]
    assert source.read_bytes().count(end) == 1
    source.write_bytes(source.read_bytes().replace(end, bytes([end[0] ^ 1]) + end[1:]))
    assert identify(source) == footer
    assert embed(source, dataset).code == 0
    check_seen(verify(dataset, "--input", source), "rg00000_rb00001.parquet: its pictures are not those of the input's")
    found = EmbeddingsDataset(dataset)
    with pytest.raises(InputError, match="in.parquet: not the pictures that .*out was made from: give those"):
        list(found.read_images(found.open_input(source), [3]))


def test_another_input_is_refused(verify, embed, dataset, packaged):
    check_seen(verify(dataset, "--input", packaged), "not the input that")


def test_a_file_that_is_not_ours_is_named_and_stays(verify, dataset):
    foreign = dataset / "parts" / "mine.parquet"
    pq.write_table(pa.table({"a": [1]}), foreign)
    check_seen(verify(dataset), "mine.parquet: not written by this project")
    check_seen(verify(dataset, "--repair"), "mine.parquet: not written by this project (1 such files, which are left)")
    assert foreign.exists()


def write_foreign(folder):
    """Write what the reference implementation leaves: the same layout, without a word of whose it is."""
    (folder / "parts").mkdir(parents=True)
    for name in ("rg00000_rb00000.parquet", "rg00000_rb00001.parquet"):
        embeddings = pa.array([[1.0, 0.0], [0.0, 1.0]], pa.list_(pa.float32()))
        pq.write_table(pa.table({"OSMID": ["way/1", "way/2"], "embedding": embeddings}), folder / "parts" / name)
    (folder / "state.json").write_text(json.dumps({"input_path": "in.parquet", "model_id": "m", "rows_embedded": 4}))
    return folder


@pytest.mark.parametrize("damaged", [False, True])
def test_a_dataset_of_another_program_is_named_and_left_as_it_is_by_every_tool(
    run_main, embed, packaged, tmp_path, damaged
):
    output = write_foreign(tmp_path / "out")
    if damaged:
        list_parts(output)[1].write_bytes(b"PAR1")
    (tmp_path / "ids.txt").write_text("way/1\n")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    lines = [
        (verify_embeddings.main, output), (verify_embeddings.main, output, "--repair"),
        (aggregate_embeddings.main, output),
        (search_embeddings.main, output, "--query", "q.jpg"),
        (delete_ids.main, output, "--delete-ids", tmp_path / "ids.txt"),
    ]  # fmt: skip
    for outcome in [*(run_main(*line) for line in lines), embed(packaged, output)]:
        assert outcome.code == 1
        assert "not written by this project" in outcome.stderr.splitlines()[-1]
        assert "adopt_embeddings.py" in outcome.stderr.splitlines()[-1]
        assert "--repair" not in outcome.stderr.splitlines()[-1]
        left = {path: path.read_bytes() for path in output.rglob("*") if path.is_file() and path.suffix != ".log"}
        assert left == before


@pytest.mark.parametrize("content", ['{"rows_embedded": 4}', '{"rows_total": "4"}', "[1, 2]", "mine"])
def test_a_state_of_another_program_is_not_replaced_either(embed, packaged, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "state.json").write_text(content)
    outcome = embed(packaged, tmp_path / "out")
    assert outcome.code == 1
    assert "state.json: not written by this project" in outcome.stderr.splitlines()[-1]
    assert (tmp_path / "out" / "state.json").read_text() == content


def test_ids_of_which_one_is_missing_are_no_damage(verify, embed, tmp_path):
    """pandas makes floats of whole numbers of which one is missing, and NaN equals nothing."""
    ids = pa.array([1.0, float("nan"), None, 4.0, float("nan")])
    source = write_packaged(tmp_path / "in.parquet", [*make_photographs(4), None], OSMID=ids)
    assert embed(source, tmp_path / "out").code == 0
    outcome = verify(tmp_path / "out", "--input", source)
    assert outcome.code == 0, outcome.stderr


def test_what_is_repaired_is_set_aside_until_the_dataset_is_complete_again(verify, embed, dataset, tmp_path):
    part = list_parts(dataset)[3]
    part.write_bytes(part.read_bytes()[:-30])
    damaged = part.read_bytes()
    assert verify(dataset, "--repair").code == 0
    assert (dataset / "_removed" / "1" / "parts" / part.name).read_bytes() == damaged
    assert (dataset / "_removed" / "1" / "_rejects" / part.name).exists()
    assert verify(dataset).code == 0
    assert embed(tmp_path / "in.parquet", dataset, "--limit", 4).code == 0
    assert (dataset / "_removed").exists()
    assert embed(tmp_path / "in.parquet", dataset).code == 0
    assert not (dataset / "_removed").exists()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO])
def test_a_part_that_cannot_be_opened_now_is_not_called_damaged(verify, embed, dataset, tmp_path, monkeypatch, number):
    before = read_bytes(dataset)
    plain = pq.ParquetFile
    doomed = list_parts(dataset)[2]

    def fail(path, *arguments, **options):
        if path == doomed:
            raise OSError(number, os.strerror(number), str(path))
        return plain(path, *arguments, **options)

    monkeypatch.setattr(pq, "ParquetFile", fail)
    for outcome in (verify(dataset), verify(dataset, "--repair"), embed(tmp_path / "in.parquet", dataset)):
        assert outcome.code == 1
        last = outcome.stderr.splitlines()[-1]
        assert f"{doomed}: cannot be read (" in last
        assert os.strerror(number) in last
        assert "remove" not in last
    monkeypatch.setattr(pq, "ParquetFile", plain)
    assert read_bytes(dataset) == before


def test_a_changed_byte_is_never_a_traceback(tmp_path):
    """Every 11th byte of a part and of its rejects, footers included: seen, or of no consequence to who reads it."""
    ids = pa.array(["a", "b", "c", "d"])
    output = write_dataset(tmp_path / "out", ids, unit_rows(0, 4), rows_of_part=2, k=["x", "y", "z", None])
    num_broken = 0
    for path in (output / "parts" / "rg00000_rb00001.parquet", output / "_rejects" / "rg00000_rb00001.parquet"):
        data = path.read_bytes()
        expected = pq.read_table(path)
        for at in range(4, len(data) - 8, 11):
            path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
            findings = check_dataset(EmbeddingsDataset(output))
            assert not findings.foreign
            num_broken += bool(findings.broken)
            assert findings.broken or pq.read_table(path).equals(expected)
        path.write_bytes(data)
    assert num_broken > 100


def test_kept_lists_of_text_have_a_checksum_of_their_text():
    kind = pa.list_(pa.string(), 1)
    one, other = ({"k": pa.array([["a" * 40], ["b" * 40]], kind)} for _ in range(2))
    assert checksum_tables(pa.table(one)) == checksum_tables(pa.table(other))
    assert checksum_tables(pa.table(one)) != checksum_tables(pa.table({"k": pa.array([["a"], ["b"]], kind)}))


def test_a_part_of_another_model_is_seen(verify, dataset):
    def rename(table):
        text = table.schema.metadata[b"spatial_building_embeddings"]
        version = read_state(dataset)["embedding_version"].encode()
        return text.replace(version, b"0" * 16)

    path = list_parts(dataset)[1]
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({b"spatial_building_embeddings": rename(table)}), path)
    check_seen(verify(dataset), "made with another embedding_version")


def test_the_state_of_another_dataset_is_named_and_no_part_set_aside(verify, dataset):
    state = read_state(dataset) | {"embedding_version": "0" * 16}
    (dataset / "state.json").write_text(json.dumps(state))
    before = read_bytes(dataset)
    for options in ((), ("--repair",)):
        check_seen(verify(dataset, *options), f"{dataset}/state.json: of another dataset than the parts beside it")
    assert read_bytes(dataset) == before


@pytest.mark.parametrize("columns", [["a", "b"], ["b", "a"]])
def test_a_checksum_is_of_values_not_of_chunks_and_encodings(columns):
    one = pa.table({"a": ["x", "y", None], "b": pa.array([[1.0, 2], [3, 4], [5, 6]], pa.list_(pa.float32(), 2))})
    chunked = pa.concat_tables([one.slice(0, 1), one.slice(1)])
    assert checksum_tables(one.select(columns)) == checksum_tables(chunked.select(columns))
    for change in (one.slice(0, 2), one.set_column(0, "a", pa.array(["x", "y", ""])), one.rename_columns(["a", "c"])):
        assert checksum_tables(change) != checksum_tables(one)


# ------------------------------------------------------------------------------------------------ drift


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_a_published_folder_carries_the_rates_of_pairs_of_its_validation(config_with_splits):
    for kind in ("all", "near"):  # 30 images of 10 buildings
        rates = published_model.read_pairs(config_with_splits, kind).columns["false_rate"]
        assert len(rates) > 5
        assert 0 < rates.min() < rates.max() < 1
    path = config_with_splits / published_model.RATES_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": "another"}))
    with pytest.raises(InputError, match="no rates of false pairs of this model"):
        published_model.read_pairs(config_with_splits, "all")


@pytest.fixture
def config_with_splits(toy_backbone, tmp_path):
    """A model published beside the splits that it was trained on."""
    from published_models import make_config, write_checkpoint

    from pipeline.files.identity import identify
    from publish_model import convert_to_hf

    generator = np.random.default_rng(0)
    inputs = []
    for name, count in (("train", 40), ("val", 30)):
        kind = pa.list_(pa.float32(), 24)
        path = tmp_path / "merged" / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        table = pa.table({"embedding": pa.array(list(generator.normal(size=(count, 24))), kind)})
        table = table.append_column("building_id", pa.array([f"0001_{row // 3}" for row in range(count)]))
        for column in ("street_lat", "street_lon"):
            table = table.append_column(column, pa.array(generator.uniform(0, 1e-3, count)))
        pq.write_table(table, path)
        inputs.append(identify(path))
    provenance = {"stage": "train", "inputs": inputs}
    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt", provenance=provenance)
    config = make_config(tmp_path, toy_backbone)
    config = config.model_copy(update={"paths": config.paths.model_copy(update={"merged_dir": "merged"})})
    convert_to_hf.run(config, convert_to_hf.PublishOptions())
    return tmp_path / "published"
