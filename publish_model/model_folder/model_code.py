"""What every published folder has in common: its code, and what its config.json says."""

from pathlib import Path
from typing import Any

MODEL_TYPE = "spatial_embeddings"
CODE_DIR = Path(__file__).resolve().parents[1]
# One definition of pooling and projector: the very files that stage 2 and training use travel with the model.
CODE_PATHS = (
    CODE_DIR / "configuration_spatial_embeddings.py",
    CODE_DIR / "modeling_spatial_embeddings.py",
    CODE_DIR.parent / "pipeline" / "inference" / "pooling.py",
    CODE_DIR.parent / "pipeline" / "retrieval" / "projector.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_spatial_embeddings.SpatialEmbeddingsConfig",
    "AutoModel": "modeling_spatial_embeddings.SpatialEmbeddingsModel",
}
# What a backbone's configuration says of where and in which type it was stored: false for the published copy.
STORAGE_KEYS = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "auto_map")


def describe_model(
    backbone_name: str, backbone_config: dict[str, Any], pooling_type: str, architecture: dict[str, Any]
) -> dict[str, Any]:
    """Return the published config.json, to which the weights' type is to be added; it names no place."""
    return {
        "architectures": [AUTO_MAP["AutoModel"].partition(".")[2]],
        "auto_map": AUTO_MAP,
        "model_type": MODEL_TYPE,
        "backbone_model_name": backbone_name,
        "backbone_config": {key: value for key, value in backbone_config.items() if key not in STORAGE_KEYS},
        "pooling_type": pooling_type,
        "projector": architecture,
        "embedding_dim": architecture["output_dim"],
    }
