"""Decode image bytes to upright RGB pixels, or reject them with a reason."""

import io
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin, PngImagePlugin

from pipeline.crashes import guarded
from pipeline.errors import Rejection
from pipeline.log import logger

# The limit by the header: a decompression bomb is never decoded.
MAX_PIXELS = 100_000_000
# Two pictures of more pixels are decoded at once, as each pixel takes up to 8 bytes.
LARGE_PIXELS = 2**24
_TURNS_OF_LARGE = threading.BoundedSemaphore(2)
# A scan takes as long as the pixels that it refines: 0.1 s for MAX_PIXELS. Encoders write 4 to 20.
MAX_SCANS = 100
# Pillow passes over fill bytes one by one, and copies all EXIF segments at each: this takes it a second.
MAX_FILL = 2**20
FORMATS = ("JPEG", "PNG", "WEBP")
_JPEGS = ("JPEG", "MPO")  # the latter holds several pictures

# What Pillow's openers and decoders raise on damaged data.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, OverflowError, AttributeError,
    NotImplementedError, MemoryError, struct.error, zlib.error,
)  # fmt: skip

_START_OF_IMAGE = b"\xff\xd8"
_END_OF_IMAGE = 0xD9
_START_OF_SCAN = 0xDA
# The marker and the upper byte of the length, which is 0: entropy-coded bytes never hold them.
_SCAN = b"\xff\xda\0"
# Baseline, extended and progressive frames, all Huffman-coded (ITU-T T.81, table B.1); libjpeg judges the others.
_FRAMES = (0xC0, 0xC1, 0xC2)
_PROGRESSIVE = 0xC2
# Segments with a length: Huffman and quantisation tables, restart interval, application data, comment.
_SEGMENTS = (*_FRAMES, 0xC4, _START_OF_SCAN, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)
# Segments before the scan of a plain JPEG: JFIF, tables, restart interval.
_JFIF = 0xE0
_TABLES = (0xC4, 0xDB, 0xDD)
# In entropy-coded bytes FF is followed by 00, by a restart marker or by more FF; anything else ends them.
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")

# How a picture is turned by its EXIF orientation; 1 and unknown numbers leave it as it lies.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_turned: list[int] = []  # an entry for each picture that was turned; lists are safe in threads

# MAX_PIXELS is stricter.
Image.MAX_IMAGE_PIXELS = None
# Colour profiles and texts of 1 MB make Pillow refuse a sound PNG.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 << 20
warnings.filterwarnings("ignore", module=r"PIL\..*")


@guarded
def decode_rgb(data: bytes) -> Image.Image:
    """Decode a whole image to RGB, upright by its EXIF orientation.

    Raises Rejection `image_too_large` or `unreadable_image` (empty, truncated, not JPEG, PNG or WebP).
    """
    return load_upright(open_image(data))


