"""Read the text of a configuration: TOML files, overrides of a command line, and names that are nearly right."""

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError

# How alike a name must be to be proposed (difflib's ratio): of 340 slips of one letter in valid keys 0.75 finds the
# right key for all, and for 3 of 45 unrelated names it proposes one; at 0.6 for 15, at 0.8 five slips are missed.
_NEAR = 0.75


def read_toml(path: Path) -> dict[str, Any]:
    """Return a configuration's tables, without a byte-order mark.

    Raises ConfigError if the file cannot be read or is no TOML in UTF-8.
    """
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration ({error.strerror}): correct the path") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def apply_override(tables: dict[str, Any], override: str) -> str | None:
    """Put `SECTION.KEY=VALUE`, or the settings of a TOML file, into the tables; return the problem, if any."""
    if override.endswith(".toml") and "=" not in override:
        try:
            settings = read_toml(Path(override))
        except ConfigError as error:
            return f"--set {error}"
    elif match := re.fullmatch(r"([A-Za-z_]\w*)\.([A-Za-z_]\w*)=(.*)", override, re.DOTALL):
        section, key, text = match.groups()
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text  # a bare word: strings need no quotes on a command line
        settings = {section: {key: value}}
    else:
        return f"--set {override}: must read SECTION.KEY=VALUE"
    for section, keys in settings.items():
        known = tables.get(section)
        tables[section] = known | keys if isinstance(known, dict) and isinstance(keys, dict) else keys
    return None


def suggest(valid: Mapping[str, Sequence[str]], section: str, key: str | None = None) -> str:
    """Return `; did you mean X?` for an unknown section or key, nothing if no valid name is near.

    `valid` has the keys of each section. First comes a key of this very name in another section, then a near one of
    the same section, then of any.
    """
    name = key or section
    found = [] if key else difflib.get_close_matches(section, valid, n=1, cutoff=_NEAR)
    found = found or [f"[{other}].{name}" for other, keys in valid.items() if name in keys]
    if key and not found:
        found = difflib.get_close_matches(key, valid.get(section, []), n=1, cutoff=_NEAR)
    if not found:
        near = difflib.get_close_matches(name, {one for keys in valid.values() for one in keys}, n=1, cutoff=_NEAR)
        found = [f"[{other}].{one}" for one in near for other, keys in valid.items() if one in keys]
    return f"; did you mean {' or '.join(found)}?" if found else ""
