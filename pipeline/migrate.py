"""Print a configuration of the reference implementation as one of this project.

    python -m pipeline.migrate OLD.toml > config.toml

Every key that has a counterpart is printed under its name here. Those that have none, and those whose value does not
fit, are listed below as comments, each with the reason.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline import cli
from pipeline.config import Config, list_keys
from pipeline.config_overrides import read_toml
from pipeline.errors import ConfigError

# Other names of what is here, whatever section they stood in.
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
# Why a key has no counterpart, by what is in its name; the first that fits.
REASONS = (
    (r"te?mp|scratch|extract", "tars are streamed and nothing is extracted to disk"),
    (r"row_group|compress|chunk", "files are written in row groups of bounded size, compressed with zstd"),
    (r"account|partition|slurm|sbatch|gpus|nodes|wall", "it goes to the submit scripts: docs/slurm.md"),
    (r"trial|study|storage|prun", "it is an option of train_specialized_embeddings/tune.py: docs/tuning.md"),
    (r"band|ucb|reward|bandit|explor", "bands are drawn by [training].band_sampling: docs/training.md"),
    (r"hub|repo|push|token", "it is the option --push-to-hub of publish_model/convert_to_hf.py"),
    (r"leaf|tree|metric", "the search is exact, and [difficulty].backend names its engine"),
    (r"pin_|prefetch|persistent|loader", "features are read into memory, so nothing is loaded by workers"),
    (r"amp|precision|bf16|fp16", "[embedding_model].dtype says in what the backbone computes"),
)
UNKNOWN = "nothing here goes by this name: docs/configuration.md lists every key"


@dataclass
class Migration:
    """The new tables, and the old keys that are not in them, each with the reason."""

    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    origins: dict[tuple[str, str], str] = field(default_factory=dict)  # the old name of each new key

    def take(self, place: tuple[str, str], old: str, value: Any) -> None:
        """Set a key, unless another old one has set it."""
        if place in self.origins:
            self.left_out.append((old, f"[{place[0]}].{place[1]} is set by {self.origins[place]}"))
            return
        self.origins[place] = old
        self.tables.setdefault(place[0], {})[place[1]] = value

    def drop(self, place: tuple[str, str], reason: str) -> None:
        """Leave a key out after all."""
        value = self.tables[place[0]].pop(place[1])
        self.left_out.append((self.origins.pop(place), f"its value {value!r} does not fit: {reason}"))


def migrate(old: dict[str, Any]) -> Migration:
    """Map the tables of an old configuration."""
    valid, found = list_keys(), Migration()
    settings = list(_flatten(old))
    own = [(section, key) for section, key, _ in settings if key in valid.get(section, [])]
    # What has kept its place goes before what has to find one.
    for section, key, value in sorted(settings, key=lambda setting: setting[:2] not in own):
        name = f"[{section}].{key}" if section else key
        places = [(section, key)] if (section, key) in own else [(one, key) for one in valid if key in valid[one]]
        places = places or ([RENAMED[key]] if key in RENAMED else [])
        if len(places) == 1:
            found.take(places[0], name, value)
        elif places:
            found.left_out.append((name, f"choose one of {', '.join(f'[{one}].{key}' for one, _ in places)}"))
        else:
            found.left_out.append((name, explain(key)))
    _drop_what_does_not_fit(found)
    return found


def _flatten(old: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for section, content in old.items():
        if isinstance(content, dict):
            yield from ((section, key, value) for key, value in content.items())
        else:
            yield "", section, content


def explain(key: str) -> str:
    """Say why a key has no counterpart."""
    return next((reason for pattern, reason in REASONS if re.search(pattern, key.lower())), UNKNOWN)


def _drop_what_does_not_fit(found: Migration) -> None:
    try:
        Config.model_validate(found.tables)
    except ValidationError as error:
        problems = {tuple(map(str, details["loc"][:2])): details["msg"] for details in error.errors()}
        for place, reason in problems.items():
            if len(place) == 2 and place[1] in found.tables.get(place[0], {}):
                found.drop((place[0], place[1]), reason[:1].lower() + reason[1:])
            else:  # a rule across keys: whoever runs a stage is told again
                found.left_out.append((f"[{place[0]}]", reason.removeprefix("Value error, ")))


def format_config(found: Migration) -> str:
    """Return the new file."""
    lines = ["# Relative paths start from this file's folder. Every key is in docs/configuration.md with its default."]
    for section in list_keys():
        if table := found.tables.get(section):
            lines += ["", f"[{section}]", *(f"{key} = {_format(value)}" for key, value in table.items())]
    if found.left_out:
        lines += ["", f"# {len(found.left_out)} of the old file that are not here:"]
        lines += [" ".join(f"# {name}: {reason}".split()) for name, reason in found.left_out]
    return "\n".join(lines)


def _format(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_format, value))}]"
    # A string, a number and a truth value are the same in JSON and TOML.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.make_parser(__doc__ or "", config=False)
    parser.add_argument("old", type=Path, metavar="OLD.toml", help="the configuration to map")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the new configuration.

    Raises ConfigError where the old one cannot be read.
    """
    path = parse(argv).old
    try:
        old = read_toml(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration ({error.strerror}): correct the path") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    print(format_config(migrate(old)))


if __name__ == "__main__":
    cli.run_guarded(main)
