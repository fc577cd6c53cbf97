"""Check in one call of under 9 minutes whether the project's GPU code is right and fast enough.

    python benchmarks/gpu_acceptance.py [--output acceptance.json] [--phases 0 1 6] [--folder DIR] [--cpu]

Runs the phases below, cheap and decisive ones first. Each has a process of its own and a deadline; a phase that fails,
dies or hangs stops no other. The JSON (checks, speed targets, figures) is rewritten after each. Speeds are the better
of two rounds after a warm-up. Weights are random; nothing is fetched. Needs 20 GB in the folder and 40 GB of memory.
`--cpu` runs every phase at toy size on the CPU and judges no speed. Exits with 0 if everything passed, else 1.
"""

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by path: import from the project, not this folder

from benchmarks.acceptance.findings import FAILED, PASSED, Entry, Findings, is_sound
from pipeline import cli
from pipeline.files.workspace import read_json_object, write_json
from pipeline.log import logging_to

# For all phases together; a phase that has not begun by then is skipped.
LIMIT_SECONDS = 530.0
# Last lines to keep of the log of a phase that did not pass.
LOG_LINES = 40
POLL_SECONDS = 0.05
FINDINGS = "findings.json"
NOT_OVER = "not over"


@dataclass(frozen=True)
class Phase:
    """A part of the acceptance: its function as `module:function`, and its deadline on a GPU in seconds."""

    name: str
    title: str
    function: str
    deadline: float

    def describe(self, result: str) -> Entry:
        """Return the entry of the phase with its result."""
        return {"phase": self.name, "title": self.title, "result": result}


PHASES = (
    Phase("0", "environment, copies, products", "benchmarks.acceptance.device:measure_device", 60),
    Phase("1", "the GPU's results beside the CPU's", "benchmarks.acceptance.device:compare_with_cpu", 100),
    Phase("2", "stage 5: 1M images, every engine", "benchmarks.acceptance.search:compare_engines", 90),
    Phase("3", "stage 6: 1M x 4,096, draws, resume", "benchmarks.acceptance.steps:train_steps", 90),
    Phase("4", "ViT-S: every path of the engine", "benchmarks.acceptance.embedding:check_engine", 90),
    Phase("5", "ViT-L from tar to parquet", "benchmarks.acceptance.embedding:measure_large", 90),
    Phase("6", "ViT-7B from shards, from tar to parquet", "benchmarks.acceptance.embedding:measure_largest", 190),
    Phase("7", "Lite0 and ViT-B beside the plain loop", "benchmarks.acceptance.embedding:measure_small", 100),
    # The longest, so the last.
    Phase("2-full", "stage 5: 5.77M fingerprints to file", "benchmarks.acceptance.search:search_all", 280),
)  # fmt: skip


def run_phase(phase: Phase, folder: Path, last: float, *, on_cpu: bool) -> Entry:
    """Run a phase in a session of its own, until it ends, its deadline or the limit of all; return what it found."""
    folder.mkdir()
    command = [sys.executable, __file__, "--child", phase.function, "--folder", str(folder)]
    started = time.monotonic()
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(
            command + (["--cpu"] if on_cpu else []), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.PIPE,
            start_new_session=True, env=os.environ | ({"OMP_NUM_THREADS": "1"} if on_cpu else {}),
        )  # fmt: skip
    try:
        # Not reaped here, so that its id still names its session when that is killed.
        while not (has_ended := bool(os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))):
            if time.monotonic() > min(started + phase.deadline, last):
                break
            time.sleep(POLL_SECONDS)
    finally:
        seconds = time.monotonic() - started
        os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        process.stdin.close()  # type: ignore[union-attr]
    found = read_json_object(folder / FINDINGS)
    if not has_ended and seconds < phase.deadline:
        result = f"cut off after {seconds:.0f} s: no time was left"
    elif not has_ended:
        result = f"hung, and was killed after {seconds:.0f} s"
    elif code < 0:
        result = f"died of {signal.Signals(-code).name}"
    else:
        result = PASSED if code == 0 and is_sound(found) else FAILED
    lines = [] if result == PASSED else (folder / "log.txt").read_text("utf-8", "replace").splitlines()[-LOG_LINES:]
    shutil.rmtree(folder, ignore_errors=True)
    return phase.describe(result) | {"seconds": round(seconds, 1), **found, "log": lines}


def run_phases(phases: Sequence[Phase], output: Path, folder: Path, *, on_cpu: bool) -> list[Entry]:
    """Run the phases one after the other, rewrite the output after each, and return the entries."""
    entries: list[Entry] = []
    last = time.monotonic() + LIMIT_SECONDS
    for phase in phases:
        if time.monotonic() > last:
            entries.append(phase.describe("skipped: no time was left"))
        else:
            entries.append(run_phase(phase, folder / phase.name, last, on_cpu=on_cpu))
        print("\n".join(list_lines(entries[-1])), file=sys.stderr, flush=True)
        result = NOT_OVER if len(entries) < len(phases) else PASSED if all_passed(entries) else FAILED
        write_json(output, {"result": result, "toy": on_cpu, "phases": entries})
    return entries


def all_passed(entries: Sequence[Entry]) -> bool:
    """Return whether every phase passed."""
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
    if not on_cpu:
        import torch

        if not torch.cuda.is_available():
            sys.exit("error: torch finds no usable GPU: see nvidia-smi, or give --cpu")
    module, name = function.split(":")
    with logging_to(None):
        findings = Findings(folder / FINDINGS, folder, "cpu" if on_cpu else "cuda")
        getattr(importlib.import_module(module), name)(findings)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the phases from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = [phase.name for phase in PHASES]
    parser.add_argument("--output", type=Path, default=Path("acceptance.json"), help="JSON (acceptance.json)")
    parser.add_argument("--phases", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--folder", type=Path, help="where the phases write (default: the temporary folder)")
    parser.add_argument("--cpu", action="store_true", help="toy sizes, on the CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # what a process of its own is asked
    arguments = parser.parse_args(argv)
    if arguments.child:
        run_child(arguments.child, arguments.folder, on_cpu=arguments.cpu)
        return
    chosen = [phase for phase in PHASES if phase.name in arguments.phases]
    if arguments.cpu:  # shared with other programs: durations say nothing
        chosen = [replace(phase, deadline=LIMIT_SECONDS) for phase in chosen]
    with tempfile.TemporaryDirectory(dir=arguments.folder, ignore_cleanup_errors=True) as folder:
        entries = run_phases(chosen, arguments.output, Path(folder), on_cpu=arguments.cpu)
    sys.exit(0 if all_passed(entries) else 1)


if __name__ == "__main__":
    cli.run_guarded(main)
