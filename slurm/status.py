"""Show how far the pipeline is on the cluster: every stage, what failed and why, and the commands that retry it.

    python slurm/status.py [--config C] [--json]

Reads the outputs, the jobs' logs and, where it answers, squeue. Changes nothing.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from pipeline import cli
from slurm.control.survey import survey

HEAD = ("stage", "name", "done", "running", "failed", "not started", "of")


def format_status(stages: list[dict[str, Any]]) -> str:
    """Return the table, the failures and the commands."""
    line = "{:>5}  {:<32}  {:>5}  {:>7}  {:>6}  {:>11}  {:>5}".format
    counts = ("stage", "name", "done", "running", "failed", "not_started")
    lines = [line(*HEAD), *(line(*map(stage.get, counts), stage["total"] or "?") for stage in stages)]
    for stage in stages:
        for failure in stage["failures"]:
            job = f", job {failure['job']}" if failure["job"] else ""
            lines.append(f"\nstage {stage['stage']} {stage['name']}, shard {failure['shard']}{job}: failed")
            lines.append(f"  {failure['error']}")
            lines += [f"  {failure['log']}"] if failure["log"] else []
        lines += [f"  retry: {stage['retry']}"] if stage["retry"] else []
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Show the state from a command line."""
    parser = cli.make_parser(__doc__ or "")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    config = cli.config_from(arguments)
    stages = survey(config, arguments.overrides)
    if arguments.json:
        print(json.dumps({"config": str(config.file_path), "stages": stages}, indent=2))
    else:
        print(format_status(stages))


if __name__ == "__main__":
    cli.run_guarded(main)
