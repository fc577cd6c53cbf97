"""Every mode that a JPEG, PNG or WebP can come in: the pixels and the fingerprint of its 8-bit RGB twin."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from raw_tars import draw_view, encode

from pipeline.errors import Rejection
from pipeline.inference import images
from pipeline.inference.images import check_image, decode_rgb, load_rgb
from pipeline.inference.pixels import decode_pixels
from preprocess_raw_data.compute_fingerprints import compute_fingerprint

VIEW = draw_view(3, size=(64, 48))
RGB = np.asarray(VIEW)
GREY = np.asarray(VIEW.convert("L"))
ALPHA = np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))


def write_png(pixels, bits, colour_type):
    """Write a PNG by hand: `pixels` (H, W, channels) of `bits` each, as PNG's own type of colour."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    rows = pixels.astype(f">u{bits // 8}").reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def wide(pixels, low=None):
    """Return 8-bit pixels as 16 bits; `low` takes the place of the repeated lower byte."""
    return pixels.astype(np.uint16) * 256 + (pixels if low is None else low)


def with_alpha(pixels):
    return np.dstack([pixels, ALPHA])


def animate(kind):
    return encode(VIEW, kind, save_all=True, append_images=[draw_view(9, size=(64, 48))], lossless=True)


def make_mpo():
    file = io.BytesIO()
    VIEW.save(file, "MPO", save_all=True, append_images=[draw_view(9, size=(64, 48))], quality=95)
    return file.getvalue()


GREYS = {
    "16 bits of grey": write_png(wide(GREY), 16, 0),
    "16 bits of grey, lower byte 0": write_png(wide(GREY, 0), 16, 0),
    "16 bits of grey, lower byte 255": write_png(wide(GREY, 255), 16, 0),
    "16 bits of grey and alpha": write_png(wide(with_alpha(GREY)), 16, 4),
    "8 bits of grey": encode(VIEW.convert("L"), "PNG"),
    "grey and alpha": write_png(with_alpha(GREY), 8, 4),
}
COLOURS = {
    "16 bits a channel": write_png(wide(RGB), 16, 2),
    "16 bits a channel and alpha": write_png(wide(with_alpha(RGB)), 16, 6),
    "alpha": write_png(with_alpha(RGB), 8, 6),
    "animated PNG": animate("PNG"),
    "animated WebP": animate("WEBP"),
    "lossless WebP": encode(VIEW, "WEBP", lossless=True),
}


def check(data, twin):
    """Hold every way that an image is decoded to an RGB twin (H, W, 3) uint8."""
    check_image(data)
    np.testing.assert_array_equal(np.asarray(decode_rgb(data)), twin)
    np.testing.assert_array_equal(decode_pixels(data).permute(1, 2, 0).numpy(), twin)
    plain = compute_fingerprint(encode(Image.fromarray(twin), "PNG"), 16)
    np.testing.assert_array_equal(compute_fingerprint(data, 16), plain)


@pytest.mark.parametrize("kind", GREYS)
def test_grey_of_any_depth_is_its_eight_bit_twin(kind):
    check(GREYS[kind], np.repeat(GREY[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", COLOURS)
def test_colour_of_any_depth_is_its_eight_bit_twin(kind):
    check(COLOURS[kind], RGB)


@pytest.mark.parametrize("transparent", [False, True])
def test_a_palette_is_its_colours_whatever_of_it_is_transparent(transparent):
    quantised = VIEW.quantize(16)
    options = {"transparency": bytes(range(0, 160, 10))} if transparent else {}
    check(encode(quantised, "PNG", **options), np.asarray(quantised.convert("RGB")))


def test_black_and_white_is_black_and_white():
    twin = np.repeat(np.where(GREY[..., None] > 127, 255, 0).astype(np.uint8), 3, axis=2)
    check(encode(Image.fromarray(twin[..., 0]).convert("1", dither=Image.Dither.NONE), "PNG"), twin)


def test_of_several_pictures_in_a_jpeg_the_first_is_taken():
    found = np.asarray(decode_rgb(make_mpo())).astype(int)
    assert np.abs(found - RGB).mean() < 6 < np.abs(found - np.asarray(draw_view(9, size=(64, 48)))).mean()
    np.testing.assert_array_equal(decode_pixels(make_mpo()).permute(1, 2, 0).numpy(), found)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "RGBX"])
def test_other_colour_spaces_are_converted(mode):
    found = np.asarray(load_rgb(VIEW.convert(mode))).astype(int)
    assert np.abs(found - RGB).mean() < 4


def test_floats_are_rejected_by_name():
    with pytest.raises(Rejection, match="unreadable_image: grey floats"):
        load_rgb(Image.new("F", (4, 4)))


def tag(image, orientation, kind, **options):
    """Return an image file that lies so that `orientation` turns it into `image`."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Image.Transpose
    return encode(image if undo is None else image.transpose(undo), kind, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_every_orientation_is_turned_upright_by_whoever_decodes(kind, orientation):
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}[kind]
    data = tag(VIEW, orientation, kind, **options)
    images._turned.clear()
    found = np.asarray(decode_rgb(data))
    assert np.abs(found.astype(int) - RGB).mean() < (4 if kind == "JPEG" else 0.01)
    np.testing.assert_array_equal(decode_pixels(data).permute(1, 2, 0).numpy(), found)
    upright = compute_fingerprint(encode(VIEW, "PNG"), 16).astype(int)
    assert np.abs(compute_fingerprint(data, 16) - upright).mean() < (1 if kind == "JPEG" else 0.01)
    assert len(images._turned) == (3 if orientation > 1 else 0)


def test_a_png_is_turned_by_a_tag_behind_its_pixels():
    data = tag(VIEW, 6, "PNG")
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    last = data.index(b"IEND") - 4
    np.testing.assert_array_equal(
        np.asarray(decode_rgb(data[:start] + data[end:last] + data[start:end] + data[last:])), RGB
    )


@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0"],
)
def test_damaged_or_unknown_orientations_leave_a_picture_as_it_lies(exif):
    found = np.asarray(decode_rgb(encode(VIEW, exif=exif)))
    np.testing.assert_array_equal(found, np.asarray(decode_rgb(encode(VIEW))))
    np.testing.assert_array_equal(decode_pixels(encode(VIEW, exif=exif)).permute(1, 2, 0).numpy(), found)


def test_a_png_with_a_colour_profile_and_texts_of_megabytes_has_its_pixels():
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Comment", "x" * (3 << 20), zip=True)
    check(encode(VIEW, "PNG", icc_profile=bytes(5 << 20), pnginfo=texts), RGB)
