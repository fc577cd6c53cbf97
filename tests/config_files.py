"""Configurations for the tests."""

import json
from pathlib import Path
from typing import Any

NAMES = ("raw", "intermediates", "embeddings", "merged", "fingerprints", "checkpoint", "published_model", "report")


def write_config(folder: Path, **sections: dict[str, Any]) -> Path:
    """Write `folder/config.toml` with every path below that folder; `section={key: value}` adds to it or replaces."""
    paths = {f"{name}_dir": name for name in NAMES} | {"difficulty_metadata_path": "difficulty.parquet"}
    tables: dict[str, dict[str, Any]] = {
        "global": {"log_dir": "logs"}, "paths": paths, "infrastructure": {"num_workers": 2},
    }  # fmt: skip
    for name, content in sections.items():
        tables[name] = tables.get(name, {}) | content
    lines = []
    for name, content in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in content.items()), ""]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text("\n".join(lines), encoding="utf-8")
    return folder / "config.toml"
