"""Check in two calls of at most 8 minutes each whether the project's GPU code is right and fast enough.

    python benchmarks/gpu_acceptance.py --group decisive [--output acceptance.json] [--folder DIR]
    python benchmarks/gpu_acceptance.py --group throughput [--output acceptance.json] [--folder DIR]
    python benchmarks/gpu_acceptance.py --phases 0 1 6 | --cpu

Runs the phases below in order, cheap and telling ones first. Each has a process of its own and a deadline; a phase that
fails, dies or hangs stops no other. The JSON (checks, speed targets, figures) is rewritten after each; what the phases
log goes to a file beside it, `.log` in place of `.json`. Speeds are the better of two rounds after a warm-up. Weights
are random; nothing is fetched; prepare_bare.sh gathers what a bare machine lacks. Needs 20 GB in the folder and 45 GB
of memory. `--cpu` runs every phase at toy size on the CPU and judges no speed. Exits with 0 if all passed, else 1.
"""

import argparse
import faulthandler
import importlib
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by path: import from the project, not this folder

from benchmarks.acceptance.findings import FAILED, PASSED, Entry, Findings, is_sound
from pipeline import cli
from pipeline.log import logger, logging_to
from pipeline.workspace import read_json_object, write_json

# For all phases of a group; a phase that has not begun by then is skipped.
LIMIT_SECONDS = 480.0
# Last lines to print of the log of a phase that did not pass.
LOG_LINES = 40
POLL_SECONDS = 0.05
# A phase hangs if its processes took less than the second number of seconds of a core in the last HUNG_AFTER ones.
HUNG_AFTER, HUNG_BELOW = 5.0, 0.2
# For the stacks of a phase that is to be killed.
STACKS_SECONDS = 1.0
FINDINGS = "findings.json"
NOT_OVER = "not over"


@dataclass(frozen=True)
class Phase:
    """A part of the acceptance: its function as `module:function`, and by count its seconds on one H200."""

    name: str
    group: str
    title: str
    function: str
    seconds: float

    @property
    def deadline(self) -> float:
        """When it is killed, in seconds from its start."""
        return 2 * self.seconds

    def describe(self, result: str) -> Entry:
        """Return the entry of the phase with its result."""
        return {"phase": self.name, "title": self.title, "result": result}


DECISIVE, THROUGHPUT = "decisive", "throughput"
PHASES = (
    Phase("0", DECISIVE, "environment, products", "benchmarks.acceptance.device:measure_device", 20),
    Phase("1", DECISIVE, "the GPU's results beside the CPU's", "benchmarks.acceptance.device:compare_with_cpu", 50),
    Phase("2", DECISIVE, "stage 5: 1M images, every engine", "benchmarks.acceptance.search:compare_engines", 45),
    Phase("3", DECISIVE, "stage 6: 1M x 4,096, draws, steps, resume", "benchmarks.acceptance.steps:train_steps", 60),
    Phase("3-start", DECISIVE, "stage 6: the start on 1M x 4,096", "benchmarks.acceptance.steps:measure_start", 50),
    Phase("4", DECISIVE, "ViT-S: every path of the engine", "benchmarks.acceptance.embedding:check_engine", 50),
    Phase("2-full", DECISIVE, "stage 5: 5.77M fingerprints to file", "benchmarks.acceptance.search:search_all", 135),
    Phase("9", DECISIVE, "stage 9: scores of 200,000 x 4,096", "benchmarks.acceptance.device:rank_many", 35),
    Phase("5", THROUGHPUT, "ViT-L from tar to parquet", "benchmarks.acceptance.embedding:measure_large", 75),
    Phase("6", THROUGHPUT, "ViT-7B from shards to parquet", "benchmarks.acceptance.embedding:measure_largest", 140),
    Phase("7", THROUGHPUT, "ViT-B, decoding, a plain loop", "benchmarks.acceptance.embedding:measure_small", 135),
    Phase("2-on-1", THROUGHPUT, "two processes on one GPU", "benchmarks.acceptance.embedding:share_one_gpu", 60),
)  # fmt: skip


def run_phase(phase: Phase, folder: Path, deadline: float, last: float, *, on_cpu: bool) -> tuple[Entry, str]:
    """Run a phase in a session of its own until it ends or its time does; return what it found, and its log."""
    folder.mkdir()
    command = [sys.executable, __file__, "--child", phase.function, "--folder", str(folder)]
    started = time.monotonic()
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(
            command + (["--cpu"] if on_cpu else []), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.PIPE,
            start_new_session=True, env=os.environ | ({"OMP_NUM_THREADS": "1"} if on_cpu else {}),
        )  # fmt: skip
    samples = [(started, 0.0)]
    try:
        # Not reaped here, so that its id still names its session when that is killed.
        while not (has_ended := bool(os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))):
            now = time.monotonic()
            if now > min(started + deadline, last):
                os.kill(process.pid, signal.SIGUSR1)  # every thread's stack goes to the log
                time.sleep(STACKS_SECONDS)
                break
            if now > samples[-1][0] + HUNG_AFTER / 5:
                samples = [*samples, (now, read_core_seconds(process.pid))][-6:]
            time.sleep(POLL_SECONDS)
    finally:
        seconds = time.monotonic() - started
        os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        process.stdin.close()  # type: ignore[union-attr]
    found = read_json_object(folder / FINDINGS)
    if not has_ended:
        is_idle = len(samples) == 6 and samples[-1][1] - samples[0][1] < HUNG_BELOW
        why = "hung" if is_idle else "deadline" if seconds >= deadline else "no time was left"
        at = "".join(f", in {part}" for part in found.get("under_way", [])[-1:])
        result = f"{why}: stopped after {seconds:.0f} s{at}"
    elif code < 0:
        result = f"killed by {signal.Signals(-code).name}"
    else:
        result = PASSED if code == 0 and is_sound(found) else FAILED
    text = (folder / "log.txt").read_text("utf-8", "replace")
    shutil.rmtree(folder, ignore_errors=True)
    lines = [] if result == PASSED else text.splitlines()[-LOG_LINES:]
    return phase.describe(result) | {"seconds": round(seconds, 1), **found, "log": lines}, text


