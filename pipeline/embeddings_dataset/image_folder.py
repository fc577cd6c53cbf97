"""Take a folder of photographs for packaged images: the path below the folder is the identifier."""

import os
from pathlib import Path

import pyarrow as pa

from pipeline.files.listing import walk_files, warn_of_others
from pipeline.ids import decode_name
from pipeline.log import logger

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Photographs of one row group, which is what `--shard` deals out.
IMAGES_PER_GROUP = 1000
ImageFile = tuple[str, int]  # path below the folder, bytes


def list_images(folder: Path) -> list[ImageFile]:
    """Return the photographs below a folder by path, with their sizes; what else is there is counted.

    Links to folders are followed; links to files are passed over, as are names that begin with a dot. Raises
    InputError if a folder cannot be read.
    """
    found, others, num_links = [], [], 0
    for entry in walk_files(folder):
        name = os.path.relpath(entry.path, folder).replace(os.sep, "/")
        if not name.lower().endswith(IMAGE_SUFFIXES):
            others.append(name)
        elif entry.is_symlink():  # nothing outside the folders that are named is opened
            num_links += 1
        elif entry.is_file():
            found.append((name, entry.stat().st_size))
        else:  # a pipe would be waited for without end
            others.append(name)
    if num_links:
        logger.warning("%s: %d links are passed over: copy the files there", folder, num_links)
    warn_of_others(folder, map(decode_name, others), "photographs")
    return sorted(found, key=lambda image: decode_name(image[0]))


def read_images(folder: Path, images: tuple[ImageFile, ...], schema: pa.Schema) -> pa.Table:
    """Return the photographs as packaged rows; a file that cannot be read any more has null bytes."""
    contents: list[bytes | None] = []
    for name, _ in images:
        try:
            contents.append((folder / name).read_bytes())
        except OSError:
            contents.append(None)
    ids = pa.array([decode_name(name) for name, _ in images], schema.field(0).type)
    return pa.Table.from_arrays([ids, pa.array(contents, schema.field(1).type)], schema=schema)
