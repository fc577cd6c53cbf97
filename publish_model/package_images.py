"""Package images as stage 8 reads them: a folder of parquets with OSMID, image_bytes and is_valid.

    python publish_model/package_images.py --input photographs --output packaged
    python publish_model/package_images.py --input images.csv --output packaged

Reads a folder of photographs (OSMID is the path below it), a CSV of OSMID, path and further columns, which are kept
(paths are relative to the CSV), or a tar or a folder of tars (OSMID is the tar's name and the member's). Writes
OUTPUT/NNNNN.parquet, where a picture that cannot be read has no bytes and is_valid false, and OUTPUT/_rejects/, which
says why. OUTPUT appears when it is complete; until then the files are kept in a hidden folder beside it, where a rerun
goes on. Takes no configuration.
"""

import argparse
import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

import pyarrow as pa

from pipeline import cli
from pipeline.config import count_cores
from pipeline.embeddings_dataset.packaged_input import IMAGE_COLUMN, VALID_COLUMN
from pipeline.errors import InputError, PipelineError, Rejection, StaleOutputError
from pipeline.files import workspace
from pipeline.files.tables import (
    make_provenance,
    matches,
    parquet_writer,
    read_provenance,
    rejects_path,
    write_rejects,
)
from pipeline.inference.images import check_image
from pipeline.log import Progress, logger
from pipeline.threads import map_in_order
from publish_model.new_data.embed_options import check_places, fraction
from publish_model.new_data.image_sources import ImageSource, SourceImage, open_source

STAGE = "package_images"
# A row group is what stage 8's --shard deals out and a reader may hold: 1,000 pictures of Street View take 110 MB.
ROW_GROUP_ROWS, ROW_GROUP_BYTES = 1000, 128 * 2**20
# What an interruption costs at most.
FILE_BYTES = 2**29


@dataclass
class Packed:
    """An image that was tried: its row, or why it has no bytes."""

    image: SourceImage
    data: bytes | None
    rejection: Rejection | None

    def to_row(self) -> dict[str, Any]:
        """Return the row of the package."""
        return {**self.image.row, IMAGE_COLUMN: self.data, VALID_COLUMN: self.data is not None}


def try_image(image: SourceImage) -> Packed:
    """Read an image and see whether it can be decoded."""
    try:
        data = image.read()
        check_image(data)
        return Packed(image, data, None)
    except Rejection as rejection:
        return Packed(image, None, rejection)


def group_rows(images: Iterator[Packed]) -> Iterator[list[Packed]]:
    """Yield row groups: as many rows as fit into the bounds, one at least."""
    held: list[Packed] = []
    num_bytes = 0
    for image in images:
        size = len(image.data or b"")
        if held and (len(held) == ROW_GROUP_ROWS or num_bytes + size > ROW_GROUP_BYTES):
            yield held
            held, num_bytes = [], 0
        held.append(image)
        num_bytes += size
    if held:
        yield held


@dataclass
class Package:
    """A package under way: numbered files in a hidden folder, each done once its rejects are there."""

    folder: Path
    schema: pa.Schema
    provenance: dict[str, Any]
    counts: list[dict[str, Any]] = field(default_factory=list)  # of each file

    def take_up(self) -> int:
        """Find the files that an interrupted run has finished, and return how many images they hold."""
        try:
            while (path := self._next_path()).is_file() and rejects_path(path).is_file():
                self.counts.append(read_counts(path, self.provenance))
        except StaleOutputError:
            logger.info("%s: begun with other images: begun anew", self.folder)
            for old in self.folder.iterdir():
                workspace.remove(old)
            self.counts.clear()
        return sum(counts["in"] for counts in self.counts)

    def _next_path(self) -> Path:
        return self.folder / f"{len(self.counts):05d}.parquet"

    def write_file(self, groups: Iterator[list[Packed]], progress: Progress) -> bool:
        """Write the next file of row groups, and return whether there was anything to write."""
        first = next(groups, None)
        if first is None:
            return False
        rejected: list[tuple[str, Rejection]] = []
        num_rows = num_bytes = 0
        path = self._next_path()
        with parquet_writer(path, self.schema, self.provenance) as writer:
            for group in itertools.chain([first], groups):
                writer.write_table(pa.Table.from_pylist([image.to_row() for image in group], self.schema))
                rejected += [(image.image.name, image.rejection) for image in group if image.rejection is not None]
                num_rows += len(group)
                num_bytes += sum(len(image.data or b"") for image in group)
                progress.advance(len(group))
                if num_bytes >= FILE_BYTES:
                    break
        counts = {"in": num_rows, "out": num_rows - len(rejected), "rejected": len(rejected), "dropped": 0}
        reasons = dict(Counter(rejection.reason for _, rejection in rejected))
        write_rejects(rejects_path(path), rejected, self.provenance | {"counts": counts, "reasons": reasons})
        self.counts.append({**counts, "reasons": reasons})
        return True


