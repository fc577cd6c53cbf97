"""What a backbone computes in: held to float32 on the run's first pictures, decided once, and kept.

The CPU stands in for a GPU, on which alone it is measured: models are made that bfloat16 is enough for, and not.
"""

import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from plain_loop import embed_plainly, smallest_cosine
from published_models import publish, read_bytes
from raw_tars import draw_view, encode
from safetensors.torch import load_file, save_file
from stage8_fixtures import read_state
from test_generate_embeddings import as_matrix, read

from generate_embeddings import generate_embeddings
from pipeline.errors import DeviceMemoryError, InputError, PipelineError
from pipeline.files import tables
from pipeline.inference import precision
from pipeline.inference.backbone import Embedder
from pipeline.inference.devices import full_precision
from pipeline.inference.precision import (
    LEAST_COSINE,
    MODES,
    NUM_PICTURES,
    Precision,
    agree_on,
    choose_precision,
    measure_cosines,
    settle_precision,
)
from pipeline.log import logging_to
from preprocess_raw_data import process_tar

PICTURES = [encode(draw_view(number, size=(80, 70))) for number in range(20)]
# What is added to the weights of the toy backbone, and in what it can then be computed.
SHIFTS = {
    "sound": "bfloat16",
    "large residuals": "bfloat16_autocast",  # bfloat16 keeps too little of 300 + x; LayerNorm takes the mean off again
    "large activations": "tf32",  # so do the products of bfloat16, here within a block
}


def shift_weights(folder, kind):
    """Make of a toy DINOv2 one that computes the same in exact arithmetic, by way of larger numbers."""
    weights = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        if kind == "large residuals" and name.endswith("position_embeddings"):
            value += 300.0  # noqa: PLW2901 (in place)
        if kind == "large activations" and name.endswith("mlp.fc1.bias"):
            value += 1000.0  # noqa: PLW2901 (far out on the straight side of the GELU)
            weights[name.replace("fc1", "fc2")] -= 1000.0 * weights[name.replace("fc1.bias", "fc2.weight")].sum(1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, toy_backbone):
    folder = tmp_path_factory.mktemp("precision")
    return {kind: shift_weights(shutil.copytree(toy_backbone, folder / kind), kind) for kind in SHIFTS}


@pytest.fixture
def measured_here(monkeypatch):
    monkeypatch.setattr(precision, "is_measured_on", lambda _: True)


def loader(folder, loaded=None):
    def load(mode):
        if loaded is not None:
            loaded.append(mode)
        return Embedder(folder, device="cpu", dtype=mode, batch_size=NUM_PICTURES)

    return load


@pytest.mark.parametrize("kind", SHIFTS)
def test_the_fastest_mode_is_taken_that_stays_near_float32(models, kind, tmp_path):
    loaded = []
    with logging_to(tmp_path / "a.log"):
        found = choose_precision(loader(models[kind], loaded), iter(PICTURES))
    log = (tmp_path / "a.log").read_text()
    assert found.mode == SHIFTS[kind]
    assert found.pictures == NUM_PICTURES
    tried = list(MODES[: MODES.index(found.mode) + 1])
    assert loaded == ["float32", *tried]
    assert list(found.cosines) == tried
    for mode, cosines in found.cosines.items():
        assert (cosines["least"] >= LEAST_COSINE) == (mode == found.mode)
        assert cosines["least"] <= cosines["median"] + 1e-6
        assert f"{mode}: cosine to float32 {cosines['least']:.6f} at the least, {cosines['median']:.6f}" in log
    assert (f"computing in {found.mode}: slower than bfloat16" in log) == (found.mode != "bfloat16")


def test_the_cosines_are_those_to_the_plain_loop_in_float32(models):
    found = choose_precision(loader(models["large residuals"]), PICTURES)
    plain = embed_plainly(models["large residuals"], PICTURES[:NUM_PICTURES])
    for mode, cosines in found.cosines.items():
        embedder = loader(models["large residuals"])(mode)
        ours = embedder.embed([embedder.decode(data) for data in PICTURES[:NUM_PICTURES]])
        assert smallest_cosine(ours, plain) == pytest.approx(cosines["least"], abs=1e-4)


def test_autocast_leaves_weights_and_residuals_in_float32(models):
    embedder = loader(models["sound"])("bfloat16_autocast")
    assert {weight.dtype for weight in embedder.model.parameters()} == {torch.float32}
    kinds = {"residual": set(), "product": set()}
    for layer in embedder.model.encoder.layer:
        layer.register_forward_hook(lambda _, __, output: kinds["residual"].add(output.dtype))
        layer.mlp.fc1.register_forward_hook(lambda _, __, output: kinds["product"].add(output.dtype))
    embedder.embed([embedder.decode(PICTURES[0])])
    assert kinds == {"residual": {torch.float32}, "product": {torch.bfloat16}}


