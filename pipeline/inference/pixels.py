"""Turn image bytes to pixels, and pixels to a model's input by its own image processor, on the CPU or on a GPU."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor

from pipeline.crashes import guarded
from pipeline.errors import InputError, one_line
from pipeline.inference.images import (
    MAX_PIXELS,
    decode_rgb,
    load_upright,
    open_image,
    read_orientation,
    read_plain_header,
)
from pipeline.inference.loading import PROBLEMS
from pipeline.log import logger

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
# No camera makes longer pictures. With a shorter edge of 256 pixels one takes 50 MB, and a crop keeps 0.3 % of it.
RIBBON_RATIO = 256
# Pictures resized at once on a device: 310 MB as floats at 640 x 640. Each such group makes the host wait twice.
DEVICE_CHUNK = 64


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
    with suppress(RuntimeError):
        return decode_jpeg(encoded, mode=ImageReadMode.RGB)  # type: ignore[no-any-return]
    return to_pixels(decode_rgb(data))


def to_pixels(image: Image.Image) -> torch.Tensor:
    """Return an RGB image's pixels (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def travels_whole(height: int, width: int) -> bool:
    """Whether a picture of this size goes to the GPU before it is resized."""
    return height * width <= MAX_DEVICE_PIXELS and max(height, width) <= MAX_DEVICE_RATIO * min(height, width)


def prepare_on_device(processor: Any, pixels: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Return the model's input, (3, h, w) float32 each, of pictures (3, H, W) uint8 on the device."""
    chunks = (list(pixels[start : start + DEVICE_CHUNK]) for start in range(0, len(pixels), DEVICE_CHUNK))
    return [one for chunk in chunks for one in processor(images=chunk, device=device)["pixel_values"]]


def works_on_tensors(processor: Any) -> bool:
    """Whether an image processor computes with torch: BaseImageProcessorFast until transformers 5, then this name."""
    names = {base.__name__ for base in type(processor).__mro__}
    return bool(names & {"TorchvisionBackend", "BaseImageProcessorFast"})


def draw_picture(width: int, height: int) -> torch.Tensor:
    """Draw a smooth picture of many colours, (3, height, width) uint8, the same each time."""
    blocks = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return to_pixels(Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC))


def prepare(processor: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Return the model's input (3, h, w) float32 of an image's pixels (3, H, W) uint8, on the CPU."""
    if getattr(processor, "do_center_crop", False):
        # A processor that resizes the shorter edge to 256 pixels makes 4 GB of an image of 1 x 20,000, to crop a square
        # from its middle. That square stays the same but for a shift of half a pixel.
        height, width = pixels.shape[1:]
        longest = RIBBON_RATIO * min(width, height)
        x, y = max(0, width - longest) // 2, max(0, height - longest) // 2
        pixels = pixels[:, y : height - y, x : width - x]
    image = pixels if works_on_tensors(processor) else Image.fromarray(pixels.permute(1, 2, 0).numpy())
    prepared: torch.Tensor = processor(images=[image], return_tensors="pt")["pixel_values"][0]
    return prepared


def load_processor(folder: Path, image_size: int | None = None) -> Any:
    """Load a model's image processor, set to squares of `image_size` pixels if given; never code of the folder's own.

    Raises InputError where it cannot be loaded, or cannot be set to that size.
    """
    if not any(folder.glob("*processor_config.json")):
        logger.warning("%s says nothing of its image processor: taken is the default of its kind", folder)
    try:
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        if image_size is None:
            return processor
        sizes = size_settings(processor.to_dict(), image_size)
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, **sizes)
    except PROBLEMS as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{folder}: its image processor is code of its own, which is never run: name one of transformers' in "
                "preprocessor_config.json"
            ) from None
        raise InputError(
            f"{folder}: no image processor can be loaded ({one_line(error)[:300]}): fetch the model again"
        ) from None


def size_settings(settings: dict[str, Any], image_size: int) -> dict[str, Any]:
    """Return the `size` and `crop_size` with which an image processor makes squares of `image_size` pixels.

    The share of the picture that it crops stays the same. Raises InputError where it cannot make squares.
    """
    size = {key: value for key, value in (settings.get("size") or {}).items() if value is not None}
    if not set(size) <= {"shortest_edge", "height", "width"} or not size or settings.get("do_resize") is False:
        raise InputError(
            f"{settings.get('image_processor_type')}: an image size cannot be set for it (it resizes by {size}): "
            "leave [embedding_model].image_size at auto and scales empty"
        )
    if not settings.get("do_center_crop"):
        return {"size": dict.fromkeys(size, image_size)}
    factor = image_size / min(settings["crop_size"][side] for side in ("height", "width"))
    return {
        "size": {key: round(value * factor) for key, value in size.items()},
        "crop_size": {"height": image_size, "width": image_size},
    }
