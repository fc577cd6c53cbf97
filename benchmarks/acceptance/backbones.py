"""Make backbones of the published shapes with random weights, on the device."""

from pathlib import Path
from typing import Any

import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel
from transformers.utils import logging as transformers_logging

# hidden size, blocks, heads, MLP width (DINOv3's model cards); the 7B's MLP is gated.
SHAPES = {
    "vit-s": (384, 12, 6, 1536),
    "vit-b": (768, 12, 12, 3072),
    "vit-l": (1024, 24, 16, 4096),
    "vit-7b": (4096, 40, 32, 8192),
}
TOY_SHAPE = (96, 2, 4, 192)
# Standard deviation of a ViT-B's weights; narrower inputs take larger ones, so that a sum of products keeps its size.
DEVIATION, DEVIATION_WIDTH = 0.02, 768
PIXELS, TOY_PIXELS = 224, 64
SHARD_SIZE, TOY_SHARD_SIZE = "5GB", "200KB"


def write_backbone(name: str, folder: Path, device: torch.device, *, is_toy: bool) -> Path:
    """Write a model's folder as published: settings, processor, weights in bfloat16 and shards."""
    transformers_logging.disable_progress_bar()
    pixels = TOY_PIXELS if is_toy else PIXELS
    model = _make_vit(name, device, is_toy=is_toy)
    model.save_pretrained(folder, max_shard_size=TOY_SHARD_SIZE if is_toy else SHARD_SIZE)
    _make_processor(pixels).save_pretrained(folder)
    return folder


def _make_vit(name: str, device: torch.device, *, is_toy: bool) -> Any:
    """Return a DINOv3 in bfloat16 on the device; on a CPU the largest would take 92 s of a core."""
    width, blocks, heads, mlp = TOY_SHAPE if is_toy else SHAPES[name]
    config = DINOv3ViTConfig(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, intermediate_size=mlp,
        use_gated_mlp=name == "vit-7b", num_register_tokens=4, patch_size=16,
        image_size=TOY_PIXELS if is_toy else PIXELS,
    )  # fmt: skip
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = DINOv3ViTModel(config).eval()
            draw_weights(model, DEVIATION * (DEVIATION_WIDTH / width) ** 0.5)
            return model
    finally:
        torch.set_default_dtype(previous)


def draw_weights(model: torch.nn.Module, deviation: float) -> None:
    """Draw every matrix and token anew from a normal distribution.

    transformers takes trunc_normal_, which torch 2.11 gets wrong in bfloat16: 0.4 % of the weights become 2 or -2, and
    embeddings in bfloat16 then lie far from those in float32.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=deviation)


def _make_processor(pixels: int) -> Any:
    """Return DINOv3's image processor, whose name depends on the version of transformers."""
    import transformers

    kind = getattr(transformers, "DINOv3ViTImageProcessor", None) or transformers.DINOv3ViTImageProcessorFast
    return kind(size={"height": pixels, "width": pixels})
