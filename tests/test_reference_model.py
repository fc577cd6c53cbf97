"""The model that the reference implementation published, as --model-id: built anew, its code never run."""

import json
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from published_models import make_photographs, read_dataset, write_backbone, write_kind, write_packaged
from reference_models import write_reference_model
from safetensors.torch import load_file, save_file

from pipeline.errors import InputError
from publish_model import embed_images, generate_embeddings_from_parquet, search_embeddings, verify_embeddings
from publish_model.model_folder.published_model import find_model

PHOTOGRAPHS = make_photographs(12)


@pytest.fixture(scope="module", params=["dinov2", "dinov3", "lite0"])
def artefact(request, tmp_path_factory):
    """A folder of the reference implementation's, its backbone's folder, and the oracle."""
    place = tmp_path_factory.mktemp(request.param)
    backbone, width = write_kind(place / "backbone", request.param)
    oracle = write_reference_model(place / "reference", backbone, width)
    return place / "reference", backbone, oracle


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, data in enumerate(PHOTOGRAPHS):
        (folder / f"{number:02d}.jpg").write_bytes(data)
    return folder


def expected_of(artefact, pictures):
    """What the original computes, with the processor of its backbone."""
    from PIL import Image
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(artefact[1])
    images = [Image.open(path).convert("RGB") for path in sorted(pictures.iterdir())]
    with torch.inference_mode():
        return artefact[2](processor(images=images, return_tensors="pt")["pixel_values"]).numpy()


def embed(folder, packaged, output):
    arguments = ["--input", packaged, "--output", output, "--model-id", folder]
    generate_embeddings_from_parquet.main([str(argument) for argument in arguments])
    return np.stack(read_dataset(output).column("embedding").to_numpy())


def test_stage_8_gives_the_embeddings_of_the_original(artefact, pictures, tmp_path):
    packaged = write_packaged(tmp_path / "packaged.parquet", PHOTOGRAPHS)
    found = embed(artefact[0], packaged, tmp_path / "out")
    expected = expected_of(artefact, pictures)
    assert found.shape == (12, 256)
    assert (found * expected).sum(axis=1).min() >= 0.9999
    assert np.abs((expected @ expected.T)[0, 1:]).max() < 0.999  # the pictures are told apart
    state = json.loads((tmp_path / "out" / "state.json").read_text())
    assert state["complete"]
    assert state["model_id"] == artefact[0].name


