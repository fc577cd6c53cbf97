"""The backbone: embeddings equal to the plain loop, whatever is batched how, and what is refused."""

import contextlib
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from plain_loop import embed_plainly, smallest_cosine
from raw_tars import draw_view, encode
from safetensors.torch import load_file, save_file
from transformers import (
    BitImageProcessor,
    ConvNextConfig,
    ConvNextImageProcessor,
    ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTImageProcessorFast,
    DINOv3ViTModel,
)

from pipeline.errors import DeviceMemoryError, InputError, PipelineError, Rejection
from pipeline.inference import backbone
from pipeline.inference.backbone import Embedder, check_embeddings
from pipeline.inference.devices import choose_device
from pipeline.inference.images import decode_rgb
from pipeline.inference.pixels import decode_pixels, to_pixels
from pipeline.log import logging_to

# What a street-view patch can look like as a file.
EXIF = Image.Exif()
EXIF[0x0112] = 8
PHOTOGRAPHS = {
    "square": encode(draw_view(1, size=(448, 448)), quality=85),
    "wide": encode(draw_view(2, size=(640, 200))),
    "odd": encode(draw_view(3, size=(97, 131))),
    "tiny": encode(draw_view(4, size=(9, 7)), "PNG"),
    "grayscale": encode(draw_view(5, size=(200, 200)).convert("L")),
    "cmyk": encode(draw_view(6, size=(120, 90)).convert("CMYK")),
    "exif": encode(draw_view(7, size=(150, 100)), exif=EXIF),
    "progressive": encode(draw_view(8, size=(300, 300)), progressive=True),
    "palette": encode(draw_view(9, size=(64, 64)).quantize(16), "PNG"),
    "webp": encode(draw_view(10, size=(222, 111)), "WEBP"),
    "square again": encode(draw_view(11, size=(448, 448))),
}


def make_dinov3(folder):
    torch.manual_seed(1)
    config = DINOv3ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=16, image_size=64,
        num_register_tokens=2, use_gated_mlp=True,
    )  # fmt: skip
    DINOv3ViTModel(config).save_pretrained(folder)
    DINOv3ViTImageProcessorFast(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def make_convnext(folder):
    torch.manual_seed(2)
    ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])).save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875).save_pretrained(folder)
    return folder


def make_without_crop(folder, toy_backbone):
    shutil.copytree(toy_backbone, folder)
    BitImageProcessor(size={"shortest_edge": 42}, do_center_crop=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory, toy_backbone):
    folder = tmp_path_factory.mktemp("backbones")
    return {
        "dinov2": toy_backbone,
        "dinov3": make_dinov3(folder / "dinov3"),
        "convnext": make_convnext(folder / "convnext"),
        "without crop": make_without_crop(folder / "without-crop", toy_backbone),
    }


def embed_ours(embedder, photographs):
    return embedder.embed([embedder.prepare(decode_pixels(data)) for data in photographs])


@pytest.mark.parametrize("kind", ["dinov2", "dinov3", "convnext", "without crop"])
def test_every_photograph_gets_the_embedding_of_the_plain_loop(models, kind):
    embedder = Embedder(models[kind], device="cpu")
    ours = embed_ours(embedder, PHOTOGRAPHS.values())
    plain = embed_plainly(models[kind], PHOTOGRAPHS.values())
    assert ours.shape == plain.shape
    assert ours.dtype == np.float32
    assert smallest_cosine(ours, plain) >= 0.9999
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), np.linalg.norm(plain, axis=1), rtol=1e-4)
    assert smallest_cosine(ours[:1], ours[1:2]) < 0.9999  # the photographs do differ
    assert embedder.width == plain.shape[1]


@pytest.mark.parametrize("size", [(3, 1201), (1600, 5)])
def test_a_ribbon_gets_the_embedding_of_the_plain_loop(models, size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1] // 12 + 1, size[0] // 12 + 1, 3), dtype=np.uint8)
    ribbon = encode(Image.fromarray(pixels).resize(size), "PNG")
    ours, plain = (
        embed_ours(Embedder(models["dinov2"], device="cpu"), [ribbon]),
        embed_plainly(models["dinov2"], [ribbon]),
    )
    assert smallest_cosine(ours, plain) >= 0.999


