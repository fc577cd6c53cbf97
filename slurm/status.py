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
from slurm.control.scheduler import format_shards
from slurm.control.survey import DONE, FAILED, NOT_STARTED, RUNNING, WAITING, ShardState, StageState, survey
from slurm.control.target import spell_overrides

HEAD = ("stage", "name", "done", "running", "failed", "not started", "of", "rate", "ETA")


def describe(state: StageState, config: Config, overrides: Sequence[str]) -> dict[str, Any]:
    """Return a stage's state as plain values."""
    failed = [shard for shard in state.shards if shard.state == FAILED]
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
        "items_per_second": state.items_per_second,
        "items": state.items,
        "eta_seconds": state.eta_seconds,
        "failures": [_describe_failure(shard) for shard in failed],
        "retry": retry_command(state, config, overrides) if failed else None,
        "retry_rest": shlex.join(_command("submit_pipeline.sh", state, config, overrides)) if failed else None,
    }


def _describe_failure(shard: ShardState) -> dict[str, Any]:
    log = shard.log
    return {
        "shard": shard.shard,
        "job": shard.job,
        "exit_code": log.exit_code if log else None,
        "error": shard.problem or (log.last_error if log else "no log: sacct says it failed before it began"),
        "log": str(log.path) if log else None,
    }


def retry_command(state: StageState, config: Config, overrides: Sequence[str]) -> str:
    """Return the command that submits a stage's failed shards again."""
    command = _command("submit_stage.sh", state, config, overrides)
    command.insert(1, str(state.stage.number))
    if state.stage.is_array:
        failed = (shard.shard for shard in state.shards if shard.state == FAILED)
        command += ["--array-size", str(state.shard_count), "--shards", format_shards(failed)]
    return shlex.join(command)


def _command(script: str, state: StageState, config: Config, overrides: Sequence[str]) -> list[str]:
    account = ["--account", state.account] if state.account else []
    paths = ["--config", str(config.file_path)] if config.file_path != DEFAULT_CONFIG_PATH else []
    return [str(PROJECT_ROOT / "slurm" / script), *account, *paths, *spell_overrides(overrides)]


def format_status(stages: list[dict[str, Any]]) -> str:
    """Return the table, the failures and the commands."""
    rows = [HEAD, *map(_format_row, stages)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if column == 1 else cell.rjust(width)
                 for column, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    failing = [stage for stage in stages if stage["failures"]]
    for stage in failing:
        for failure in stage["failures"]:
            job = f", job {failure['job']}" if failure["job"] else ""
            lines.append(f"\nstage {stage['stage']} {stage['name']}, shard {failure['shard']}{job}: failed")
            lines.append(f"  {failure['error']}")
            lines += [f"  {failure['log']}"] if failure["log"] else []
        lines.append(f"  retry: {stage['retry']}")
    if failing:
        lines.append(f"\nwhat waited for them: {failing[0]['retry_rest']}")
    return "\n".join(lines)


def _format_row(stage: dict[str, Any]) -> tuple[str, ...]:
    rate = "" if stage["items_per_second"] is None else f"{stage['items_per_second']:.0f} {stage['items']}/s"
    counts = [str(stage[key]) for key in ("done", "running", "failed", "not_started")]
    total = "?" if stage["total"] is None else str(stage["total"])
    eta = "" if stage["eta_seconds"] is None else format_seconds(stage["eta_seconds"])
    return (str(stage["stage"]), stage["name"], *counts, total, rate, eta)


def format_seconds(seconds: float) -> str:
    """Write a duration as 1:02:03 h, or in seconds where it is short."""
    whole = round(seconds)
    return f"{whole} s" if whole < 120 else f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d} h"


def show(arguments: argparse.Namespace) -> bool:
    """Print the state once; return whether everything is done."""
    config = cli.config_from(arguments)
    states = survey(config)
    stages = [describe(state, config, arguments.overrides) for state in states]
    if arguments.json:
        print(json.dumps({"config": str(config.file_path), "stages": stages}, indent=2), flush=True)
    else:
        if arguments.watch and sys.stdout.isatty():
            print("\x1b[2J\x1b[H", end="")
        print(format_status(stages), flush=True)
    return all(stage["total"] and stage["done"] == stage["total"] for stage in stages)


def main(argv: Sequence[str] | None = None) -> None:
    """Show the state from a command line."""
    parser = cli.make_parser(__doc__ or "")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--watch", type=float, nargs="?", const=30.0, metavar="SECONDS",
                        help="again every SECONDS (30), until all is done")  # fmt: skip
    arguments = parser.parse_args(argv)
    while not show(arguments) and arguments.watch:
        time.sleep(arguments.watch)


if __name__ == "__main__":
    cli.run_guarded(main)
