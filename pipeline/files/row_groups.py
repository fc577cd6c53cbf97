"""A parquet whose row groups are encoded by several threads: Arrow's writer encodes one after the other.

Each row group is made as a small file in memory. Its pages are copied as they are, and what its footer says of them
goes into the footer of the whole, with their places moved. A footer is a Thrift struct in the compact protocol
(thrift.apache.org, thrift-compact-protocol.md); its fields have the numbers of parquet.thrift (Apache Parquet format).
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.files.tables import PROVENANCE_KEY, choose_encodings
from pipeline.files.writing import writing_to

_MAGIC = b"PAR1"
# A dictionary that the table brings may take so much of a row group; Arrow's own limit is 1 MiB.
_DICTIONARY_BYTES = 64 << 20
# FileMetaData, RowGroup, ColumnChunk, and in ColumnMetaData the places of data, index, dictionary and Bloom filter.
_SCHEMA, _NUM_ROWS, _ROW_GROUPS = 2, 3, 4
_COLUMNS, _GROUP_OFFSET = 1, 5
_METADATA, _COLUMN_OFFSETS = 3, (9, 10, 11, 14)
# The compact protocol's types.
_TRUE, _FALSE, _BYTE, _INT16, _INT32, _INT64, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = (*range(1, 11), 12)
# Bytes of a value; a truth value is its field's type, and a footer has no list of them.
_SIZES = {_TRUE: 0, _FALSE: 0, _BYTE: 1, _DOUBLE: 8}

# A struct's fields by their numbers: each field's type and value. A list is its elements' type and the elements.
Struct = dict[int, tuple[int, Any]]


def encode_row_group(table: pa.Table, schema: pa.Schema) -> pa.Buffer:
    """Return a parquet that holds a table as one row group, as `schema`, the output's, wants it encoded.

    Strings may come as dictionaries, which are then written as they are, and without statistics: finding a
    dictionary's least value took as long as all the rest.
    """
    brought = [f"{field.name}.list.element" for field in table.schema if _is_dictionary_list(field.type)]
    leaves = [f"{field.name}.list.element" if pa.types.is_nested(field.type) else field.name for field in table.schema]
    sink = pa.BufferOutputStream()
    options = choose_encodings(schema) | {"write_statistics": [leaf for leaf in leaves if leaf not in brought]}
    with pq.ParquetWriter(sink, table.schema, dictionary_pagesize_limit=_DICTIONARY_BYTES, **options) as writer:
        writer.write_table(table, row_group_size=len(table))
    return sink.getvalue()


def _is_dictionary_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) and pa.types.is_dictionary(kind.value_type))


def join_row_groups(path: Path, schema: pa.Schema, provenance: dict[str, Any], row_groups: Iterable[pa.Buffer]) -> None:
    """Write what `encode_row_group` returned as one parquet of `schema`, which appears when it is complete."""
    described = schema.with_metadata({PROVENANCE_KEY: json.dumps(provenance, sort_keys=True)})
    sink = pa.BufferOutputStream()
    pq.ParquetWriter(sink, described).close()
    _, whole = _split(sink.getvalue())
    joined: list[Struct] = []
    num_rows = 0
    with writing_to(path) as temporary, open(temporary, "wb") as file:
        file.write(_MAGIC)
        for encoded in row_groups:
            pages, footer = _split(encoded)
            if footer[_SCHEMA] != whole[_SCHEMA]:
                raise ValueError(f"a row group of {path} has other columns than the file")
            for group in footer[_ROW_GROUPS][1][1]:
                _move(group, file.tell() - len(_MAGIC))
                joined.append(group)
            num_rows += footer[_NUM_ROWS][1]
            file.write(pages)
        whole |= {_NUM_ROWS: (_INT64, num_rows), _ROW_GROUPS: (_LIST, (_STRUCT, joined))}
        written = _write_value(_STRUCT, whole)
        file.write(written + len(written).to_bytes(4, "little") + _MAGIC)


def _split(encoded: pa.Buffer) -> tuple[memoryview, Struct]:
    """Return the pages of a parquet in memory, and its footer."""
    content = memoryview(encoded)
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    footer: Struct = _Reader(content[start:-8]).read_value(_STRUCT)
    return content[len(_MAGIC) : start], footer


def _move(group: Struct, offset: int) -> None:
    """Have a row group start `offset` bytes further on."""
    places = [(group, _GROUP_OFFSET)]
    for column in group[_COLUMNS][1][1]:
        places += [(column[_METADATA][1], number) for number in _COLUMN_OFFSETS]
    for struct, number in places:
        if number in struct:
            struct[number] = (_INT64, struct[number][1] + offset)


class _Reader:
    """Reads values in Thrift's compact protocol."""

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self._place = 0

    def read_value(self, kind: int) -> Any:
        """Return the next value, of a type."""
        if kind == _STRUCT:
            return self._read_struct()
        if kind in (_LIST, _SET):
            return self._read_list()
        if kind in (_INT16, _INT32, _INT64):
            return self._read_int()
        return self._take(self._read_varint() if kind == _BINARY else _SIZES[kind])

    def _read_struct(self) -> Struct:
        found: Struct = {}
        number = 0
        while header := self._take(1)[0]:
            number = number + (header >> 4) if header >> 4 else self._read_int()
            found[number] = (header & 15, self.read_value(header & 15))
        return found

    def _read_list(self) -> tuple[int, list[Any]]:
        header = self._take(1)[0]
        size = header >> 4 if header >> 4 < 15 else self._read_varint()
        return header & 15, [self.read_value(header & 15) for _ in range(size)]

    def _read_int(self) -> int:
        value = self._read_varint()
        return (value >> 1) ^ -(value & 1)

    def _read_varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def _take(self, count: int) -> bytes:
        self._place += count
        return bytes(self._content[self._place - count : self._place])


def _write_value(kind: int, value: Any) -> bytes:
    """Return a value of a type in Thrift's compact protocol."""
    if kind == _STRUCT:
        return _write_struct(value)
    if kind in (_LIST, _SET):
        element, elements = value
        size = bytes([len(elements) << 4 | element]) if len(elements) < 15 else bytes([0xF0 | element])
        size += b"" if len(elements) < 15 else _write_varint(len(elements))
        return size + b"".join(_write_value(element, each) for each in elements)
    if kind in (_INT16, _INT32, _INT64):
        return _write_int(value)
    written: bytes = (_write_varint(len(value)) if kind == _BINARY else b"") + value
    return written


def _write_struct(fields: Struct) -> bytes:
    parts = []
    last = 0
    for number, (kind, value) in sorted(fields.items()):
        step = number - last
        parts.append(bytes([step << 4 | kind]) if step < 16 else bytes([kind]) + _write_int(number))
        parts.append(_write_value(kind, value))
        last = number
    return b"".join(parts) + b"\0"


def _write_int(value: int) -> bytes:
    return _write_varint(value << 1 if value >= 0 else (-value << 1) - 1)


def _write_varint(value: int) -> bytes:
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    return bytes(written) + bytes([value])
