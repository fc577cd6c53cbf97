"""Disturb the stages and the tools on a dataset in every way that is known, and check what is left.

    python tests/faults/run.py --tries 100

Prints a table of faults, tries and outcomes; exit code 1 if anything is lost, twice there, or dies with a traceback.
--only WORD picks faults by name. docs/reliability.md has the sums.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# Each run copies the model's code there; the user's own cache is none of our business.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="faults-modules-")
os.environ["HF_HUB_OFFLINE"] = "1"

# Imported once, here, so that a forked run begins at once. Nothing may compute in this process.
import torch  # noqa: F401
import transformers  # noqa: F401
from faults import dataset_disturbances, stage_disturbances, tuning_disturbances  # noqa: F401 (their faults)
from faults.bench import Bench, Failure, Tally
from faults.disturbances import FAULTS, RECOVERED
from transformers import AutoImageProcessor, AutoModel, Dinov2Model  # noqa: F401


def run_fault(name: str, bench: Bench, tries: int) -> Tally:
    """Try one fault and count what came of it."""
    tally = Tally(name)
    try:
        for outcome in FAULTS[name](bench, tries):
            if outcome == RECOVERED:
                tally.recovered += 1
            else:
                tally.refused += 1
    except Failure as failure:
        tally.failures.append(str(failure))
    if not tally.tries:
        tally.skipped = "mounting is not permitted here"
    return tally


def make_table(tallies: list[Tally]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| fault | tries | as undisturbed after a rerun | refused clearly, then as undisturbed | failed |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for tally in tallies:
        counts = f"{tally.tries} | {tally.recovered} | {tally.refused} | {len(tally.failures)}"
        lines.append(f"| {tally.name} | {tally.skipped + ' | - | - | -' if tally.skipped else counts} |")
    sums = [
        sum(one) for one in zip(*((t.tries, t.recovered, t.refused, len(t.failures)) for t in tallies), strict=True)
    ]
    return "\n".join([*lines, f"| **all** | {' | '.join(f'**{value}**' for value in sums)} |"]) + "\n"


def main() -> int:
    """Run the campaign from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tries", type=int, default=100, help="kills; the other faults take a share of them (100)")
    parser.add_argument("--seed", type=int, default=0, help="which moments and files (0)")
    parser.add_argument("--only", action="append", metavar="WORD", help="faults whose name holds this; may be repeated")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-bench-"))
    tallies = []
    started = time.monotonic()
    try:
        bench = Bench(folder, options.seed)
        for name in [name for name in FAULTS if any(word in name for word in options.only or [""])]:
            tally = run_fault(name, bench, options.tries)
            print(
                f"{time.monotonic() - started:6.0f} s  {name}: {tally.tries} tries, {len(tally.failures)} failed",
                file=sys.stderr,
            )
            for failure in tally.failures:
                print(failure, file=sys.stderr)
            tallies.append(tally)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)
    print(make_table(tallies))
    return int(any(tally.failures for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
