"""Raw tars in the dataset's layout with drawn pictures: whole ones, and ones with any defect."""

import io
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image


@dataclass(frozen=True)
class Entry:
    """A member of a tar to be written."""

    name: str
    data: bytes = b""
    kind: bytes = tarfile.REGTYPE
    link: str = ""


def draw_view(building: int, view: int = 0, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """Draw a pattern of coloured blocks that is the building's own, moved and lit as the view says."""
    blocks = np.random.default_rng(building).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
    noise = np.random.default_rng((building, view)).integers(-9, 10, pixels.shape)
    return Image.fromarray((np.roll(pixels, 5 * view, axis=1) + noise + 7 * view).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """Return an image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_d_line(
    target_id: object = 1,
    patch_id: object = 1,
    *,
    dataset_id: object = 1,
    street_view_id: object = 500,
    lat: object = 52.2,
    lon: object = 0.12,
) -> str:
    """Return a metadata line: d and 17 numbers."""
    ids = f"{dataset_id} {target_id} {patch_id} {street_view_id}"
    return f"d {ids} {lat} {lon} 7.5 0.6 0.8 0.0 52.2001 0.1201 2.5 12.25 -90.5 10.125 0"


def make_view(
    stem: str,
    target_id: object,
    patch_id: object,
    *,
    image: bytes | None = None,
    text: bytes | None = None,
    suffix: str = ".jpg",
    **fields: object,
) -> list[Entry]:
    """Return an image and its metadata, sound ones where none are given."""
    image = encode(draw_view(len(stem))) if image is None else image
    text = (write_d_line(target_id, patch_id, **fields) + "\n").encode() if text is None else text
    return [Entry(stem + suffix, image), Entry(stem + ".txt", text)]


def make_city(dataset_id: int, images_of_buildings: Sequence[int]) -> list[Entry]:
    """Return the views of buildings with so many images each; the patches count from 1 through the dataset."""
    entries, patch = [], 0
    for building, num_images in enumerate(images_of_buildings, start=1):
        for view in range(num_images):
            patch += 1
            entries += make_view(
                f"{dataset_id:04d}/{dataset_id:04d}/{dataset_id:04d}_{patch:06d}_{view}_{building:06d}",
                building,
                patch,
                image=encode(draw_view(1000 * dataset_id + building, view), quality=85),
                dataset_id=dataset_id,
                street_view_id=500 + view,
                lat=52.2 + 0.0004 * building,
                lon=0.12 + 0.01 * dataset_id,
            )
    return entries


def write_tar(path: Path, entries: Iterable[Entry], tar_format: int = tarfile.GNU_FORMAT) -> Path:
    """Write a plain tar; a name's surrogates become the bytes that they stand for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format, encoding="utf-8", errors="surrogateescape") as tar:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.type, info.linkname, info.size = entry.kind, entry.link, len(entry.data)
            tar.addfile(info, io.BytesIO(entry.data))
    return path


def replace_tar(path: Path, entries: Iterable[Entry]) -> None:
    """Write another tar in a tar's place; its intermediate becomes another program's, which names no tar."""
    write_tar(path, entries)
    intermediate = path.parents[1] / "intermediates" / f"{path.stem}.parquet"
    pq.write_table(pq.read_table(intermediate).replace_schema_metadata(), intermediate)


def find_member(path: Path, name: str) -> tarfile.TarInfo:
    """Return where a member lies."""
    with tarfile.open(path) as tar:
        return tar.getmember(name)
