"""Collect a phase's findings: figures, checks of correctness, targets of speed."""

import math
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.log import logger
from pipeline.workspace import write_json

if TYPE_CHECKING:
    import torch

PASSED, FAILED, NOT_MEASURED = "passed", "failed", "not measured"

Entry = dict[str, Any]


class Findings:
    """A phase's findings, written to a file after each one, so that a phase that dies keeps them."""

    def __init__(self, path: Path, work_dir: Path, device: str) -> None:
        """`work_dir` is for the phase's files; a CPU stands for the GPU at toy size, where no speed counts."""
        self._path, self.work_dir = path, work_dir
        self._device, self.is_toy = device, device == "cpu"
        self.figures: dict[str, Any] = {}
        self.checks: list[Entry] = []
        self.targets: list[Entry] = []
        self.errors: list[Entry] = []
        self.under_way: list[str] = []  # parts, for a phase that does not come to its end
        self._save()

    @property
    def device(self) -> "torch.device":
        """Where the phase computes."""
        import torch

        return torch.device(self._device)

    def note(self, **figures: Any) -> None:
        """Note figures; seconds and rates of a CPU only show that the code ran."""
        self.figures |= {name: _round(value) for name, value in figures.items()}
        self._save()

    def check(self, what: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> None:
        """Check that a value is within its bounds, on any machine."""
        self.checks.append(_judge(what, value, at_least, at_most))
        self._save()

    def aim(self, what: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> None:
        """Compare a figure with its target, on a GPU; on a CPU it counts as not measured."""
        entry = _judge(what, value, at_least, at_most)
        self.targets.append(entry | ({"value": None, "result": NOT_MEASURED} if self.is_toy else {}))
        self._save()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of the phase; note its exception and let the next part run."""
        started = time.monotonic()
        self.under_way.append(name)
        self._save()
        try:
            yield
        except Exception as error:  # noqa: BLE001 (a bug on a GPU is what the acceptance is there to find)
            logger.exception("%s failed", name)
            last = traceback.format_exception_only(error)[-1].strip()
            self.errors.append({"part": name, "error": last[:2000]})
        self.under_way.remove(name)
        self.note(**{f"{name}: seconds": time.monotonic() - started})

    def _save(self) -> None:
        names = ("figures", "checks", "targets", "errors", "under_way")
        write_json(self._path, {key: getattr(self, key) for key in names})


def is_sound(content: dict[str, Any]) -> bool:
    """Return whether a phase's written findings hold no error and no failure."""
    return not content.get("errors", True) and all(
        entry["result"] != FAILED for entry in content["checks"] + content["targets"]
    )


def _judge(what: str, value: float, at_least: float | None, at_most: float | None) -> Entry:
    # NaN fails every comparison, and so the check.
    passed = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    needed = " and ".join(
        f"{sign} {bound:g}" for sign, bound in ((">=", at_least), ("<=", at_most)) if bound is not None
    )
    return {"what": what, "value": _round(value), "needed": needed, "result": PASSED if passed else FAILED}


def _round(value: Any) -> Any:
    """Round to eight digits; turn NaN and infinity, which JSON lacks, into words."""
    if isinstance(value, dict):
        return {key: _round(item) for key, item in value.items()}
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, float):
        return value
    return float(f"{value:.8g}") if math.isfinite(value) else str(value)