def test_where_nothing_is_near_float32_it_is_float32(models, monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "LEAST_COSINE", 1.1)
    with logging_to(tmp_path / "a.log"):
        found = choose_precision(loader(models["sound"]), PICTURES)
    assert found.mode == "float32"
    assert list(found.cosines) == ["bfloat16", "bfloat16_autocast", "tf32"]
    assert "computing in float32: " in (tmp_path / "a.log").read_text()


def test_embeddings_that_are_no_numbers_are_near_nothing():
    expected = np.array([[1, 2], [3, 4], [1, 1]], np.float32)
    found = np.array([[1, 2], [np.inf, 4], [0, 0]], np.float32)
    np.testing.assert_allclose(measure_cosines(found, expected), [1, -1, -1])


def test_pictures_that_cannot_be_read_are_passed_over_and_no_more_are_asked_for_than_needed(models):
    asked = []

    def pictures():
        for data in [b"", PICTURES[0][:500], *PICTURES]:
            asked.append(data)
            yield data

    assert choose_precision(loader(models["sound"]), pictures()).pictures == NUM_PICTURES
    assert len(asked) == 2 + NUM_PICTURES


def test_without_a_picture_nothing_is_measured_or_noted(models, measured_here, tmp_path):
    loaded = []
    found = settle_precision("auto", "cpu", loader(models["sound"], loaded), lambda: [b"none"], tmp_path / "note.json")
    assert found == Precision("bfloat16")
    assert (loaded, list(tmp_path.iterdir())) == ([], [])


def test_a_gpu_that_cannot_hold_float32_computes_in_bfloat16_and_says_that_it_is_not_measured(tmp_path):
    def load(mode):
        assert mode == "float32"
        raise DeviceMemoryError("the GPU cannot hold the model of 26.9 GB")

    with logging_to(tmp_path / "a.log"):
        found = choose_precision(load, PICTURES)
    assert (found.mode, found.cosines) == ("bfloat16", {})
    log = (tmp_path / "a.log").read_text()
    assert "computing in bfloat16, not measured: in float32, the GPU cannot hold the model of 26.9 GB" in log
    assert agree_on(tmp_path / "note.json", lambda: found) == found
    assert agree_on(tmp_path / "note.json", lambda: Precision("tf32", pictures=1)) == found  # on a larger GPU too


def test_the_weights_are_never_there_twice(models):
    alive = []

    def load(mode):
        assert [one() for one in alive if one() is not None] == []
        embedder = loader(models["large activations"])(mode)
        alive.extend(weakref.ref(weight) for weight in embedder.model.parameters())
        return embedder

    assert len(choose_precision(load, PICTURES).cosines) == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_asked_for_is_obeyed_without_measuring_and_bfloat16_warns(dtype, measured_here, tmp_path):
    with logging_to(tmp_path / "a.log"):
        assert settle_precision(dtype, "auto", None, None) == Precision(dtype)
    assert ("computing in bfloat16, as asked for" in (tmp_path / "a.log").read_text()) == (dtype == "bfloat16")


def test_on_a_cpu_it_is_float32_and_nothing_is_measured():
    assert settle_precision("auto", "cpu", None, None) == Precision("float32")


def test_the_first_of_several_processes_decides_for_all(tmp_path):
    note = tmp_path / "_precision" / "note.json"
    mine, other = Precision("tf32", {"tf32": {"least": 1.0, "median": 1.0}}, 16), Precision("bfloat16", pictures=16)

    def decide_too_late():
        assert agree_on(note, lambda: other) == other
        return mine

    assert agree_on(note, decide_too_late) == other
    assert agree_on(note, lambda: pytest.fail("measured again")) == other
    assert [path.name for path in note.parent.iterdir()] == ["note.json"]


@pytest.mark.parametrize("content", ["", "{}", '{"mode": "float8", "cosines": {}, "pictures": 16}', '{"mode": "tf32"}'])
def test_a_damaged_note_is_named_with_its_remedy(tmp_path, content):
    (tmp_path / "note.json").write_text(content)
    with pytest.raises(InputError, match=r"note\.json: does not say what to compute in: remove it"):
        agree_on(tmp_path / "note.json", lambda: pytest.fail("measured"))


def test_a_note_that_cannot_be_written_is_named_and_never_taken_for_one_that_is_there(tmp_path):
    (tmp_path / "_precision").write_text("a file where the folder belongs")
    with pytest.raises(PipelineError, match=r"cannot write .*note\.json.*: free space or allow writing there"):
        agree_on(tmp_path / "_precision" / "note.json", lambda: Precision("tf32", pictures=1))


def test_tf32_is_allowed_within_and_as_before_behind():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for tf32, name in ((True, "high"), (False, "highest")):
        with full_precision(tf32=tf32):
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (name, tf32)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


# -------------------------------------------------------------------------------------------------------- stage 2


@pytest.fixture
def stage(tmp_path, models, write_config, run_main, make_tar):
    """Run stage 2 on two tars with the model that needs autocast."""
    config = write_config(tmp_path, embedding_model={"model_name": str(models["large residuals"])})
    for dataset_id in (1, 2):
        make_tar(tmp_path / "raw", dataset_id, (3, 2, 4, 2, 3, 1, 5))
    assert run_main(process_tar.main, "--config", config).code == 0
    return lambda *arguments: run_main(generate_embeddings.main, "--config", config, *arguments)


