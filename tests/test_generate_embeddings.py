"""Stage 2: the embeddings of whole tars, and everything that can interrupt or spoil them."""

import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from plain_loop import embed_plainly, smallest_cosine
from raw_tars import draw_view, encode, make_city, make_view, replace_tar, write_tar

from generate_embeddings import generate_embeddings
from pipeline.errors import Terminated
from pipeline.files import tables
from pipeline.files.scratch import RowScratch
from preprocess_raw_data import process_tar

SIZES = (3, 2, 4, 2, 3, 1, 5)


@pytest.fixture
def config(tmp_path, write_config, toy_backbone):
    return write_config(tmp_path, embedding_model={"model_name": str(toy_backbone)})


@pytest.fixture
def validate(config, run_main):
    """Run stage 1."""

    def run():
        assert run_main(process_tar.main, "--config", config, "--set", "data.max_reject_fraction=1").code == 0

    return run


@pytest.fixture
def stage(config, run_main):
    """Run stage 2."""

    def run(*arguments):
        options = [word if str(word).startswith(("--", "/")) else f"--set={word}" for word in arguments]
        return run_main(generate_embeddings.main, "--config", config, *options)

    return run


@pytest.fixture
def city(tmp_path, make_tar, validate):
    """One validated tar of twenty images."""
    path = make_tar(tmp_path / "raw", 1, SIZES)
    validate()
    return path


def read(folder, name="0001", where="embeddings"):
    return pq.read_table(folder / where / f"{name}_embeddings.parquet")


def as_matrix(table):
    return np.stack(table["embedding"].to_numpy(zero_copy_only=False)).astype(np.float64)


def list_files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def read_members(tar_path, names):
    with tarfile.open(tar_path) as tar:
        return [tar.extractfile(name).read() for name in names]


def test_every_image_gets_the_plain_loops_embedding_beside_all_columns_of_stage_1(
    tmp_path, toy_backbone, validate, stage
):
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = [
        encode(draw_view(1, size=(448, 448)), quality=85),
        encode(draw_view(2, size=(131, 97))),
        encode(draw_view(3).convert("L")),
        encode(draw_view(4).convert("CMYK")),
        encode(draw_view(5, size=(90, 60)), exif=exif),
        encode(draw_view(6, size=(200, 300)), progressive=True),
        encode(draw_view(7), "PNG"),
        encode(draw_view(8), "WEBP"),
        *(encode(draw_view(number)) for number in range(9, 22)),
    ]
    entries = [
        entry for patch, data in enumerate(pictures) for entry in make_view(f"x/{99 - patch}", 1, patch, image=data)
    ]
    tar = write_tar(tmp_path / "raw" / "0001.tar", entries)
    validate()
    outcome = stage()
    assert outcome.code == 0
    assert outcome.stdout == f"{tmp_path}/embeddings/0001_embeddings.parquet\n"
    table, before = read(tmp_path), pq.read_table(tmp_path / "intermediates" / "0001.parquet")
    assert table.drop_columns("embedding").equals(before)
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 24)
    ours, plain = as_matrix(table), embed_plainly(toy_backbone, read_members(tar, table["image_path"].to_pylist()))
    assert smallest_cosine(ours, plain) >= 0.9999
    np.testing.assert_allclose(ours, plain, rtol=1e-3, atol=1e-5)  # so it is not normalised either
    assert "21 in = 21 out + 0 rejected + 0 dropped; 1 written, 0 kept" in outcome.stderr.splitlines()[-1]
    assert list_files(tmp_path / "embeddings") == ["0001_embeddings.parquet", "_rejects/0001_embeddings.parquet"]


def test_half_floats_are_the_rounded_floats(tmp_path, city, stage):
    assert stage().code == 0
    whole = read(tmp_path)
    outcome = stage("embedding_model.embedding_dtype=float16")
    assert "embedding_dtype was 'float32' and is now 'float16'" in outcome.stderr
    assert stage("embedding_model.embedding_dtype=float16", "--overwrite").code == 0
    half = read(tmp_path)
    assert half.schema.field("embedding").type == pa.list_(pa.float16(), 24)
    np.testing.assert_array_equal(as_matrix(half), as_matrix(whole).astype(np.float16))


