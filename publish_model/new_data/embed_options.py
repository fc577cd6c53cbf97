"""The command lines of stage 8 and of the tools for its datasets, which take no configuration."""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import cli
from pipeline.embeddings_dataset.columns import check_names
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN, IMAGE_COLUMN, InputOptions
from pipeline.embeddings_dataset.parts import EMBEDDING_COLUMN
from pipeline.errors import ConfigError, InputError
from pipeline.files.outputs import check_outside_datasets
from pipeline.ids import Shard
from pipeline.inference.model_files import DEFAULT_MODEL_ID


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(InputOptions):
    """What to embed with which model, and how."""

    output: Path
    model_id: str = DEFAULT_MODEL_ID
    trust_remote_code: bool = False
    batch_size: int = 32
    device: str = "auto"
    dtype: str = "auto"
    limit: int | None = None
    max_reject_fraction: float = 1.0
    shard: Shard = Shard()
    overwrite: bool = False


def parse(description: str, argv: Sequence[str] | None) -> EmbedOptions:
    """Read the command line; the names of the options are the fields of EmbedOptions.

    Raises ConfigError where it is wrong.
    """
    parser = cli.make_parser(description, config=False)
    add_options(parser)
    options = EmbedOptions(**vars(parser.parse_args(argv)))
    if options.overwrite and options.shard.count > 1:
        raise ConfigError("--overwrite with --shard would remove what the other shards write: remove OUTPUT yourself")
    check_places(options.input, options.output)
    return options


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_input_options(parser)
    add("--output", "-o", type=Path, required=True, metavar="OUTPUT", help="dataset directory to write or resume")
    add_model_option(parser)
    add("--batch-size", type=cli.whole_number, default=32, metavar="N", help="images in one pass at most (32)")
    add_device_option(parser)
    add(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="type to compute in (auto: as the dataset was begun; else float32 on CPU, on CUDA\n"
        "bfloat16 if that comes near float32 on the first pictures)",
    )  # fmt: skip
    add("--limit", type=cli.whole_number, metavar="N", help="embed the first N rows of the input only")
    add(
        "--max-reject-fraction", type=fraction, default=1.0, metavar="X",
        help="exit 1 if a larger share of the images is rejected (1.0: never)",
    )  # fmt: skip
    add_column_options(parser)
    cli.add_shard_option(parser, "row group")
    add("--overwrite", action="store_true", help="remove what is in OUTPUT and begin anew")


def check_places(input_path: Path, output: Path) -> None:
    """Raise ConfigError where the output lies in the input folder, or in a dataset's own folders."""
    check_outside_datasets(output)
    if output.resolve().is_relative_to(input_path.resolve()) and input_path.is_dir():
        raise ConfigError(f"--output {output}: lies in the input folder and would become part of the input")


def add_input_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--input", "-i", type=Path, required=True, metavar="PATH",
        help="packaged images (image_bytes, OSMID): a parquet, or a folder of them",
    )  # fmt: skip
    add("--no-filter-valid", action="store_false", dest="filter_valid", help="embed rows with is_valid false too")
    add("--read-batch-size", type=cli.whole_number, default=1000, metavar="N", help="rows of a part (1000)")


def add_column_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--keep-columns", type=_names, default=(), metavar="A,B",
        help="columns of the input to carry along, or keys of its folders year=2020/ (none)",
    )  # fmt: skip
    add("--id-column", default=ID_COLUMN, metavar="NAME", help="column of the ids (OSMID)")
    add(
        "--image-column", default=IMAGE_COLUMN, metavar="NAME",
        help="column of the images: bytes, or Hugging Face's struct of bytes and path (image_bytes)",
    )  # fmt: skip


def add_model_option(parser: argparse.ArgumentParser, default: str = DEFAULT_MODEL_ID) -> None:
    """Add `--model-id`, and `--trust-remote-code` for a model that comes with code of its own."""
    parser.add_argument(
        "--model-id", type=cli.expand_user, default=os.environ.get("MODEL_ID") or default, metavar="ID",
        help=f"published model: folder, hub id or hub id@revision (default: $MODEL_ID, else {default or 'none'})",
    )  # fmt: skip
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code from the model's folder; read it first"
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where the model runs (auto)")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    check_names(f"--keep-columns {text}", [ID_COLUMN, IMAGE_COLUMN, EMBEDDING_COLUMN], names)
    if "" in names:
        raise argparse.ArgumentTypeError(f"{text!r} must name columns")
    return names


def fraction(text: str) -> float:
    value = float(text)  # argparse names the option where this fails
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0 to 1")
    return value


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
