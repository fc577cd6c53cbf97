"""Print a configuration of the reference implementation as one of this project.

    python -m pipeline.migrate OLD.toml > config.toml

Keys that have a counterpart are printed under its name. The others, and those whose value does not fit, are listed
below as comments, each with the reason.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline import cli
from pipeline.config import Config, list_keys
from pipeline.config_text import read_toml
from pipeline.errors import ConfigError

# The reference's names of keys, in whatever section.
RENAMED = {
    "random_seed": ("global", "seed"),
    "split_seed": ("global", "seed"),
    "backbone_model_name": ("embedding_model", "model_name"),
    "fingerprint_size": ("fingerprints", "image_size"),
    "n_neighbors": ("difficulty", "neighbors"),
    "num_neighbors": ("difficulty", "neighbors"),
    "k_neighbors": ("difficulty", "neighbors"),
    "sample_fraction": ("difficulty", "sample_fraction_for_bands"),
    "n_components": ("difficulty", "pca_components"),
    "num_layers": ("training_model", "num_hidden_layers"),
    "epochs": ("training", "num_epochs"),
    "lr": ("training", "learning_rate"),
    "triplet_margin": ("training", "margin"),
    "triplets_per_epoch": ("training", "anchors_per_epoch"),
    "samples_per_epoch": ("training", "anchors_per_epoch"),
    "gradient_clip": ("training", "grad_clip"),
    "max_grad_norm": ("training", "grad_clip"),
    "early_stopping_patience": ("training", "patience"),
    "log_level": ("logging", "level"),
}
# Why a key has no counterpart, by a pattern of its name; the first that fits.
REASONS = (
    (r"te?mp|scratch|extract", "tars are streamed and nothing is extracted to disk"),
    (r"row_group|compress|chunk", "files are written in row groups of bounded size, compressed with zstd"),
    (r"account|partition|slurm|sbatch|gpus|nodes|wall", "it goes to the submit scripts: docs/slurm.md"),
    (r"trial|study|storage|prun", "it is an option of train_specialized_embeddings/tune.py: docs/tuning.md"),
    (r"band|ucb|reward|bandit|explor", "bands are drawn by [training].band_sampling: docs/training.md"),
    (r"hub|repo|push|token", "it is the option --push-to-hub of publish_model/convert_to_hf.py"),
    (r"leaf|tree|metric", "the search is exact, and [difficulty].backend names its engine"),
    (r"pin_|prefetch|persistent|loader", "features are read into memory, so nothing is loaded by workers"),
    (r"amp|precision|bf16|fp16", "[embedding_model].dtype is the backbone's precision"),
)
UNKNOWN = "nothing here goes by this name: docs/configuration.md lists every key"

Place = tuple[str, str]  # section and key


def migrate(old: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], list[tuple[str, str]]]:
    """Return the new tables, and the old keys that are not in them, each with the reason."""
    valid = list_keys()
    sections = {name: content for name, content in old.items() if isinstance(content, dict)}
    sections[""] = {key: value for key, value in old.items() if key not in sections}
    settings = [(section, key, value) for section, content in sections.items() for key, value in content.items()]
    tables: dict[str, dict[str, Any]] = {}
    left_out: list[tuple[str, str]] = []
    origins: dict[Place, str] = {}  # the old name of each new key
    # Keys that keep their place come first: they win.
    for section, key, value in sorted(settings, key=lambda setting: setting[1] not in valid.get(setting[0], [])):
        name = f"[{section}].{key}" if section else key
        places = (
            [(section, key)] if key in valid.get(section, []) else [(one, key) for one in valid if key in valid[one]]
        )
        places = places or ([RENAMED[key]] if key in RENAMED else [])
        if not places:
            reason = next((reason for pattern, reason in REASONS if re.search(pattern, key.lower())), UNKNOWN)
            left_out.append((name, reason))
        elif len(places) > 1:
            left_out.append((name, f"choose one of {', '.join(f'[{one}].{key}' for one, _ in places)}"))
        elif places[0] in origins:
            left_out.append((name, "[{}].{} is set by {}".format(*places[0], origins[places[0]])))
        else:
            origins[places[0]] = name
            tables.setdefault(places[0][0], {})[places[0][1]] = value
    try:
        Config.model_validate(tables)
    except ValidationError as error:
        problems = {tuple(map(str, details["loc"][:2])): details["msg"] for details in error.errors()}
        for place, reason in problems.items():
            if place in origins:
                value = tables[place[0]].pop(place[1])
                text = f"its value {value!r} does not fit: {reason[:1].lower()}{reason[1:]}"
                left_out.append((origins[place], text))
            else:  # a rule across keys: whoever runs a stage is told again
                left_out.append((f"[{place[0]}]", reason.removeprefix("Value error, ")))
    return tables, left_out


def format_config(tables: dict[str, dict[str, Any]], left_out: list[tuple[str, str]]) -> str:
    """Return the new file."""
    lines = ["# Relative paths start from this file's folder. Every key is in docs/configuration.md with its default."]
    for section in list_keys():
        if table := tables.get(section):
            lines += ["", f"[{section}]", *(f"{key} = {_format(value)}" for key, value in table.items())]
    if left_out:
        lines += ["", f"# {len(left_out)} of the old file that are not here:"]
        lines += [" ".join(f"# {name}: {reason}".split()) for name, reason in left_out]
    return "\n".join(lines)


def _format(value: Any) -> str:
    """Return a value in TOML: of strings, numbers, truth values and lists of them JSON is the same."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the new configuration.

    Raises ConfigError if the old one cannot be read.
    """
    parser = cli.make_parser(__doc__ or "", config=False)
    parser.add_argument("old", type=Path, metavar="OLD.toml", help="the configuration to map")
    path = parser.parse_args(argv).old
    try:
        old = read_toml(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration ({error.strerror}): correct the path") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    print(format_config(*migrate(old)))


if __name__ == "__main__":
    cli.run_guarded(main)