def test_a_ribbon_takes_no_gigabytes(models):
    prepared = Embedder(models["dinov2"], device="cpu").prepare(torch.zeros((3, 50_000_000, 1), dtype=torch.uint8))
    assert prepared.shape[0] == 3
    assert prepared.shape[1] == prepared.shape[2]


def test_real_photographs_of_every_mode_get_the_embedding_of_the_plain_loop(shared_dir, models):
    with tarfile.open(shared_dir / "data" / "bad" / "0099.tar") as tar:
        files = [tar.extractfile(info).read() for info in tar if info.isfile() and info.name.endswith("jpg")]
    photographs = []
    for data in files:
        with contextlib.suppress(Rejection):
            decode_rgb(data)
            photographs.append(data)
    assert len(photographs) > 39
    ours = embed_ours(Embedder(models["dinov3"], device="cpu"), photographs)
    assert smallest_cosine(ours, embed_plainly(models["dinov3"], photographs)) >= 0.9999


def test_the_class_token_is_another_output_and_is_the_plain_loops_too(models):
    photographs = list(PHOTOGRAPHS.values())[:4]
    ours = embed_ours(Embedder(models["dinov2"], pooling_type="cls_token", device="cpu"), photographs)
    assert smallest_cosine(ours, embed_plainly(models["dinov2"], photographs, "cls_token")) >= 0.9999


@pytest.mark.parametrize("batch_size", [1, 3, 64, "auto"])
def test_the_batch_size_changes_nothing_but_rounding(models, batch_size):
    embedder = Embedder(models["dinov3"], device="cpu", batch_size=batch_size)
    assert embedder.micro_batch <= (batch_size if isinstance(batch_size, int) else 64)
    ours = embed_ours(embedder, PHOTOGRAPHS.values())
    np.testing.assert_allclose(ours, embed_plainly(models["dinov3"], PHOTOGRAPHS.values()), rtol=1e-3, atol=1e-5)


def test_bfloat16_stays_close_to_the_plain_loop(models):
    embedder = Embedder(models["dinov3"], device="cpu", dtype="bfloat16")
    assert embedder.dtype == torch.bfloat16
    ours = embed_ours(embedder, PHOTOGRAPHS.values())
    assert smallest_cosine(ours, embed_plainly(models["dinov3"], PHOTOGRAPHS.values())) >= 0.999


def test_out_of_memory_halves_the_pass_and_keeps_every_row(models, monkeypatch):
    embedder = Embedder(models["dinov3"], device="cpu", batch_size=8)
    pixels = [embedder.prepare(to_pixels(draw_view(number))) for number in range(21)]
    expected = embedder.embed(pixels)
    sizes, forward = [], embedder.model.forward

    def refuse_large(*, pixel_values):
        sizes.append(len(pixel_values))
        if len(pixel_values) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(pixel_values=pixel_values)

    monkeypatch.setattr(embedder.model, "forward", refuse_large)
    np.testing.assert_allclose(embedder.embed(pixels), expected, rtol=1e-4, atol=1e-6)
    assert embedder.micro_batch == 2
    assert sizes[:3] == [8, 4, 2]


def test_what_comes_as_pixels_and_prepared_is_one_pass_in_order(models):
    embedder = Embedder(models["dinov3"], device="cpu")
    embedder.resizes_on_device = True  # the CPU does what is left to a GPU
    ready = [embedder.decode(data) for data in PHOTOGRAPHS.values()]
    assert {one.dtype for one in ready} == {torch.uint8}
    large = encode(draw_view(12, size=(1100, 1000)))
    assert embedder.decode(large).dtype == torch.float32  # it would fill the memory
    photographs = [*PHOTOGRAPHS.values(), large]
    ours = embedder.embed([embedder.decode(data) for data in photographs])
    assert smallest_cosine(ours, embed_plainly(models["dinov3"], photographs)) >= 0.9999


