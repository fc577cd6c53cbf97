"""A takedown is done when no byte is left, and not before it says so."""

import errno
import json
import os
import shutil
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded_datasets import unit_rows, write_dataset
from published_models import list_parts, read_bytes, read_dataset

from pipeline.embeddings_dataset import deletions, parts
from pipeline.embeddings_dataset.appending import Appending
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.packaged_input import InputOptions, open_input
from pipeline.inference.precision import Precision
from publish_model import aggregate_embeddings, verify_embeddings


def holders(folder, text):
    """Return the files below a folder that hold a text in whatever way: rows, dictionaries, footers, plain bytes."""
    found = []
    for path in (path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                table = file.read()
            content += str(table.schema.metadata).encode()
            for column in table.columns:
                content += b"".join(bytes(one) for chunk in column.chunks for one in chunk.buffers() if one)
                for chunk in column.chunks:
                    content += str(chunk.flatten() if pa.types.is_nested(chunk.type) else chunk).encode()
                    content += str(chunk.dictionary if pa.types.is_dictionary(chunk.type) else "").encode()
        if text.encode() in content:
            found.append(str(path.relative_to(folder)))
    return sorted(found)


def write_derived(output):
    """Write all that may hold ids beside the parts, as the tools and killed runs leave it."""
    hidden = f"{'0' * 16}.tmp"
    for name in (
        "_aggregated/OSMID.parquet", "_clusters/clusters.parquet", "_clusters/look_alike.html",
        "_removed/1/parts/rg00000_rb00001.parquet",
        f"parts/.rg00000_rb00000.parquet.another_host-1-{hidden}", f"_rejects/.b.parquet.another_host-1-{hidden}",
        f"_aggregated/.OSMID.parquet.another_host-1-{hidden}", "_adopted/state.json",
    ):  # fmt: skip
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        stage = "cluster_embeddings" if "_clusters" in name else "aggregate_embeddings"
        footer = {parts.PROVENANCE_KEY: json.dumps({"stage": stage})}
        pq.write_table(pa.table({"OSMID": ["way/1"]}).replace_schema_metadata(footer), output / name)
    (output / "_logs").mkdir(exist_ok=True)
    (output / "_logs" / "generate_embeddings_from_parquet.1of3.log").write_text("4 times, among them way/1 and way/2")


def test_no_file_holds_a_deleted_id_any_more(delete, dataset, monkeypatch):
    write_derived(dataset)
    assert len(holders(dataset, "way/1")) > 8
    assert delete(dataset, "way/1").code == 0
    assert holders(dataset, "way/1") == []
    assert holders(dataset, "way/2") != []


@pytest.mark.parametrize("step", ["_remove_derived", "_rewrite", "replace"])
@pytest.mark.parametrize("way", ["again", "overwrite"])
def test_killed_anywhere_the_next_run_leaves_no_byte(delete, embed, dataset, tmp_path, monkeypatch, step, way):
    """Before anything derived is removed, before the first part is rewritten, and before the order is done."""
    write_derived(dataset)

    def die(*_arguments, **_changes):
        raise KeyboardInterrupt

    monkeypatch.setattr(deletions, step, die)
    if step == "replace":  # the last one, behind parts and state
        finish = lambda one, **changes: die() if "done" in changes else replace(one, **changes)  # noqa: E731
        monkeypatch.setattr(deletions, step, finish)
    assert delete(dataset, "way/1").code == 130
    monkeypatch.undo()
    write_derived(dataset)  # by whoever was at it meanwhile
    if way == "again":
        assert delete(dataset, "way/1").code == 0
    else:
        assert embed(tmp_path / "in.parquet", dataset, "--overwrite").code == 0
    (dataset / "_logs" / "generate_embeddings_from_parquet.log").unlink(missing_ok=True)
    assert holders(dataset, "way/1") == []
    assert deletions.read_order(dataset).done


def test_a_takedown_of_more_ids_finishes_a_killed_one(delete, run_main, dataset, tmp_path, monkeypatch):
    plain = parts.write_parquet

    def write(path, *others):
        if path.parent.name == "parts":
            raise KeyboardInterrupt
        plain(path, *others)

    with monkeypatch.context() as patched:
        patched.setattr(parts, "write_parquet", write)
        assert delete(dataset, "way/1").code == 130
    assert delete(dataset, "way/1", "way/0").code == 0
    assert {"way/0", "way/1"}.isdisjoint(read_dataset(dataset)["OSMID"].to_pylist())
    assert run_main(verify_embeddings.main, dataset, "--input", tmp_path / "in.parquet").code == 0


OTHERS = [
    "notes.txt", "user/a.parquet", ".hidden/a", "parts/notes.txt", "parts/.rg00000_rb00000.parquet.abcd.tmp",
    "_removed/1/parts/mine.parquet", "_removed/007/state.json", "_removed/\u0663/state.json",
    "_clusters/mine.npy", "_exports/int8/parts/rg00000_rb00000.parquet",
]  # fmt: skip


@pytest.mark.parametrize("name", [*OTHERS, "_rejects/rg00077_rb00000.parquet", "_logs/notes.txt", "export.json"])
def test_files_of_others_stay_and_are_named(delete, dataset, name):
    path = dataset / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text('way/1 {"stage": "aggregate_embeddings"}')
    outcome = delete(dataset, "way/1")
    assert outcome.code == 1
    assert f"{path}: not written by this project: it stays, and may hold the ids" in outcome.stderr
    assert "gone but for 1 files" in outcome.stderr.splitlines()[-1]
    path.unlink()
    assert delete(dataset, "way/1").code == 0
    assert holders(dataset, "way/1") == []


@pytest.mark.parametrize("place", ["second", "deep/er", "_clusters/mine", "_removed/mine", "parts/x"])
def test_a_second_dataset_inside_is_one_other_and_stays(delete, run_main, dataset, tmp_path, place):
    """It holds the same ids, and all that tools make, a link and an empty folder too."""
    second = tmp_path / "apart"
    shutil.copytree(dataset, second)
    assert run_main(aggregate_embeddings.main, second).code == 0
    write_derived(second)
    (second / "_clusters" / "empty").mkdir(parents=True, exist_ok=True)
    (second / "link").symlink_to(tmp_path)
    (dataset / place).parent.mkdir(parents=True, exist_ok=True)
    second = second.rename(dataset / place)
    before = sorted(second.rglob("*")), read_bytes(second)
    outcome = delete(dataset, "way/1")
    assert outcome.code == 1
    assert f"{second}: another embeddings dataset: it stays, and may hold the ids" in outcome.stderr
    assert outcome.stderr.count("it stays, and may hold the ids") == 1
    assert "gone but for 1 files or datasets that are not its own" in outcome.stderr.splitlines()[-1]
    assert (sorted(second.rglob("*")), read_bytes(second)) == before
    second = second.rename(tmp_path / "apart")
    assert holders(dataset, "way/1") == []
    (second / "link").unlink()
    assert delete(second, "way/1").code == 0
    assert holders(second, "way/1") == []


def test_a_folder_that_cannot_be_read_stops_a_takedown_before_it_begins(delete, dataset, monkeypatch):
    closed, listed, before = dataset / "closed", os.scandir, read_bytes(dataset)
    closed.mkdir()

    def scandir(place):
        if str(place) == str(closed):
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return listed(place)

    monkeypatch.setattr(os, "scandir", scandir)
    outcome = delete(dataset, "way/1")
    monkeypatch.undo()
    assert outcome.code == 1
    assert f"error: cannot use {closed} (Permission denied)" in outcome.stderr.splitlines()[-1]
    assert read_bytes(dataset) == before


@pytest.mark.parametrize("name", ["_rejects/rg00077_rb00000.parquet", "_rejects/rg1.parquet", "parts/mine.parquet"])
@pytest.mark.parametrize("is_damaged", [False, True])
def test_no_tool_sets_a_users_parquet_aside(delete, embed, run_main, dataset, tmp_path, name, is_damaged):
    """What is set aside is removed once the dataset is complete."""
    mine = dataset / name
    pq.write_table(pa.table({"mine": [1]}), mine)
    if is_damaged and "_rb" not in name:
        mine.write_bytes(b"PAR1, but no parquet")
    before = mine.read_bytes()
    for outcome in (
        run_main(verify_embeddings.main, dataset, "--repair"),
        embed(tmp_path / "in.parquet", dataset, "--overwrite"),
    ):
        assert outcome.code == 1
        assert f"{mine}: not written by this project" in outcome.stderr
    embed(tmp_path / "in.parquet", dataset)
    assert mine.read_bytes() == before


def test_notes_of_crashed_decoders_go_with_the_logs(delete, dataset):
    (dataset / "_logs").mkdir(exist_ok=True)
    (dataset / "_logs" / ".generate_embeddings_from_parquet.log.decoding").write_text("1")
    assert delete(dataset, "way/1").code == 0
    assert not (dataset / "_logs").exists()


def test_rejects_whose_part_was_never_written_go(delete, dataset):
    list_parts(dataset)[0].unlink()
    assert delete(dataset, "way/1").code == 0
    assert holders(dataset, "way/1") == []


def test_an_overwriting_run_killed_before_its_first_part_leaves_the_ids_deletable(delete, embed, dataset, tmp_path):
    write_derived(dataset)
    EmbeddingsDataset(dataset).set_all_aside()
    assert not list_parts(dataset)
    outcome = delete(dataset, "way/1")
    assert (outcome.code, "holds no embeddings" in outcome.stderr) == (1, True)
    assert "run stage 8 first" in outcome.stderr
    assert (dataset / "_removed" / "2" / "parts").is_dir()
    assert embed(tmp_path / "in.parquet", dataset, "--limit", "3").code == 0
    outcome = delete(dataset, "way/1")
    assert outcome.code == 0, outcome.stderr
    assert holders(dataset, "way/1") == []
    assert deletions.read_order(dataset).done
    assert embed(tmp_path / "in.parquet", dataset).code == 0
    assert holders(dataset, "way/1") == []
    assert holders(dataset, "way/2") != []


def test_dictionaries_keep_no_deleted_value(delete, tmp_path):
    values = ["low", "secret", "high", "low"]
    plain = pa.dictionary(pa.int32(), pa.string())
    ordered = pa.DictionaryArray.from_arrays(pa.array([2, 0, 1, 2], pa.int8()), ["secret", "high", "low"], ordered=True)
    columns = {
        "plain": pa.array(values).dictionary_encode(),
        "ordered": ordered,
        "listed": pa.array([[one] for one in values], pa.list_(plain)),
        "inside": pa.array([{"x": one} for one in values], pa.struct([("x", plain)])),
    }
    output = write_dataset(tmp_path / "out", pa.array(["a", "b", "c", "d"]), unit_rows(0, 4), **columns)
    before = read_dataset(output)
    assert len(holders(output, "secret")) == 1
    assert delete(output, "b").code == 0
    assert holders(output, "secret") == []
    left = read_dataset(output)
    assert left.schema.equals(before.schema)
    assert left["ordered"].chunk(0).dictionary.to_pylist() == ["high", "low"]
    for name in columns:
        assert left[name].to_pylist() == before[name].take([0, 2, 3]).to_pylist()


@pytest.mark.parametrize(
    "name",
    [
        "_aggregated", "_logs", "_removed", "_removed/1", "_aggregated/OSMID.parquet",
        "parts", "parts/rg00000_rb00000.parquet", "_rejects/rg00000_rb00000.parquet",
    ],
)  # fmt: skip
def test_a_link_is_named_and_nothing_is_deleted(delete, dataset, tmp_path, name):
    write_derived(dataset)
    elsewhere = tmp_path / "elsewhere"
    (dataset / name).rename(elsewhere)
    (dataset / name).symlink_to(elsewhere)
    (tmp_path / "ids.txt").write_text("way/1")
    before = holders(tmp_path, "way/1")
    outcome = delete(dataset, "way/1")
    assert outcome.code == 1
    assert f"error: {dataset / name}: a link, and what it leads to may hold the ids" in outcome.stderr.splitlines()[-1]
    assert holders(tmp_path, "way/1") == before
    assert not (dataset / "_deleted").exists()
    (dataset / name).unlink()
    elsewhere.rename(dataset / name)
    assert delete(dataset, "way/1").code == 0
    assert holders(dataset, "way/1") == []


@pytest.mark.parametrize("name", ["_removed", "parts", "_rejects", "_logs"])
def test_stage_8_neither_writes_nor_removes_through_a_link(embed, dataset, tmp_path, name):
    (dataset / "_removed" / "1").mkdir(parents=True)
    (dataset / "_removed" / "1" / "photo.jpg").write_text("mine")
    (dataset / name).rename(tmp_path / "elsewhere")
    (dataset / name).symlink_to(tmp_path / "elsewhere")
    list_parts(dataset)[0].unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()}
    outcome = embed(tmp_path / "in.parquet", dataset)
    assert outcome.code == 1
    assert str(dataset / name) in outcome.stderr.splitlines()[-1]
    assert "a link" in outcome.stderr.splitlines()[-1]
    assert embed(tmp_path / "in.parquet", dataset, "--overwrite").code == 1
    assert [path.name for path in (dataset / "_removed").iterdir()] == ["1"]  # nothing was set aside
    assert {path: path.read_bytes() for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()} == before


