"""A published folder as the reference implementation leaves it, and a plain module that computes what its code does."""

import json
from pathlib import Path
from typing import Any

import torch
from reference_projector import ReferenceProjector
from safetensors.torch import save_file
from torch import nn

# What its code does under transformers 5, and what must never be run.
CODE = 'raise RuntimeError("the code of the folder was run")\n'


class ReferenceModule(nn.Module):
    """The backbone's pooled output where it has one, else its first token, and the projector on top."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        outputs = self.backbone(pixel_values=pixel_values)
        pooled = getattr(outputs, "pooler_output", None)
        return self.projector(outputs.last_hidden_state[:, 0] if pooled is None else pooled)


def write_reference_model(
    folder: Path, backbone_dir: Path, input_dim: int = 24, widths: tuple[int, ...] = (40, 30, 22), **settings: Any
) -> ReferenceModule:
    """Write a folder without image processor, whose config.json names the backbone, and return its oracle."""
    from transformers import AutoModel

    torch.manual_seed(11)
    activation = settings.pop("activation", "gelu")
    norm = settings.pop("norm", True)  # its default
    projector = ReferenceProjector(input_dim, list(widths), 256, activation or "gelu", norm=norm)
    module = ReferenceModule(AutoModel.from_pretrained(backbone_dir), projector).eval()
    folder.mkdir(parents=True)
    weights = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["SpatialEmbeddingsModel"],
        "auto_map": {
            "AutoConfig": "configuration_spatial_embeddings.SpatialEmbeddingsConfig",
            "AutoModel": "modeling_spatial_embeddings.SpatialEmbeddingsModel",
        },
        "backbone_model_name": str(backbone_dir),
        "model_type": "spatial_embeddings",
        "input_dim": input_dim,
        "output_dim": 256,
        "hidden_dim": widths[0],
        "num_hidden_layers": len(widths),
        "dropout": 0.2,
        "activation": activation,
        "torch_dtype": "float32",
        "transformers_version": "4.57.1",
    }
    config |= settings
    content = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))
    for name in ("configuration", "modeling"):
        (folder / f"{name}_spatial_embeddings.py").write_text(CODE)
    return module