@guarded
def check_image(data: bytes) -> None:
    """Raise the Rejection that `decode_rgb` would raise, at a tenth of its cost for a sound JPEG.

    Pillow's `load()` judges a JPEG by its structure alone (see `strip_scans`). Every other format, and a JPEG that
    fails so, is decoded in full.
    """
    image = read_header(data)
    structure = strip_scans(data) if image.format in _JPEGS else None
    if structure is not None:
        with (
            suppress(*DECODE_ERRORS),  # the whole file says why
            _take_turn(image),  # a progressive one has all its coefficients in memory
            JpegImagePlugin.JpegImageFile(io.BytesIO(structure)) as empty,
        ):
            empty.draft("L", (max(1, empty.width // 8), max(1, empty.height // 8)))
            empty.load()
            return
    load_rgb(open_image(data))


def strip_scans(data: bytes) -> bytes | None:
    """Return a JPEG's markers and segments to its end, without the entropy-coded bytes between them.

    libjpeg refuses the result exactly where it refuses the whole file. Entropy-coded bytes cannot fail: bad codes are
    warnings, and the decoder never reads past a marker (jdhuff.c, jdphuff.c), of which those from C0 on stay until the
    scan is full (jdmarker.c, jpeg_resync_to_restart). Only segments, which are kept, and a missing end are fatal.
    Returns None for a file without an end, with more than MAX_SCANS, or with anything unusual between its segments.
    """
    if data[:2] != _START_OF_IMAGE:
        return None
    kept: list[bytes | memoryview] = [_START_OF_IMAGE]
    position, num_scans, view = 2, 0, memoryview(data)
    while data[position : position + 1] == b"\xff" and position + 1 < len(data):
        marker = data[position + 1]
        if marker == _END_OF_IMAGE:
            return b"".join([*kept, b"\xff\xd9"])
        if marker not in _SEGMENTS:
            return None
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        kept.append(view[position:end])
        if marker == _START_OF_SCAN:
            found = _MARKER.search(data, end)
            num_scans += 1
            # libjpeg passes over markers below C0 inside a scan, not behind it.
            if found is None or found[1] < b"\xc0" or num_scans > MAX_SCANS:
                return None
            end = found.start()
        position = end
    return None


def read_plain_header(data: bytes) -> tuple[int, int] | None:
    """Return the width and height of a plain RGB or grey JPEG, which has no EXIF orientation, else None.

    Pillow's opener needs 0.1 ms of Python for this, during which no other thread can decode.
    """
    size, num_channels, is_progressive, position = None, 0, False, 2
    if data[:2] != _START_OF_IMAGE:
        return None
    while position + 18 < len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == _START_OF_SCAN:
            has_one_scan = data[position + 4] == num_channels and not is_progressive
            return size if has_one_scan or data.count(_SCAN) <= MAX_SCANS else None
        if marker in _FRAMES:
            precision, height, width, num_channels = struct.unpack_from(">BHHB", data, position + 4)
            if size is not None or precision != 8 or num_channels not in (1, 3):
                return None
            size, is_progressive = (width, height), marker == _PROGRESSIVE
        elif marker == _JFIF:
            if data[position + 4 : position + 9] != b"JFIF\0" or length < 16:
                return None
        elif marker not in _TABLES:
            return None
        position += 2 + length
    return None


@guarded
def decode_rgb_small(data: bytes, choose_scale: Callable[[int, int], int]) -> tuple[Image.Image, tuple[float, float]]:
    """Decode a JPEG to RGB at 1/`choose_scale(width, height)` of its size (1, 2, 4 or 8), others as `decode_rgb` does.

    Scaling a JPEG by its DCT coefficients costs a fraction of the full decode. Returns the image and the width and
    height, in its pixels, that the original covers: 137 pixels at 1/8 cover 17.125 of 18 pixels. A picture that has to
    be turned is decoded in full: what is not covered would lie elsewhere. Raises Rejection as `decode_rgb` does.
    """
    image = open_image(data)
    if image.format in _JPEGS and read_orientation(image) not in _TURNS:
        width, height = image.size
        scale = choose_scale(width, height)
        drafted = image.draft("RGB", (width // scale, height // scale))
        return load_rgb(image), drafted[1][2:] if drafted else (width, height)
    upright = load_upright(image)
    return upright, upright.size


def open_image(data: bytes) -> Image.Image:
    """Read an image's header. Raises Rejection `image_too_large` or `unreadable_image`."""
    image = read_header(data)
    if image.format in _JPEGS and (num_scans := data.count(_SCAN)) > MAX_SCANS:
        raise Rejection("unreadable_image", f"{num_scans} scans, at most {MAX_SCANS} are decoded")
    return image


def read_header(data: bytes) -> Image.Image:
    """Read an image's header as `open_image` does, without counting a JPEG's scans."""
    if not data:
        raise Rejection("unreadable_image", "0 bytes")
    if data.startswith(_START_OF_IMAGE) and (data.count(b"\xff\xff") > MAX_FILL or data.count(b"Exif\0\0") > MAX_SCANS):
        raise Rejection("unreadable_image", "fill bytes or EXIF segments without end")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except DECODE_ERRORS as error:
        raise Rejection("unreadable_image", _explain(error)) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Rejection("image_too_large", f"{width} x {height} pixels, at most {MAX_PIXELS} are decoded")
    return image


def read_orientation(image: Image.Image) -> int:
    """Return an opened image's EXIF orientation, 1 where there is none or it is damaged."""
    with suppress(*DECODE_ERRORS):
        return image.getexif().get(ExifTags.Base.Orientation, 1)  # type: ignore[no-any-return]
    return 1


def load_upright(image: Image.Image) -> Image.Image:
    """Decode an opened image as `load_rgb` does, and turn it upright by its EXIF orientation."""
    loaded = load_rgb(image)
    turn = _TURNS.get(read_orientation(image))  # a PNG's may follow its pixels
    if turn is None:
        return loaded
    _turned.append(turn)
    return loaded.transpose(turn)


def log_turned() -> None:
    """Log how many pictures were turned upright since the last call, if any."""
    if _turned:
        logger.info("%d pictures turned upright by their EXIF orientation", len(_turned))
        _turned.clear()


def _take_turn(image: Image.Image) -> AbstractContextManager[object]:
    return _TURNS_OF_LARGE if image.width * image.height > LARGE_PIXELS else nullcontext()


def load_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image as it lies: the first picture, the upper 8 of 16 bits, without transparency.

    Raises Rejection `unreadable_image`.
    """
    try:
        with _take_turn(image):
            image.load()
            if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
                upper = np.asarray(image) >> 8
                image = Image.fromarray(upper.clip(0, 255, out=upper).astype(np.uint8))
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
