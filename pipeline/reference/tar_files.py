"""Take over the reference implementation's files: image paths with other folders, outputs without provenance."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.files.archive import stream_members
from pipeline.files.list_columns import ListColumn, find_embedding
from pipeline.files.tables import read_batches, read_columns, read_provenance
from pipeline.files.units import TarUnit, UnitState
from pipeline.ids import dataset_name
from pipeline.log import logger

_ID = pa.field("streetview_image_id", pa.string())
_BATCH_ROWS = 1024


def read_intermediate(unit: TarUnit, fields: Iterable[pa.Field], *, with_others: bool = False) -> pa.Table:
    """Return columns of a tar's intermediate, `image_path` among them; `with_others` all of them.

    The reference's image paths may begin with NNNN/ more or less often than the tar's members do: return the members'
    names. Raises InputError if the tar or the intermediate is damaged, the tar is not the one that it was made from, or
    it lacks a column or a value, names an image twice, or has a path that could be either of two members.
    """
    source = unit.intermediate_path
    provenance = read_provenance(source, warn=True)
    table = read_columns(source, fields, "make the file again with stage 1", with_others=with_others)
    paths = table["image_path"].to_pylist()
    if len(set(paths)) < len(paths):
        (twice, _), *_ = Counter(paths).most_common(1)
        raise InputError(f"{source}: image_path {twice} is there twice: make the file again with stage 1")
    if provenance is not None:
        unit.check_tar(provenance)
        return table
    names = match_members(unit.tar_path, unit.dataset_id, paths)
    num_changed = sum(name != path for name, path in zip(names, paths, strict=True))
    if num_changed:
        logger.info("%s: %d image paths have other folders there: matched", unit.tar_path.name, num_changed)
    return table.set_column(table.schema.get_field_index("image_path"), "image_path", pa.array(names, pa.string()))


def match_members(tar_path: Path, dataset_id: int, image_paths: list[str]) -> list[str]:
    """Return the member of each image path: the one of that very name, else the only one with other NNNN/ in front.

    Leave ambiguous paths unchanged.
    """
    counts = Counter(_strip(path, dataset_id) for path in image_paths)
    members = {
        member.name for member in stream_members(tar_path)
        if member.is_file and _strip(member.name, dataset_id) in counts
    }  # fmt: skip
    others: dict[str, list[str]] = {}  # members that no path names
    for member in sorted(members.difference(image_paths)):
        others.setdefault(_strip(member, dataset_id), []).append(member)
    names = []
    for path in image_paths:
        found = [] if path in members else others.get(key := _strip(path, dataset_id), [])
        if len(found) > 1:
            raise InputError(
                f"{tar_path}: image_path {path} may be {found[0]} or {found[1]}: make the intermediate again with "
                "stage 1"
            )
        names.append(found[0] if found and counts[key] == 1 else path)
    return names


def read_old_rows(path: Path, image_ids: pa.Array) -> tuple[list[int], NDArray[Any] | None]:
    """Return each row's place among `image_ids`, and the embeddings (n, width); none of a file with provenance."""
    if not path.exists() or read_provenance(path) is not None:
        return [], None
    ids, column = read_columns(path, [_ID], "make the file again")[_ID.name], find_embedding(path)
    values = [np.empty((0, column.width or 0), np.float32)]
    for batch in read_batches(column.path, [column.name], _BATCH_ROWS):
        values.append(column.read(batch.column(0), sum(map(len, values))).astype(np.float32))
    return pc.index_in(ids, value_set=image_ids).to_pylist(), np.concatenate(values)


def _strip(name: str, dataset_id: int) -> str:
    folder = f"{dataset_name(dataset_id)}/"
    while name.startswith((folder, "./")):
        name = name.partition("/")[2]
    return name


def check_foreign_output(unit: TarUnit, column: ListColumn, remedy: str) -> UnitState:
    """Return the state of an output without provenance that has a `column` for its intermediate's images.

    Images that it lacks are counted as dropped; `remedy` says how they are made. Raises InputError if a file is
    damaged, or the output has other images or one twice.
    """
    path, source = unit.output_path, unit.intermediate_path
    ids, wanted = (read_columns(place, [_ID], "make the file again")[_ID.name] for place in (path, source))
    strange = ids.filter(pc.invert(pc.is_in(ids, value_set=wanted.combine_chunks())))
    num_twice = len(ids) - pc.count_distinct(ids).as_py()
    if len(strange) or num_twice or not len(ids):
        problem = f"{len(strange)} images are in {path.name} only, as {strange[0]}" if len(strange) else (
            f"{num_twice} images are there twice" if num_twice else "it has no rows"
        )  # fmt: skip
        raise InputError(
            f"{path}: carries no provenance and does not match {source} ({problem}): move it away to have it made "
            "again, or make the intermediate again with stage 1"
        )
    note = (
        f"it carries no provenance, but has {len(ids)} of the {len(wanted)} images of {source.name}, {column.width} "
        "numbers each; it is taken to be made with the settings as they are"
    )
    num_missing = len(wanted) - len(ids)
    if num_missing:
        note += f"; {num_missing} images were not embedded by whoever wrote the file: {remedy}"
    return UnitState(True, {"in": len(wanted), "out": len(ids), "dropped": num_missing}, note=note)
