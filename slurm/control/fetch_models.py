"""Fetch the configured backbone, or named models, into the hub's cache, for jobs without internet.

    slurm/prepare.sh [--config CONFIG] [--model-id ID ...] [--no-install]

Prints each model's folder. What is there already is not fetched again.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.inference.model_files import locate_backbone
from pipeline.reference.model_folder import locate_published


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(__doc__ or "")
    parser.add_argument(
        "--model-id", action="append", default=[], metavar="ID", dest="model_ids",
        help="fetch this hub model in place of the backbone; may be repeated",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if not arguments.model_ids:
        print(locate_backbone(cli.config_from(arguments), download=True))
    for name in arguments.model_ids:
        located = locate_published(name, download=True)
        print(located and located.folder)


if __name__ == "__main__":
    cli.run_guarded(main)
