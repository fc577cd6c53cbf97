"""The embeddings dataset directory: plan, parts, state."""

import dataclasses
import json
import multiprocessing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_models import list_parts

from pipeline.embeddings_dataset import dataset as dataset_module
from pipeline.embeddings_dataset.appending import Appending
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.packaged_input import InputOptions, PackagedInput
from pipeline.embeddings_dataset.parts import PartContent, PartPlan, find_files, plan_parts, read_part
from pipeline.errors import DamagedError, InputError, PipelineError, StaleOutputError
from pipeline.files.tables import PROVENANCE_KEY
from pipeline.ids import Shard
from pipeline.inference.precision import Precision

ID = pa.field("OSMID", pa.int64())
EMBEDDED = pa.schema([ID, pa.field("embedding", pa.list_(pa.float32(), 2))])
REJECTED = pa.schema([("row", pa.int64()), ID, ("reason", pa.string()), ("detail", pa.string())])


@pytest.fixture
def source(tmp_path):
    schema = pa.schema([ID, ("image_bytes", pa.binary())])
    options = InputOptions(input=tmp_path / "in.parquet", read_batch_size=2)
    return PackagedInput(options.input, options, 1234, schema, "abcd", (5, 0, 3))


def make_appending(folder, source, *, model="model", model_id="the/model", begin=True, dtype="float32"):
    dataset = EmbeddingsDataset(folder)
    appending = Appending(dataset, source, model_id, f"{model}, {dtype}", Precision(dtype))
    appending.find_work(find_files(folder), Shard(), None)
    if begin:
        appending.begin()
    return appending, plan_parts(source)


def make_content(plan, rejected=0, skipped=0):
    embedded = plan.num_rows - rejected - skipped
    return PartContent(
        embedded=pa.table({"OSMID": [1] * embedded, "embedding": [[1.0, 0.0]] * embedded}, schema=EMBEDDED),
        rejects=pa.table(
            {
                "row": [plan.first_row] * rejected, "OSMID": [1] * rejected, "reason": ["missing_image"] * rejected,
                "detail": ["null"] * rejected,
            },
            schema=REJECTED,
        ),
        skipped=skipped,
        image_hashes=np.zeros(embedded, np.uint64),
    )  # fmt: skip


def read_state(appending):
    return json.loads(appending.dataset.state_path.read_text())


def test_the_plan_has_one_part_for_each_read_batch_of_each_row_group(source):
    assert plan_parts(source) == [
        PartPlan(0, 0, 0, 2), PartPlan(0, 1, 2, 2), PartPlan(0, 2, 4, 1), PartPlan(2, 0, 5, 2), PartPlan(2, 1, 7, 1),
    ]  # fmt: skip
    larger = dataclasses.replace(source, options=dataclasses.replace(source.options, read_batch_size=1000))
    assert [plan.name for plan in plan_parts(larger)] == [
        "rg00000_rb00000.parquet",
        "rg00002_rb00000.parquet",
    ]
    assert PartPlan(123456, 7, 0, 1).name == "rg123456_rb00007.parquet"


@pytest.mark.parametrize(("limit", "rows"), [(None, 4), (0, 0), (10, 0), (11, 1), (13, 3), (14, 4), (99, 4)])
def test_a_limit_counts_rows_of_the_input(limit, rows):
    assert PartPlan(0, 0, 10, 4).rows_within(limit) == rows


def test_the_directory_is_the_output_unless_a_file_or_an_older_dataset_is_in_the_way(tmp_path):
    output, sidecar = tmp_path / "e.parquet", tmp_path / "e.parquet.parts"
    assert EmbeddingsDataset(output).folder == output
    output.mkdir()
    assert EmbeddingsDataset(output).folder == output
    output.rmdir()
    output.write_text("")
    assert EmbeddingsDataset(output).folder == sidecar
    output.unlink()
    sidecar.mkdir()
    assert EmbeddingsDataset(output).folder == output
    (sidecar / "state.json").write_text("{}")
    assert EmbeddingsDataset(output).folder == sidecar
    output.mkdir()
    assert EmbeddingsDataset(output).folder == output


