"""Encoded images in, uint8 pixels as torch takes them out."""

import io
import math
import time

import numpy as np
import torch
from PIL import Image

from pipeline.inference.images import MAX_PIXELS, decode_rgb, load_rgb, open_image, read_plain_header

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
# The share of what a picture's reading and decoding costs that holds Python's lock, at most: measured on the processor
# seconds of stage 2's engine without a model, by benchmarks/decoding.py.
LOCK_SHARE = 0.15


def decode_pixels(data: bytes) -> torch.Tensor:
    """Decode a whole image to RGB pixels (3, H, W) uint8, the same as those of `decode_rgb`.

    torchvision's decoder is the same libjpeg as Pillow's, without the detour over Pillow's own pixels: it takes 0.7 of
    the time and less of the interpreter lock. What it does not take, Pillow judges.
    Raises Rejection as `decode_rgb` does.
    """
    size = read_plain_header(data) if decode_jpeg is not None else None
    if size is None or not 0 < size[0] * size[1] <= MAX_PIXELS:
        image = open_image(data)
        if decode_jpeg is None or image.format != "JPEG" or image.mode not in _MODES:
            return to_pixels(load_rgb(image))
    try:
        pixels: torch.Tensor = decode_jpeg(_to_bytes(data), mode=ImageReadMode.RGB)
        return pixels
    except RuntimeError:
        return to_pixels(decode_rgb(data))


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


def describe_ceiling(num_cores: int, decode_rate: float, model_rate: float) -> str:
    """Say how many images/s threads on so many cores decode at most, and what to do where the model alone does more.

    `decode_rate` is one thread's. Python's lock, which one thread holds at a time, bounds how many are sure to help.
    """
    most, sure = num_cores * decode_rate, min(num_cores, 1 / LOCK_SHARE) * decode_rate
    text = f"{num_cores} cores decode at most {most:.0f} img/s of 640 pixels"
    if most < model_rate:
        text += ", which binds: more cores a GPU do more"
    if sure < min(most, model_rate):
        count = math.ceil(num_cores * LOCK_SHARE)
        text += f"; one process is sure of {sure:.0f}, {count} a GPU (--processes) of all that the cores do"
    return text


def travels_whole(height: int, width: int) -> bool:
    """Whether a picture of this size goes to the GPU before it is resized."""
    return height * width <= MAX_DEVICE_PIXELS and max(height, width) <= MAX_DEVICE_RATIO * min(height, width)


def _to_bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy: torch warns of memory that is read-only
