"""Image sizes, scales, mirror images and pooling: the same numbers by hand, in stage 2 and in the published model."""

import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from plain_loop import smallest_cosine
from published_models import make_picture, publish, write_backbone
from torch.nn import functional

from generate_embeddings import generate_embeddings
from pipeline.cli import Options
from pipeline.config import load_config
from pipeline.errors import ConfigError, InputError, PipelineError
from pipeline.files import tables
from pipeline.inference.backbone import Embedder
from pipeline.inference.pixels import to_pixels
from pipeline.inference.pooling import embed_views
from preprocess_raw_data import process_tar
from publish_model.configuration_spatial_embeddings import SpatialEmbeddingsConfig

PICTURES = [make_picture(seed, size) for seed, size in enumerate([(300, 280), (97, 131), (448, 448)])]
VIEWS = {
    "size": {"image_size": 84},
    "flip": {"flip": True},
    "scales": {"scales": [56, 112, 84]},
    "scales and flip": {"scales": [56, 84], "flip": True},
    "class token": {"pooling_type": "cls_token", "image_size": 70, "flip": True},
}


def load_plainly(folder):
    from transformers import AutoImageProcessor, AutoModel

    return AutoImageProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def embed_by_hand(folder, views):
    """The oracle: one picture and one view at a time, with the processor's settings written out."""
    processor, model = load_plainly(folder)
    scales = views.get("scales") or [views.get("image_size", 56)]
    side = max(scales)
    sizes = {"size": {"shortest_edge": round(64 * side / 56)}, "crop_size": {"height": side, "width": side}}
    rows = []
    with torch.inference_mode():
        for picture in PICTURES:
            pixels = processor(images=picture, return_tensors="pt", **sizes)["pixel_values"]
            found = []
            for scale in scales:
                sized = functional.interpolate(pixels, (scale, scale), mode="bicubic", antialias=True)
                seen = [sized, sized.flip(3)] if views.get("flip") else [sized]
                outputs = [model(pixel_values=one) for one in seen]
                if views.get("pooling_type") == "cls_token":
                    pooled = [one.last_hidden_state[:, 0] for one in outputs]
                else:
                    pooled = [one.pooler_output for one in outputs]
                found.append(sum(pooled) / len(pooled))
            rows.append(found[0] if len(found) == 1 else unit(sum(unit(one) for one in found) / len(found)))
    return torch.cat(rows).numpy()


def options_of(views):
    options = {**views, "image_size": max(views["scales"]) if "scales" in views else views.get("image_size")}
    return {**options, "device": "cpu"}


@pytest.fixture(scope="module", params=["dinov2", "dinov3"])
def backbone(request, tmp_path_factory):
    settings = {"patch_size": 14}
    return write_backbone(tmp_path_factory.mktemp(request.param) / "backbone", request.param, **settings)


def prepare_all(embedder):
    return [embedder.prepare(to_pixels(picture)) for picture in PICTURES]


@pytest.mark.parametrize("kind", VIEWS)
def test_stage_2_computes_what_the_views_by_hand_give(backbone, kind):
    embedder = Embedder(backbone, **options_of(VIEWS[kind]))
    found, expected = (
        embedder.embed(prepare_all(embedder)),
        embed_by_hand(backbone, VIEWS[kind]),
    )
    assert found.shape == expected.shape == (3, embedder.width)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    plain = Embedder(backbone, device="cpu")
    if embedder.width == plain.width:  # the views do something
        assert smallest_cosine(found, plain.embed(prepare_all(plain))) < 0.99999


