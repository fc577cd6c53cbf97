"""Print a configuration of the reference implementation as one of this project.

    python -m pipeline.migrate OLD.toml > config.toml

Keys that have a counterpart are printed under its name. The others are listed below as comments, each with the reason.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import cli
from pipeline.config import list_keys, read_toml, suggest
from pipeline.reference.settings import SECTIONS, Place, Settings, find_rule

Notes = list[tuple[str, str]]  # old name, what to know


def migrate(old: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], Notes]:
    """Return the new tables, and the old keys that need a look, each with the reason."""
    valid = list_keys()
    sections = {name: content for name, content in old.items() if isinstance(content, dict)}
    sections[""] = {key: value for key, value in old.items() if key not in sections}
    names = [(section, key) for section, content in sections.items() for key in content]
    tables: dict[str, dict[str, Any]] = {}
    notes: Notes = []
    origins: dict[Place, str] = {}  # the old name of each new key
    # Keys that keep their place come first: they win.
    for section, key in sorted(names, key=lambda name: name[1] not in valid.get(name[0], [])):
        name = f"[{section}].{key}" if section else key
        found, note = map_key(sections[section], section, key, valid)
        for place, value in found.items():
            if place in origins and tables[place[0]][place[1]] != value:
                note = f"[{place[0]}].{place[1]} is set by {origins[place]}"
            else:
                origins.setdefault(place, name)
                tables.setdefault(place[0], {})[place[1]] = value
        if note:
            notes.append((name, note))
    return tables, notes


def map_key(content: dict[str, Any], section: str, key: str, valid: dict[str, list[str]]) -> tuple[Settings, str]:
    """Return our settings for a key of an old section, and a note where there is something to know."""
    rule = find_rule(section, key)
    if callable(rule):
        return rule(content, key, section)
    if isinstance(rule, str) and key not in valid.get(section, []):
        return {}, rule
    own = SECTIONS.get(section, (section, ""))[0]
    places = [(one, key) for one in (section, own) if key in valid.get(one, [])]
    places = places[:1] or ([rule] if isinstance(rule, tuple) else [(one, key) for one in valid if key in valid[one]])
    if len(places) == 1:
        return {places[0]: content[key]}, ""
    if places:
        return {}, f"choose one of {', '.join(f'[{one}].{key}' for one, _ in places)}"
    return {}, f"nothing here has this name{suggest(valid, section, key)}: docs/configuration.md lists every key"


def format_config(tables: dict[str, dict[str, Any]], notes: Notes) -> str:
    """Return the new file; TOML writes strings, numbers, truth values and lists of them as JSON does."""
    lines = ["# Relative paths start from this file's folder. Every key is in docs/configuration.md with its default."]
    for section in list_keys():
        if table := tables.get(section):
            lines += ["", f"[{section}]"]
            lines += [
                f"{key} = {repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)}"
                for key, value in table.items()
            ]
    if notes:
        lines += ["", f"# {len(notes)} of the old file to look at:"]
        lines += [" ".join(f"# {name}: {note}".split()) for name, note in notes]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the new configuration; raise ConfigError if the old one cannot be read."""
    parser = cli.make_parser(__doc__ or "", config=False)
    parser.add_argument("old", type=Path, metavar="OLD.toml", help="the configuration to map")
    print(format_config(*migrate(read_toml(parser.parse_args(argv).old))))


if __name__ == "__main__":
    cli.run_guarded(main)
