"""Decoding to torch: the same pixels and the same refusals as Pillow's, whoever decodes."""

import numpy as np
import pytest
import torch
from raw_tars import draw_view, encode
from test_jpeg import KINDS, judge

from pipeline.inference import pixels
from pipeline.inference.images import decode_rgb
from pipeline.inference.pixels import decode_pixels, measure_decoding, travels_whole

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
    refusals = [judge(decode_pixels, data[:cut]) for cut in cuts]
    assert refusals == [judge(decode_rgb, data[:cut]) for cut in cuts]
    assert None not in refusals


def test_without_torchvisions_decoder_pillow_decodes(monkeypatch):
    expected = decode_pixels(KINDS["baseline"])
    monkeypatch.setattr(pixels, "decode_jpeg", None)
    assert torch.equal(decode_pixels(KINDS["baseline"]), expected)


def test_the_rate_of_decoding_is_that_of_a_larger_picture_where_it_is_larger():
    assert measure_decoding(draw_view(1, size=(64, 64))) > measure_decoding(draw_view(1, size=(1600, 1600))) > 0


def test_pictures_of_usual_size_travel_whole():
    assert travels_whole(1024, 1024)
    assert not travels_whole(1024, 1025)
    assert not travels_whole(100, 900)