def test_one_picture_gives_the_same(artefact, pictures):
    found = embed_images.embed_images(sorted(pictures.iterdir()), str(artefact[0]))
    assert (found * expected_of(artefact, pictures)).sum(axis=1).min() >= 0.9999


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A small artefact for what does not depend on the backbone."""
    place = tmp_path_factory.mktemp("dino")
    backbone = write_backbone(place / "backbone")
    return place / "reference", backbone, write_reference_model(place / "reference", backbone)


def test_search_and_verify_take_its_dataset(run_main, dino, pictures, tmp_path):
    packaged = write_packaged(tmp_path / "packaged.parquet", PHOTOGRAPHS, OSMID=[f"way/{n}" for n in range(12)])
    embed(dino[0], packaged, tmp_path / "out")
    query = ("--query", pictures / "07.jpg", "--top", 1, "--model-id", dino[0])
    outcome = run_main(search_embeddings.main, tmp_path / "out", *query)
    assert outcome.code == 0, outcome.stderr
    rank, similarity, identifier = outcome.stdout.split()
    assert (rank, identifier) == ("1", "way/7")
    assert float(similarity) > 0.9999
    assert "UNEXPECTED" not in outcome.stderr  # as transformers calls the projector under its old names
    outcome = run_main(verify_embeddings.main, tmp_path / "out", "--input", packaged)
    assert outcome.code == 0, outcome.stderr


def test_a_rerun_and_a_copy_of_the_model_elsewhere_go_on_with_the_dataset(run_main, dino, tmp_path):
    packaged = write_packaged(tmp_path / "packaged.parquet", PHOTOGRAPHS)
    first = embed(dino[0], packaged, tmp_path / "out")
    copy = shutil.copytree(dino[0], tmp_path / "copy")
    main = generate_embeddings_from_parquet.main
    arguments = ("--input", packaged, "--output", tmp_path / "out", "--model-id")
    assert "nothing redone" in run_main(main, *arguments, copy).stderr
    next((tmp_path / "out" / "parts").iterdir()).unlink()
    assert run_main(main, *arguments, copy).code == 0
    assert np.array_equal(np.stack(read_dataset(tmp_path / "out").column("embedding").to_numpy()), first)


def test_its_version_changes_with_weights_processor_and_backbone(dino, tmp_path):
    version = find_model(str(dino[0]), download=False).name_version("float32")
    versions = {version}
    for number, change in enumerate(("weights", "processor", "backbone")):
        backbone = shutil.copytree(dino[1], tmp_path / f"backbone{number}")
        folder = shutil.copytree(dino[0], tmp_path / f"reference{number}")
        config = json.loads((folder / "config.json").read_text())
        if change == "weights":
            with open(folder / "model.safetensors", "r+b") as file:
                file.seek(-4, 2)
                file.write(b"\0\0\x80?")
        else:
            path = backbone / ("config.json" if change == "backbone" else "preprocessor_config.json")
            path.write_text(json.dumps(json.loads(path.read_text()) | {"changed": True}))
            config["backbone_model_name"] = str(backbone)
        (folder / "config.json").write_text(json.dumps(config))
        versions.add(find_model(str(folder), download=False).name_version("float32"))
    assert len(versions) == 4


def test_its_version_hangs_on_no_order_of_names(dino):
    index = json.loads((find_model(str(dino[0]), download=False).folder / "model.safetensors.index.json").read_text())
    assert list(index["weight_map"]) == sorted(index["weight_map"])


def test_a_processor_of_its_own_wins_over_the_backbones(dino, tmp_path):
    folder = shutil.copytree(dino[0], tmp_path / "reference")
    shutil.copy(dino[1] / "preprocessor_config.json", folder)
    (folder / "preprocessor_config.json").write_text('{"of": "its own"}')
    model = find_model(str(folder), download=False)
    assert (model.folder / "preprocessor_config.json").read_text() == '{"of": "its own"}'


@pytest.mark.parametrize(
    ("removed", "problem"),
    [
        ("projector.", "holds no projector weights"),
        ("backbone.encoder.layer.1.", r"weights are missing \(backbone\.encoder\.layer\.1\."),
    ],
)
def test_weights_that_are_not_all_there_are_one_line(dino, tmp_path, removed, problem):
    folder = shutil.copytree(dino[0], tmp_path / "reference")
    path = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if not name.startswith(removed)}
    save_file(kept, path, {"format": "pt"})
    with pytest.raises(InputError, match=problem):
        find_model(str(folder), download=False).load("float32")


def test_weights_in_several_files_give_the_same(dino, pictures, tmp_path):
    folder = shutil.copytree(dino[0], tmp_path / "reference")
    weights = load_file(folder / "model.safetensors")
    save_torch_state_dict(weights, folder, max_shard_size=20_000)  # which removes the one file
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    found = embed_images.embed_images(sorted(pictures.iterdir()), str(folder))
    assert (found * expected_of(dino, pictures)).sum(axis=1).min() >= 0.9999


def test_a_backbone_without_pooled_output_gives_its_first_token(pictures, tmp_path):
    from transformers import AutoModel, BitImageProcessor, ViTMAEConfig

    torch.manual_seed(0)
    config = ViTMAEConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=56, patch_size=14,
        mask_ratio=0.0,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path / "backbone")
    BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}).save_pretrained(
        tmp_path / "backbone"
    )
    write_reference_model(tmp_path / "reference", tmp_path / "backbone")
    model = find_model(str(tmp_path / "reference"), download=False)
    assert json.loads((model.folder / "config.json").read_text())["pooling_type"] == "cls_token"


def test_a_shallow_projector_and_each_activation_are_built(pictures, tmp_path):
    backbone = write_backbone(tmp_path / "backbone")
    for number, (activation, widths) in enumerate([("relu", (24,)), ("SiLU", (256, 256)), ("gelu", (48, 24))]):
        norm = number > 0
        folder = tmp_path / f"reference{number}"
        oracle = write_reference_model(folder, backbone, widths=widths, activation=activation.lower(), norm=norm)
        settings = json.loads((folder / "config.json").read_text())
        settings.pop("activation")
        (folder / "config.json").write_text(json.dumps(settings | {"projector": {"activation": activation}}))
        found = embed_images.embed_images(sorted(pictures.iterdir()), str(folder))
        expected = expected_of((folder, backbone, oracle), pictures)
        assert (found * expected).sum(axis=1).min() >= 0.9999


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"backbone_model_name": "/nowhere/backbone"}, "backbone '/nowhere/backbone' are not to be had"),
        ({"activation": None}, "does not say the projector's activation"),
        ({"activation": "tanh"}, "does not say the projector's activation"),
    ],
)
def test_what_cannot_be_built_is_one_line_that_says_why(run_main, dino, pictures, tmp_path, change, problem):
    folder = shutil.copytree(dino[0], tmp_path / "reference")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value}))
    outcome = run_main(embed_images.main, pictures / "00.jpg", "--model-id", folder)
    assert outcome.code == 1
    assert outcome.stderr.count("error: ") == 1
    assert problem in outcome.stderr


def test_weights_that_are_missing_or_damaged_are_said(run_main, dino, pictures, tmp_path):
    folder = shutil.copytree(dino[0], tmp_path / "reference")
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    outcome = run_main(embed_images.main, pictures / "00.jpg", "--model-id", folder)
    assert "its weights cannot be read" in outcome.stderr
    (folder / "model.safetensors").unlink()
    outcome = run_main(embed_images.main, pictures / "00.jpg", "--model-id", folder)
    assert outcome.code == 1
    assert "its weights cannot be read (No such file" in outcome.stderr
