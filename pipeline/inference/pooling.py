"""Pool a vision backbone's outputs to one vector per picture, over several sizes of it and its mirror image.

Stage 2 uses this file, and it is published with the model: it imports torch alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional


class PoolingError(ValueError):
    """The backbone has no output of the kind asked for."""


def embed_views(
    backbone: Any, pixel_values: torch.Tensor, pooling_type: str, scales: Sequence[int], flip: bool, **options: Any
) -> tuple[torch.Tensor, Any]:
    """Return a backbone's features (B, D) float32 of pictures (B, 3, H, W), and its outputs for the pictures as given.

    `scales` are sides in pixels: the pictures come at the largest and are resized to the others; the features are the
    mean over the sizes, normalised to length 1 before and after. Without scales they are the backbone's own.
    `flip` averages, at each size, with the mirror image. `options` go to the backbone.
    Raises PoolingError where the backbone has no output of this `pooling_type`.
    """
    features, given = [], None
    for scale in sorted(scales, reverse=True) or [0]:
        pixels = resize(pixel_values, scale / max(scales)) if scale else pixel_values
        outputs = backbone(pixel_values=pixels.to(backbone.dtype), **options)
        pooled = pool(backbone, outputs, pooling_type, pixels)
        if flip:
            mirrored = backbone(pixel_values=pixels.flip(-1).to(backbone.dtype), **options)
            pooled = (pooled + pool(backbone, mirrored, pooling_type, pixels)) / 2
        features.append(pooled)
        given = outputs if given is None else given
    if len(features) == 1:
        return features[0], given
    return functional.normalize(torch.stack([functional.normalize(one) for one in features]).mean(0)), given


def resize(pixel_values: torch.Tensor, factor: float) -> torch.Tensor:
    """Return pictures (B, 3, H, W) at `factor` of their size, float32; with factor 1 unchanged."""
    if factor == 1:
        return pixel_values
    size = [round(side * factor) for side in pixel_values.shape[2:]]
    return functional.interpolate(pixel_values.float(), size, mode="bicubic", antialias=True)


def pool(backbone: Any, outputs: Any, pooling_type: str, pixels: torch.Tensor) -> torch.Tensor:
    """Return (B, D) float32: `pooler_output`, or the CLS token.

    Raises PoolingError where the outputs for `pixels` (B, 3, H, W) lack it.
    """
    if pooling_type == "pooler_output":
        pooled: torch.Tensor | None = getattr(outputs, "pooler_output", None)
        if pooled is None:
            raise PoolingError("has no pooler_output")
        return pooled.flatten(1).float()
    tokens: torch.Tensor = outputs.last_hidden_state
    side = getattr(backbone.config, "patch_size", None)
    height, width = side if isinstance(side, (tuple, list)) else (side or 1, side or 1)
    num_patches = (pixels.shape[2] // height) * (pixels.shape[3] // width)
    if tokens.ndim != 3 or tokens.shape[1] <= num_patches:  # (B, C, H, W) of a convolutional one
        raise PoolingError("has no CLS token")
    return tokens[:, 0].float()
