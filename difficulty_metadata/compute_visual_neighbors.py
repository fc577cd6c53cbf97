"""Stage 5: find every image's look-alikes among other buildings and sort them into bands of difficulty.

    python difficulty_metadata/compute_visual_neighbors.py --config config.toml

Reads fingerprints_dir/*_fingerprints.parquet. Writes difficulty_metadata_path, one row an image. The folder _NAME_parts
beside it holds the neighbours found so far: a rerun after a kill goes on there, and with --shard I/N the process that
finds all parts complete merges them. A rerun keeps a complete output.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

import numpy as np
import pyarrow as pa

from difficulty_metadata.neighbor_search.bands import (
    assign_bands,
    calibration_ratios,
    compute_band_edges,
    distance_ratios,
)
from difficulty_metadata.neighbor_search.fingerprints import ImageTable, read_images, stream_fingerprints
from difficulty_metadata.neighbor_search.neighbor_parts import PartStore
from difficulty_metadata.neighbor_search.pca import fit_pca
from pipeline import cli
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.files.identity import identify
from pipeline.files.listing import list_outputs
from pipeline.files.tables import make_provenance, parquet_writer
from pipeline.files.units import Provenance, Unit, find_complete, find_state, keep_complete, refuse_missing
from pipeline.log import Progress, Stopwatch, logger
from pipeline.stages import STAGES
from pipeline.threads import prefetch
from pipeline.workspace import discard

STAGE = "compute_visual_neighbors"
# The names are historical: the key is the image's id, the distances are Euclidean, between fingerprints.
DIFFICULTY_SCHEMA = pa.schema(
    [
        ("target_coord_hash", pa.string()),
        ("neighbor_building_ids", pa.list_(pa.string())),
        ("neighbor_distances_meters", pa.list_(pa.float32())),
        ("neighbor_bands", pa.list_(pa.int32())),
    ]
)
# At least so many images set the band edges: 5 % of a small city are too few.
MIN_SAMPLE = 10_000
# Parts searched together: a GPU takes 500,000 queries, whose neighbours take 1 GB.
PARTS_AT_ONCE = {"cpu": 1, "cuda": 25}
# Neighbours written at a time; a row group is a part, or less of it where an image has very many.
MAX_NEIGHBORS_PER_GROUP = 1 << 23


def compute_points(images: ImageTable, num_components: int) -> np.ndarray:
    """Return the images' points (N, d) float32 in the space of the leading principal components."""
    pca = fit_pca([stream_fingerprints(column) for column in images.fingerprints], images.width, num_components)
    logger.info("PCA: %d of %d dimensions", len(pca.components), images.width)
    return pca.project_all([stream_fingerprints(column) for column in images.fingerprints])


def search_parts(images: ImageTable, store: PartStore, todo: Sequence[int], config: Config, watch: Stopwatch) -> None:
    from difficulty_metadata.neighbor_search.neighbors import Exclusion, NeighborSearch
    from pipeline.inference.devices import choose_device, describe_device, needing_memory

    with watch.measure("pca"):
        points = compute_points(images, config.difficulty.pca_components)
    device = choose_device(config.infrastructure.device)
    within_m = config.difficulty.exclude_within_m
    exclusion = Exclusion(images.latitudes, images.longitudes, within_m) if within_m > 0 else None
    with needing_memory(f"the search among {len(images)} images", "or set [infrastructure].device to cpu"):
        search = NeighborSearch(
            points, images.building_codes, store.num_neighbors, config.difficulty.backend, device, exclusion
        )
        logger.info("searching %d images of %d buildings for %d parts: %s on %s",
                    len(images), len(images.building_ids), len(todo), search.backend,
                    describe_device(device))  # fmt: skip
        at_once, num_anchors = PARTS_AT_ONCE[search.device.type], sum(len(store.anchors(part)) for part in todo)
        with Progress("neighbours", num_anchors) as progress:
            for start in range(0, len(todo), at_once):
                anchors = [store.anchors(part) for part in todo[start : start + at_once]]
                with watch.measure("search"):
                    found = search.find(np.concatenate(anchors), progress.advance)
                ends = np.cumsum([len(part) for part in anchors])[:-1]
                with watch.measure("write"):
                    for part, *own in zip(todo[start:], *(np.split(values, ends) for values in found), strict=False):
                        store.write(part, *own)


def draw_sample(num_images: int, fraction: float, seed: int) -> np.ndarray:
    """Return which images (N,) bool set the band edges: a fraction of them, but at least MIN_SAMPLE or all."""
    size = min(num_images, max(MIN_SAMPLE, round(num_images * fraction)))
    is_drawn = np.zeros(num_images, dtype=bool)
    is_drawn[np.random.default_rng(seed).choice(num_images, size, replace=False)] = True
    return is_drawn


