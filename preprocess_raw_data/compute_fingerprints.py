"""Stage 4: average every image to a few coloured cells, the fingerprint by which stage 5 finds look-alikes.

    python preprocess_raw_data/compute_fingerprints.py --config config.toml

Reads intermediates_dir/NNNN.parquet and raw_dir/NNNN.tar, streaming. Writes fingerprints_dir/NNNN_fingerprints.parquet
and what was rejected, with reasons, in fingerprints_dir/_rejects/. A rerun keeps the tars that are done.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline import cli
from pipeline.config import Config
from pipeline.errors import InputError, Rejection, catch_rejection
from pipeline.files.archive import TarImage, read_images
from pipeline.files.identity import identify
from pipeline.files.list_columns import find_fingerprint
from pipeline.files.tables import (
    FINGERPRINT_ID_SCHEMA,
    count_rejects,
    make_provenance,
    parquet_writer,
    rejects_path,
    write_rejects,
)
from pipeline.files.units import Provenance, TarUnit, UnitState, do_tars, list_tar_units
from pipeline.inference.images import decode_rgb_small, log_turned
from pipeline.log import Progress, Stopwatch
from pipeline.reference.tar_files import check_foreign_output, read_intermediate
from pipeline.stages import STAGES
from pipeline.threads import map_in_order

STAGE = "compute_fingerprints"
PATH_FIELD = pa.field("image_path", pa.string())
# 6 MB of 16 x 16 fingerprints; the writer holds a group, at twelve times that.
ROWS_PER_GROUP = 8_192

# A reduced decode must leave so many pixels of a cell in each direction: on photographs and noise of any size the
# fingerprint then stays within 0.4 grey levels of the full decode.
MIN_PIXELS_PER_CELL = 8


def choose_scale(width: int, height: int, image_size: int) -> int:
    """Return the largest factor of 8, 4, 2 by which a reduced decode still resolves the cells, else 1.

    A scale at which the cells' borders fall between its pixels loses nothing.
    """
    for scale in (8, 4, 2):
        aligned = width % (scale * image_size) == 0 and height % (scale * image_size) == 0
        if aligned or min(width, height) >= scale * image_size * MIN_PIXELS_PER_CELL:
            return scale
    return 1


def average_intervals(values: np.ndarray, extent: float, num_cells: int) -> np.ndarray:
    """Average along the first axis over `num_cells` equal parts of [0, extent]: (N, ...) gives (num_cells, ...).

    Value j stands for [j, j + 1], whole or in part. A running sum, because a matrix product would start the BLAS's own
    threads in each of ours.
    """
    edges = np.linspace(0.0, extent, num_cells + 1)
    whole = np.minimum(edges.astype(np.int64), len(values) - 1)
    part = (edges - whole).reshape(-1, *[1] * (values.ndim - 1))
    sums = np.zeros((len(values) + 1, *values.shape[1:]))
    np.cumsum(values, axis=0, dtype=np.float64, out=sums[1:])
    areas = sums[whole] + part * values[whole]
    return np.asarray(np.diff(areas, axis=0) * (num_cells / extent))


def average_cells(image: Image.Image, extent: tuple[float, float], image_size: int) -> np.ndarray:
    """Return the exact area average of an RGB image's part [0, extent], as (image_size, image_size, 3) uint8."""
    if extent == image.size and not any(side % image_size for side in image.size):  # whole pixels in every cell
        return np.asarray(image.reduce((image.width // image_size, image.height // image_size)))
    factors = [max(1, side // (2 * MIN_PIXELS_PER_CELL * image_size)) for side in image.size]
    if max(factors) > 1:  # a format without reduced decode: the sums of all its pixels could take gigabytes
        extent = (extent[0] / factors[0], extent[1] / factors[1])
        image = image.reduce((factors[0], factors[1]))
    rows = average_intervals(np.asarray(image), extent[1], image_size)  # (image_size, W, 3)
    cells = average_intervals(rows.swapaxes(0, 1), extent[0], image_size).swapaxes(0, 1)
    return np.asarray(np.rint(cells).clip(0, 255), np.uint8)


# Goes into the provenance, so that fingerprints of another descriptor do not count as complete.
DESCRIPTOR = "area_mean_rgb"


def fingerprint_width(image_size: int) -> int:
    return image_size * image_size * 3


def compute_fingerprint(data: bytes, image_size: int) -> np.ndarray:
    """Return an encoded image's fingerprint: `fingerprint_width` numbers, uint8.

    To use another descriptor, change this function, the width and the name above. Raises Rejection
    `unreadable_image` or `image_too_large`.
    """
    image, extent = decode_rgb_small(data, lambda width, height: choose_scale(width, height, image_size))
    return average_cells(image, extent, image_size).reshape(-1)


def write_tar(unit: TarUnit, provenance: Provenance, config: Config, watch: Stopwatch) -> Provenance:
    """Make one tar's fingerprints and its rejects, and return the provenance with the counts.

    Raises InputError if the tar or its intermediate is missing or damaged.
    """
    side = config.fingerprints.image_size
    views = read_intermediate(unit, [*FINGERPRINT_ID_SCHEMA, PATH_FIELD])
    names = views[PATH_FIELD.name].to_pylist()
    rows = {name: row for row, name in enumerate(names)}
    absent = Rejection("missing_image", f"not in {unit.tar_path.name}")
    outcomes: list[np.ndarray | Rejection] = [absent] * len(names)

    def compute(image: TarImage) -> tuple[TarImage, np.ndarray | Rejection]:
        return image, catch_rejection(compute_fingerprint, image.data, side)

    images = watch.measure_each("read", read_images(unit.tar_path, rows))
    computed = map_in_order(compute, images, config.infrastructure.count_workers(), weigh=lambda image: len(image.data))
    with Progress(unit.tar_path.name, len(names)) as progress:
        for image, outcome in computed:
            outcomes[image.row] = outcome
            progress.advance()
    rejects = [(name, one) for name, one in zip(names, outcomes, strict=True) if isinstance(one, Rejection)]
    provenance = count_rejects(provenance, len(names), (rejection for _, rejection in rejects))
    write_rejects(rejects_path(unit.output_path), sorted(rejects, key=lambda reject: reject[0]), provenance)
    fingerprints = [one for one in outcomes if not isinstance(one, Rejection)]
    keep = pa.array([not isinstance(one, Rejection) for one in outcomes], pa.bool_())
    schema = pa.schema([*FINGERPRINT_ID_SCHEMA, ("fingerprint", pa.list_(pa.uint8(), fingerprint_width(side)))])
    with watch.measure("write"), parquet_writer(unit.output_path, schema, provenance) as writer:
        values = np.concatenate([np.empty(0, np.uint8), *fingerprints])
        column = pa.FixedSizeListArray.from_arrays(pa.array(values), fingerprint_width(side))
        ids = views.select(FINGERPRINT_ID_SCHEMA.names).filter(keep)
        table = ids.append_column(schema.field("fingerprint"), column).cast(schema)
        writer.write_table(table, row_group_size=ROWS_PER_GROUP)
    return provenance


def list_units(config: Config, options: cli.Options = cli.NO_OPTIONS) -> list[TarUnit]:
    side = config.fingerprints.image_size

    def describe(unit: TarUnit) -> Provenance:
        inputs = [identify(unit.intermediate_path), *unit.identify_tar()]
        return make_provenance(STAGE, inputs, {"descriptor": DESCRIPTOR, "image_size": side})

    def take_over(unit: TarUnit) -> UnitState:
        column = find_fingerprint(unit.output_path)
        if column.width not in (None, fingerprint_width(side)):
            raise InputError(
                f"{unit.output_path}: fingerprints of {column.width} values, [fingerprints].image_size = {side} gives "
                f"{fingerprint_width(side)}: correct the setting, or move the file away to have it made again"
            )
        return check_foreign_output(unit, column, "--overwrite makes the whole file again")

    return list_tar_units(STAGES[4], config, options, describe, take_over)


def run(config: Config, options: cli.Options) -> cli.StageResult:
    """Compute every tar's fingerprints and return the counts.

    Raises InputError if a tar failed, PipelineError if too many images were rejected.
    """
    result = cli.StageResult(STAGE)
    do_tars(
        list_units(config, options), result, options.overwrite,
        make=lambda unit, provenance: write_tar(unit, provenance, config, result.watch),
    )  # fmt: skip
    log_turned()
    result.check_reject_fraction(config.data.max_reject_fraction)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    cli.run_from_command_line(STAGE, run, __doc__, argv, cli.add_tar_options)


if __name__ == "__main__":
    cli.run_guarded(main)
