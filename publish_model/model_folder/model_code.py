"""The code and the config.json that every published folder has."""

from pathlib import Path
from typing import Any

MODEL_TYPE = "spatial_embeddings"
CODE_DIR = Path(__file__).resolve().parents[1]
# Stage 2 and training use the same two files for pooling and projector.
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
# Keys of a backbone's configuration about its storage, which do not hold for the published copy.
STORAGE_KEYS = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "auto_map")


def describe_model(
    backbone_name: str, backbone_config: dict[str, Any], pooling_type: str, architecture: dict[str, Any]
) -> dict[str, Any]:
    """Return the published config.json without the weights' type; it contains no path of this machine."""
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
