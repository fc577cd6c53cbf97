"""Time calls in turns, measure memory, describe the machine, and write results as a table and JSON."""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch

from pipeline.config import count_cores

Result = TypeVar("Result")

ROUNDS = 2
_PACKAGES = ("torch", "triton", "torchvision", "transformers", "numpy", "pyarrow", "pillow", "faiss-cpu")


def time_call(call: Callable[[], object]) -> float:
    """Return the seconds of a call, until a GPU has finished too."""
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


def run_steady(call: Callable[[], Result], rounds: int = ROUNDS) -> tuple[float, Result]:
    """Call once to warm up, then return the least seconds of the rounds, and the last result."""
    found, seconds = [call()], []
    for _ in range(rounds):
        found.clear()
        seconds.append(time_call(lambda: found.append(call())))
    return min(seconds), found[0]


def time_steady(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Call once to warm up, then return the least seconds of the rounds."""
    return run_steady(call, rounds)[0]


def take_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the least seconds of each call; the calls take turns, so other work on the machine meets all of them."""
    seconds: dict[str, float] = {}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name] = min(seconds.get(name, float("inf")), time_call(call))
    return seconds


def wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def measure_product(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Return the operations/s of a large square matrix product."""
    a = torch.rand((side, side), device=device).to(dtype)
    return 2 * side**3 / time_steady(lambda: a @ a, rounds=8)


def run_child(script: str, *arguments: object) -> float:
    """Run a script in a process of its own, untuned by ours; return the seconds that it prints."""
    command = [sys.executable, script, *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"error: {' '.join(map(str, arguments))}: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout)


def read_peak() -> int:
    """Return this process's peak resident memory in bytes (proc(5))."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024


def describe_machine() -> dict[str, Any]:
    """Return what the figures were measured on, and when."""
    found = {one.name: one.version for one in distributions()}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processor": platform.machine(),
        "cores": count_cores(),
        "load": os.getloadavg()[0],
        "versions": {name: found.get(name, "not installed") for name in _PACKAGES},
    }


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON here too")
    return parser


def write_results(rows: list[dict[str, Any]], output: Path | None, **more: Any) -> None:
    """Print the rows as a table to stderr and everything as JSON to stdout, and to a file if there is one."""
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:,.4g}".format), file=sys.stderr)
    text = json.dumps({"rows": rows, **more, "machine": describe_machine()}, indent=2)
    print(text)
    if output:
        output.write_text(text + "\n", encoding="utf-8")
