"""Read a few photographs from the raw tars, by their offsets, as thumbnails for the page."""

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
from PIL import Image

from pipeline.errors import Rejection
from pipeline.files.archive import read_placed
from pipeline.files.tables import PLACE_COLUMNS, open_parquet
from pipeline.ids import tar_name
from pipeline.inference.images import decode_rgb
from pipeline.pages import to_data_uri

# Longest side in pixels, and JPEG quality: some 200 pictures of noise would take 13 MB.
SIDE, QUALITY = 224, 80


class PhotoSource:
    """The photographs of a split; `problem` gives the reason if there are none."""

    def __init__(self, split_path: Path, raw_dir: Path | None) -> None:
        """Read the place of each row's image from the split."""
        names = ["dataset_id", *(name for name, _ in PLACE_COLUMNS)]
        self.problem: str | None = None
        self.num_missing = 0
        if raw_dir is None or not raw_dir.is_dir():
            self.problem = "[paths].raw_dir is not set to a folder that is here"
        else:
            with open_parquet(split_path) as file:
                if {*names} <= {*file.schema_arrow.names}:
                    self._places: pa.Table = file.read(columns=names)
                else:
                    self.problem = f"{split_path.name} does not say where the images lie in their tars"
            self._tar_dir = raw_dir

    def read_thumbnails(self, rows: Iterable[int]) -> dict[int, str]:
        """Return a JPEG as a data URI for each row whose picture can be read, and count the other rows."""
        found: dict[int, str] = {}
        for row in dict.fromkeys(rows) if self.problem is None else ():
            try:
                found[row] = to_data_uri(self._read(row), SIDE, QUALITY)
            except (Rejection, OSError):  # a tar that is gone, cut or changed leaves a gap, never a failure
                self.num_missing += 1
        return found

    def _read(self, row: int) -> Image.Image:
        dataset_id, offset, size = (self._places.column(i)[row].as_py() for i in range(3))
        return decode_rgb(read_placed(self._tar_dir / tar_name(dataset_id), offset or 0, size or 0))