def read_note(tmp_path):
    [note] = (tmp_path / "embeddings" / "_precision").iterdir()
    return json.loads(note.read_text())


def read_precision(tmp_path, name):
    found = tables.read_provenance(tmp_path / "embeddings" / f"{name}_embeddings.parquet")
    assert found["settings"]["dtype"] == "auto"
    return found["precision"], found.get("fidelity")


def test_stage_2_notes_what_it_computed_in_and_how_near_that_is(tmp_path, stage, measured_here, models):
    outcome = stage()
    assert outcome.code == 0, outcome.stderr
    note = read_note(tmp_path)
    assert note["mode"] == "bfloat16_autocast"
    for name in ("0001", "0002"):
        mode, fidelity = read_precision(tmp_path, name)
        assert {"mode": mode, **fidelity} == note
    files = [path.name for path in (tmp_path / "embeddings").iterdir()]
    assert sorted(files) == ["0001_embeddings.parquet", "0002_embeddings.parquet", "_precision", "_rejects"]
    rerun = stage()
    assert (rerun.code, "nothing redone" in rerun.stderr, "cosine to float32" in rerun.stderr) == (0, True, False)


def test_array_tasks_of_other_pictures_compute_alike_and_what_is_done_stays(
    tmp_path, stage, measured_here, monkeypatch
):
    assert stage("--shard", "1/2").code == 0
    note = read_note(tmp_path)
    with monkeypatch.context() as patch:  # from here on nothing may be measured
        patch.setattr(precision, "choose_precision", lambda *_: pytest.fail("measured again"))
        assert stage("--shard", "0/2").code == 0
        (tmp_path / "embeddings" / "0002_embeddings.parquet").unlink()
        assert stage().code == 0
    assert {read_precision(tmp_path, name)[0] for name in ("0001", "0002")} == {note["mode"]}


def test_a_tar_that_a_cpu_goes_on_with_is_begun_anew_in_its_precision(tmp_path, stage, monkeypatch):
    launch, left = Embedder.launch, [9]

    def interrupt(self, staged):
        left[0] -= hasattr(self, "width") and self.mode == "bfloat16_autocast"
        if not left[0]:
            raise KeyboardInterrupt
        return launch(self, staged)

    with monkeypatch.context() as patch:
        patch.setattr(precision, "is_measured_on", lambda _: True)
        patch.setattr(Embedder, "launch", interrupt)
        assert stage("--set", "embedding_model.batch_size=2").code == 130
    assert (tmp_path / "embeddings" / ".0001_embeddings.parquet.progress.json").is_file()
    assert stage().code == 0
    assert read_precision(tmp_path, "0001") == ("float32", None)
    mixed = as_matrix(read(tmp_path))
    assert stage("--overwrite").code == 0
    np.testing.assert_allclose(mixed, as_matrix(read(tmp_path)), rtol=1e-4, atol=1e-5)


def test_a_damaged_first_tar_fails_alone_and_the_next_ones_pictures_are_taken(tmp_path, stage, measured_here):
    path = tmp_path / "raw" / "0001.tar"
    path.write_bytes(path.read_bytes()[:1000])
    outcome = stage()
    assert outcome.code == 1
    assert "1 of 2 tars failed" in outcome.stderr
    assert read_precision(tmp_path, "0002")[0] == read_note(tmp_path)["mode"] == "bfloat16_autocast"


# -------------------------------------------------------------------------------------------------------- stage 8


@pytest.fixture
def published(models, tmp_path_factory):
    return publish(tmp_path_factory.mktemp("published"), models["large residuals"])


def test_stage_8_keeps_what_it_measured_and_a_rerun_goes_on_in_it(embed, packaged, published, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(precision, "is_measured_on", lambda _: True)
        outcome = embed(packaged, output, "--limit", 4, model=published)
        assert outcome.code == 0, outcome.stderr
    state = read_state(output)
    assert state["precision"] == "bfloat16_autocast"
    assert state["fidelity"]["pictures"] == NUM_PICTURES
    assert set(state["fidelity"]["cosines"]) == {"bfloat16", "bfloat16_autocast"}
    (output / "state.json").unlink()  # and where that is lost a part says it
    assert embed(packaged, output, model=published).code == 0
    assert read_state(output)["fidelity"] == state["fidelity"]
    for path in (output / "parts").iterdir():
        found = tables.read_provenance(path)
        assert (found["settings"]["precision"], found["fidelity"]) == (state["precision"], state["fidelity"])


def test_shards_of_stage_8_measure_the_same_pictures_and_make_one_dataset(
    embed, packaged, published, tmp_path, measured_here
):
    assert embed(packaged, tmp_path / "whole", model=published).code == 0
    output = tmp_path / "out"
    for index in (1, 0):
        assert embed(packaged, output, "--shard", f"{index}/2", model=published).code == 0
    assert read_bytes(output) == read_bytes(tmp_path / "whole")
