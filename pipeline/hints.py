"""Propose a valid name for a wrong one of a configuration."""

import difflib
from collections.abc import Mapping, Sequence

# How alike a name must be to be proposed (difflib's ratio): of 340 slips of one letter in valid keys 0.75 finds the
# right key for all, and for 3 of 45 unrelated names it proposes one; at 0.6 for 15, at 0.8 five slips are missed.
_NEAR = 0.75
# Keys that were taken out of [training].
_GONE = {
    "triplets_per_epoch": "it is anchors_per_epoch now",
    "hard_mining": "it is gone: the triplet loss always takes the semi-hard negative of the batch",
    "share_within_building": "it is gone: every loss compares all images of a batch",
    "input_dropout": "it is gone: input_noise gained more",
    "anchor_penalty": "it is gone: what is published already keeps a part of the start",
}


def suggest(valid: Mapping[str, Sequence[str]], section: str, key: str | None = None) -> str:
    """Return `; did you mean X?` for an unknown section or key, nothing where no name of any section is near.

    `valid` holds the keys of each section. A key of that very name in another section goes first, then what is near in
    its own section, then in any. Of a key that was taken out, say what became of it.
    """
    if section == "training" and key in _GONE:
        return f"; {_GONE[key]}"
    found = _find_near(valid, section, key)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _find_near(valid: Mapping[str, Sequence[str]], section: str, key: str | None) -> list[str]:
    if key is None and (sections := difflib.get_close_matches(section, valid, n=1, cutoff=_NEAR)):
        return sections
    name = key or section
    namesakes = [f"[{other}].{name}" for other, keys in valid.items() if name in keys]
    if namesakes:
        return namesakes
    if key and (own := difflib.get_close_matches(key, valid.get(section, []), n=1, cutoff=_NEAR)):
        return own
    anywhere = difflib.get_close_matches(name, {one for keys in valid.values() for one in keys}, n=1, cutoff=_NEAR)
    return [f"[{other}].{one}" for one in anywhere for other, keys in valid.items() if one in keys]