def test_a_rerun_of_stage_8_removes_only_numbered_folders(embed, dataset, tmp_path):
    (dataset / "_removed" / "photos").mkdir(parents=True)
    (dataset / "_removed" / "photos" / "1.jpg").write_text("mine")
    (dataset / "_removed" / "2").mkdir()
    shutil.copytree(dataset / "parts", dataset / "_removed" / "3" / "parts")
    (dataset / "_removed" / "3" / "parts" / "holiday.parquet").write_text("mine")
    (dataset / "_removed" / "3" / "_rejects" / "rg00000_rb00009.parquet").mkdir(parents=True)
    (dataset / "_removed" / "3" / "_rejects" / "rg00000_rb00009.parquet" / "b.txt").write_text("mine")
    assert embed(tmp_path / "in.parquet", dataset).code == 0
    left = [path for path in (dataset / "_removed").rglob("*") if path.is_file()]
    assert sorted(path.name for path in left) == ["1.jpg", "b.txt", "holiday.parquet"]
    assert {path.read_text() for path in left} == {"mine"}
    assert not (dataset / "_removed" / "2").exists()


def test_nothing_is_deleted_while_another_process_writes_and_nothing_written_while_one_deletes(
    delete, embed, run_main, dataset, tmp_path
):
    before, line = read_bytes(dataset), f"error: {dataset}: process "
    with EmbeddingsDataset(dataset).held(shared=True):
        outcome = delete(dataset, "way/1")
        assert (outcome.code, outcome.stderr.splitlines()[-1].startswith(line)) == (1, True)
        assert "is writing to it: wait for that one" in outcome.stderr
        assert run_main(verify_embeddings.main, dataset, "--repair").code == 1
        assert embed(tmp_path / "in.parquet", dataset).code == 0
    with EmbeddingsDataset(dataset).held():
        for outcome in (
            delete(dataset, "way/1"),
            embed(tmp_path / "in.parquet", dataset),
            run_main(aggregate_embeddings.main, dataset),
        ):
            assert (outcome.code, outcome.stderr.splitlines()[-1].startswith(line)) == (1, True)
    assert read_bytes(dataset) == before
    assert not (dataset / "_deleted").exists()
    assert delete(dataset, "way/1").code == 0


