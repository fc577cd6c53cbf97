"""Decoding to torch: the same pixels and the same refusals as Pillow's, whoever decodes."""

import numpy as np
import pytest
import torch
from raw_tars import draw_view, encode
from test_jpeg import KINDS, judge

from pipeline.errors import Rejection
from pipeline.inference import pixels
from pipeline.inference.images import decode_rgb
from pipeline.inference.pixels import decode_on_gpu, decode_pixels, has_nvjpeg, is_for_nvjpeg, to_pixels, travels_whole

OTHERS = {"png": encode(draw_view(1), "PNG"), "webp": encode(draw_view(1), "WEBP")}


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_the_pixels_are_pillows(kind):
    data = (KINDS | OTHERS)[kind]
    found = decode_pixels(data)
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), np.asarray(decode_rgb(data)))


@pytest.mark.parametrize("kind", ["baseline", "progressive", "restart markers", "grayscale", "cmyk"])
def test_truncated_files_are_refused_as_pillow_refuses_them(kind):
    data = KINDS[kind]
    cuts = [*range(0, len(data), 41), *range(len(data) - 12, len(data))]
    for decode in (decode_pixels, is_for_nvjpeg):
        refusals = [judge(decode, data[:cut]) for cut in cuts]
        if decode is decode_pixels or kind in ("baseline", "restart markers", "grayscale"):
            assert refusals == [judge(decode_rgb, data[:cut]) for cut in cuts]
            assert None not in refusals


def test_without_torchvisions_decoder_pillow_decodes(monkeypatch):
    expected = decode_pixels(KINDS["baseline"])
    monkeypatch.setattr(pixels, "decode_jpeg", None)
    assert torch.equal(decode_pixels(KINDS["baseline"]), expected)
    assert not has_nvjpeg(torch.device("cpu"))


def test_nvjpeg_gets_baseline_jpegs_of_usual_size_only():
    assert all(is_for_nvjpeg(KINDS[kind]) for kind in ("baseline", "grayscale", "tagged", "restart markers"))
    others = [KINDS["progressive"], KINDS["cmyk"], KINDS["several pictures"], *OTHERS.values()]
    others += [encode(draw_view(1, size=size)) for size in ((1100, 1100), (900, 100))]
    assert not any(is_for_nvjpeg(data) for data in others)
    with pytest.raises(Rejection, match="unreadable_image"):
        is_for_nvjpeg(b"")
    assert travels_whole(1024, 1024)
    assert not travels_whole(1024, 1025)


def test_what_nvjpeg_refuses_is_decoded_on_the_cpu(monkeypatch):
    files = [KINDS["baseline"], KINDS["grayscale"]]
    plain = pixels.decode_jpeg

    def refuse_lists(data, *arguments, **options):
        if isinstance(data, list):
            raise RuntimeError("nvJPEG: unsupported")
        return plain(data, *arguments, **options)

    monkeypatch.setattr(pixels, "decode_jpeg", refuse_lists)
    found = decode_on_gpu(files, torch.device("cpu"))
    assert all(torch.equal(one, to_pixels(decode_rgb(data))) for one, data in zip(found, files, strict=True))
    assert not has_nvjpeg(torch.device("cpu"))