def test_the_class_token_is_another_embedding_and_refused_as_such(tmp_path, city, stage):
    stage()
    outcome = stage("embedding_model.pooling_type=cls_token")
    assert outcome.code == 1
    assert "pooling_type was 'pooler_output' and is now 'cls_token'" in outcome.stderr.splitlines()[-1]
    assert stage("embedding_model.pooling_type=cls_token", "paths.embeddings_dir=other").code == 0
    assert read(tmp_path, where="other").schema.equals(read(tmp_path).schema)


def test_a_tar_of_rejects_alone_gives_no_rows_of_the_right_width(tmp_path, validate, stage):
    write_tar(tmp_path / "raw" / "0001.tar", make_view("a", 1, 1, image=b"x"))
    validate()
    assert stage().code == 0
    table = read(tmp_path)
    assert len(table) == 0
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 24)


def test_images_that_are_gone_or_spoiled_since_are_rejected_with_their_reasons(tmp_path, city, stage):
    entries = make_city(1, SIZES)
    gone, spoiled = entries[4].name, entries[10].name
    kept = [
        entry if entry.name != spoiled else type(entry)(spoiled, b"\xff\xd8") for entry in entries if entry.name != gone
    ]
    replace_tar(city, kept)
    outcome = stage()
    assert outcome.code == 0
    rejects = pq.read_table(tmp_path / "embeddings" / "_rejects" / "0001_embeddings.parquet").to_pylist()
    assert rejects == [
        {"member": gone, "reason": "missing_image", "detail": "not in 0001.tar"},
        {"member": spoiled, "reason": "unreadable_image", "detail": "not a JPEG, PNG or WebP image"},
    ]
    before = pq.read_table(tmp_path / "intermediates" / "0001.parquet")["image_path"].to_pylist()
    assert read(tmp_path)["image_path"].to_pylist() == [name for name in before if name not in (gone, spoiled)]
    assert "20 in = 18 out + 2 rejected + 0 dropped (missing_image 1, unreadable_image 1)" in outcome.stderr
    assert stage("data.max_reject_fraction=0.05").code == 1


