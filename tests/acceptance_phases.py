"""Phases of an acceptance that end in every way; they import no torch, so as to be over soon."""

import os
import signal
import subprocess
import sys

from benchmarks.acceptance.findings import Findings


def be_right(findings: Findings) -> None:
    findings.note(answer=42)
    findings.check("a cosine", 1.0, at_least=0.999)
    findings.aim("a rate", 100.0, at_least=90)


def be_wrong(findings: Findings) -> None:
    findings.check("a cosine", 0.9, at_least=0.999)
    findings.check("another", 1.0, at_least=0.999)


def raise_in_a_part(findings: Findings) -> None:
    with findings.part("the first part"):
        raise ValueError("a bug")
    with findings.part("the second part"):
        findings.check("a cosine", 1.0, at_least=0.999)


def raise_outside(findings: Findings) -> None:
    findings.check("a cosine", 1.0, at_least=0.999)
    raise ValueError("another bug")


def be_killed(findings: Findings) -> None:
    findings.note(reached=1)
    os.kill(os.getpid(), signal.SIGKILL)


def hang(findings: Findings) -> None:
    findings.note(reached=1)
    with findings.part("a part"):
        sleep = "import time; time.sleep(600)"
        subprocess.run([sys.executable, "-c", sleep, str(findings.work_dir)], check=True)


def work_on(findings: Findings) -> None:
    findings.note(reached=1)
    with findings.part("a part"):
        while True:
            pass
