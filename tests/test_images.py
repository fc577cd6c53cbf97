"""Decoding: what is accepted, what is rejected and why, and what is never decoded."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps
from raw_tars import draw_view, encode

from pipeline.errors import Rejection
from pipeline.inference import images
from pipeline.inference.images import decode_rgb, decode_rgb_small

VIEW = draw_view(1)


def reason_of(data):
    with pytest.raises(Rejection) as caught:
        decode_rgb(data)
    return caught.value.reason


def decode_plainly(data):
    """Decode as one who knows nothing of this project."""
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "I;16":
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
        return np.asarray(image.convert("RGB"))


def make_sound_images():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees
    deep = Image.fromarray(np.asarray(VIEW.convert("L"), np.uint16) * 257)
    return {
        "jpeg": encode(VIEW),
        "progressive": encode(VIEW, progressive=True),
        "grayscale": encode(VIEW.convert("L")),
        "cmyk": encode(VIEW.convert("CMYK")),
        "exif-rotated": encode(VIEW, exif=exif),
        "several pictures": encode(VIEW, "MPO", save_all=True, append_images=[draw_view(2)]),
        "png": encode(VIEW, "PNG"),
        "palette": encode(VIEW.quantize(32), "PNG"),
        "transparent": encode(VIEW.convert("RGBA"), "PNG"),
        "grey and transparent": encode(VIEW.convert("LA"), "PNG"),
        "bilevel": encode(VIEW.convert("1"), "PNG"),
        "16 bit": encode(deep, "PNG"),
        "webp": encode(VIEW, "WEBP"),
        "lossless webp": encode(VIEW.convert("RGBA"), "WEBP", lossless=True),
        "one pixel": encode(Image.new("RGB", (1, 1), "red")),
    }


SOUND = make_sound_images()


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_image_of_any_mode_becomes_rgb_upright(kind):
    image = decode_rgb(SOUND[kind])
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), decode_plainly(SOUND[kind]))
    if kind != "one pixel":
        assert image.size == (VIEW.size if kind != "exif-rotated" else VIEW.size[::-1])


@pytest.mark.parametrize("kind", ["jpeg", "progressive", "cmyk", "png", "palette", "webp", "lossless webp"])
def test_a_truncated_image_is_rejected_wherever_pillows_load_refuses_it(kind):
    data = SOUND[kind]
    cuts = {1, 2, 10, len(data) // 4, len(data) // 2, *range(len(data) - 30, len(data))}
    refused = 0
    for cut in sorted(cuts):
        try:
            decode_plainly(data[:cut])
        except (OSError, SyntaxError, ValueError):
            assert reason_of(data[:cut]) == "unreadable_image"
            refused += 1
        else:
            decode_rgb(data[:cut])
    assert refused >= 10


def test_a_jpeg_cut_in_the_middle_of_its_pixels_is_rejected_at_every_scale():
    data = encode(draw_view(3, size=(640, 640)))
    with pytest.raises(Rejection, match="truncated"):
        decode_rgb(data[: len(data) // 2])
    for scale in (1, 2, 8):
        with pytest.raises(Rejection, match="truncated"):
            decode_rgb_small(data[: len(data) // 2], lambda *_, scale=scale: scale)


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b"", "0 bytes"),
        (b"\xff\xd8\xff", "not a JPEG, PNG or WebP image"),
        (b"d 1 2 3\n" * 20, "not a JPEG, PNG or WebP image"),
        (encode(VIEW.convert("P"), "GIF"), "not a JPEG, PNG or WebP image"),
        (encode(VIEW, "BMP"), "not a JPEG, PNG or WebP image"),
        (encode(VIEW, "TIFF"), "not a JPEG, PNG or WebP image"),
        (bytes(5000), "not a JPEG, PNG or WebP image"),
    ],
)
def test_what_is_no_accepted_image_is_unreadable_by_its_content_whatever_its_name(content, detail):
    with pytest.raises(Rejection) as caught:
        decode_rgb(content)
    assert (caught.value.reason, caught.value.detail) == ("unreadable_image", detail)


def make_png_header(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def make_jpeg_header(width, height):
    data = bytearray(SOUND["jpeg"])
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


BOMBS = {
    "png": make_png_header(60_000, 60_000),
    "jpeg": make_jpeg_header(60_000, 60_000),
    "webp": encode(Image.new("L", (16_000, 6_251)), "WEBP", lossless=True, method=0),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_known_by_its_header_and_never_decoded(monkeypatch, kind):
    def explode(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", explode)
    monkeypatch.setattr("PIL.WebPImagePlugin.WebPImageFile.load", explode)
    assert reason_of(BOMBS[kind]) == "image_too_large"
    with pytest.raises(Rejection, match="image_too_large"):
        decode_rgb_small(BOMBS[kind], lambda *_: 8)


def test_one_hundred_million_pixels_are_allowed_and_one_more_is_not(monkeypatch):
    decoded = []
    monkeypatch.setattr(images, "load_rgb", decoded.append)
    decode_rgb(make_jpeg_header(10_000, 10_000))
    assert decoded[0].size == (10_000, 10_000)
    assert reason_of(make_png_header(100_000_001, 1)) == "image_too_large"


def test_any_damage_gives_a_picture_or_a_rejection_and_nothing_else():
    generator = random.Random(0)
    rejections = []
    for data in SOUND.values():
        for _ in range(60):
            raw = bytearray(data)
            for _ in range(generator.randint(1, 4)):
                raw[generator.randrange(min(len(raw), generator.choice([40, 200, 100_000])))] = generator.randrange(256)
            try:
                decode_rgb(bytes(raw))
            except Rejection as rejection:
                rejections.append(rejection)
    assert {rejection.reason for rejection in rejections} <= {"unreadable_image", "image_too_large"}
    details = "".join(rejection.detail for rejection in rejections)
    assert "0x" not in details  # an address would differ from run to run
    assert "\n" not in details


def test_a_reduced_decode_says_what_it_covers():
    data = encode(draw_view(4, size=(137, 96)))
    image, extent = decode_rgb_small(data, lambda *_: 8)
    assert image.size == (18, 12)
    assert extent == (17.125, 12.0)
    whole, extent = decode_rgb_small(data, lambda *_: 1)
    assert whole.size == extent == (137, 96)
    assert decode_rgb_small(encode(draw_view(4, size=(137, 96)), "PNG"), lambda *_: 8)[1] == (137, 96)


def test_warnings_of_the_decoder_stay_silent(recwarn):
    with pytest.raises(Rejection):
        decode_rgb(BOMBS["jpeg"])
    assert not recwarn.list