def test_the_state_adds_up_what_the_parts_say(tmp_path, source):
    appending, plans = make_appending(tmp_path / "out", source)
    assert read_state(appending)["rows_embedded"] == 0
    appending.write_part(plans[0], make_content(plans[0], rejected=1))
    appending.write_part(plans[1], make_content(plans[1], skipped=2))
    state = appending.write_state()
    assert state == read_state(appending)
    assert (state["rows_total"], state["rows_embedded"], state["rows_rejected"], state["rows_skipped_invalid"]) == (
        8, 1, 1, 2,
    )  # fmt: skip
    assert (state["parts_done"], state["parts_total"], state["complete"]) == (2, 5, False)
    assert state["rejected_by_reason"] == {"missing_image": 1}
    for plan in plans[2:]:
        appending.write_part(plan, make_content(plan))
    assert appending.write_state()["complete"] is True


def test_a_cut_part_counts_its_rows_but_not_as_done(tmp_path, source):
    appending, plans = make_appending(tmp_path / "out", source)
    appending.write_part(plans[0], make_content(dataclasses.replace(plans[0], num_rows=1)))
    state = appending.write_state()
    assert (state["rows_embedded"], state["parts_done"]) == (1, 0)


def test_a_part_written_while_another_process_counts_is_counted(tmp_path, source, monkeypatch):
    """The other process has written its state before this one does, which must not be the last word."""
    appending, plans = make_appending(tmp_path / "out", source)
    other, _ = make_appending(tmp_path / "out", source)
    appending.write_part(plans[0], make_content(plans[0]))
    plain = dataset_module.write_json

    def finish_a_part_first(path, content, **options):
        monkeypatch.setattr(dataset_module, "write_json", plain)
        for plan in plans[1:]:
            other.write_part(plan, make_content(plan))
        other.write_state()
        plain(path, content, **options)

    monkeypatch.setattr(dataset_module, "write_json", finish_a_part_first)
    assert appending.write_state()["complete"] is True
    assert read_state(appending)["complete"] is True


def write_some_parts(folder, source, index):
    appending, plans = make_appending(folder, source)
    for plan in plans[index::3]:
        appending.write_part(plan, make_content(plan))
        appending.write_state()


def test_many_writers_at_once_leave_the_right_state(tmp_path, source):
    source = dataclasses.replace(source, row_group_rows=(40,))
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_some_parts, args=(tmp_path / "out", source, index)) for index in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    state = json.loads((tmp_path / "out" / "state.json").read_text())
    assert (state["rows_embedded"], state["complete"]) == (40, True)
    assert list((tmp_path / "out").rglob(".*")) == []


@pytest.mark.parametrize("is_first_while_the_other_counts", [False, True])
def test_two_runs_that_begin_at_once_with_other_settings_do_not_mix(
    tmp_path, source, monkeypatch, is_first_while_the_other_counts
):
    first, _ = make_appending(tmp_path / "out", source, begin=False)
    second, _ = make_appending(tmp_path / "out", source, begin=False, dtype="bfloat16")
    plain = dataset_module.count_rows

    def begin_first(parts):
        monkeypatch.setattr(dataset_module, "count_rows", plain)
        first.begin()
        return plain(parts)

    if is_first_while_the_other_counts:
        monkeypatch.setattr(dataset_module, "count_rows", begin_first)
    else:
        first.begin()
    with pytest.raises(StaleOutputError, match="precision was 'float32' and is now 'bfloat16'"):
        second.begin()


def test_the_first_state_is_not_written_over_by_a_run_that_saw_none(tmp_path, source):
    first, _ = make_appending(tmp_path / "out", source, model_id="first/name", begin=False)
    other, _ = make_appending(tmp_path / "out", source, model_id="second/name", begin=False)
    first.begin()
    other.begin()
    assert other.dataset.state["model_id"] == "first/name"
    assert list((tmp_path / "out").glob(".*")) == []


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"size": 99}, "input_size was 1234 and is now 99"),
        ({"fingerprint": "ef"}, "row_group_fingerprint was 'abcd' and is now 'ef'"),
        ({"schema": pa.schema([ID])}, "input_schema was ['OSMID: int64', 'image_bytes: binary'] and is now"),
    ],
)
def test_another_input_is_refused_by_what_differs(tmp_path, source, change, difference):
    make_appending(tmp_path / "out", source)
    with pytest.raises(StaleOutputError) as caught:
        make_appending(tmp_path / "out", dataclasses.replace(source, **change))
    assert difference in str(caught.value)
    assert "give another --output, or --overwrite to begin anew" in str(caught.value)