def test_the_order_is_read_before_each_part_is_written(delete, dataset):
    """As where a file system lets two processes hold one lock."""
    part = parts.read_part(list_parts(dataset)[0])
    content = part.read_content()
    assert "way/1" in content.embedded["OSMID"].to_pylist()
    assert delete(dataset, "way/1").code == 0
    size = part.recipe["read_batch_size"]
    source = open_input(InputOptions(input=dataset.parent / "in.parquet", read_batch_size=size))
    store = Appending(EmbeddingsDataset(dataset), source, "m", "v", Precision("float32"))
    store.write_part(part.plan, content)
    assert holders(dataset, "way/1") == []


def test_a_part_that_holds_a_deleted_id_is_seen(delete, run_main, dataset, tmp_path):
    path = list_parts(dataset)[0]
    rejects = dataset / "_rejects" / path.name
    before = path.read_bytes(), rejects.read_bytes()
    assert delete(dataset, "way/1").code == 0
    arguments = [verify_embeddings.main, dataset, "--input", tmp_path / "in.parquet"]
    assert run_main(*arguments).code == 0
    for one, data in zip((path, rejects), before, strict=True):
        one.write_bytes(data)
    outcome = run_main(*arguments)
    assert outcome.code == 1
    assert f"{path}: holds ids that were deleted: run delete_ids.py again" in outcome.stderr
    assert delete(dataset, "way/1").code == 0
    assert run_main(*arguments).code == 0
    assert holders(dataset, "way/1") == []


