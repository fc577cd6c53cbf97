"""The command line of the stages: options, exit codes, results."""

import argparse
import io
import math
import os
import platform
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from pipeline import VERSION
from pipeline.config import DEFAULT_CONFIG_PATH, Config, load_config
from pipeline.crashes import noting_decoders
from pipeline.errors import ConfigError, PipelineError, Terminated, one_line, printable
from pipeline.ids import Shard, decode_name
from pipeline.log import Stopwatch, logger, logging_to

_STOPS: dict[signal.Signals, type[BaseException]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


@dataclass(frozen=True)
class Options:
    overwrite: bool = False
    shard: Shard = Shard()
    tar_files: Sequence[Path] = ()
    add_missing: bool = False  # stage 2 alone


NO_OPTIONS = Options()
AnyOptions = TypeVar("AnyOptions", bound=Any)


@dataclass
class StageResult:
    """The counts of a stage, where in = out + rejected + dropped, and the paths that it wrote or kept."""

    stage: str
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    written: list[Path] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)
    seconds: float = 0.0
    watch: Stopwatch = field(default_factory=Stopwatch)

    def add(self, counts: dict[str, int], reasons: dict[str, int] | None = None) -> None:
        self.counts.update(counts)
        self.reasons.update(reasons or {})

    def describe(self) -> str:
        why = ", ".join(f"{reason} {count}" for reason, count in sorted(self.reasons.items()))
        parts = " + ".join(f"{self.counts[key]} {key}" for key in ("out", "rejected", "dropped"))
        paths = f"{len(self.written)} written, {len(self.kept)} kept"
        return f"{self.stage}: {self.counts['in']} in = {parts}{f' ({why})' if why else ''}; {paths}"

    def check_reject_fraction(self, allowed: float, setting: str = "[data].max_reject_fraction") -> None:
        """Raise PipelineError if a larger share of the items that were not dropped was rejected than is allowed."""
        rejected, tried = self.counts["rejected"], self.counts["in"] - self.counts["dropped"]
        if 0 < tried == rejected:
            logger.warning("%s: none of the %d items could be used: read the _rejects folder", self.stage, tried)
        if tried and rejected / tried > allowed:
            raise PipelineError(
                f"{self.stage}: {rejected} of {tried} items were rejected, more than {setting} = {allowed:g} "
                "allows: read the _rejects folder beside the outputs, correct the input path or raise the setting",
                self,
            )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; see --help")


def expand_user(text: str) -> str:
    """Expand `~` and `~user` in a path; raise ArgumentTypeError if there is no such user."""
    expanded = os.path.expanduser(text)  # noqa: PTH111 (a hub id is no path)
    if expanded.startswith("~"):
        raise argparse.ArgumentTypeError(f"{text!r} names a user who does not exist: correct it, or write ./{text}")
    return expanded


def whole_number(text: str) -> int:
    """Read a number above 0; raise ArgumentTypeError for anything else."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def make_parser(description: str, *, config: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the options that every configured stage takes."""
    parser = _Parser(
        usage=argparse.SUPPRESS,  # the first line of --help says what the stage is
        description=description,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,  # half a word would be taken for --overwrite
    )
    parser.register("type", Path, lambda text: Path(expand_user(text)))
    if config:
        parser.add_argument(
            "--config", type=Path, default=DEFAULT_CONFIG_PATH, metavar="PATH",
            help="configuration file (default: config.toml beside the project)",
        )  # fmt: skip
        parser.add_argument(
            "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
            help="override one setting, or those that a .toml file names; may be repeated",
        )  # fmt: skip
        parser.add_argument("--overwrite", action="store_true", help="make again what is there already")
    return parser


def add_shard_option(parser: argparse.ArgumentParser, unit: str) -> None:
    parser.add_argument(
        "--shard", type=parse_shard, default=Shard(), metavar="I/N", help=f"do every N-th {unit}, 0 <= I < N"
    )


def add_tar_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tar-file", type=Path, action="append", default=[], metavar="PATH", dest="tar_files",
        help="do this tar only; may be repeated (default: every tar of raw_dir)",
    )  # fmt: skip
    add_shard_option(parser, "tar")


def parse_shard(text: str) -> Shard:
    """Read `I/N`; raise ArgumentTypeError unless 0 <= I < N."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} must read I/N with 0 <= I < N")
    return Shard(int(index), int(count))


def run_guarded(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a script's main and exit with its code; a failure that is no bug is one line on stderr."""
    if argv is None:  # run as a script, not from another program
        _check_surroundings()
    _catch_stops()
    try:
        main(argv)
    except PipelineError as error:
        problems = error.problems if isinstance(error, ConfigError) else [one_line(error)]
        _exit(error.exit_code, *problems)
    except KeyboardInterrupt as stop:
        code, what = (143, "terminated") if isinstance(stop, Terminated) else (130, "interrupted")
        _exit(code, f"{what}: what was finished is kept, the same command goes on from there")
    except BrokenPipeError:  # nobody reads our stdout any more
        sys.stdout = None
        sys.exit(1)
    except UnicodeEncodeError as error:  # a path: Parquet's library takes UTF-8 alone
        shown = decode_name(error.object)
        if shown == error.object:
            raise
        _exit(1, f"{shown}: not UTF-8, so it cannot be read or written: rename that, then run this again")
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        _exit(1, f"cannot use{place} ({error.strerror or one_line(error)}): correct that, then run this again")
    except MemoryError as error:
        _exit(1, f"out of memory ({one_line(error)[:200]}): give more of it, or smaller batches or files")
    sys.exit(0)