def read_core_seconds(session: int) -> float:
    """Return the seconds of a core that the session's processes have taken (proc(5))."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            fields = path.read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:13])) if int(fields[3]) == session else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def run_phases(phases: Sequence[Phase], output: Path, folder: Path, *, on_cpu: bool) -> list[Entry]:
    """Run the phases one after the other, rewrite the output after each, and return the entries."""
    entries: list[Entry] = []
    last = time.monotonic() + LIMIT_SECONDS * len({phase.group for phase in phases})
    log = output.with_suffix(".log")
    for phase in phases:
        if time.monotonic() > last:
            entries.append(phase.describe("skipped: no time was left"))
        else:
            # A CPU is shared with other programs: durations say nothing there.
            deadline = math.inf if on_cpu else phase.deadline
            entry, text = run_phase(phase, folder / phase.name, deadline, last, on_cpu=on_cpu)
            entries.append(entry)
            with open(log, "w" if len(entries) == 1 else "a", encoding="utf-8") as file:
                file.write(f"==== phase {phase.name}: {entry['result']}\n{text}")
        print("\n".join(list_lines(entries[-1])), file=sys.stderr, flush=True)
        result = NOT_OVER if len(entries) < len(phases) else PASSED if all_passed(entries) else FAILED
        write_json(output, {"result": result, "toy": on_cpu, "phases": entries})
    return entries


def all_passed(entries: Sequence[Entry]) -> bool:
    return all(entry["result"] == PASSED for entry in entries)


def list_lines(entry: Entry) -> list[str]:
    """Return the lines to print for a phase: its result, each target, each failure."""
    lines = [f"{entry['phase']} {entry['title']}: {entry['result']}, {entry.get('seconds', 0):.0f} s"]
    for target in entry.get("targets", []):
        value = "" if target["value"] is None else f" {target['value']:,.6g}"
        lines.append(f"    target: {target['what']}{value}, {target['needed']}: {target['result']}")
    wrong = [check for check in entry.get("checks", []) if check["result"] == FAILED]
    lines += [f"    WRONG: {check['what']}: {check['value']}, has to be {check['needed']}" for check in wrong]
    lines += [f"    ERROR: {error['part']}: {error['error']}" for error in entry.get("errors", [])]
    return lines + [f"    | {line}" for line in entry.get("log", [])]


def run_child(function: str, folder: Path, *, on_cpu: bool) -> None:
    """Run one phase in this process; when stdin closes, the parent is gone: end with all children."""

    def end_with_parent() -> None:
        os.read(0, 1)  # not by sys.stdin, whose lock Python cannot take at its end
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    if not on_cpu:
        import torch

        if not torch.cuda.is_available():
            sys.exit("error: torch finds no usable GPU: see nvidia-smi, or give --cpu")
    module, name = function.split(":")
    with logging_to(None):
        for handler in logger.handlers:
            handler.filters.clear()  # stderr is the phase's log file: also what is for a file only
        findings = Findings(folder / FINDINGS, folder, "cpu" if on_cpu else "cuda")
        getattr(importlib.import_module(module), name)(findings)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = [phase.name for phase in PHASES]
    groups = [DECISIVE, THROUGHPUT]
    parser.add_argument("--group", choices=groups, help="the phases of one of the two calls")
    parser.add_argument("--output", type=Path, default=Path("acceptance.json"), help="JSON (acceptance.json)")
    parser.add_argument("--phases", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--folder", type=Path, help="where the phases write (default: the temporary folder)")
    parser.add_argument("--cpu", action="store_true", help="toy sizes, on the CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # what a process of its own is asked
    arguments = parser.parse_args(argv)
    if arguments.child:
        run_child(arguments.child, arguments.folder, on_cpu=arguments.cpu)
        return
    if not (arguments.group or arguments.phases or arguments.cpu):
        parser.error("give --group decisive, then --group throughput: together they take longer than one call may")
    asked = [arguments.group] if arguments.group else groups
    chosen = [phase for phase in PHASES if phase.name in (arguments.phases or names) and phase.group in asked]
    with tempfile.TemporaryDirectory(dir=arguments.folder, ignore_cleanup_errors=True) as folder:
        entries = run_phases(chosen, arguments.output, Path(folder), on_cpu=arguments.cpu)
    sys.exit(0 if all_passed(entries) else 1)


if __name__ == "__main__":
    cli.run_guarded(main)