def test_weights_that_are_no_numbers_stop_the_run_naming_the_image(tmp_path, city, stage, toy_backbone):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(toy_backbone, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    first = make_city(1, SIZES)[0].name
    for value, place in ((np.nan, "layernorm.weight holds numbers that are"), (3e38, f"{first}: its embedding is")):
        weights["layernorm.weight"][:] = value
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        outcome = stage("embedding_model.model_name=broken")
        assert (outcome.code, f"{place} not finite" in outcome.stderr.splitlines()[-1]) == (1, True)
    assert list_files(tmp_path / "embeddings") == []


# ------------------------------------------------------------------------------------------------ keep, refuse, redo


def test_a_rerun_keeps_whatever_shapes_no_value_has_changed(tmp_path, city, stage):
    stage()
    path = tmp_path / "embeddings" / "0001_embeddings.parquet"
    before = path.read_bytes()
    (tmp_path / "raw").rename(tmp_path / "moved")
    for arguments in (
        [
            "paths.raw_dir=moved",
            "embedding_model.batch_size=2",
            "infrastructure.device=cpu",
            "infrastructure.num_workers=1",
        ],
        ["paths.raw_dir=nowhere"],  # a tar may be deleted once it has been embedded
        ["paths.raw_dir=nowhere", "embedding_model.model_name=/no/such/model"],  # and so may the model
    ):
        outcome = stage(*arguments)
        assert (outcome.code, outcome.stdout) == (0, "")
        assert f"kept {path}, which is complete" in outcome.stderr
        assert "20 in = 20 out + 0 rejected + 0 dropped; 0 written, 1 kept" in outcome.stderr
    assert path.read_bytes() == before


def test_deciding_to_keep_everything_needs_no_torch(config, city, stage):
    assert stage().code == 0
    code = (
        "import sys; from generate_embeddings.generate_embeddings import main\n"
        f"main(['--config', {str(config)!r}]); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_another_model_or_intermediate_is_refused_by_name(
    tmp_path, city, stage, toy_backbone, make_tar, run_main, config
):
    stage()
    folder = shutil.copytree(toy_backbone, tmp_path / "copy")
    assert stage("embedding_model.model_name=copy").code == 0
    (folder / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text() + " ")
    assert "(model was " in stage("embedding_model.model_name=copy").stderr
    make_tar(tmp_path / "raw", 1, (2, 2))
    assert f"{city}: not the one that 0001.parquet was made from" in stage("--overwrite").stderr
    assert run_main(process_tar.main, "--config", config, "--overwrite").code == 0
    assert "(input 0001.parquet has changed)" in stage().stderr
    assert stage("--overwrite").code == 0
    assert len(read(tmp_path)) == 4


def test_shards_together_give_the_same_bytes_as_one_run(tmp_path, make_tar, validate, stage):
    for number in (1, 2, 3, 5):
        make_tar(tmp_path / "raw", number, (3, 2))
    validate()
    assert stage().code == 0
    for index in range(3):
        assert stage(f"--shard={index}/3", "paths.embeddings_dir=sharded").code == 0
    names = list_files(tmp_path / "embeddings")
    assert len(names) == 8
    assert list_files(tmp_path / "sharded") == names
    for name in names:
        assert (tmp_path / "sharded" / name).read_bytes() == (tmp_path / "embeddings" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda table: table.drop_columns("image_path"), "column image_path is missing"),
        (lambda table: table.set_column(0, "dataset_id", table["dataset_id"].cast(pa.bool_())), "dataset_id is bool"),
        (lambda table: pa.concat_tables([table, table.slice(0, 1)]), "is there twice"),
        (lambda table: table.set_column(2, "patch_id", pa.nulls(len(table), pa.int64())), "patch_id has empty values"),
    ],
)
def test_an_intermediate_of_another_shape_is_one_line(tmp_path, city, stage, change, complaint):
    path = tmp_path / "intermediates" / "0001.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    outcome = stage()
    assert outcome.code == 1
    line = outcome.stderr.splitlines()[-1]
    assert line.startswith("error: 1 of 1 tars failed")
    assert f"{path}: " in line
    assert complaint in line


def test_a_tar_without_its_intermediate_fails_and_the_others_are_done(tmp_path, city, stage, make_tar):
    make_tar(tmp_path / "raw", 2)
    outcome = stage()
    assert outcome.code == 1
    assert f"1 of 2 tars failed, the others are done: {tmp_path}/intermediates/0002.parquet: no such" in outcome.stderr
    assert len(read(tmp_path)) == 20


def test_an_intermediate_of_someone_else_is_taken_and_its_texts_become_plain_strings(tmp_path, city, stage):
    path = tmp_path / "intermediates" / "0001.parquet"
    table = pq.read_table(path).select([name for name, _ in tables.ID_COLUMNS + tables.FILE_COLUMNS])
    large = [f.with_type(pa.large_string()) if f.type == pa.string() else f for f in table.schema]
    pq.write_table(table.replace_schema_metadata(None).cast(pa.schema(large)), path)
    outcome = stage()
    assert outcome.code == 0
    assert "carries no provenance" in outcome.stderr
    assert read(tmp_path).schema.field("building_id").type == pa.string()


# ------------------------------------------------------------------------------------------------ interruptions

KILLED = """
import os, sys
from generate_embeddings import generate_embeddings
from pipeline.files import scratch
from pipeline.files.scratch import RowScratch
scratch.SECONDS_BETWEEN_SAVES = -1.0
save = RowScratch.save
def die_behind_the_second_pass(self):
    save(self)
    if self.seen == 8:
        os.kill(os.getpid(), 9)
RowScratch.save = die_behind_the_second_pass
generate_embeddings.main(sys.argv[1:])
"""


