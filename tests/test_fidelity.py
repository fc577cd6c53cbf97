"""Every path through the engine against the float32 loop over the model's own processor, to fixed cosines.

The paths of a GPU run where there is one; torch on the CPU stands in for it wherever the code is the same.
"""

from typing import Any

import pytest
import torch
from PIL import Image
from test_backbone import make_convnext, make_dinov3

from benchmarks.fidelity import LEAST_COSINE, check_paths, embed_plainly
from benchmarks.plain_loops import load
from benchmarks.synthetic import draw_picture
from pipeline.errors import Rejection
from pipeline.inference.backbone import Embedder
from sample_data import convert_lite0


def draw_photographs() -> dict[str, bytes]:
    """Return JPEGs as street-view patches may come: of odd sizes, of each mode, turned by a tag, progressive."""
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: dict[str, tuple[tuple[int, int], str, dict[str, Any]]] = {
        "square": ((448, 448), "RGB", {"quality": 85}),
        "large": ((640, 640), "RGB", {}),
        "odd": ((131, 97), "RGB", {}),
        "wide": ((1001, 301), "RGB", {"subsampling": 0}),
        "small": ((33, 47), "RGB", {}),
        "grayscale": ((200, 210), "L", {}),
        "cmyk": ((150, 160), "CMYK", {}),
        "tagged": ((300, 200), "RGB", {"exif": exif}),
        "progressive": ((300, 310), "RGB", {"progressive": True}),
    }
    return {
        name: draw_picture(seed, size, mode, **options)
        for seed, (name, (size, mode, options)) in enumerate(kinds.items())
    }


PHOTOGRAPHS = draw_photographs()
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: its paths are run by benchmarks/gpu_acceptance.py"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory, toy_backbone):
    folder = tmp_path_factory.mktemp("fidelity")
    return {
        "dinov2": toy_backbone,
        "dinov3": make_dinov3(folder / "dinov3"),
        "convnext": make_convnext(folder / "convnext"),
        "lite0": convert_lite0.run(folder / "lite0"),
    }


@pytest.fixture(scope="module")
def expected(models):
    return {kind: embed_plainly(*load(folder), list(PHOTOGRAPHS.values())) for kind, folder in models.items()}


def check(models, expected, kind, **options):
    embedder = Embedder(models[kind], **options)
    if not embedder.on_gpu:
        embedder.resizes_on_device = True
    found = check_paths(embedder, list(PHOTOGRAPHS.values()), expected[kind])
    assert set(found) >= {"prepared on the CPU", "resized on the device", "one image a pass", "64 a pass"}
    assert {name: cosine for name, cosine in found.items() if cosine < LEAST_COSINE[embedder.dtype]} == {}


@pytest.mark.parametrize("kind", ["dinov2", "dinov3", "convnext", "lite0"])
def test_every_path_on_the_cpu_in_float32(models, expected, kind):
    check(models, expected, kind, device="cpu")


@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_every_path_on_the_cpu_in_bfloat16(models, expected, kind):
    check(models, expected, kind, device="cpu", dtype="bfloat16")


def test_the_last_pass_padded_to_the_shape_that_is_compiled(models, expected, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    check(models, expected, "dinov3", device="cpu", batch_size=4, compile_model=True)


@pytest.mark.slow
def test_a_model_that_is_really_compiled(models, expected):
    check(models, expected, "dinov3", device="cpu", batch_size=4, compile_model=True)


def test_another_models_embeddings_would_be_found_out(models, expected):
    wrong = expected["dinov2"][::-1]
    embedder = Embedder(models["dinov2"], device="cpu")
    assert min(check_paths(embedder, list(PHOTOGRAPHS.values()), wrong).values()) < 0.999


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["dinov2", "dinov3", "convnext", "lite0"])
def test_every_path_on_the_gpu(models, expected, kind, dtype, compiled):
    check(models, expected, kind, device="cuda", dtype=dtype, compile_model=compiled)


@needs_gpu
def test_truncated_jpegs_are_refused_before_any_gpu_sees_them(models):
    embedder = Embedder(models["dinov3"], device="cuda")
    data = PHOTOGRAPHS["square"]
    for cut in range(1, len(data), len(data) // 40):
        with pytest.raises(Rejection):
            embedder.decode(data[:cut])
