"""Decoding to torch: the same pixels and the same refusals as Pillow's, whoever decodes."""

import random

import numpy as np
import pytest
import torch
from raw_tars import draw_view, encode
from test_jpeg import KINDS, damage, judge

from pipeline.inference import images, pixels
from pipeline.inference.images import decode_rgb, open_image, read_plain_header
from pipeline.inference.pixels import decode_pixels, to_pixels, travels_whole

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


def test_any_damage_is_judged_as_by_pillow_and_what_it_accepts_has_its_pixels():
    generator = random.Random(2)
    plain = accepted = 0
    for _ in range(1500):
        data = damage(generator, generator.choice(list(KINDS.values())))
        verdict = judge(decode_rgb, data)
        assert verdict == judge(decode_pixels, data)
        plain += read_plain_header(data) is not None
        if verdict is None:
            accepted += 1
            assert torch.equal(decode_pixels(data), to_pixels(decode_rgb(data)))
    assert 200 < accepted < 1300
    assert plain > 200


@pytest.mark.parametrize("kind", KINDS)
def test_a_header_that_is_read_without_pillow_says_what_pillows_says(kind):
    is_plain = kind not in {"cmyk", "progressive cmyk", "rgb", "tagged", "several pictures"}
    found = read_plain_header(KINDS[kind])
    assert found == (open_image(KINDS[kind]).size if is_plain else None)
    assert all(read_plain_header(KINDS[kind][:cut]) in (None, found) for cut in range(700))


@pytest.mark.parametrize("content", [b"JFIF\0", b"JFIF\0\x01", b"JFIF\0\x01\x01\0\0\x01\0\x01\0\0", b"JFXX\0", b""])
def test_a_jfif_segment_is_judged_as_by_pillow(content):
    whole = KINDS["baseline"]
    length = int.from_bytes(whole[4:6], "big")
    data = whole[:4] + (2 + len(content)).to_bytes(2, "big") + content + whole[4 + length :]
    assert judge(decode_pixels, data) == judge(decode_rgb, data)


def test_too_many_pixels_are_refused_by_the_header(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    monkeypatch.setattr(pixels, "MAX_PIXELS", 100)
    assert judge(decode_pixels, KINDS["baseline"])[0] == "image_too_large"


def test_without_torchvisions_decoder_pillow_decodes(monkeypatch):
    expected = decode_pixels(KINDS["baseline"])
    monkeypatch.setattr(pixels, "decode_jpeg", None)
    assert torch.equal(decode_pixels(KINDS["baseline"]), expected)


def test_pictures_of_usual_size_travel_whole():
    assert travels_whole(1024, 1024)
    assert not travels_whole(1024, 1025)
    assert not travels_whole(100, 900)