def test_pictures_that_the_gpu_cannot_hold_are_one_line_with_a_remedy(models, monkeypatch):
    embedder = Embedder(models["dinov3"], device="cpu")
    embedder.resizes_on_device = True

    def refuse(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(backbone, "prepare_on_device", refuse)
    with pytest.raises(DeviceMemoryError, match="cannot hold the pictures of a pass: .*batch_size to a smaller number"):
        embedder.embed([embedder.decode(data) for data in PHOTOGRAPHS.values()])


def test_a_gpu_too_small_for_one_image_is_one_line(models, monkeypatch):
    embedder = Embedder(models["dinov3"], device="cpu")

    def refuse(**_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(embedder.model, "forward", refuse)
    with pytest.raises(PipelineError, match="the GPU cannot hold the model and one image"):
        embedder.embed([embedder.prepare(to_pixels(draw_view(1)))])


def test_a_compiled_model_sees_one_shape_only(models, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)  # the padding is what is tested
    embedder = Embedder(models["dinov3"], device="cpu", batch_size=4, compile_model=True)
    sizes, forward = [], embedder.model.forward

    def note(*, pixel_values):
        sizes.append(len(pixel_values))
        return forward(pixel_values=pixel_values)

    monkeypatch.setattr(embedder.model, "forward", note)
    ours = embed_ours(embedder, PHOTOGRAPHS.values())
    assert sizes == [4, 4, 4]
    assert smallest_cosine(ours, embed_plainly(models["dinov3"], PHOTOGRAPHS.values())) >= 0.9999


@pytest.fixture
def copied(models, tmp_path):
    return shutil.copytree(models["dinov2"], tmp_path / "copied")


def test_missing_weights_are_refused_and_never_made_up(copied):
    weights = load_file(copied / "model.safetensors")
    gone = sorted(weights)[-1]
    save_file(
        {name: tensor for name, tensor in weights.items() if name != gone},
        copied / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(InputError, match=rf"copied: 1 weights are missing \({gone}, \.\.\.\): fetch the model again"):
        Embedder(copied, device="cpu")


@pytest.mark.parametrize(
    "damage", ["weights gone", "weights cut", "weights empty", "config gone", "config cut", "unknown kind"]
)
def test_a_model_that_cannot_be_loaded_is_one_line(copied, damage):
    weights, config = copied / "model.safetensors", copied / "config.json"
    if damage.endswith("gone"):
        (weights if "weights" in damage else config).unlink()
    elif damage == "weights cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "weights empty":
        weights.write_bytes(b"")
    elif damage == "config cut":
        config.write_text("{")
    else:
        config.write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(InputError) as caught:
        Embedder(copied, device="cpu")
    assert str(caught.value).startswith(str(copied))
    assert "\n" not in str(caught.value)


def test_a_damaged_processor_is_one_line(copied):
    (copied / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match="no image processor can be loaded"):
        Embedder(copied, device="cpu")


def test_a_processor_that_transformers_has_to_guess_is_said_or_refused(copied, tmp_path):
    (copied / "preprocessor_config.json").unlink()
    with logging_to(tmp_path / "a.log"), contextlib.suppress(InputError):  # older versions do not guess
        Embedder(copied, device="cpu")
    assert "says nothing of its image processor" in (tmp_path / "a.log").read_text()


def test_embeddings_that_are_no_numbers_name_the_first_image():
    rows = np.ones((4, 3), np.float32)
    check_embeddings(rows, "abcd", 3)
    for value in (np.nan, np.inf):
        bad = rows.copy()
        bad[2, 1] = bad[3, 0] = value
        with pytest.raises(PipelineError, match=r"^c: its embedding is not finite or all zero, and 1 more of 4"):
            check_embeddings(bad, "abcd")
    bad = rows.copy()
    bad[1] = 0
    with pytest.raises(PipelineError, match="^b: its embedding"):
        check_embeddings(bad, "abcd")
    with pytest.raises(PipelineError, match="the model gives 3 numbers an image, expected 4"):
        check_embeddings(rows, "abcd", 4)
    check_embeddings(np.ones((0, 3), np.float32), [])


def test_asking_for_a_gpu_where_there_is_none_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PipelineError, match=r"no usable GPU: set \[infrastructure\]\.device to auto or cpu"):
        choose_device("cuda")
    assert choose_device("auto").type == choose_device("cpu").type == "cpu"