def read_counts(path: Path, provenance: dict[str, Any]) -> dict[str, Any]:
    """Return the counts of a packaged file, which its rejects carry.

    Raises StaleOutputError where they were made from other images.
    """
    found = read_provenance(rejects_path(path)) or {}
    matches(rejects_path(path), found, provenance)
    return {**found["counts"], "reasons": found["reasons"]}


def read_finished(output: Path, provenance: dict[str, Any], overwrite: bool) -> list[dict[str, Any]]:
    """Return the counts of each file of the package at `output`, none where it is to be made.

    Raises StaleOutputError where it was made from other images and `overwrite` is off, InputError where something else
    lies there, which no option removes.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return []
    first = output / "00000.parquet"
    found = read_provenance(first) if first.is_file() else None
    if found is None or found.get("stage") != STAGE:
        raise InputError(f"{output}: not empty, and not a package that was made here: give another --output")
    if overwrite:
        return []
    matches(output, found, provenance)
    return [read_counts(path, provenance) for path in sorted(output.glob("*.parquet"))]


def fill(package: Package, source: ImageSource) -> None:
    """Write what is missing of a package.

    Raises InputError where a tar is damaged or there is no image at all; what was finished before is kept.
    """
    start = package.take_up()
    if start:
        logger.info("%s: going on behind image %d", STAGE, start)
    with (
        contextlib.closing(map_in_order(try_image, source.stream(start), count_cores())) as images,
        Progress(STAGE, source.num_images) as progress,
    ):
        progress.resume_at(start)
        groups = group_rows(images)
        while package.write_file(groups, progress):
            pass
    if not package.counts:
        raise InputError(f"{source.inputs[0]['name']}: holds no image: correct --input")


def package_images(options: argparse.Namespace) -> cli.StageResult:
    """Package the images and return the counts.

    Raises InputError where the input cannot be read, StaleOutputError where the output was made of others,
    PipelineError where more images are bad than allowed.
    """
    source = open_source(options.input)
    provenance = make_provenance(STAGE, source.inputs, {})
    result = cli.StageResult(STAGE)
    schema = pa.schema(
        [*source.fields[:1], (IMAGE_COLUMN, pa.binary()), (VALID_COLUMN, pa.bool_()), *source.fields[1:]]
    )
    output = options.output.resolve()
    finished = read_finished(output, provenance, options.overwrite)
    if finished:
        result.kept.append(options.output)
    else:
        with workspace.writing_folder(output, resumable=True) as folder:
            package = Package(folder, schema, provenance)
            fill(package, source)
        finished = package.counts
        result.written.append(options.output)
    for counts in finished:
        result.add(counts, counts["reasons"])
    check_rejects(result, options.max_reject_fraction)
    return result


def check_rejects(result: cli.StageResult, allowed: float) -> None:
    """Raise PipelineError where more of the images were rejected than allowed."""
    if result.rejected / result.rows_in > allowed:
        error = PipelineError(
            f"{result.rejected} of {result.rows_in} images cannot be used, more than --max-reject-fraction "
            f"{allowed:g} allows: read OUTPUT/_rejects, correct the input and give --overwrite, or raise the fraction"
        )
        error.result = result
        raise error


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(__doc__ or "", config=False)
    add = parser.add_argument
    add("--input", "-i", type=Path, required=True, metavar="PATH", help="a folder, a .csv or a .tar")
    add("--output", "-o", type=Path, required=True, metavar="DIR", help="folder to write or resume")
    add(
        "--max-reject-fraction", type=fraction, default=0.2, metavar="X",
        help="exit 1 if a larger share of the images cannot be used (0.2)",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="make a package anew that is there; the old one stays until then")
    options = parser.parse_args(argv)
    check_places(options.input, options.output)
    cli.run_logged(STAGE, lambda: package_images(options), None)


if __name__ == "__main__":
    cli.run_guarded(main)
