"""Hashes of images, ids and parts, the same in every process."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.embeddings_dataset.columns import plain_values


def hash_bytes(data: bytes, salt: bytes = b"") -> int:
    """Return a 64-bit hash, the same in every process."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=salt).digest(), "little")


def hash_ids(values: Sequence[object], salt: bytes = b"") -> list[int]:
    """Return the 64-bit hashes of plain Python values."""
    return [hash_bytes(repr(value).encode("utf-8", "surrogatepass"), salt) for value in values]


def checksum_tables(*tables: pa.Table) -> str:
    """Return a hash of the values of tables, whatever their chunks and encodings are; float lists count by their bytes.

    A column's plain Python values are hashed as text, which for the ids of a part costs about a millisecond.
    """
    digest = hashlib.blake2b(digest_size=16)
    for table in tables:
        for field, column in zip(table.schema, table.columns, strict=True):
            # A list's type names its element otherwise after it was stored.
            kind = "list" if pa.types.is_nested(field.type) else str(field.type)
            digest.update(f"{field.name}\0{kind}\0{len(column)}\0".encode())
            for chunk in column.chunks:
                # Lists of text come as objects, whose bytes are addresses.
                numeric = pa.types.is_fixed_size_list(chunk.type) and pa.types.is_primitive(chunk.type.value_type)
                if numeric and chunk.null_count == 0:
                    digest.update(np.ascontiguousarray(chunk.flatten().to_numpy(zero_copy_only=False)).tobytes())
                else:
                    for value in plain_values(chunk):
                        digest.update(repr(value).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
