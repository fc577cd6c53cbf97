"""Lists of shard numbers as SLURM writes them."""

import re
from collections.abc import Iterable


def format_shards(shards: Iterable[int]) -> str:
    """Write shard numbers as sbatch's --array does: `0-3,7`."""
    ranges: list[list[int]] = []
    for shard in sorted(set(shards)):
        if ranges and shard == ranges[-1][1] + 1:
            ranges[-1][1] = shard
        else:
            ranges.append([shard, shard])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in ranges)


def parse_shards(text: str) -> list[int]:
    """Read what `format_shards` writes, and what squeue shows of an array: `[0-3,7%4]`.

    Raises ValueError where it is something else.
    """
    shards: list[int] = []
    for part in re.sub(r"%\d+$", "", text.strip("[]")).split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise ValueError(f"{text!r} must read like 0-3,7")
        shards += range(int(match[1]), int(match[2] or match[1]) + 1)
    return sorted(set(shards))
