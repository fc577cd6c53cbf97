"""The names in the reference implementation's configuration, and what became of them."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

Place = tuple[str, str]  # section and key
Settings = dict[Place, Any]

# Its sections: ours of the same settings, and the key of [paths] of what the section's stage writes.
SECTIONS = {
    "process_tar": ("", "intermediates_dir"),
    "generate_embeddings": ("embedding_model", "embeddings_dir"),
    "embedding_model": ("embedding_model", "embeddings_dir"),
    "merge_and_split": ("data", "merged_dir"),
    "data": ("data", "merged_dir"),
    "compute_fingerprints": ("fingerprints", "fingerprints_dir"),
    "fingerprints": ("fingerprints", "fingerprints_dir"),
    "compute_visual_neighbors": ("difficulty", "difficulty_metadata_path"),
    "difficulty": ("difficulty", "difficulty_metadata_path"),
    "triplet_training": ("training", "checkpoint_dir"),
    "training": ("training", "checkpoint_dir"),
}


def _map_output(section: dict[str, Any], key: str, name: str) -> tuple[Settings, str]:
    if name not in SECTIONS:
        return {}, "set the key of [paths] of the stage that writes it"
    return {("paths", SECTIONS[name][1]): section[key]}, ""


def _map_wandb(section: dict[str, Any], _: str, __: str) -> tuple[Settings, str]:
    mode = section.get("wandb_mode", "online") if section.get("wandb_enabled", True) else "off"
    return {("logging", "wandb"): "off" if mode == "disabled" else mode}, ""


def _map_resumed(section: dict[str, Any], key: str, _: str) -> tuple[Settings, str]:
    if str(section[key]).endswith(".pt"):
        return {("training", "init_checkpoint"): section[key]}, ""
    return {}, "stage 6 resumes by itself"


# By SECTION.KEY, `*` for any: our place, the reason why there is none, or a function that returns settings and a note.
Rule = Place | str | Callable[[dict[str, Any], str, str], tuple[Settings, str]]
_MEMORY = "memory is bounded by [data].memory_mb"
_FEWER = "[training].sample_buildings trains on fewer buildings, tune.py --sample-buildings the trials"
_VALIDATION = "every validation has mAP, MRR and Recall@k, [training].recall_ranks adds k"
RULES: dict[str, Rule] = {
    "paths.raw_dir": lambda section, key, _: (
        {("paths", "raw_dir"): section[key]},
        "" if Path(str(section[key])).name == "dataset_unaligned"
        else "it has to hold the tars themselves; the old code found them in dataset_unaligned/",
    ),
    "*.output_dir": _map_output,
    "*.output_parquet_path": _map_output,
    **dict.fromkeys(
        ("*.train_parquet_path", "*.val_parquet_path"),
        lambda section, key, _: ({("paths", "merged_dir"): str(Path(str(section[key])).parent)}, ""),
    ),
    "infrastructure.batch_size": _MEMORY,
    "data.batch_size": _MEMORY,
    "*.sample_fraction_for_bands": ("difficulty", "sample_fraction_for_bands"),
    "*.sample_fraction": _FEWER,
    "*.val_sample_fraction": _FEWER,
    "*.sample_buildings": ("training", "sample_buildings"),
    "*.val_sample_buildings": _FEWER,
    "*.samples_per_epoch": ("training", "anchors_per_epoch"),
    "*.triplets_per_epoch": ("training", "anchors_per_epoch"),
    "*.early_stopping_patience": ("training", "patience"),
    "*.loss_distance": lambda section, key, _: (
        {("training", "triplet_distance"): section[key], ("training", "loss"): "triplet"}, ""
    ),
    "*.margin": lambda section, key, _: (
        {("training", "margin"): section[key]},
        "" if "loss_distance" in section or section.get("loss") == "triplet"
        else 'idle unless [training].loss = "triplet"',
    ),
    "*.retrieval_metric_*": _VALIDATION,
    "*.best_training_metric_name": _VALIDATION,
    "*.resume_from_checkpoint": _map_resumed,
    "*.ucb_*": lambda section, key, _: (
        {("training", "band_sampling"): "uniform" if section[key] is False else "ucb"},
        "the bandit has no other setting here",
    ),
    "*.use_residual": ("training", "use_residual"),
    "*.learning_rate": lambda section, key, _: (
        {("training", "learning_rate"): section[key]},
        "stage 6 divides it by the root of the number of a layer's inputs (64 at 4,096); its default is 5e-3"
    ),
    "*.use_layer_norm": "stage 6 trains without; an old checkpoint keeps its LayerNorms",
    "*.wandb_enabled": _map_wandb,
    "*.wandb_mode": _map_wandb,
}  # fmt: skip


def find_rule(section: str, key: str) -> Rule | None:
    """Return what became of a key of the reference's configuration, None for a name that it does not have."""
    return next((rule for pattern, rule in RULES.items() if fnmatchcase(f"{section}.{key}", pattern)), None)


def names_old_key(tables: dict[str, Any], valid: dict[str, list[str]]) -> bool:
    """Tell whether a configuration has a key of a name that is only the reference's, or in a section of its own."""
    return any(
        (section in SECTIONS and section not in valid)
        or (key not in valid.get(section, ()) and find_rule(section, key))
        for section, content in tables.items() if isinstance(content, dict) for key in content
    )  # fmt: skip
