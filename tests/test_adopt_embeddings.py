"""A dataset that the reference implementation wrote: left alone until it is adopted, and one of ours from then on."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_models import list_parts, make_photographs, read_dataset, write_backbone, write_packaged
from reference_models import write_reference_model

from pipeline.reference import adoption
from publish_model import (
    adopt_embeddings,
    aggregate_embeddings,
    delete_ids,
    generate_embeddings_from_parquet,
    search_embeddings,
    verify_embeddings,
)

IMAGES = make_photographs(26)
IMAGES[3], IMAGES[14] = None, IMAGES[14][:200]
VALID = [row != 7 for row in range(26)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The model, the packaged images, and what stage 8 makes of them in parts of five."""
    folder = tmp_path_factory.mktemp("made")
    backbone = write_backbone(folder / "backbone")
    write_reference_model(folder / "model", backbone)
    write_packaged(folder / "in.parquet", IMAGES, is_valid=VALID)
    arguments = ["--input", folder / "in.parquet", "--output", folder / "ours", "--model-id", folder / "model"]
    generate_embeddings_from_parquet.main([*map(str, arguments), "--read-batch-size", "5"])
    return folder


@pytest.fixture
def foreign(made, tmp_path):
    """The same dataset as the reference implementation writes it."""
    for path in list_parts(made / "ours"):
        table = pq.read_table(path)
        lists = pa.array(table.column("embedding").to_pylist(), pa.list_(pa.float32()))
        (tmp_path / "out" / "parts").mkdir(parents=True, exist_ok=True)
        pq.write_table(
            pa.table({"OSMID": table.column("OSMID"), "embedding": lists}), tmp_path / "out/parts" / path.name
        )
    state = {"input_path": "packaged.parquet", "model_id": "someone/model", "rows_processed": 26}
    (tmp_path / "out" / "state.json").write_text(json.dumps(state))
    return tmp_path / "out"


def read_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def adopt(run_main, made, output, *options, model="model", source="in.parquet"):
    arguments = (output, "--input", made / source, "--model-id", made / model, "--read-batch-size", 5)
    return run_main(adopt_embeddings.main, *arguments, *options)


def test_an_adopted_dataset_is_what_stage_8_would_have_made_and_every_tool_takes_it(run_main, made, foreign, tmp_path):
    old_state = (foreign / "state.json").read_bytes()
    outcome = adopt(run_main, made, foreign)
    assert outcome.code == 0, outcome.stderr
    assert "26 in = 23 out + 2 rejected + 1 dropped (missing_image 1, unreadable_image 1)" in outcome.stderr
    assert read_dataset(foreign).equals(read_dataset(made / "ours"))
    for path in list_parts(foreign):
        twin = made / "ours" / "_rejects" / path.name
        assert pq.read_table(foreign / "_rejects" / path.name).equals(pq.read_table(twin))
    assert (foreign / "_adopted" / "state.json").read_bytes() == old_state
    assert run_main(verify_embeddings.main, foreign, "--input", made / "in.parquet").code == 0
    stage8 = ("--input", made / "in.parquet", "--output", foreign, "--model-id", made / "model", "--read-batch-size", 5)
    assert "nothing redone" in run_main(generate_embeddings_from_parquet.main, *stage8).stderr
    list_parts(foreign)[2].unlink()
    assert run_main(generate_embeddings_from_parquet.main, *stage8).code == 0
    assert read_dataset(foreign).column("OSMID").equals(read_dataset(made / "ours").column("OSMID"))
    assert run_main(aggregate_embeddings.main, foreign, "--by", "OSMID").code == 0
    (tmp_path / "photo.jpg").write_bytes(IMAGES[20])
    query = ("--query", tmp_path / "photo.jpg", "--top", 1, "--model-id", made / "model")
    found = run_main(search_embeddings.main, foreign, *query)
    assert found.stdout.split()[-1] == "way/10"
    (tmp_path / "ids.txt").write_text("way/10\n")
    assert run_main(delete_ids.main, foreign, "--delete-ids", tmp_path / "ids.txt").code == 0
    assert read_dataset(foreign).num_rows == 21


def test_without_adoption_each_tool_says_so_and_removes_nothing(run_main, made, foreign, tmp_path):
    before = read_files(foreign)
    (tmp_path / "ids.txt").write_text("way/1\n")
    (tmp_path / "photo.jpg").write_bytes(IMAGES[0])
    stage8 = ("--input", made / "in.parquet", "--output", foreign, "--model-id", made / "model", "--read-batch-size", 5)
    for main, arguments in (
        (generate_embeddings_from_parquet.main, stage8),
        (aggregate_embeddings.main, (foreign, "--by", "OSMID")),
        (search_embeddings.main, (foreign, "--query", tmp_path / "photo.jpg")),
        (delete_ids.main, (foreign, "--delete-ids", tmp_path / "ids.txt")),
        (verify_embeddings.main, (foreign, "--repair")),
    ):
        outcome = run_main(main, *arguments)
        assert outcome.code == 1, main.__module__
        assert "adopt" in outcome.stderr, main.__module__
        left = {name: data for name, data in read_files(foreign).items() if not name.startswith("_logs")}
        assert left == before, main.__module__


