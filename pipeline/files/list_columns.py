"""Read embeddings and fingerprints: columns of lists of one length.

This project writes fixed_size_list. Lists of other types, such as `list<double>`, are checked and converted batch by
batch. A column that is missing or of another type raises InputError.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.files.column_types import is_list_of
from pipeline.files.tables import open_parquet, read_batches

_REMEDIES = {"embedding": "make the file again with stage 2", "fingerprint": "make the file again with stage 4"}


@dataclass(frozen=True)
class ListColumn:
    """A column of lists of `width` numbers, read as `dtype`; the width is None if there are no rows to tell it."""

    path: Path
    name: str
    width: int | None
    dtype: np.dtype[Any]

    @property
    def arrow_type(self) -> pa.DataType:
        return pa.list_(pa.from_numpy_dtype(self.dtype), self.width or 0)

    def read(self, column: pa.Array, first_row: int, *, check_finite: bool = True) -> NDArray[Any]:
        """Return a batch's rows (n, width), from the file's row `first_row`; raise InputError naming a bad one."""
        width = self.width or 0
        lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
        self._refuse_first(lengths != width, first_row, f"is empty or has not {width} numbers as the first row has")
        stored = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), width)  # NaN for an empty value
        if self.dtype.kind == "u" and stored.dtype != self.dtype:
            self._refuse_first(
                ~((stored >= 0) & (stored <= 255)).all(axis=1), first_row, "holds an empty value or no byte (0 ... 255)"
            )
        with np.errstate(over="ignore"):  # too large a number becomes infinite, and is refused as that
            rows: NDArray[Any] = stored.astype(self.dtype, copy=False)
        if check_finite and self.dtype.kind == "f":
            self._refuse_first(
                ~np.isfinite(rows).all(axis=1), first_row, "holds an empty value or a number that is not finite"
            )
        return rows

    def _refuse_first(self, is_bad: NDArray[np.bool_], first_row: int, what: str) -> None:
        if is_bad.any():
            row = first_row + int(np.argmax(is_bad))
            raise InputError(f"{self.path}: column {self.name}: row {row} {what}: {_REMEDIES[self.name]}")


def find_width(columns: list[ListColumn], remedy: str) -> int:
    """Return the one width of the columns of several files, 0 without any row. Raises InputError where two differ."""
    known = next((column for column in columns if column.width), columns[0])
    for column in columns:
        if column.width not in (None, known.width):
            found = f"{column.name}s of {column.width} numbers, {known.path.name} has {known.width}"
            raise InputError(f"{column.path}: {found}: {remedy}")
    return known.width or 0


def _find(path: Path, name: str) -> ListColumn:
    wanted, what = (pa.int64(), "whole numbers") if name == "fingerprint" else (pa.float64(), "floats")
    with open_parquet(path) as file:
        schema = file.schema_arrow
    index = schema.get_field_index(name)
    if index < 0:
        raise InputError(f"{path}: column {name} is missing: {_REMEDIES[name]}")
    kind = schema.field(index).type
    is_fixed = pa.types.is_fixed_size_list(kind)
    if not is_list_of(kind, wanted) or (is_fixed and kind.list_size == 0):
        raise InputError(f"{path}: column {name} is {kind}, not lists of one length of {what}: {_REMEDIES[name]}")
    width = kind.list_size if is_fixed else None
    first = None if is_fixed else next(read_batches(path, [name], 1), None)
    if first is not None:
        width = pc.list_value_length(first.column(0))[0].as_py()
        if not width:
            raise InputError(f"{path}: column {name}: row 0 is empty: {_REMEDIES[name]}")
    stored = "u1" if wanted == pa.int64() else "f2" if kind.value_type == pa.float16() else "f4"
    return ListColumn(path, name, width, np.dtype(stored))


# Find a parquet's column: embeddings as float32 or float16, fingerprints as bytes.
find_embedding = functools.partial(_find, name="embedding")
find_fingerprint = functools.partial(_find, name="fingerprint")