def count_passes(monkeypatch):
    from pipeline.inference.backbone import Embedder

    launch, passes = Embedder.launch, []

    def note(self, staged):
        if hasattr(self, "width"):  # else it is tried while loading
            passes.append(sum(len(batch) for batch in staged.batches))
        return launch(self, staged)

    monkeypatch.setattr(Embedder, "launch", note)
    return passes


def test_a_kill_inside_a_tar_is_gone_on_from_and_gives_the_undisturbed_bytes(
    tmp_path, config, city, stage, monkeypatch
):
    arguments = ["--config", str(config), "--set", "embedding_model.batch_size=4"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, check=False)
    assert killed.returncode == -9
    left = [f".0001_embeddings.parquet.{kind}" for kind in ("lock", "progress.json", "rows")]
    assert list_files(tmp_path / "embeddings") == left
    passes = count_passes(monkeypatch)
    outcome = stage("embedding_model.batch_size=4")
    assert outcome.code == 0
    assert "0001_embeddings.parquet: going on behind image 8" in outcome.stderr
    assert passes == [4] * 3
    assert stage("embedding_model.batch_size=4", "paths.embeddings_dir=undisturbed").code == 0
    assert passes[3:] == [4] * 5
    names = list_files(tmp_path / "undisturbed")
    assert list_files(tmp_path / "embeddings") == names
    for name in names:
        assert (tmp_path / "embeddings" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


@pytest.mark.parametrize(("signal", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_an_interrupted_tar_is_gone_on_from_with_its_rejects(tmp_path, city, stage, monkeypatch, signal, code):
    from pipeline.inference.backbone import Embedder

    entries = make_city(1, SIZES)
    spoiled = entries[2].name
    replace_tar(city, [entry if entry.name != spoiled else type(entry)(spoiled, b"") for entry in entries])
    launch = Embedder.launch
    left = [3]

    def interrupt(self, staged):
        left[0] -= hasattr(self, "width")  # else it is tried while loading
        if not left[0]:
            raise signal
        return launch(self, staged)

    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "launch", interrupt)
        assert stage("embedding_model.batch_size=4").code == code
    passes = count_passes(monkeypatch)
    outcome = stage("embedding_model.batch_size=4")
    assert outcome.code == 0
    assert sorted(passes) == [3, 4, 4]  # several are computed at once
    assert "20 in = 19 out + 1 rejected + 0 dropped (unreadable_image 1)" in outcome.stderr
    assert stage("embedding_model.batch_size=4", "paths.embeddings_dir=undisturbed").code == 0
    assert read(tmp_path).equals(read(tmp_path, where="undisturbed"))


def test_two_processes_on_one_tar_are_one_too_many(tmp_path, city, stage):
    other = RowScratch(tmp_path / "embeddings" / "0001_embeddings.parquet", "other")
    outcome = stage()
    other.close()
    assert outcome.code == 1
    error = outcome.stderr.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path}/embeddings/0001_embeddings.parquet: process {os.getpid()} on ")
    assert error.endswith(" is making it: wait for that one, or stop it and run this again")
    assert stage().code == 0


def test_out_of_gpu_memory_keeps_every_row(tmp_path, city, stage, monkeypatch):
    import torch
    from transformers import Dinov2Model

    assert stage().code == 0
    forward = Dinov2Model.forward

    def refuse_large(self, pixel_values, **options):
        if len(pixel_values) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(self, pixel_values, **options)

    monkeypatch.setattr(Dinov2Model, "forward", refuse_large)
    outcome = stage("paths.embeddings_dir=tight")
    assert outcome.code == 0
    assert "out of GPU memory: going on with 2 images a pass" in outcome.stderr
    np.testing.assert_allclose(
        as_matrix(read(tmp_path, where="tight")), as_matrix(read(tmp_path)), rtol=1e-4, atol=1e-6
    )


def test_a_full_disk_is_one_line_and_a_rerun_finishes(tmp_path, city, stage, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.files.scratch.os.pwrite", refuse)
        outcome = stage()
    assert outcome.code == 1
    assert "(No space left on device): free space or allow writing there" in outcome.stderr.splitlines()[-1]
    assert list_files(tmp_path / "embeddings") == []
    assert stage().code == 0
