"""Encoded images in, uint8 pixels as torch takes them out, on the CPU or by nvJPEG on the GPU."""

import io

import numpy as np
import torch
from PIL import Image

from pipeline.inference.images import check_image, decode_rgb, load_rgb, open_image

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # announced for a later torchvision; Pillow decodes then
    decode_jpeg = None

# What libjpeg and nvJPEG turn to RGB in the same way as Pillow; CMYK is left to Pillow.
_MODES = ("RGB", "L")
# The most that a picture may have to travel to the GPU as it is (3 MB); larger ones are resized by the threads that
# decode them, so that a pass of them cannot fill the memory.
MAX_DEVICE_PIXELS = 1 << 20
MAX_DEVICE_RATIO = 8


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


def travels_whole(height: int, width: int) -> bool:
    """Whether a picture of this size goes to the GPU before it is resized."""
    return height * width <= MAX_DEVICE_PIXELS and max(height, width) <= MAX_DEVICE_RATIO * min(height, width)


def is_for_nvjpeg(data: bytes) -> bool:
    """Whether nvJPEG may decode an image: a baseline JPEG of usual size that Pillow would load.

    nvJPEG itself returns half a picture for a truncated file. Raises Rejection where Pillow would not load it.
    """
    image = open_image(data)
    if image.format != "JPEG" or image.mode not in _MODES or image.info.get("progressive"):
        return False
    if not travels_whole(image.height, image.width):
        return False
    check_image(data)
    return True


def has_nvjpeg(device: torch.device) -> bool:
    """Whether this torchvision decodes on the GPU, by trying it."""
    if decode_jpeg is None:
        return False
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "grey").save(file, "JPEG")
    try:
        return bool(decode_jpeg([_to_bytes(file.getvalue())], ImageReadMode.RGB, device)[0].shape == (3, 16, 16))
    except RuntimeError:
        return False


def decode_on_gpu(files: list[bytes], device: torch.device) -> list[torch.Tensor]:
    """Decode JPEGs for which `is_for_nvjpeg` holds to RGB pixels (3, H, W) uint8 on a GPU, in one call of nvJPEG.

    What nvJPEG refuses is decoded on the CPU.
    """
    try:
        pixels: list[torch.Tensor] = decode_jpeg([_to_bytes(data) for data in files], ImageReadMode.RGB, device)
    except RuntimeError:  # for all of them, without saying which
        pixels = [decode_pixels(data).to(device) for data in files]
    return pixels


def _to_bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy: torch warns of memory that is read-only
