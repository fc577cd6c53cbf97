"""Run stages 1 to 9 in order, in one process, and print the ledger of all rows.

    python run_pipeline.py --config config.toml [--from-stage N] [--to-stage N]

What is complete is kept, so the same command goes on after a failure. Stage 8 runs only where [new_data].input and
output are set.
"""

import importlib
import sys
from collections.abc import Sequence

from pipeline import cli
from pipeline.config import Config
from pipeline.errors import ConfigError, PipelineError
from pipeline.stages import choose_stages


def run_stages(
    config: Config, options: cli.Options, results: list[cli.StageResult], first: int = 1, last: int = 9
) -> None:
    """Run the stages from `first` to `last`, adding each one's line of the ledger to `results` as it ends.

    Raises ConfigError before anything runs if a path of a later stage is not set, and what the failing stage raises.
    """
    for stage in choose_stages(config, first, last):
        try:
            results.append(cli.run_stage(stage.name, importlib.import_module(stage.module).run, config, options))
        except PipelineError as error:
            results += [error.result] if error.result else []
            raise
    if last == 9 and config.paths.published_model_dir is not None:
        from publish_model.model_folder.model_card import add_test_results

        # The card was written two stages before there were results.
        add_test_results(config.path("published_model_dir"), config.path("report_dir") / "metrics.json")


def format_ledger(results: list[cli.StageResult]) -> str:
    """Return the ledger as a table of at most 80 columns: one line a stage, rows in = out + rejected + dropped."""
    lines = [f"{'stage':<35}{'in':>9}{'out':>9}{'rejected':>9}{'dropped':>9}{'seconds':>9}"]
    for result in results:
        seconds = "kept" if result.kept and not result.written else f"{result.seconds:.1f}"
        numbers = (*(result.counts[key] for key in ("in", "out", "rejected", "dropped")), seconds)
        lines.append(f"{result.stage:<35}" + "".join(f"{number:>9}" for number in numbers))
    if results and all(result.kept and not result.written for result in results):
        lines.append("every stage is complete and up to date: nothing was redone")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(__doc__ or "")
    parser.add_argument("--from-stage", type=int, default=1, metavar="N", choices=range(1, 10), help="first stage (1)")
    parser.add_argument("--to-stage", type=int, default=9, metavar="N", choices=range(1, 10), help="last stage (9)")
    arguments = parser.parse_args(argv)
    if arguments.from_stage > arguments.to_stage:
        raise ConfigError(f"--from-stage {arguments.from_stage} lies behind --to-stage {arguments.to_stage}")
    config, options = cli.config_from(arguments), cli.options_from(arguments, cli.Options)
    results: list[cli.StageResult] = []
    try:
        run_stages(config, options, results, arguments.from_stage, arguments.to_stage)
    finally:
        if results:
            print(format_ledger(results), file=sys.stderr)


if __name__ == "__main__":
    cli.run_guarded(main)
