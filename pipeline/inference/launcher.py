"""Run a stage as several processes on one machine, one shard each; they divide the GPUs and the cores among them."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import count_cores
from pipeline.errors import ConfigError, Terminated


def add_processes_option(parser: argparse.ArgumentParser) -> None:
    """Add `--processes N|auto`."""
    parser.add_argument(
        "--processes", type=parse_count, default=1, metavar="N",
        help="run N processes at once, one shard each, one GPU each where there are any;\nauto: one per GPU (1)",
    )  # fmt: skip


def parse_count(text: str) -> int | str:
    """Read a number above 0, or `auto`; raise ArgumentTypeError for anything else."""
    return text if text == "auto" else whole_number(text, ", or auto")


def whole_number(text: str, others: str = "") -> int:
    """Read a number above 0; raise ArgumentTypeError, which names the `others` that are valid, for anything else."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0{others}")
    return int(text)


def launch(script: str, argv: Sequence[str] | None, processes: int | str, *, is_sharded: bool) -> bool:
    """Run the script once for each shard and return True; do nothing and return False for a single process.

    SIGINT and SIGTERM are passed on, and raised here when all processes have ended. Exits with the worst exit code if
    one failed. Raises ConfigError where the command line names a shard already.
    """
    if processes == 1:
        return False
    if is_sharded:
        raise ConfigError("--processes with --shard: it gives each process its shard itself: leave out one of them")
    gpus = list_gpus()
    count = max(1, len(gpus)) if isinstance(processes, str) else processes
    if count == 1:
        return False
    arguments = list(sys.argv[1:] if argv is None else argv)
    codes = _run_all(Path(script).resolve(), arguments, count, gpus)
    failed = [code for code in codes if code]
    if failed:
        print(f"error: {len(failed)} of {count} processes failed: see their own lines above", file=sys.stderr)
        sys.exit(max(failed))
    return True


def list_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()  # opens none of them
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


def _run_all(script: Path, arguments: list[str], count: int, gpus: list[str]) -> list[int]:
    """Start all and return their exit codes, 128 + N for a signal N; pass a signal on that comes meanwhile."""
    processes: list[subprocess.Popen[bytes]] = []
    interruption: BaseException | None = None
    while True:
        try:
            while len(processes) < count and interruption is None:
                processes.append(_start(script, arguments, len(processes), count, gpus))
            codes = [process.wait() for process in processes]
            break
        except (KeyboardInterrupt, Terminated) as caught:
            interruption = caught
            for process in processes:
                process.send_signal(signal.SIGTERM if isinstance(caught, Terminated) else signal.SIGINT)
    if interruption is not None:
        raise interruption
    return [128 - code if code < 0 else code for code in codes]


def _start(script: Path, arguments: list[str], index: int, count: int, gpus: list[str]) -> "subprocess.Popen[bytes]":
    """Start one shard in a session of its own, so that Ctrl-C reaches it once, on its share of the cores."""
    environment = dict(os.environ)
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
    # After the given arguments, so that these win.
    command = [sys.executable, str(script), *arguments, "--processes", "1", "--shard", f"{index}/{count}"]
    own: list[int] = []
    if hasattr(os, "sched_setaffinity") and count_cores() >= count:
        cores = sorted(os.sched_getaffinity(0))
        own = cores[len(cores) * index // count : len(cores) * (index + 1) // count]
    environment.setdefault("OMP_NUM_THREADS", str(len(own) or max(1, count_cores() // count)))
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    if own:
        os.sched_setaffinity(process.pid, own)
    return process
