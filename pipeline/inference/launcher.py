"""Run a stage as several processes on one machine, one shard each: one per GPU, or the cores divided among them."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    """Read a number above 0, or `auto`.

    Raises ArgumentTypeError if it is neither.
    """
    if text == "auto":
        return text
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0, or auto")
    return int(text)


def launch(script: str, argv: Sequence[str] | None, processes: int | str, *, is_sharded: bool) -> bool:
    """Run the script's command line once a shard and return True, or False where one process is asked for: this one.

    SIGINT and SIGTERM are passed on, and raised here when all have ended. Otherwise exits with the worst exit code of
    the processes, if one failed. Raises ConfigError where the command line names a shard already.
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
    """Start all and return their exit codes, 128 + N for a signal N; a signal that comes meanwhile is passed on."""
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
    """Start one shard; in a session of its own, so that Ctrl-C reaches it once, by way of this process."""
    environment = dict(os.environ)
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
    # Behind the given arguments, whose place they take.
    command = [sys.executable, str(script), *arguments, "--processes", "1", "--shard", f"{index}/{count}"]
    with _part_of_the_cores(index, count) as num_cores:
        environment.setdefault("OMP_NUM_THREADS", str(num_cores))
        return subprocess.Popen(command, env=environment, start_new_session=True)


def choose_cores(cores: list[int], nodes: list[set[int]], index: int, count: int) -> list[int]:
    """Return the cores of process `index` of `count`: every so many-th, of one NUMA node where that comes out even.

    Memory of another node is slower, and GPUs are numbered in the order of the nodes that they hang on.
    """
    on_node = [found for node in nodes if (found := [core for core in cores if core in node])]
    if on_node and count % len(on_node) == 0 and len({len(found) for found in on_node}) == 1:
        per_node = count // len(on_node)
        cores, index, count = on_node[index // per_node], index % per_node, per_node
    return cores[index::count]


def list_numa_nodes() -> list[set[int]]:
    """Return the cores of each NUMA node, none where Linux does not say."""
    nodes = []
    for path in sorted(
        Path("/sys/devices/system/node").glob("node[0-9]*/cpulist"), key=lambda path: int(path.parent.name[4:])
    ):
        spans = [span.split("-") for span in path.read_text().strip().split(",") if span]
        nodes.append({core for span in spans for core in range(int(span[0]), int(span[-1]) + 1)})
    return nodes


@contextmanager
def _part_of_the_cores(index: int, count: int) -> Iterator[int]:
    """Bind whatever is started in the block to its share of the cores, and say how many those are.

    Bound, two processes never take turns on a core while another one is idle, and each counts its own cores.
    """
    if not hasattr(os, "sched_setaffinity") or count_cores() < count:
        yield max(1, count_cores() // count)
        return
    cores = sorted(os.sched_getaffinity(0))
    own = choose_cores(cores, list_numa_nodes(), index, count)
    os.sched_setaffinity(0, own)
    try:
        yield len(own)
    finally:
        os.sched_setaffinity(0, cores)
