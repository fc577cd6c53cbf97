"""The command line that the tools for embeddings datasets have in common."""

import argparse
from collections.abc import Callable
from pathlib import Path

from pipeline import cli
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.errors import InputError


def make_tool_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser that takes the dataset's directory."""
    parser = cli.make_parser(description, config=False)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="dataset directory that stage 8 wrote")
    return parser


def run_tool(
    tool: str, output: Path, story: Callable[[EmbeddingsDataset], cli.StageResult], *, alone: bool = False
) -> None:
    """Tell a story of a dataset while none that needs it `alone` runs; such a one leaves no log file in the dataset.

    Raises InputError where there is no dataset, PipelineError where another process is at it.
    """
    dataset = EmbeddingsDataset(output)
    if not dataset.folder.is_dir():
        raise InputError(f"{dataset.folder}: no embeddings dataset: run stage 8 first, or correct the path")
    # No log is written into a folder that is something else.
    log_path = dataset.folder / "_logs" / f"{tool}.log" if not alone and (dataset.folder / "parts").is_dir() else None
    with dataset.held(shared=not alone):
        cli.run_logged(tool, lambda: story(dataset), log_path)
