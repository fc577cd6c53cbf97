"""Backbones for timing: published shapes with random weights, and EfficientNet-Lite0 with its own."""

from pathlib import Path

import torch
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel

from sample_data import convert_lite0

# hidden size, blocks, heads, MLP width (DINOv3's model cards); the 7B's MLP is gated.
SHAPES = {
    "vit-s": (384, 12, 6, 1536),
    "vit-b": (768, 12, 12, 3072),
    "vit-l": (1024, 24, 16, 4096),
    "vit-7b": (4096, 40, 32, 8192),
}
PIXELS = 224


def make_backbone(name: str, folder: Path) -> Path:
    """Write a backbone's folder and return it; of the large shapes the settings alone (see `make_model`)."""
    if name == "lite0":
        return convert_lite0.run(folder)
    torch.manual_seed(0)
    if name == "tiny":
        config = Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
        Dinov2Model(config).save_pretrained(folder)
        BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}).save_pretrained(folder)
        return folder
    width, blocks, heads, mlp = SHAPES[name]
    config = DINOv3ViTConfig(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, intermediate_size=mlp,
        use_gated_mlp=name == "vit-7b", num_register_tokens=4, patch_size=16, image_size=PIXELS,
    )  # fmt: skip
    config.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def make_processor() -> object:
    """Return DINOv3's image processor at 224 px, under whichever name this transformers has it."""
    import transformers

    kind = getattr(transformers, "DINOv3ViTImageProcessor", None) or transformers.DINOv3ViTImageProcessorFast
    return kind(size={"height": PIXELS, "width": PIXELS})


def make_model(folder: Path, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """Build the model whose settings a folder holds, with random weights, on the device."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            return DINOv3ViTModel(DINOv3ViTConfig.from_pretrained(folder)).eval()
    finally:
        torch.set_default_dtype(previous)