@pytest.mark.parametrize("stop_at", range(1, 5))
def test_a_repair_between_a_killed_takedown_and_its_rerun_touches_nothing(
    delete, run_main, dataset, monkeypatch, stop_at
):
    written, plain = [], parts.write_parquet

    def write(*arguments):
        written.append(arguments[0])
        if len(written) == stop_at:
            raise KeyboardInterrupt
        plain(*arguments)

    monkeypatch.setattr(parts, "write_parquet", write)
    assert delete(dataset, "way/1", "way/9").code == 130
    monkeypatch.undo()
    before = {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()}
    outcome = run_main(verify_embeddings.main, dataset, "--repair")
    assert outcome.code == 1
    last = outcome.stderr.splitlines()[-1]
    assert "a deletion of ids was interrupted" in last
    assert f"delete_ids.py {dataset} --delete-ids FILE" in last
    assert {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()} == before
    assert delete(dataset, "way/1", "way/9").code == 0
    assert run_main(verify_embeddings.main, dataset, "--repair").code == 0
    assert holders(dataset, "way/1") == []


def test_with_the_input_a_part_that_lacks_more_than_the_deleted_ids_is_seen(delete, run_main, dataset, tmp_path):
    assert delete(dataset, "way/1").code == 0
    part = parts.read_part(list_parts(dataset)[1])
    content = part.read_content()
    ids = pa.array(["way/999", *content.embedded["OSMID"].to_pylist()[1:]])
    part.rewrite(replace(content, embedded=content.embedded.set_column(0, content.embedded.schema.field(0), ids)))
    outcome = run_main(verify_embeddings.main, dataset, "--input", tmp_path / "in.parquet")
    assert (outcome.code, "its ids are not those of the input's rows" in outcome.stderr) == (1, True)
