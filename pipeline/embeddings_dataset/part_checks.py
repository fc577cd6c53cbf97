"""Check one part of an embeddings dataset: what it says of itself, what it holds, what the input says."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.embeddings_dataset.columns import plain_values
from pipeline.embeddings_dataset.hashes import checksum_tables, unpack_hashes
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN, PackagedInput
from pipeline.embeddings_dataset.part_plans import PartContent
from pipeline.embeddings_dataset.parts import EMBEDDING_COLUMN, Part, embeddings_of, read_part
from pipeline.errors import DamagedError, one_line
from pipeline.files.tables import read_provenance

# The model normalises in float32.
NORM_TOLERANCE = 1e-3
RECIPE_KEYS = ("input_size", "row_group_fingerprint", "read_batch_size", "filter_valid", "embedding_version")


def open_part(path: Path, recipe: dict[str, Any]) -> Part | str:
    """Open a part that was made as `recipe` says, or say what is wrong with it.

    Raises ForeignError for a parquet that was not written here, InputError for one that cannot be read now.
    """
    try:
        part = read_part(path)
    except DamagedError as error:
        return one_line(error).removeprefix(f"{path}: ")
    if part.plan.name != path.name:
        return f"holds the rows of {part.plan.name}"
    for key in RECIPE_KEYS:
        if part.recipe.get(key) != recipe.get(key):
            return f"made with another {key} ({part.recipe.get(key)!r}, the dataset has {recipe.get(key)!r})"
    return part


def check_part(part: Part) -> str | None:
    """Say what is wrong with what a part holds, None where nothing is.

    Raises InputError for one that cannot be read now.
    """
    if not part.rejects_path.exists():
        return "its rejects are missing: no such file"
    try:
        content = part.read_content()
        if read_provenance(part.rejects_path) != part.provenance:
            return "its rejects are those of another part or run"
        return check_counts(part, content) or check_values(part, content)
    except DamagedError as error:
        return one_line(error)
    except (KeyError, TypeError, ValueError) as error:  # a changed byte in a column's name, a hash, a count
        return f"damaged ({one_line(error)[:200]})"


def check_counts(part: Part, content: PartContent) -> str | None:
    """Say in what rows, rejects and hashes are not what the part says of itself, None where they are."""
    counts, plan = part.record.counts, part.plan
    if content.counts != counts:
        return f"holds {content.counts}, but says {counts}"
    if counts["in"] > plan.num_rows:
        return f"accounts for {counts['in']} rows of a read batch of {plan.num_rows}"
    rows = content.rejects.column("row").to_numpy()
    inside = (rows >= plan.first_row) & (rows < plan.first_row + counts["in"])
    if not inside.all() or (np.diff(rows) <= 0).any():
        return "its rejects list rows that are not its own, or one twice"
    if dict(Counter(content.rejects.column("reason").to_pylist())) != part.record.reasons:
        return "its rejects have other reasons than it says"
    if unpack_hashes(content.hashes).shape[1] != counts["out"]:
        return "its image hashes are not one for each embedding"
    return None


def check_values(part: Part, content: PartContent) -> str | None:
    """Say what is wrong with the values of a part, None where nothing is."""
    kind = content.embedded.schema.field(EMBEDDING_COLUMN).type
    if not (pa.types.is_fixed_size_list(kind) and kind.value_type == pa.float32()):
        return f"its embeddings are {kind}"
    if content.embedded.column(EMBEDDING_COLUMN).null_count:
        return "an embedding is null"
    embeddings = embeddings_of(content.embedded)  # (N, D)
    if not np.isfinite(embeddings).all():
        return f"embedding {int(np.flatnonzero(~np.isfinite(embeddings).all(axis=1))[0])} is not finite"
    norms = np.linalg.norm(embeddings.astype(np.float64), axis=1)  # a changed byte may make a number huge
    if (np.abs(norms - 1) > NORM_TOLERANCE).any():
        row = int(np.argmax(np.abs(norms - 1)))
        return f"embedding {row} has norm {norms[row]:.4f}"
    if part.checksum is not None and checksum_tables(content.embedded, content.rejects) != part.checksum:
        return "its data are not those of its checksum"
    return None


def check_against_input(part: Part, table: pa.Table, source: PackagedInput) -> str | None:
    """Say in what a part does not account for the rows of its read batch, in order, None where it does.

    `table` is the read batch without images. Rows that were deleted are not looked for one by one.
    """
    content = part.read_content()
    table = table.slice(0, part.record.counts["in"])
    if part.record.counts.get("deleted", 0):
        return None if table.num_rows == part.record.counts["in"] else "accounts for rows that the input lacks"
    ids = _values(table.column(ID_COLUMN))
    rows = source.embedded_rows(table, part.plan.first_row, content.rejects)
    if not _same([ids[row] for row in rows], _values(content.embedded.column(ID_COLUMN))):
        return "its ids are not those of the input's rows"
    rejected = content.rejects.column("row").to_numpy() - part.plan.first_row
    if not _same([ids[row] for row in rejected], _values(content.rejects.column(ID_COLUMN))):
        return "its rejected ids are not those of the input's rows"
    return None


def _values(column: pa.ChunkedArray) -> list[object]:
    return [value for chunk in column.chunks for value in plain_values(chunk)]


def _same(one: list[object], other: list[object]) -> bool:
    """Whether ids are the same, in order; NaN, which pandas makes of a missing number, is as good as any."""
    return [repr(value) for value in one] == [repr(value) for value in other]
