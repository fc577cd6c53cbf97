"""Run stages 1 to 9 in order, in one process, and print the ledger of all rows.

    python run_pipeline.py --config config.toml [--from-stage N] [--to-stage N]

What is complete is kept, so the same command goes on after a failure. Stage 8 runs only where [new_data].input and
output are set.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import cli
from pipeline.config import Config
from pipeline.errors import ConfigError, PipelineError


@dataclass(frozen=True)
class Stage:
    """A stage: its number, the module whose `run(config, options)` does it, and the paths it needs."""

    number: int
    module: str
    paths: tuple[str, ...]

    @property
    def name(self) -> str:
        """The script's name."""
        return self.module.rpartition(".")[2]

    def run(self, config: Config, options: cli.Options) -> cli.StageResult:
        """Import the stage and run it with its own log file."""
        return cli.run_stage(self.name, importlib.import_module(self.module).run, config, options)


STAGES = (
    Stage(1, "preprocess_raw_data.process_tar", ("raw_dir", "intermediates_dir")),
    Stage(2, "generate_embeddings.generate_embeddings", ("raw_dir", "intermediates_dir", "embeddings_dir")),
    Stage(3, "preprocess_raw_data.merge_and_split", ("embeddings_dir", "merged_dir")),
    Stage(4, "preprocess_raw_data.compute_fingerprints", ("raw_dir", "intermediates_dir", "fingerprints_dir")),
    Stage(5, "difficulty_metadata.compute_visual_neighbors", ("fingerprints_dir", "difficulty_metadata_path")),
    Stage(6, "train_specialized_embeddings.train", ("merged_dir", "difficulty_metadata_path", "checkpoint_dir")),
    Stage(7, "publish_model.convert_to_hf", ("checkpoint_dir", "published_model_dir")),
    Stage(8, "publish_model.generate_embeddings_from_parquet", ()),
    Stage(9, "evaluate_embeddings.evaluate", ("merged_dir", "checkpoint_dir", "report_dir")),
)


def run_stages(
    config: Config, options: cli.Options, results: list[cli.StageResult], first: int = 1, last: int = 9
) -> None:
    """Run the stages from `first` to `last`, adding each one's line of the ledger to `results` as it ends.

    Raises ConfigError before anything runs if a path of a later stage is not set, and what the failing stage raises.
    """
    chosen = [stage for stage in STAGES if first <= stage.number <= last]
    config.require_paths(*dict.fromkeys(key for stage in chosen for key in stage.paths))
    _check_other_paths(config, {stage.number for stage in chosen})
    for stage in chosen:
        if stage.number == 8 and not (config.new_data.input and config.new_data.output):
            print("stage 8: [new_data].input and output are not set: passed over", file=sys.stderr)
            continue
        try:
            results.append(stage.run(config, options))
        except PipelineError as error:
            results += [error.result] if error.result else []
            raise
    if last == 9 and config.paths.published_model_dir is not None:
        from publish_model.model_folder.card_results import add_test_results

        # The card was written two stages before there were results.
        add_test_results(config.path("published_model_dir"), config.path("report_dir") / "metrics.json")


def _check_other_paths(config: Config, numbers: set[int]) -> None:
    """Raise ConfigError where a path outside `[paths]`, which a chosen stage uses hours later, cannot be expanded."""
    others = (
        ({2, 7}, "[embedding_model].model_name", config.embedding_model.model_name),
        ({3}, "[data].split_file", config.data.split_file),
        ({6}, "[training].init_checkpoint", config.training.init_checkpoint),
        ({8}, "[new_data].input", config.new_data.input),
        ({8}, "[new_data].output", config.new_data.output),
    )
    for users, where, value in others:
        if value and users & numbers:
            config.expand(value, where)


def format_ledger(results: list[cli.StageResult]) -> str:
    """Return the ledger as a table of at most 80 columns: one line a stage, rows in = out + rejected + dropped."""
    lines = [f"{'stage':<35}{'in':>9}{'out':>9}{'rejected':>9}{'dropped':>9}{'seconds':>9}"]
    for result in results:
        seconds = "kept" if result.kept and not result.written else f"{result.seconds:.1f}"
        lines.append(
            f"{result.stage:<35}{result.rows_in:>9}{result.rows_out:>9}{result.rejected:>9}{result.dropped:>9}"
            f"{seconds:>9}"
        )
    if results and all(result.kept and not result.written for result in results):
        lines.append("every stage is complete and up to date: nothing was redone")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the pipeline from a command line."""
    parser = cli.make_parser(__doc__ or "")
    parser.add_argument("--from-stage", type=int, default=1, metavar="N", choices=range(1, 10), help="first stage (1)")
    parser.add_argument("--to-stage", type=int, default=9, metavar="N", choices=range(1, 10), help="last stage (9)")
    arguments = parser.parse_args(argv)
    if arguments.from_stage > arguments.to_stage:
        raise ConfigError(f"--from-stage {arguments.from_stage} lies behind --to-stage {arguments.to_stage}")
    config, options = cli.config_from(arguments), cli.options_from(arguments)
    results: list[cli.StageResult] = []
    try:
        run_stages(config, options, results, arguments.from_stage, arguments.to_stage)
    finally:
        if results:
            print(format_ledger(results), file=sys.stderr)


if __name__ == "__main__":
    cli.run_guarded(main)
