"""Run a script's `main` in a process that has imported nothing yet; print its seconds and peak memory as JSON.

python benchmarks/memory.py MODULE [ARGUMENT ...]
"""

import importlib
import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder


def read_peak() -> int:
    """Return this process's peak resident memory in bytes.

    From /proc where it exists: getrusage of a child begins with its parent's memory.
    """
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(module: str, *arguments: str) -> None:
    """Run the module's `main` and print what it took."""
    started = time.perf_counter()
    importlib.import_module(module).main(list(arguments))
    print(json.dumps({"seconds": time.perf_counter() - started, "peak_mib": read_peak() / 2**20}))


if __name__ == "__main__":
    main(*sys.argv[1:])
