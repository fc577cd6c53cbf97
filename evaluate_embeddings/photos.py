"""Fetch a few photographs out of the raw tars, by their offsets, as thumbnails that a page can carry."""

import base64
import io
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
from PIL import Image

from pipeline.errors import Rejection
from pipeline.images import MAX_IMAGE_BYTES, decode_rgb
from pipeline.tables import PLACE_COLUMNS, open_parquet

THUMBNAIL_SIDE = 224
JPEG_QUALITY = 80


class PhotoSource:
    """The photographs of a split; `problem` says why there are none."""

    def __init__(self, split_path: Path, raw_dir: Path | None) -> None:
        """Read where each row's image lies, if the split says so."""
        names = ["dataset_id", *(name for name, _ in PLACE_COLUMNS)]
        file = open_parquet(split_path)
        self.raw_dir = raw_dir
        self.problem: str | None = None
        self.num_missing = 0
        self._places: pa.Table | None = None
        if raw_dir is None or not raw_dir.is_dir():
            self.problem = "[paths].raw_dir is not set to a folder that is here"
        elif any(file.schema_arrow.get_field_index(name) < 0 for name in names):
            self.problem = f"{split_path.name} does not say where the images lie in their tars"
        else:
            self._places = file.read(columns=names)

    def read_thumbnails(self, rows: Iterable[int]) -> dict[int, str]:
        """Return, for the rows whose picture can be had, a JPEG as a data URI; the others are counted."""
        found = {}
        for row in sorted(set(rows)):
            try:
                found[row] = to_data_uri(self._read(row))
            except (Rejection, OSError):  # a tar that is gone, cut or changed leaves a gap, never a failure
                self.num_missing += 1
        return found

    def _read(self, row: int) -> Image.Image:
        if self._places is None or self.raw_dir is None:
            raise Rejection("missing_image", "no place is known")
        dataset_id, offset, size = (self._places.column(i)[row].as_py() for i in range(3))
        if offset is None or size is None or offset < 0 or not 0 < size <= MAX_IMAGE_BYTES:
            raise Rejection("missing_image", "no place is known")
        with open(self.raw_dir / f"{dataset_id:04d}.tar", "rb") as tar:
            tar.seek(offset)
            return decode_rgb(tar.read(size))


def to_data_uri(image: Image.Image) -> str:
    """Return an RGB image, shrunk to fit THUMBNAIL_SIDE, as a JPEG data URI."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