@pytest.mark.parametrize("kind", VIEWS)
def test_one_forward_of_the_published_model_gives_what_stage_2_gave(backbone, kind, tmp_path):
    from transformers import AutoImageProcessor, AutoModel, pipeline

    embedder = Embedder(backbone, **options_of(VIEWS[kind]))
    features = embedder.embed(prepare_all(embedder))
    published = publish(tmp_path, backbone, embedder.width, **VIEWS[kind])
    model = AutoModel.from_pretrained(published, trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(published)
    pixels = processor(images=PICTURES, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        own, _ = model.extract(pixels)
        found = model(pixel_values=pixels).embeddings.numpy()
        expected = model.projector(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(own.numpy(), features, rtol=1e-4, atol=1e-5)
    assert smallest_cosine(found, expected) > 0.99999
    extract = pipeline("image-feature-extraction", model=str(published), trust_remote_code=True, device="cpu")
    assert smallest_cosine(np.array(extract(PICTURES[0])).reshape(1, -1), expected[:1]) > 0.9999
    stage_8 = Embedder(published, device="cpu", trust_remote_code=True)
    assert smallest_cosine(stage_8.embed(prepare_all(stage_8)), expected) > 0.99999


def test_the_published_folder_says_its_views_and_its_card_too(backbone, tmp_path):
    published = publish(tmp_path, backbone, scales=[56, 84], flip=True)
    config = json.loads((published / "config.json").read_text())
    assert (config["scales"], config["flip"]) == ([56, 84], True)
    processor = json.loads((published / "preprocessor_config.json").read_text())
    assert processor["crop_size"] == {"height": 84, "width": 84}
    assert processor["size"] == {"shortest_edge": 96}
    card = " ".join((published / "README.md").read_text().split())
    assert "as the normalised mean over 56, 84 pixels, the mean with the mirror image's)" in card


def test_with_the_defaults_the_features_are_the_backbones_own(backbone):
    _, model = load_plainly(backbone)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(pixel_values=pixels)
        found, outputs = embed_views(model, pixels, "pooler_output", (), False)
    assert torch.equal(found, expected.pooler_output)
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    assert (SpatialEmbeddingsConfig().scales, SpatialEmbeddingsConfig().flip) == ([], False)


# ---------------------------------------------------------------------------------------------------- what is refused


def write_vit(folder, **settings):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(**shape, image_size=32, patch_size=8)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_a_vit_that_does_not_interpolate_its_positions_is_refused_at_another_size(tmp_path):
    folder = write_vit(tmp_path / "vit")
    assert Embedder(folder, device="cpu", image_size=32).width == 24
    with pytest.raises(InputError, match=r"ViTModel or its .* cannot embed a picture .*leave .*image_size"):
        Embedder(folder, device="cpu", image_size=64)


def test_a_size_that_is_no_multiple_of_a_patch_is_refused_with_those_beside_it(backbone):
    with pytest.raises(InputError, match="60 pixels are no multiple of its patches of 14.*take 56 or 70 in"):
        Embedder(backbone, device="cpu", image_size=60)
    with pytest.raises(InputError, match="30 pixels are no multiple of its patches of 14"):
        Embedder(backbone, device="cpu", image_size=56, scales=[30, 56])


def test_a_processor_whose_size_cannot_be_set_is_refused(backbone, tmp_path):
    copy = shutil.copytree(backbone, tmp_path / "copy")
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps(settings | {"do_resize": False}))
    with pytest.raises(InputError, match="BitImageProcessor.*: an image size cannot be set for it"):
        Embedder(copy, device="cpu", image_size=56)


def test_a_model_without_a_class_token_is_refused_not_given_a_patch(tmp_path):
    from transformers import SiglipVisionConfig, SiglipVisionModel, SwinConfig, SwinModel, ViTImageProcessor

    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    siglip = SiglipVisionModel(SiglipVisionConfig(**shape, image_size=32, patch_size=8))
    swin = SwinModel(
        SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)
    )
    for model in (siglip, swin):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        Embedder(folder, device="cpu")
        with pytest.raises(InputError, match=r"has no CLS token: set .*pooling_type to pooler_output"):
            Embedder(folder, device="cpu", pooling_type="cls_token")


def write_text_and_vision(folder, family):
    """Save a toy model of text and pictures, and return its folder."""
    import transformers

    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{family}Config")(
        vision_config={**shape, "image_size": 32, "patch_size": 8}, text_config={**shape, "vocab_size": 99}
    )
    torch.manual_seed(3)
    getattr(transformers, f"{family}Model")(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    options = size if family == "CLIP" else {"size": {"height": 32, "width": 32}}
    getattr(transformers, f"{family}ImageProcessor")(**options).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_of_a_model_of_text_and_pictures_the_vision_tower_is_taken_and_published(tmp_path, family):
    import transformers
    from transformers import AutoModel

    folder = write_text_and_vision(tmp_path / family.lower(), family)
    embedder = Embedder(folder, device="cpu")
    pixels = torch.stack(prepare_all(embedder))
    whole = getattr(transformers, f"{family}Model").from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = whole.vision_model(pixel_values=pixels).pooler_output.numpy()
    found = embedder.embed(list(pixels))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    published = publish(tmp_path, folder)
    model, info = AutoModel.from_pretrained(published, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values())
    with torch.inference_mode():
        features, _ = model.eval().extract(pixels)
    np.testing.assert_allclose(features.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_model_of_text_is_refused_with_what_to_give(tmp_path):
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(**shape, vocab_size=99)).save_pretrained(tmp_path / "bert")
    with pytest.raises(
        InputError, match="bert: a bert model does not take pictures alone: set .*model_name to a vision"
    ):
        Embedder(tmp_path / "bert", device="cpu")


def test_a_model_without_a_pooled_output_says_what_to_set(backbone, monkeypatch):
    from transformers import Dinov2Model, DINOv3ViTModel

    for kind in (Dinov2Model, DINOv3ViTModel):

        def without_pooler(self, *arguments, forward=kind.forward, **options):
            outputs = forward(self, *arguments, **options)
            outputs["pooler_output"] = None
            return outputs

        monkeypatch.setattr(kind, "forward", without_pooler)
    with pytest.raises(InputError, match=r"has no pooler_output: set \[embedding_model\]\.pooling_type to cls_token"):
        Embedder(backbone, device="cpu")


def test_a_model_that_masks_at_random_is_refused(tmp_path):
    from transformers import ViTImageProcessor, ViTMAEConfig, ViTMAEModel

    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    ViTMAEModel(ViTMAEConfig(**shape, image_size=32, patch_size=8)).save_pretrained(tmp_path / "mae")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "mae")
    with pytest.raises(InputError, match="has no pooler_output"):
        Embedder(tmp_path / "mae", device="cpu")
    with pytest.raises(InputError, match="has no CLS token"):
        Embedder(tmp_path / "mae", device="cpu", pooling_type="cls_token")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": [224, 224]}, "a size is there twice"),
        ({"scales": [224, 320], "image_size": 384}, "image_size, scales: give one of them"),
        ({"scales": [0]}, "greater than or equal to 1"),
        ({"image_size": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_cannot_go_together_are_refused_by_name(tmp_path, settings, message):
    path = tmp_path / "config.toml"
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    path.write_text("\n".join(["[embedding_model]", *lines]))
    with pytest.raises(ConfigError, match=message):
        load_config(path)


@pytest.mark.parametrize(
    ("setting", "difference"),
    [
        ("image_size=70", "image_size was 'auto' and is now 70"),
        ("scales=[70,56]", "scales was [] and is now [56, 70]"),
        ("flip=true", "flip was False and is now True"),
    ],
)
def test_embeddings_of_other_views_are_refused_by_name(tmp_path, make_tar, toy_backbone, setting, difference):
    make_tar(tmp_path / "raw", 1, [2, 3])
    paths = ["raw_dir", "intermediates_dir", "embeddings_dir"]
    lines = ["[paths]", *(f'{key} = "{key.removesuffix("_dir")}"' for key in paths)]
    lines += ["[embedding_model]", f'model_name = "{toy_backbone}"']
    (tmp_path / "config.toml").write_text("\n".join(lines))

    def run(stage, *overrides):
        return stage.run(load_config(tmp_path / "config.toml", list(overrides)), Options())

    run(process_tar)
    written = run(generate_embeddings).written[0]
    settings = tables.read_provenance(written)["settings"]
    views = {"pooling_type", "image_size", "scales", "flip", "trust_remote_code"}
    assert set(settings) == views | {"model", "dtype", "embedding_dtype"}
    with pytest.raises(PipelineError, match=re.escape(difference)):
        run(generate_embeddings, f"embedding_model.{setting}")
    other = run(generate_embeddings, f"embedding_model.{setting}", "paths.embeddings_dir=other").written[0]
    rows = [np.stack(pq.read_table(path)["embedding"].to_numpy()) for path in (written, other)]
    assert smallest_cosine(*rows) < 0.999999
