"""The code and the config.json that every published folder has."""

import hashlib
from pathlib import Path
from typing import Any

from pipeline.config import EmbeddingModelSection
from pipeline.inference.model_files import read_settings
from pipeline.log import logger

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


def read_code() -> dict[str, bytes]:
    """Return the code files of a published folder by name.

    transformers keeps the classes that it loaded first, by the folder's base name and the configuration's file: this
    ends with a hash of the others, so that two folders in one process each run their own.
    """
    code = {path.name: path.read_bytes() for path in CODE_PATHS}
    digest = hashlib.sha256(b"".join(code.values())).hexdigest()[:16]
    code[CODE_PATHS[0].name] += f"\n# The model's code as a whole: {digest}\n".encode()
    return code


def has_own_code(folder: Path) -> bool:
    """Whether the code in a model folder is what this version publishes, so that its own classes load the weights."""
    if read_settings(folder / "config.json").get("model_type") != MODEL_TYPE:
        return False
    for name, code in read_code().items():
        if (folder / name).is_file() and (folder / name).read_bytes() != code:
            logger.warning("%s: not the code that this version publishes", folder / name)
            return False
    return True


def describe_model(
    backbone_name: str, backbone_config: dict[str, Any], section: EmbeddingModelSection, architecture: dict[str, Any]
) -> dict[str, Any]:
    """Return the published config.json without the weights' type; it contains no path of this machine."""
    return {
        "architectures": [AUTO_MAP["AutoModel"].partition(".")[2]],
        "auto_map": AUTO_MAP,
        "model_type": MODEL_TYPE,
        "backbone_model_name": backbone_name,
        "backbone_config": {key: value for key, value in backbone_config.items() if key not in STORAGE_KEYS},
        "pooling_type": section.pooling_type,
        "scales": section.scales,
        "flip": section.flip,
        "projector": architecture,
        "embedding_dim": architecture["output_dim"],
    }
