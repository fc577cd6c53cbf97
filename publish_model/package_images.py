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
import hashlib
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

import pyarrow as pa

from pipeline import cli, workspace
from pipeline.config import count_cores
from pipeline.embeddings_dataset.packaged_input import IMAGE_COLUMN, VALID_COLUMN, InputOptions
from pipeline.embeddings_dataset.parts import EMBEDDING_COLUMN
from pipeline.errors import InputError, Rejection, StaleOutputError
from pipeline.files.identity import hash_footer, hash_json
from pipeline.files.outputs import carries
from pipeline.files.tables import (
    BUFFER_BYTES,
    PROVENANCE_KEY,
    REJECT_SCHEMA,
    count_rejects,
    make_provenance,
    matches,
    open_parquet,
    parquet_writer,
    read_columns,
    read_provenance,
    rejects_path,
    write_parquet,
    write_rejects,
)
from pipeline.log import Progress, logger
from pipeline.threads import map_in_order
from publish_model.new_data.embed_options import add_column_options, check_places, fraction
from publish_model.new_data.image_sources import ImageSource, SourceImage, open_source, try_image

STAGE = "package_images"
# A row group is what stage 8's --shard deals out and a reader may hold: 1,000 pictures of Street View take 110 MB.
ROW_GROUP_ROWS, ROW_GROUP_BYTES = 1000, 128 * 2**20
# What an interruption costs at most.
FILE_BYTES = 2**29


def try_images(
    source: ImageSource, start: int, end: int | None = None
) -> AbstractContextManager[Iterator[SourceImage]]:
    """Try the images from one number to another in parallel, in order."""
    stream = itertools.islice(source.stream(start), None if end is None else end - start)
    return contextlib.closing(map_in_order(try_image, stream, count_cores(), weigh=lambda image: image.size))


def name_file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.parquet"


def gather_groups(images: Iterator[SourceImage]) -> Iterator[list[SourceImage]]:
    """Yield the images in row groups, in one list that is emptied before it is filled again."""
    group: list[SourceImage] = []
    num_bytes = 0
    for image in images:
        group.append(image)
        num_bytes += image.size
        del image
        if len(group) == ROW_GROUP_ROWS or num_bytes >= ROW_GROUP_BYTES:
            yield group
            group.clear()
            num_bytes = 0
    if group:
        yield group


def write_file(
    path: Path,
    groups: Iterator[list[SourceImage]],
    source: ImageSource,
    provenance: dict[str, Any],
    progress: Progress,
    most_bytes: float,
) -> dict[str, Any]:
    """Write row groups until the file is full, then its rejects, and return its counts, which the rejects carry."""
    rejected: list[tuple[str, Rejection]] = []
    seen: list[list[int] | None] = []
    own, *kept = source.fields
    schema = pa.schema([own, (IMAGE_COLUMN, pa.binary()), (VALID_COLUMN, pa.bool_()), *kept])
    others, digest = [field.name for field in schema if field.name != IMAGE_COLUMN], hashlib.sha256()
    # A picture is a page as it stands: statistics, a dictionary or compression would each be a copy of it.
    options: dict[str, Any] = {
        "write_batch_size": 1, "write_statistics": [own.name, VALID_COLUMN], "use_dictionary": others,
        "compression": {IMAGE_COLUMN: "none", **dict.fromkeys(others, "zstd")},
    }  # fmt: skip
    with parquet_writer(path, schema, provenance, **options) as writer:
        for group in groups:
            rows = ({**one.row, IMAGE_COLUMN: one.data, VALID_COLUMN: one.data is not None} for one in group)
            writer.write_table(pa.Table.from_pylist(list(rows), schema))
            rejected += [(one.name, one.rejection) for one in group if one.rejection is not None]
            seen += [one.seen for one in group]
            for one in group:
                digest.update(hashlib.sha256(one.data or b"").digest())
                most_bytes -= one.size
            progress.advance(len(group))
            del one
            if most_bytes <= 0:
                break
        # Stage 8 tells its input by the footer, in which a picture of the same size would be the same.
        writer.add_key_value_metadata({PROVENANCE_KEY + b".pictures": digest.hexdigest().encode()})
    described = count_rejects(provenance, len(seen), (rejection for _, rejection in rejected))
    described |= {"seen": source.seen or hash_json(seen), "footer": hash_footer(path)}
    write_rejects(rejects_path(path), rejected, described)
    return described


