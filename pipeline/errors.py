"""The ways in which a run or an item can fail, apart from bugs."""

import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar

Result = TypeVar("Result")

# A name and a password before a host, with a scheme or without; passwords with a scheme may hold an @.
_CREDENTIALS = re.compile(r"(?<=://)[^\s'\"]+(?=@)|(?<![^\s'\"=(,/])[^\s'\"/:@=(,]+:[^\s'\"/@]+(?=@)")
# What moves a terminal's cursor, colours or turns its text, or begins a new line.
_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class PipelineError(Exception):
    """A run that cannot go on: what is wrong, where, what to do; `result` is the StageResult of what was done."""

    exit_code = 1

    def __init__(self, problem: str, result: Any = None) -> None:
        super().__init__(problem)
        self.result = result


class ConfigError(PipelineError):
    """A wrong command line or configuration; each problem is a line of its own."""

    exit_code = 2

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else problems
        super().__init__("; ".join(self.problems))


class InputError(PipelineError):
    """An input that is missing, empty, damaged, or not of the shape that the stage reads."""


class DamagedError(InputError):
    """A file with damaged content, which may be replaced."""


class StaleOutputError(PipelineError):
    """An output that exists but was made from other inputs or settings."""


class HeldError(PipelineError):
    """An output that another process is making."""


class DeviceMemoryError(PipelineError):
    """A GPU with too little memory."""


# Every word that a `_rejects` table may hold; docs/data_architecture.md says what each means.
Reason = Literal[
    "not_a_file", "unsafe_path", "missing_image", "missing_metadata", "bad_metadata", "image_too_large",
    "unreadable_image", "duplicate_image_id",
]  # fmt: skip


class Rejection(Exception):
    """One bad item: it is counted and listed with its reason, and the run goes on."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def catch_rejection(call: Callable[..., Result], *arguments: Any) -> Result | Rejection:
    """Return what a call returns or the Rejection that it raises, without the traceback, which holds the picture."""
    try:
        return call(*arguments)
    except Rejection as rejection:
        return Rejection(rejection.reason, rejection.detail)


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: handled as Ctrl-C is."""


def printable(text: str) -> str:
    """Return a text for a terminal or a log: on one line, and without passwords."""
    return escape_controls(hide_credentials(text))


def escape_controls(text: str) -> str:
    """Return a text on one line; control characters, from names in data, become `\\xNN`."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def hide_credentials(text: str) -> str:
    """Return a text with `***` for the name and password in `NAME:PASSWORD@HOST`."""
    return _CREDENTIALS.sub("***", text)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def unreadable(place: object, error: OSError) -> InputError:
    """Return the error for a file or a folder that the system does not let us read."""
    return InputError(
        f"{error.filename or place}: cannot be read ({error.strerror or one_line(error)}): "
        "correct the path, or allow reading it"
    )
