"""Sum embeddings by group, and make means and their spread from the sums."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.embeddings_dataset.columns import plain_values, take_rows
from pipeline.embeddings_dataset.parts import EMBEDDING_COLUMN, embeddings_of
from pipeline.files.column_types import whole_from_floats

Key = tuple[object, ...]
MEASURED = pa.schema([("num_images", pa.int64()), ("mean_pairwise_similarity", pa.float64())])


def keys_of(table: pa.Table, by: Sequence[str]) -> list[Key]:
    """Return the keys of a part's rows as plain values; NaN, which equals nothing, counts as null.

    Raises InputError where a key is a float that is not a whole number.
    """
    columns = (table.column(name).combine_chunks() for name in by)
    columns = (whole_from_floats(one, name, "--by", quiet=True) for one, name in zip(columns, by, strict=True))
    rows = zip(*map(plain_values, columns), strict=True)
    return [tuple(None if value != value else value for value in row) for row in rows]  # noqa: PLR0124


class Groups:
    """Groups in order of their first image: keys, and the sums of their embeddings, which are (G, D) float64."""

    def __init__(self, schema: pa.Schema, by: Sequence[str]) -> None:
        """Begin without groups, for embeddings of a dataset's schema."""
        self._key_schema = pa.schema([schema.field(name) for name in by])
        self._embedding = schema.field(EMBEDDING_COLUMN)
        self._numbers: dict[Key, int] = {}
        self._keys: list[pa.Table] = []
        self._sums: NDArray[np.float64] = np.zeros((1024, self._embedding.type.list_size))
        self._squares: NDArray[np.float64] = np.zeros(1024)  # (G,) sums of squared norms
        self._counts: NDArray[np.int64] = np.zeros(1024, dtype=np.int64)

    def add(self, table: pa.Table, keys: Sequence[Key], rows: NDArray[np.int64]) -> None:
        """Add rows of a part; `keys` are those of all its rows."""
        if not len(rows):
            return
        before = len(self._numbers)
        codes = np.array([self._numbers.setdefault(keys[row], len(self._numbers)) for row in rows.tolist()])
        new, firsts = np.unique(codes, return_index=True)
        first_rows = rows[firsts[new >= before]]
        columns = [take_rows(table.column(name).combine_chunks(), first_rows) for name in self._key_schema.names]
        self._keys.append(pa.Table.from_arrays(columns, schema=self._key_schema))
        while len(self._counts) < len(self._numbers):
            self._sums, self._squares, self._counts = (
                np.concatenate([one, np.zeros_like(one)]) for one in (self._sums, self._squares, self._counts)
            )
        embeddings = embeddings_of(table)[rows].astype(np.float64)  # (N, D)
        order = np.argsort(codes, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(codes[order]) > 0])
        found = codes[order][starts]
        self._sums[found] += np.add.reduceat(embeddings[order], starts, axis=0)
        self._squares[found] += np.add.reduceat((embeddings**2).sum(axis=1)[order], starts)
        self._counts[found] += np.diff(np.r_[starts, len(order)])

    def to_table(self) -> pa.Table:
        """Return keys, num_images, mean_pairwise_similarity and the L2-normalised mean.

        For n unit vectors of sum s the mean over pairs is (|s|^2 - n) / (n (n - 1)); it is null for one image. A mean
        of length zero has no direction, and is null.
        """
        num_groups = len(self._numbers)
        sums, counts = self._sums[:num_groups], self._counts[:num_groups]
        lengths = np.sqrt(np.einsum("gd,gd->g", sums, sums))
        pairs = counts * (counts - 1.0)
        similarity = (lengths**2 - self._squares[:num_groups]) / np.where(pairs > 0, pairs, 1)
        has_direction = lengths > 1e-6 * counts
        means = (sums / np.where(has_direction, lengths, 1)[:, None]).astype(np.float32)
        values = pa.FixedSizeListArray.from_arrays(
            pa.array(means.ravel(), pa.float32()), means.shape[1], mask=pa.array(~has_direction)
        )
        keys = pa.concat_tables([self._key_schema.empty_table(), *self._keys]).unify_dictionaries()
        columns = [*keys.columns, pa.array(counts), pa.array(similarity, mask=counts < 2), values]
        return pa.Table.from_arrays(columns, schema=pa.schema([*self._key_schema, *MEASURED, self._embedding]))