def read_finished(folder: Path, provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """Return for each finished file of a package what `write_file` returned.

    Raises StaleOutputError where one was made from other images.
    """
    finished: list[dict[str, Any]] = []
    while (path := name_file(folder, len(finished))).is_file() and rejects_path(path).is_file():
        found = read_provenance(rejects_path(path)) or {}
        for one, own in ((path, read_provenance(path)), (rejects_path(path), found)):
            matches(one, own, provenance)
        if found.get("footer") != hash_footer(path):  # another file, or a kill came before its rejects: looked at anew
            found["seen"] = ""
        finished.append(found)
    return finished


def find_package(output: Path, provenance: dict[str, Any], overwrite: bool) -> list[dict[str, Any]]:
    """Return what `read_finished` returns for the package at `output`, nothing where it is to be made.

    Raises InputError where something else lies there, which no option removes.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return []
    if not carries(name_file(output, 0), STAGE):
        raise InputError(f"{output}: not empty, and not a package that was made here: give another --output")
    if overwrite:
        return []
    finished = read_finished(output, provenance)
    if len(finished) < len(list(output.glob("*.parquet"))):
        raise InputError(f"{output}: some of its _rejects are gone: give --overwrite to make it again")
    return finished


def fill(folder: Path, source: ImageSource, provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """Write the files that a package lacks, and return the counts of all.

    Raises InputError where a tar is damaged or there is no image at all; what was finished before is kept.
    """
    try:
        finished = read_finished(folder, provenance)
        renew(folder, source, provenance, finished)
    except StaleOutputError:
        logger.info("%s: begun with other images: begun anew", folder)
        for old in folder.iterdir():
            workspace.remove(old)
        finished = []
    start = sum(file["counts"]["in"] for file in finished)
    if start:
        logger.info("%s: going on behind image %d", STAGE, start)
    with try_images(source, start) as images, Progress(STAGE, source.num_images) as progress:
        progress.resume_at(start)
        groups = gather_groups(images)
        for first in groups:
            own = itertools.chain([first], groups)
            finished.append(write_file(name_file(folder, len(finished)), own, source, provenance, progress, FILE_BYTES))
    if not finished:
        raise InputError(f"{source.inputs[0]['name']}: holds no image: correct --input")
    return finished


def renew(folder: Path, source: ImageSource, provenance: dict[str, Any], finished: list[dict[str, Any]]) -> bool:
    """Make the files again of which a picture has changed or has come, put in their counts; return whether any has.

    Pictures whose size and time are as recorded are not read; the others are compared with what was packaged. Raises
    StaleOutputError where the picture has changed inside a tar.
    """
    has_renewed, end = False, 0
    with contextlib.ExitStack() as stack:
        images: Iterator[SourceImage] | None = None  # one for all files in a row, as a tar is read from its start
        for number, file in enumerate(finished):
            start, end = end, end + file["counts"]["in"]
            seen = source.seen or hash_json([one.seen for one in itertools.islice(source.stream(start), end - start)])
            if seen == file["seen"]:
                images = None
                continue
            images = images or stack.enter_context(try_images(source, start))
            path = name_file(folder, number)
            with open_parquet(path, BUFFER_BYTES) as packaged:
                old = (batch[0][0].as_py() for batch in packaged.iter_batches(1, columns=[IMAGE_COLUMN]))
                changed = [one.name for data, one in zip(old, images, strict=False) if one.data != data]
            if not changed:
                finished[number] = file | {"seen": seen, "footer": hash_footer(path)}
                write_parquet(rejects_path(path), read_columns(rejects_path(path), REJECT_SCHEMA, ""), finished[number])
            elif source.seen:
                raise StaleOutputError(f"{path}: {changed[0]} was another picture in its tar: give --overwrite")
            else:
                logger.warning("%s: %d pictures have changed, as %s: made again", path, len(changed), changed[0])
                with try_images(source, start, end) as again, Progress(STAGE, end - start) as progress:
                    finished[number] = write_file(path, gather_groups(again), source, provenance, progress, math.inf)
                has_renewed = True
    return has_renewed


def package_images(options: argparse.Namespace) -> cli.StageResult:
    """Package the images and return the counts.

    Raises InputError where the input cannot be read, StaleOutputError where the output was made of others,
    PipelineError where more images are bad than allowed.
    """
    columns = {"id_column": options.id_column, "image_column": options.image_column}
    source = open_source(InputOptions(input=options.input, keep_columns=options.keep_columns, **columns))
    if taken := {field.name for field in source.fields} & {IMAGE_COLUMN, VALID_COLUMN, EMBEDDING_COLUMN}:
        problem = f"column {min(taken)} has the name of one that is made here: give it another name, or do not keep it"
        raise InputError(f"{options.input}: {problem}")
    provenance = make_provenance(STAGE, source.inputs, {})
    result = cli.StageResult(STAGE)
    output = options.output.resolve()
    finished = find_package(output, provenance, options.overwrite)
    if finished:
        has_renewed = renew(output, source, provenance, finished)
        (result.written if has_renewed else result.kept).append(options.output)
    else:
        with workspace.writing_folder(output, resumable=True, made=r"\d{5}\.parquet|_rejects") as folder:
            finished = fill(folder, source, provenance)
        result.written.append(options.output)
    for file in finished:
        result.add(file["counts"], file["reasons"])
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(__doc__ or "", config=False)
    add = parser.add_argument
    add("--input", "-i", type=Path, required=True, metavar="PATH", help="a folder, a .csv, .tar or .parquet")
    add("--output", "-o", type=Path, required=True, metavar="DIR", help="folder to write or resume")
    add(
        "--max-reject-fraction", type=fraction, default=0.2, metavar="X",
        help="exit 1 if a larger share of the images cannot be used (0.2)",
    )  # fmt: skip
    add_column_options(parser)
    add("--overwrite", action="store_true", help="make a package anew that is there; the old one stays until then")
    options = parser.parse_args(argv)
    check_places(options.input, options.output)
    cli.run_logged(STAGE, lambda: package_images(options), None, max_reject_fraction=options.max_reject_fraction)


if __name__ == "__main__":
    cli.run_guarded(main)
