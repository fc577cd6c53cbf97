"""Put what a command line sets, `SECTION.KEY=VALUE` or a TOML file, over the tables of the configuration."""

import re
import tomllib
from pathlib import Path
from typing import Any


def apply_override(tables: dict[str, Any], override: str) -> str | None:
    """Put one `SECTION.KEY=VALUE`, or a TOML file of settings, into the tables; return what is wrong, if anything."""
    if override.endswith(".toml") and "=" not in override:
        return _merge_fragment(tables, Path(override))
    match = re.fullmatch(r"([A-Za-z_]\w*)\.([A-Za-z_]\w*)=(.*)", override, re.DOTALL)
    if not match:
        return f"--set {override}: must read SECTION.KEY=VALUE"
    section, key, text = match.groups()
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word: strings need no quotes on a command line
    table = tables.setdefault(section, {})
    if isinstance(table, dict):
        table[key] = value
    return None


def _merge_fragment(tables: dict[str, Any], path: Path) -> str | None:
    """Put the settings of a TOML file, as the tuning writes one, over those of the tables; return what is wrong."""
    try:
        fragment = read_toml(path)
    except OSError as error:
        return f"--set {path}: cannot read it ({error.strerror})"
    except ValueError as error:
        return f"--set {path}: not valid TOML: {error}"
    for section, keys in fragment.items():
        known = tables.get(section)
        tables[section] = known | keys if isinstance(known, dict) and isinstance(keys, dict) else keys
    return None


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file's tables; a byte-order mark is passed over.

    Raises OSError where it cannot be read, ValueError where it is no TOML in UTF-8.
    """
    return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
