"""Decode images to uint8 tensors."""

import numpy as np
import torch
from PIL import Image

from pipeline.crashes import guarded
from pipeline.inference.images import (
    MAX_PIXELS,
    decode_rgb,
    load_upright,
    open_image,
    read_orientation,
    read_plain_header,
)

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # announced for a later torchvision; Pillow decodes then
    decode_jpeg = None

# torchvision's libjpeg turns these to RGB as Pillow does; CMYK is left to Pillow. nvJPEG would be faster, but it
# repeats chroma where libjpeg interpolates it: photographs with 4:2:0 came below a cosine of 0.9999.
_MODES = ("RGB", "L")
# Larger pictures (3 MB), and longer ones, are resized by the threads that decode them: a pass of them could fill the
# GPU's memory.
MAX_DEVICE_PIXELS = 1 << 20
MAX_DEVICE_RATIO = 8


@guarded
def decode_pixels(data: bytes) -> torch.Tensor:
    """Decode a whole image to RGB pixels (3, H, W) uint8, the same as those of `decode_rgb`.

    torchvision's decoder is the same libjpeg as Pillow's, in 0.7 of the time and with less of the interpreter lock.
    Pillow takes what torchvision does not. Raises Rejection as `decode_rgb` does.
    """
    size = read_plain_header(data) if decode_jpeg is not None else None
    if size is None or not 0 < size[0] * size[1] <= MAX_PIXELS:
        image = open_image(data)
        is_upright = image.format == "JPEG" and read_orientation(image) == 1
        if decode_jpeg is None or not is_upright or image.mode not in _MODES:
            return to_pixels(load_upright(image))
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy: torch warns of read-only memory
    try:
        pixels: torch.Tensor = decode_jpeg(encoded, mode=ImageReadMode.RGB)
        return pixels
    except RuntimeError:
        return to_pixels(decode_rgb(data))


def to_pixels(image: Image.Image) -> torch.Tensor:
    """Return an RGB image's pixels (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def travels_whole(height: int, width: int) -> bool:
    """Whether a picture of this size goes to the GPU before it is resized."""
    return height * width <= MAX_DEVICE_PIXELS and max(height, width) <= MAX_DEVICE_RATIO * min(height, width)
