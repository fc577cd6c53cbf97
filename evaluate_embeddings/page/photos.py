"""Read a few photographs from the raw tars, by their offsets, as thumbnails for the page."""

from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import Rejection
from pipeline.files.archive import read_placed
from pipeline.files.tables import PLACE_COLUMNS, open_parquet
from pipeline.ids import tar_name
from pipeline.inference.images import decode_rgb
from pipeline.pages import to_data_uri

# Longest side in pixels, and JPEG quality: some 200 pictures of noise would take 13 MB.
SIDE, QUALITY = 224, 80


PLACES = ["dataset_id", *(name for name, _ in PLACE_COLUMNS)]


def read_thumbnails(split_path: Path, raw_dir: Path | None, rows: Iterable[int]) -> tuple[dict[int, str], str]:
    """Return a JPEG as a data URI for each row of a split whose picture can be read, and a note on the other rows."""
    if raw_dir is None:
        return {}, "The pictures are left out: [paths].raw_dir is not set to a folder that is here."
    with open_parquet(split_path) as file:
        if not {*PLACES} <= {*file.schema_arrow.names}:
            return {}, f"The pictures are left out: {split_path.name} does not say where the images lie in their tars."
        places = file.read(columns=PLACES).select(PLACES)
    found: dict[int, str] = {}
    wanted = set(rows)
    for row in wanted:
        dataset_id, offset, size = (column[row].as_py() for column in places.columns)
        try:
            photo = decode_rgb(read_placed(raw_dir / tar_name(dataset_id), offset or 0, size or 0))
        except (Rejection, OSError):  # a tar that is gone, cut or changed leaves a gap, never a failure
            continue
        found[row] = to_data_uri(photo, SIDE, QUALITY)
    num_missing = len(wanted) - len(found)
    return found, f"{num_missing} pictures are left out: their tars are gone or have changed." if num_missing else ""