def test_a_dataset_of_another_model_or_other_pictures_is_refused_and_left(run_main, made, foreign, tmp_path):
    before = read_files(foreign)
    other = shutil.copytree(made / "model", tmp_path / "other")
    with open(other / "model.safetensors", "r+b") as file:  # the projector's last numbers
        file.seek(-40_000, 2)
        file.write(np.random.default_rng(0).normal(size=10_000).astype("<f4").tobytes())
    outcome = adopt(run_main, made, foreign, model=other)
    assert outcome.code == 1
    assert "the cosine to what the model makes of it is" in outcome.stderr
    write_packaged(tmp_path / "other.parquet", make_photographs(26), OSMID=[f"node/{row}" for row in range(26)])
    outcome = adopt(run_main, made, foreign, source=tmp_path / "other.parquet")
    assert outcome.code == 1
    assert "its ids are not those of the input's rows" in outcome.stderr
    outcome = adopt(run_main, made, foreign, "--read-batch-size", "3")
    assert outcome.code == 1
    assert read_files(foreign) == before


def test_two_embeddings_exchanged_are_seen_where_all_images_are_compared(run_main, made, foreign):
    paths = list_parts(foreign)[3:5]
    tables = [pq.read_table(path) for path in paths]
    lists = [table["embedding"].to_pylist() for table in tables]
    lists[0][3], lists[1][3] = lists[1][3], lists[0][3]
    for path, table, values in zip(paths, tables, lists, strict=True):
        pq.write_table(table.set_column(1, "embedding", pa.array(values, pa.list_(pa.float32()))), path)
    before = read_files(foreign)
    outcome = adopt(run_main, made, foreign)
    assert (outcome.code, "row 18: the cosine to what the model makes of it" in outcome.stderr) == (1, True)
    assert read_files(foreign) == before


def test_ids_that_pandas_turned_to_doubles_because_one_is_null_are_the_inputs_own(run_main, made, foreign, tmp_path):
    ids = [None if row == 2 else 10**9 + row for row in range(26)]
    write_packaged(made / "nulls.parquet", IMAGES, is_valid=VALID, OSMID=pa.array(ids, pa.int64()))
    rows = [row for row in range(26) if row not in (3, 7, 14)]
    start = 0
    for path in list_parts(foreign):
        table = pq.read_table(path)
        own = [ids[row] for row in rows[start : start + len(table)]]
        start += len(table)
        doubles = pa.array([float("nan") if one is None else float(one) for one in own], pa.float64())
        pq.write_table(table.set_column(0, "OSMID", doubles), path)
    assert adopt(run_main, made, foreign, source="nulls.parquet").code == 0
    adopted = read_dataset(foreign)
    assert adopted.column("OSMID").to_pylist() == [ids[row] for row in rows]
    assert adopted.schema.field("OSMID").type == pa.int64()


def test_a_part_of_ours_without_its_rejects_is_left_to_stage_8(run_main, made, foreign):
    assert adopt(run_main, made, foreign).code == 0
    path = list_parts(foreign)[1]
    rejects, before = foreign / "_rejects" / path.name, path.read_bytes()
    rejects.unlink()
    outcome = adopt(run_main, made, foreign)
    assert outcome.code == 0
    assert "stage 8 with the same input and model makes the rest" in outcome.stderr
    assert path.read_bytes() == before
    assert not rejects.exists()


def test_an_interrupted_adoption_goes_on(run_main, made, foreign, monkeypatch):
    monkeypatch.setattr(adoption, "SAMPLED_IMAGES", 1)  # or the sample would meet what interrupts it
    damaged = foreign / "parts" / list_parts(foreign)[-1].name
    sound = damaged.read_bytes()
    table = pq.read_table(damaged)
    longer = pa.array([np.multiply(row, 2.0).tolist() for row in table.column("embedding").to_pylist()])
    pq.write_table(table.set_column(1, "embedding", longer.cast(pa.list_(pa.float32()))), damaged)
    outcome = adopt(run_main, made, foreign)
    assert outcome.code == 1
    assert "not of unit length" in outcome.stderr
    assert len(list((foreign / "_rejects").iterdir())) == 5  # the parts before it are taken over
    assert not json.loads((foreign / "state.json").read_text()).get("embedding_version")
    damaged.write_bytes(sound)
    assert adopt(run_main, made, foreign).code == 0
    assert read_dataset(foreign).equals(read_dataset(made / "ours"))
    outcome = adopt(run_main, made, foreign)
    assert outcome.code == 0
    assert "nothing redone" in outcome.stderr
