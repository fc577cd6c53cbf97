"""Take a folder of photographs for packaged images: the path below the folder is the identifier."""

import os
from pathlib import Path

import pyarrow as pa

from pipeline.log import logger

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Photographs of one row group, which is what `--shard` deals out.
IMAGES_PER_GROUP = 1000
ImageFile = tuple[str, int]  # path below the folder, bytes


def list_images(folder: Path) -> list[ImageFile]:
    """Return the photographs below a folder by path, with their sizes; hidden names and links are passed over."""
    found, num_links = [], 0
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith(".") or not name.lower().endswith(IMAGE_SUFFIXES):
                continue
            path = os.path.join(place, name)  # noqa: PTH118 (a million Path objects take seconds)
            if os.path.islink(path):  # noqa: PTH114 (nothing outside the folder is opened)
                num_links += 1
            else:
                found.append((os.path.relpath(path, folder).replace(os.sep, "/"), os.stat(path).st_size))  # noqa: PTH116
    if num_links:
        logger.warning("%s: %d links are passed over: copy the files there", folder, num_links)
    return sorted(found, key=lambda image: name_id(image[0]))


def name_id(name: str) -> str:
    """Return the identifier of a path; what is not UTF-8 in it is written as an escape."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def read_images(folder: Path, images: tuple[ImageFile, ...], schema: pa.Schema) -> pa.Table:
    """Return the photographs as packaged rows; a file that cannot be read any more has null bytes."""
    contents: list[bytes | None] = []
    for name, _ in images:
        try:
            contents.append((folder / name).read_bytes())
        except OSError:
            contents.append(None)
    ids = pa.array([name_id(name) for name, _ in images], schema.field(0).type)
    return pa.Table.from_arrays([ids, pa.array(contents, schema.field(1).type)], schema=schema)
