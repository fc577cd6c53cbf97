"""Encoded images in, uint8 pixels as torch takes them out."""

import io
import time

import numpy as np
import torch
from PIL import Image

from pipeline.inference.images import decode_rgb, load_rgb, open_image

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # announced for a later torchvision; Pillow decodes then
    decode_jpeg = None

# What torchvision's libjpeg turns to RGB in the same way as Pillow; CMYK is left to Pillow. nvJPEG would be faster, but
# it repeats chroma where libjpeg interpolates it: photographs with 4:2:0 came below the contract's cosine.
_MODES = ("RGB", "L")
# The most that a picture may have to travel to the GPU as it is (3 MB); larger ones are resized by the threads that
# decode them, so that a pass of them cannot fill the memory.
MAX_DEVICE_PIXELS = 1 << 20
MAX_DEVICE_RATIO = 8
# Of which the fastest counts.
TIMED_DECODES = 5


def decode_pixels(data: bytes) -> torch.Tensor:
    """Decode a whole image to RGB pixels (3, H, W) uint8, the same as those of `decode_rgb`.

    torchvision's decoder is the same libjpeg as Pillow's, without the detour over Pillow's own pixels: it takes 0.7 of
    the time and less of the interpreter lock. What it does not take, Pillow judges.
    Raises Rejection as `decode_rgb` does.
    """
    image = open_image(data)
    if decode_jpeg is not None and image.format == "JPEG" and image.mode in _MODES:
        try:
            pixels: torch.Tensor = decode_jpeg(_to_bytes(data), mode=ImageReadMode.RGB)
            return pixels
        except RuntimeError:
            return to_pixels(decode_rgb(data))
    return to_pixels(load_rgb(image))


def to_pixels(image: Image.Image) -> torch.Tensor:
    """Return an RGB image's pixels (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def measure_decoding(picture: Image.Image) -> float:
    """Return the images/s that one thread decodes, of a picture as a JPEG."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    seconds = []
    for _ in range(TIMED_DECODES):
        started = time.perf_counter()
        decode_pixels(file.getvalue())
        seconds.append(time.perf_counter() - started)
    return 1 / min(seconds)


def travels_whole(height: int, width: int) -> bool:
    """Whether a picture of this size goes to the GPU before it is resized."""
    return height * width <= MAX_DEVICE_PIXELS and max(height, width) <= MAX_DEVICE_RATIO * min(height, width)


def _to_bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy: torch warns of memory that is read-only