def _check_surroundings() -> None:
    """Write text as UTF-8; refuse another encoding of file names, a closed stdout and a removed current folder."""
    if sys.stdout is None:
        _exit(1, "stdout is closed: send it to a file, or to /dev/null")
    try:
        Path.cwd()
    except FileNotFoundError:  # torch's libraries are not found from there
        _exit(1, "the current folder was removed: cd to one that is there, then run this again")
    if sys.getfilesystemencoding() != "utf-8":
        _exit(1, "the locale is not UTF-8, so file names would be misread: export LC_ALL=C.UTF-8, then run this again")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _catch_stops() -> None:
    """Turn the signals that ask for an end into exceptions; of those within a second only the first counts.

    A terminal and a launcher both send SIGINT: the second would break off what the first one has kept.
    """
    taken = -math.inf

    def take(number: int, _frame: FrameType | None) -> None:
        nonlocal taken
        before, taken = taken, time.monotonic()
        if taken - before > 1:
            raise _STOPS[signal.Signals(number)]

    for number in _STOPS:  # a script that starts us with & has SIGINT ignored
        signal.signal(number, take)


def _exit(code: int, *lines: str) -> NoReturn:
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)  # the default, which Python sets when it ends, would change the exit code
    for line in lines:
        print(f"error: {printable(line)}", file=sys.stderr)
    sys.exit(code)


def run_stage(
    stage: str, story: Callable[[Config, Options], StageResult], config: Config, options: Options
) -> StageResult:
    """Run one stage with its log file, first and last log line, and its written paths on stdout."""

    def tell() -> StageResult:
        logger.info(
            "%s %s, Python %s, pyarrow %s, device %s, seed %d, config %s",
            stage, VERSION, platform.python_version(), version("pyarrow"), config.infrastructure.device,
            config.global_.seed, config.file_path,
        )  # fmt: skip
        return story(config, options)

    return run_logged(stage, tell, config.log_dir / log_name(stage, options.shard), config.logging.level)


def run_from_command_line(
    stage: str,
    story: Callable[[Config, Options], StageResult],
    description: str,
    argv: Sequence[str] | None,
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> StageResult:
    """Run one stage with the options of every configured stage, and those that `add_options` adds."""
    parser = make_parser(description)
    if add_options is not None:
        add_options(parser)
    arguments = parser.parse_args(argv)
    return run_stage(stage, story, config_from(arguments), options_from(arguments))


def log_name(stage: str, shard: Shard) -> str:
    return f"{stage}.log" if shard.count == 1 else f"{stage}.{shard.index}of{shard.count}.log"


def run_logged(
    stage: str,
    story: Callable[[], StageResult],
    log_path: Path | None,
    level: str = "INFO",
    max_reject_fraction: float = 1.0,
) -> StageResult:
    """Run a story with its log file and last log line, and print the paths that it wrote."""
    with logging_to(log_path, level), noting_decoders(log_path):
        started = time.monotonic()
        try:
            result = story()
            result.check_reject_fraction(max_reject_fraction, "--max-reject-fraction")
        except (PipelineError, KeyboardInterrupt) as error:
            text = str(error) or f"{stage}: interrupted; what was finished is kept"
            logger.error("%s", text, extra={"file_only": True})  # stderr gets it as the last line
            if isinstance(error, PipelineError) and error.result is not None:  # what was finished is kept and counted
                _report(error.result, started)
            raise
        if result.kept and not result.written:
            logger.info("%s: everything is there already and up to date: nothing redone", stage)
        _report(result, started)
    return result


def _report(result: StageResult, started: float) -> None:
    result.seconds = time.monotonic() - started
    logger.info("%s; %.1f s%s", result.describe(), result.seconds, result.watch.describe_parts())
    for path in result.written:
        print(path, flush=True)


def options_from(arguments: argparse.Namespace, kind: type[AnyOptions] = Options) -> AnyOptions:  # type: ignore[assignment]
    """Gather a parsed command line in a class of options: each field from the option of its name."""
    fields = {name: value for name, value in vars(arguments).items() if name in kind.__dataclass_fields__}
    options: AnyOptions = kind(**fields)
    return options


def config_from(arguments: argparse.Namespace) -> Config:
    return load_config(arguments.config, arguments.overrides)