def test_parts_of_another_model_are_found_even_if_the_state_says_otherwise(tmp_path, source):
    appending, plans = make_appending(tmp_path / "out", source, model="other")
    appending.write_part(plans[0], make_content(plans[0]))
    appending.dataset.state_path.unlink()
    appending, _ = make_appending(tmp_path / "out2", source)
    (tmp_path / "out" / "parts").rename(tmp_path / "out2" / "parts")
    with pytest.raises(StaleOutputError, match="embedding_version was"):
        appending.take_up(find_files(appending.dataset.folder))


def test_a_part_is_not_there_without_its_rejects(tmp_path, source):
    appending, plans = make_appending(tmp_path / "out", source)
    appending.write_part(plans[0], make_content(plans[0]))
    assert list(appending.take_up(find_files(appending.dataset.folder))) == [plans[0].name]
    (tmp_path / "out" / "_rejects" / plans[0].name).unlink()
    assert appending.take_up(find_files(appending.dataset.folder)) == {}


def test_a_replaced_part_is_read_again(tmp_path, source):
    appending, plans = make_appending(tmp_path / "out", source)
    appending.write_part(plans[0], make_content(plans[0]))
    assert appending.take_up(find_files(appending.dataset.folder))[plans[0].name].counts["out"] == 2
    appending.write_part(plans[0], make_content(plans[0], rejected=2))
    assert appending.take_up(find_files(appending.dataset.folder))[plans[0].name].counts["out"] == 0


def test_hidden_files_and_other_kinds_are_passed_over(tmp_path, source):
    appending, _ = make_appending(tmp_path / "out", source)
    (appending.dataset.folder / "parts").mkdir()
    for name in (".rg00000_rb00000.parquet.host-1.tmp", "_SUCCESS", "notes.txt", "_metadata.parquet"):
        ((appending.dataset.folder / "parts") / name).write_text("")
    assert appending.take_up(find_files(appending.dataset.folder)) == {}
    ((appending.dataset.folder / "parts") / "rg00009_rb00000.parquet").write_text("")
    with pytest.raises(InputError, match="no part of this input"):
        appending.take_up(find_files(appending.dataset.folder))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, source):
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match="cannot write .*state.json"):
        make_appending(tmp_path / "file" / "out", source)


@pytest.mark.parametrize(
    "counts",
    [
        {"in": 10**15, "out": 10**15, "rejected": 0, "dropped": 0},
        {"in": 2, "out": 7, "rejected": -5, "dropped": 0},
        {"in": 1, "out": 2, "rejected": 0, "dropped": 0},
        {"in": 5, "out": 2, "rejected": 0, "dropped": 3},
        {"out": 2, "rejected": 0, "dropped": 0},
        {"in": 2, "rejected": 0, "dropped": 0},
    ],
)
def test_a_part_that_claims_rows_which_it_does_not_hold_is_damaged(tmp_path, source, counts):
    store, plans = make_appending(tmp_path / "out", source)
    store.write_part(plans[0], make_content(plans[0]))
    path = tmp_path / "out" / "parts" / plans[0].name
    table = pq.read_table(path)
    claimed = json.loads(table.schema.metadata[PROVENANCE_KEY]) | {"counts": counts}
    pq.write_table(table.replace_schema_metadata({PROVENANCE_KEY: json.dumps(claimed)}), path)
    with pytest.raises(DamagedError):
        read_part(path)
    assert store.take_up(find_files(store.dataset.folder)) == {}
    assert store.write_state()["rows_embedded"] == 0


def test_notes_that_another_program_made_in_footers_go(delete, dataset):
    for path in list_parts(dataset):
        table = pq.read_table(path)
        fields = [field.with_metadata({"note": "way/1"}) for field in table.schema]
        pq.write_table(table.cast(pa.schema(fields, {**table.schema.metadata, "pandas": "way/1"})), path)
    assert delete(dataset, "way/1").code == 0
    for schema in map(pq.read_schema, list_parts(dataset)):
        assert (b"pandas" in schema.metadata, [field.metadata for field in schema]) == (False, [None] * len(schema))


def test_an_id_that_only_a_killed_run_has_written_goes(delete, dataset):
    temporary = dataset / "parts" / f".rg00001_rb00000.parquet.a_host-1-{'0' * 16}.tmp"
    (dataset / "_clusters").mkdir()
    (dataset / "_clusters" / "clusters.json").write_text("{}")
    for path in (temporary, dataset / "_logs" / "killed.log"):
        path.write_text("way/77")
    assert delete(dataset, "way/77").code == 1  # it is in no part
    assert not temporary.exists()
    assert not (dataset / "_logs").exists()
    assert (dataset / "_clusters" / "clusters.json").exists()
