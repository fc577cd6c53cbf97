"""Show how far the pipeline is on the cluster: every stage, what failed and why, and the commands that retry it.

    python slurm/status.py [--config C] [--json] [--watch [SECONDS]]

Reads the outputs, log_dir/submissions, the jobs' logs and, where they answer, squeue and sacct. Changes nothing.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.config import DEFAULT_CONFIG_PATH, PROJECT_ROOT, Config
from slurm.control.shards import format_shards
from slurm.control.survey import DONE, NOT_STARTED, RUNNING, WAITING, ShardState, StageState, survey


def retry_command(state: StageState, config: Config, overrides: list[str]) -> str:
    """Return the command that submits a stage's failed shards again."""
    command = [str(PROJECT_ROOT / "slurm" / "submit_stage.sh"), str(state.stage.number)]
    command += _common_options(state, config, overrides)
    if state.stage.is_array:
        command += ["--array-size", str(state.shard_count)]
        command += ["--shards", format_shards(shard.shard for shard in state.failed())]
    return shlex.join(command)


def _common_options(state: StageState, config: Config, overrides: list[str]) -> list[str]:
    account = ["--account", state.account] if state.account else []
    paths = ["--config", str(config.file_path)] if config.file_path != DEFAULT_CONFIG_PATH else []
    return [*account, *paths, *(part for override in overrides for part in ("--set", override))]


def describe(state: StageState, config: Config, overrides: list[str]) -> dict[str, Any]:
    """Return a stage's state as plain values."""
    failed = state.failed()
    return {
        "stage": state.stage.number,
        "name": state.stage.name,
        "done": state.count(DONE),
        "running": state.count(RUNNING),
        "failed": len(failed),
        "not_started": state.count(NOT_STARTED) + state.count(WAITING),
        "waiting_in_queue": state.count(WAITING),
        "total": state.shard_count,
        "unit": state.stage.unit,
        "units_done": state.units_done,
        "units_total": state.units_total,
        "units_per_hour": state.units_per_hour,
        "items_per_second": state.items_per_second,
        "eta_seconds": state.eta_seconds,
        "failures": [_describe_failure(shard) for shard in failed],
        "retry": retry_command(state, config, overrides) if failed else None,
    }


def _describe_failure(shard: ShardState) -> dict[str, Any]:
    return {
        "shard": shard.shard,
        "job": shard.job,
        "exit_code": shard.log.exit_code if shard.log else None,
        "error": shard.explain(),
        "log": str(shard.log.path) if shard.log else None,
    }


def format_status(states: list[StageState], config: Config, overrides: list[str]) -> str:
    """Return the table, the failures and the commands."""
    head = ("stage", "name", "done", "running", "failed", "not started", "of", "rate", "ETA")
    rows = [head, *(_format_row(state) for state in states)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if column == 1 else cell.rjust(width)
                 for column, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    failing = [state for state in states if state.failed()]
    for state in failing:
        for shard in state.failed():
            log = shard.log
            lines.append(
                f"\nstage {state.stage.number} {state.stage.name}, shard {shard.shard}, job {shard.job}: failed"
            )
            lines.append(f"  {shard.explain() or 'no log: sacct says it failed before it began'}")
            lines += [f"  {log.path}"] if log else []
        lines.append(f"  retry: {retry_command(state, config, overrides)}")
    if failing:
        options = shlex.join(_common_options(failing[0], config, overrides))
        lines.append(f"\nwhat waited for them: {PROJECT_ROOT / 'slurm' / 'submit_pipeline.sh'} {options}".rstrip())
    return "\n".join(lines)


def _format_row(state: StageState) -> tuple[str, ...]:
    rate = ""
    if state.units_per_hour is not None:
        rate = f"{state.units_per_hour:.0f} {state.stage.unit}s/h"
    if state.items_per_second is not None:
        rate = f"{rate} {state.items_per_second:.0f} {state.items}/s".strip()
    return (
        str(state.stage.number),
        state.stage.name,
        str(state.count(DONE)),
        str(state.count(RUNNING)),
        str(len(state.failed())),
        str(state.count(NOT_STARTED) + state.count(WAITING)),
        "?" if state.shard_count is None else str(state.shard_count),
        rate,
        "" if state.eta_seconds is None else format_seconds(state.eta_seconds),
    )


def format_seconds(seconds: float) -> str:
    """Write a duration as 1:02:03 h, or in seconds where it is short."""
    whole = round(seconds)
    return f"{whole} s" if whole < 120 else f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d} h"


def show(arguments: argparse.Namespace) -> bool:
    """Print the state once; return whether everything is done."""
    config = cli.config_from(arguments)
    states = survey(config)
    if arguments.json:
        stages = [describe(state, config, arguments.overrides) for state in states]
        print(json.dumps({"config": str(config.file_path), "stages": stages}, indent=2), flush=True)
    else:
        if arguments.watch and sys.stdout.isatty():
            print("\x1b[2J\x1b[H", end="")
        print(format_status(states, config, arguments.overrides), flush=True)
    return all(state.shards and state.count(DONE) == len(state.shards) for state in states)


def main(argv: Sequence[str] | None = None) -> None:
    """Show the state from a command line."""
    parser = cli.make_parser(__doc__ or "")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=30.0,
        metavar="SECONDS",
        help="again every SECONDS (30), until all is done",
    )
    arguments = parser.parse_args(argv)
    while not show(arguments) and arguments.watch:
        time.sleep(arguments.watch)


if __name__ == "__main__":
    cli.run_guarded(main)
