"""Package the images of a split as stage 8 reads them: `image_bytes`, `OSMID`, `is_valid`.

    python sample_data/package_split.py --config sample_data/demo.toml --split test --output packaged.parquet

Reads merged_dir/SPLIT.parquet and the bytes from raw_dir by offset. The building id stands in for the OSMID. A rerun
keeps the file if the split is the same.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

import pyarrow as pa

from pipeline import cli
from pipeline.config import Config
from pipeline.errors import InputError, Rejection
from pipeline.files.archive import read_placed
from pipeline.files.column_types import check_columns
from pipeline.files.identity import identify
from pipeline.files.outputs import check_replaceable
from pipeline.files.tables import is_complete, make_provenance, open_parquet, parquet_writer
from pipeline.ids import tar_name
from pipeline.log import logging_to

SCHEMA = pa.schema([("image_bytes", pa.binary()), ("OSMID", pa.string()), ("is_valid", pa.bool_())])
COLUMNS = pa.schema(
    [("dataset_id", pa.int64()), ("image_offset", pa.int64()), ("image_size", pa.int64()), ("building_id", pa.string())]
)
# Images in memory at a time, and in a row group of the package.
BATCH_ROWS = 256


def read_images(raw_dir: Path, batch: pa.RecordBatch) -> Iterator[bytes]:
    """Yield each row's image bytes from its tar.

    Raises InputError if a tar is gone or has changed.
    """
    for row in batch.select(["dataset_id", "image_offset", "image_size"]).to_pylist():
        tar_path = raw_dir / tar_name(row["dataset_id"])
        try:
            yield read_placed(tar_path, row["image_offset"] or 0, row["image_size"] or 0)
        except FileNotFoundError:
            raise InputError(f"{tar_path}: no such tar: set [paths].raw_dir to where the tars are") from None
        except Rejection as rejection:
            raise InputError(f"{tar_path}: an image is {rejection.detail}: run the stages again from stage 1") from None


def package_split(config: Config, split: str, output_path: Path, overwrite: bool = False) -> bool:
    """Write the package and return whether it had to be written.

    Raises InputError if the split or a tar is missing.
    """
    split_path = config.path("merged_dir") / f"{split}.parquet"
    check_replaceable(output_path, "package_split", [split_path])
    provenance = make_provenance("package_split", [identify(split_path)], {"split": split})
    if is_complete(output_path, provenance, overwrite):
        return False
    file = open_parquet(split_path)
    check_columns(split_path, file.schema_arrow, COLUMNS)
    with parquet_writer(output_path, SCHEMA, provenance) as writer:
        for batch in file.iter_batches(BATCH_ROWS, columns=COLUMNS.names):
            images = pa.array(read_images(config.path("raw_dir"), batch), pa.binary())
            valid = pa.repeat(pa.scalar(True), len(batch))
            writer.write_table(pa.table([images, batch["building_id"], valid], schema=SCHEMA))
    return True


def main(argv: Sequence[str] | None = None) -> None:
    """Package a split from a command line."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="which split (test)")
    parser.add_argument("--output", type=Path, required=True, help="parquet to write")
    arguments: argparse.Namespace = parser.parse_args(argv)
    with logging_to(None):
        if package_split(cli.config_from(arguments), arguments.split, arguments.output, arguments.overwrite):
            print(arguments.output)


if __name__ == "__main__":
    cli.run_guarded(main)
