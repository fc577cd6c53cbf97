"""Decode image bytes to RGB pixels, or reject them with a reason."""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, JpegImagePlugin

from pipeline.errors import Rejection

# The limit by the header: a decompression bomb is never decoded.
MAX_PIXELS = 100_000_000
FORMATS = ("JPEG", "PNG", "WEBP")

# What Pillow's openers and decoders raise on damaged data.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, OverflowError, AttributeError,
    NotImplementedError, MemoryError, struct.error, zlib.error,
)  # fmt: skip

_START_OF_IMAGE = b"\xff\xd8"
_END_OF_IMAGE = 0xD9
_START_OF_SCAN = 0xDA
# Baseline, extended and progressive frames, all Huffman-coded (ITU-T T.81, table B.1); libjpeg judges the others.
_FRAMES = (0xC0, 0xC1, 0xC2)
# Segments with a length: Huffman and quantisation tables, restart interval, application data, comment.
_SEGMENTS = (*_FRAMES, 0xC4, _START_OF_SCAN, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)
# Segments before the scan of a plain JPEG: JFIF, tables, restart interval.
_JFIF = 0xE0
_TABLES = (0xC4, 0xDB, 0xDD)
# In entropy-coded bytes FF is followed by 00, by a restart marker or by more FF; anything else ends them.
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")

# MAX_PIXELS is stricter.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module=r"PIL\..*")


def decode_rgb(data: bytes) -> Image.Image:
    """Decode a whole image to RGB; EXIF orientation is ignored, as the models' processors ignore it.

    Raises Rejection `image_too_large` or `unreadable_image` (empty, truncated, not JPEG, PNG or WebP).
    """
    return load_rgb(open_image(data))


def check_image(data: bytes) -> None:
    """Raise the Rejection that `decode_rgb` would raise, at a tenth of its cost for a sound JPEG.

    Pillow's `load()` judges a JPEG by its structure alone (see `strip_scans`). Every other format, and a JPEG that
    fails so, is decoded in full.
    """
    image = open_image(data)
    structure = strip_scans(data) if image.format in ("JPEG", "MPO") else None
    if structure is not None:
        try:
            with JpegImagePlugin.JpegImageFile(io.BytesIO(structure)) as empty:
                empty.draft("L", (max(1, empty.width // 8), max(1, empty.height // 8)))
                empty.load()
                return
        except DECODE_ERRORS:
            pass  # the whole file says why
    load_rgb(image)


def strip_scans(data: bytes) -> bytes | None:
    """Return a JPEG's markers and segments to its end, without the entropy-coded bytes between them.

    libjpeg refuses the result exactly where it refuses the whole file. Entropy-coded bytes cannot fail: bad codes are
    warnings, and the decoder never reads past a marker (jdhuff.c, jdphuff.c), of which those from C0 on stay until the
    scan is full (jdmarker.c, jpeg_resync_to_restart). Only segments, which are kept, and a missing end are fatal.
    Returns None for a file without an end, or with anything unusual between its segments.
    """
    if data[:2] != _START_OF_IMAGE:
        return None
    kept, position = [_START_OF_IMAGE], 2
    while data[position : position + 1] == b"\xff" and position + 1 < len(data):
        marker = data[position + 1]
        if marker == _END_OF_IMAGE:
            return b"".join([*kept, b"\xff\xd9"])
        if marker not in _SEGMENTS:
            return None
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        kept.append(data[position:end])
        if marker == _START_OF_SCAN:
            found = _MARKER.search(data, end)
            if found is None or found[1] < b"\xc0":  # libjpeg passes over those inside a scan, not behind it
                return None
            end = found.start()
        position = end
    return None


def read_plain_header(data: bytes) -> tuple[int, int] | None:
    """Return the width and height of a plain RGB or grey JPEG, else None.

    Pillow's opener needs 0.1 ms of Python for this, during which no other thread can decode.
    """
    size, position = None, 2
    if data[:2] != _START_OF_IMAGE:
        return None
    while position + 18 < len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == _START_OF_SCAN:
            return size
        if marker in _FRAMES:
            precision, height, width, num_channels = struct.unpack_from(">BHHB", data, position + 4)
            if size is not None or precision != 8 or num_channels not in (1, 3):
                return None
            size = width, height
        elif marker == _JFIF:
            if data[position + 4 : position + 9] != b"JFIF\0" or length < 16:
                return None
        elif marker not in _TABLES:
            return None
        position += 2 + length
    return None


def decode_rgb_small(data: bytes, choose_scale: Callable[[int, int], int]) -> tuple[Image.Image, tuple[float, float]]:
    """Decode a JPEG to RGB at 1/`choose_scale(width, height)` of its size (1, 2, 4 or 8), other formats in full.

    Scaling a JPEG by its DCT coefficients costs a fraction of the full decode. Returns the image and the width and
    height, in its pixels, that the original covers: 137 pixels at 1/8 cover 17.125 of 18 pixels.
    Raises Rejection as `decode_rgb` does.
    """
    image = open_image(data)
    width, height = image.size
    scale = choose_scale(width, height)
    drafted = image.draft("RGB", (width // scale, height // scale))
    extent = drafted[1][2:] if drafted else (width, height)
    return load_rgb(image), extent


def open_image(data: bytes) -> Image.Image:
    """Read an image's header. Raises Rejection `image_too_large` or `unreadable_image`."""
    if not data:
        raise Rejection("unreadable_image", "0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except DECODE_ERRORS as error:
        raise Rejection("unreadable_image", _explain(error)) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Rejection("image_too_large", f"{width} x {height} pixels, at most {MAX_PIXELS} are decoded")
    return image


def load_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image: the first picture, the upper 8 of 16 bits, without transparency.

    Raises Rejection `unreadable_image`.
    """
    try:
        image.load()
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        elif image.mode == "F":
            raise Rejection("unreadable_image", "grey floats, whose white nobody knows")
        return image if image.mode == "RGB" else image.convert("RGB")
    except DECODE_ERRORS as error:
        raise Rejection("unreadable_image", _explain(error)) from None


def _explain(error: BaseException) -> str:
    """Name the failure without the memory address in Pillow's message."""
    text = " ".join(str(error).split())
    if "cannot identify image file" in text:
        return "not a JPEG, PNG or WebP image"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
