"""The passes of a model: how large they are, what happens when memory or compiler fail, and what travels in them."""

import numpy as np
import pytest
import torch
from plain_loop import embed_plainly, smallest_cosine
from published_models import write_kind
from raw_tars import draw_view, encode
from test_backbone import PHOTOGRAPHS, embed_ours, make_convnext, make_dinov3

from pipeline.errors import PipelineError
from pipeline.inference import backbone
from pipeline.inference.backbone import Embedder
from pipeline.inference.devices import compile_blocks, is_convolutional
from pipeline.inference.pixels import decode_pixels, to_pixels
from pipeline.log import logging_to


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("passes")
    return {"dinov3": make_dinov3(folder / "dinov3"), "convnext": make_convnext(folder / "convnext")}


@pytest.mark.parametrize("compiled", [False, True])
def test_passes_that_the_memory_does_not_hold_are_halved_for_good(models, monkeypatch, compiled):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    embedder = Embedder(models["dinov3"], device="cpu", batch_size=8, compile_model=compiled)
    pixels = [embedder.prepare(to_pixels(draw_view(number))) for number in range(8)]
    expected = embedder.embed(pixels)
    sizes, forward = [], embedder.model.forward

    def refuse_large(*, pixel_values):
        sizes.append(len(pixel_values))
        if len(pixel_values) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(pixel_values=pixel_values)

    monkeypatch.setattr(embedder.model, "forward", refuse_large)
    for _ in range(2):
        np.testing.assert_allclose(embedder.embed(pixels), expected, rtol=1e-4, atol=1e-6)
    assert sizes == [8, 4, *[2] * 8]


def test_a_model_that_the_gpu_cannot_hold_is_one_line_with_a_remedy(models, monkeypatch):
    class TooLarge(torch.nn.Linear):
        def to(self, *_):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    too_large = TooLarge(1000, 1_000_000, bias=False, device="meta")
    monkeypatch.setattr(backbone, "load_model", lambda *_: too_large)
    with pytest.raises(PipelineError, match=r"cannot hold the model of 4\.0 GB: .*dtype to \"bfloat16\""):
        Embedder(models["dinov3"], device="cpu")


def test_a_vit_is_no_convolutional_model(models):
    from transformers import AutoModel

    assert {kind: is_convolutional(AutoModel.from_pretrained(folder)) for kind, folder in models.items()} == {
        "dinov3": False, "convnext": True,
    }  # fmt: skip


def refuse_to_compile(*_, **__):
    raise RuntimeError("no C++ compiler\nwas found")


def test_a_compiler_that_fails_is_said_and_done_without(models, monkeypatch, tmp_path):
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", lambda *_, **__: refuse_to_compile)
    with logging_to(tmp_path / "a.log"):
        embedder = Embedder(models["dinov3"], device="cpu", compile_model=True)
    assert "going on without torch.compile: no C++ compiler was found" in (tmp_path / "a.log").read_text()
    assert not embedder.compile_model
    ours = embed_ours(embedder, PHOTOGRAPHS.values())
    assert smallest_cosine(ours, embed_plainly(models["dinov3"], PHOTOGRAPHS.values())) >= 0.9999


def test_the_blocks_are_what_is_compiled(models, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(type(self).__name__))
    embedder = Embedder(models["dinov3"], device="cpu")
    assert compile_blocks(embedder.model) == len(compiled)
    assert compiled.count("DINOv3ViTLayer") == 2
    compiled.clear()
    assert compile_blocks(torch.nn.Linear(2, 2)) == 1
    assert compiled == ["Linear"]


def test_a_model_of_more_kinds_of_block_than_torch_compiles_is_compiled_as_a_whole(tmp_path, monkeypatch):
    """Lite0 has 16 blocks of 14 kinds: torch compiled the first 8, and the log said 16."""
    folder, compile_with = write_kind(tmp_path / "lite0", "lite0")[0], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *rest, **more: compile_with(*rest, backend="eager", **more))
    torch._dynamo.reset()
    with logging_to(tmp_path / "a.log"):
        embedder = Embedder(folder, device="cpu", batch_size=2, compile_model=True)
    assert embedder.num_graphs == 1
    assert "compiled 1 blocks as 1 graphs in " in (tmp_path / "a.log").read_text()


def test_pictures_travel_together_and_arrive_as_they_were(models):
    embedder = Embedder(models["dinov3"], device="cpu")
    pictures = [decode_pixels(encode(draw_view(seed, size=(100 + seed, 90)))) for seed in range(7)]
    there = embedder._upload(pictures)
    assert len(there) == 7
    assert all(torch.equal(one, other) for one, other in zip(there, pictures, strict=True))
