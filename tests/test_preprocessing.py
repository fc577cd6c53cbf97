"""The model's input made on a device: the same as the model's own processor makes it, for every family."""

import tarfile
from unittest.mock import patch

import pytest
import torch
import transformers
from published_models import write_kind
from raw_tars import draw_view
from torchvision.transforms.v2.functional import _geometry as geometry

from pipeline.inference import backbone
from pipeline.inference.backbone import Embedder
from pipeline.inference.pixels import (
    DEVICE_CHUNK,
    decode_pixels,
    prepare,
    prepare_on_device,
    to_pixels,
    works_on_tensors,
)
from pipeline.inference.precision import measure_cosines
from pipeline.log import logging_to

CPU = torch.device("cpu")
SIZES = [(448, 448), (131, 97), (640, 200), (33, 47)]


def make_processor(family):
    """Return a processor with torch inside, under its name in this transformers."""

    def kind(name):
        fast = getattr(transformers, f"{name}Fast", None)
        return fast if fast is not None and works_on_tensors(fast()) else getattr(transformers, name)

    return {
        "dinov2": lambda: kind("BitImageProcessor")(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}),
        "without crop": lambda: kind("BitImageProcessor")(size={"shortest_edge": 42}, do_center_crop=False),
        "dinov3": lambda: kind("DINOv3ViTImageProcessor")(size={"height": 64, "width": 64}),
        "vit": lambda: kind("ViTImageProcessor")(size={"height": 48, "width": 48}, resample=3),
        "convnext": lambda: kind("ConvNextImageProcessor")(size={"shortest_edge": 64}, crop_pct=0.875),
        "large convnext": lambda: kind("ConvNextImageProcessor")(size={"shortest_edge": 384}),
        "efficientnet": lambda: kind("EfficientNetImageProcessor")(size={"height": 60, "width": 60}),
        "efficientnet with offset": lambda: kind("EfficientNetImageProcessor")(
            size={"height": 60, "width": 60}, rescale_offset=True, rescale_factor=1 / 127.5, include_top=False
        ),
    }[family]()


FAMILIES = (
    "dinov2", "without crop", "dinov3", "vit", "convnext", "large convnext", "efficientnet",
    "efficientnet with offset",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_on_the_device_is_what_the_processor_makes_of_each_picture(family):
    processor = make_processor(family)
    pictures = [draw_view(seed, size=size) for seed, size in enumerate(SIZES * (DEVICE_CHUNK // 4 + 1))]
    found = prepare_on_device(processor, [to_pixels(picture) for picture in pictures], CPU)
    assert len(found) == len(pictures) > DEVICE_CHUNK
    for one, picture in zip(found[:6] + found[-3:], pictures[:6] + pictures[-3:], strict=True):
        expected = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)


def resize_otherwise(processor, pixels, device):
    """Resize bytes as floats, as torchvision does on a GPU."""
    with patch.object(geometry, "_do_native_uint8_resize_on_cpu", lambda _: False):
        return prepare_on_device(processor, pixels, device)


@pytest.mark.parametrize("kind", ["lite0", "dinov3"])
def test_the_devices_resizing_is_judged_by_the_embeddings(kind, tmp_path, shared_dir, monkeypatch):
    """On 64 photographs the device's way is as near as asked for, or the CPU resizes them."""
    folder = write_kind(tmp_path / kind, kind)[0]
    if kind == "dinov3":  # whose processor resizes floats on a CPU too
        make_processor("dinov3").save_pretrained(folder)
    photographs = read_photographs(shared_dir, 64)
    embedder = Embedder(folder, device="cpu")
    monkeypatch.setattr(backbone, "prepare_on_device", resize_otherwise)
    embedder.resizes_on_device = True
    with logging_to(tmp_path / "a.log"):
        embedder._judge_resizing()
    decoded = [decode_pixels(data) for data in photographs]
    found = embedder.embed([embedder.decode(data) for data in photographs])
    expected = embedder.embed([embedder.prepare(pixels) for pixels in decoded])
    assert measure_cosines(found, expected).min() >= 0.9999
    assert embedder.resizes_on_device == (kind != "lite0")
    if kind == "lite0":  # a fifth of a grey level is too much
        line = "pictures are resized on the CPU: on the GPU an embedding has a cosine of 0.99"
        assert line in (tmp_path / "a.log").read_text()
        assert measure_cosines(embedder.embed(decoded), expected).min() < 0.999


def read_photographs(shared_dir, count):
    with tarfile.open(next(iter(sorted((shared_dir / "data" / "raw").glob("*.tar"))))) as tar:
        names = [name for name in tar.getnames() if name.endswith(".jpg")][:count]
        return [tar.extractfile(name).read() for name in names]


def test_a_processor_that_makes_another_size_on_the_device_is_run_on_the_cpu_and_said(tmp_path, monkeypatch):
    embedder = Embedder(write_kind(tmp_path / "dinov3", "dinov3")[0], device="cpu")
    monkeypatch.setattr(backbone, "prepare_on_device", lambda _, pixels, __: [torch.zeros(3, 5, 5)] * len(pixels))
    embedder.resizes_on_device = True
    with logging_to(tmp_path / "a.log"):
        embedder._judge_resizing()
    assert not embedder.resizes_on_device
    assert (
        "pictures are resized on the CPU: on the GPU an embedding has a cosine of -1"
        in (tmp_path / "a.log").read_text()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_and_pictures_give_the_same_input(family):
    processor, picture = make_processor(family), draw_view(1, size=(131, 97))
    expected = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(prepare(processor, to_pixels(picture)), expected)
    assert works_on_tensors(processor)