def calibrate(store: PartStore, config: Config) -> list[float]:
    is_drawn = draw_sample(store.num_anchors, config.difficulty.sample_fraction_for_bands, config.global_.seed)
    drawn = (store.read(part, "distances")[is_drawn[store.anchors(part)]] for part in store.parts)
    return compute_band_edges(
        np.concatenate([calibration_ratios(distances, config.difficulty.k0_for_local_scale) for distances in drawn])
    )


def build_rows(
    images: ImageTable, start: int, rows: np.ndarray, distances: np.ndarray, edges: list[float], k0: int
) -> pa.Table:
    """Return the output's rows for the images from `start` on, from their padded neighbours (B, k)."""
    is_found = rows >= 0
    offsets = pa.array(np.concatenate([[0], is_found.sum(axis=1).cumsum()]).astype(np.int32))
    names = images.building_ids.take(pa.array(images.building_codes[rows[is_found]]))
    bands = assign_bands(distance_ratios(distances, k0)[is_found], edges)
    lists = [pa.ListArray.from_arrays(offsets, column) for column in (names, pa.array(distances[is_found]), bands)]
    return pa.table([images.image_ids.slice(start, len(rows)).combine_chunks(), *lists], schema=DIFFICULTY_SCHEMA)


def merge(images: ImageTable, store: PartStore, path: Path, config: Config) -> Provenance:
    """Write the output from all parts, and return its provenance with the band edges and the counts.

    Raises InputError if a part is missing or damaged.
    """
    edges = calibrate(store, config)
    logger.info("band edges: %s", ", ".join(f"{edge:.4f}" for edge in edges))
    provenance = store.provenance | {"band_edges": edges, "counts": {"in": len(images), "out": len(images)}}
    step = max(1, MAX_NEIGHBORS_PER_GROUP // store.num_neighbors)

    def build() -> Iterator[pa.Table]:
        for part in store.parts:
            anchors, rows, distances = store.anchors(part), store.read(part, "rows"), store.read(part, "distances")
            for first in range(0, len(anchors), step):
                some = slice(first, first + step)
                k0 = config.difficulty.k0_for_local_scale
                yield build_rows(images, anchors[first], rows[some], distances[some], edges, k0)

    with closing(prefetch(build())) as tables, parquet_writer(path, DIFFICULTY_SCHEMA, provenance) as writer:
        for table in tables:
            writer.write_table(table)
    return provenance


def list_units(config: Config) -> list[Unit]:
    (path,) = STAGES[5].list_outputs(config)
    return [Unit(STAGE, (path,), lambda _: describe_output(config))]


def describe_output(config: Config) -> dict[str, Any]:
    """Return the provenance that the output must have, but for the band edges and counts."""
    paths = list_outputs(config.path("fingerprints_dir"), 4, "_fingerprints")
    settings = config.difficulty.model_dump(exclude={"backend"})
    return make_provenance(STAGE, [identify(source) for source in paths], settings | {"seed": config.global_.seed})


def run(config: Config, options: cli.Options) -> cli.StageResult:
    """Find the neighbours of this shard's images and, when all shards are done, write the output.

    Raises InputError if the fingerprints are missing or malformed, StaleOutputError if the output or a part was made
    from other inputs or settings.
    """
    config.require_paths("fingerprints_dir", "difficulty_metadata_path")
    path = config.path("difficulty_metadata_path")
    paths = list_outputs(config.path("fingerprints_dir"), 4, "_fingerprints")
    (unit,) = list_units(config)
    result = cli.StageResult(STAGE)
    refuse_missing(config, paths, "fingerprints")
    if keep_complete(unit, result, options.overwrite):
        return result
    with result.watch.measure("read"):
        images = read_images(paths)
    num_neighbors = min(config.difficulty.neighbors, len(images))
    store = PartStore(path.parent / f"_{path.stem}_parts", len(images), num_neighbors, describe_output(config))
    own = options.shard.take(list(store.parts))
    done = [part for part in store.parts if find_complete(store.unit(part), options.overwrite)]
    todo = [part for part in own if part not in done]
    if todo:
        search_parts(images, store, todo, config, result.watch)
    try:
        if all(find_state(store.unit(part)).is_complete for part in store.parts):
            with result.watch.measure("merge"):
                provenance = merge(images, store, path, config)
            discard(store.folder)
            result.add(provenance["counts"])
            result.written.append(path)
            return result
    except InputError:  # a part is not there
        if not keep_complete(unit, result, overwrite=False):
            raise
        return result
    if keep_complete(unit, result, options.overwrite):
        return result  # another shard's process has merged the parts and removed them
    logger.info("this shard is done; the last of the %d shards will write %s", options.shard.count, path)
    num_anchors = sum(len(store.anchors(part)) for part in own)
    result.add({"in": num_anchors, "out": num_anchors})
    (result.written if todo else result.kept).extend(map(store.path, own))
    return result


def main(argv: Sequence[str] | None = None) -> None:
    add_options = partial(cli.add_shard_option, unit="block of 20,000 images")
    cli.run_from_command_line(STAGE, run, __doc__, argv, add_options)


if __name__ == "__main__":
    cli.run_guarded(main)
