from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.files.row_groups import encode_row_group, join_row_groups
from pipeline.files.tables import choose_encodings, parquet_writer, read_provenance

SCHEMA = pa.schema(
    [("id", pa.string()), ("names", pa.list_(pa.string())), ("sizes", pa.list_(pa.float32())), ("flag", pa.bool_())]
)
PROVENANCE = {"stage": "x", "counts": {"in": 5}}


def draw_table(num_rows: int, seed: int) -> pa.Table:
    generator = np.random.default_rng(seed)
    offsets = np.concatenate([[0], generator.integers(0, 5, num_rows).cumsum()]).astype(np.int32)
    values = generator.integers(0, 40, offsets[-1])
    return pa.table(
        {
            "id": [f"{seed}_{row}" for row in range(num_rows)],
            "names": pa.ListArray.from_arrays(pa.array(offsets), pa.array([f"name {value}" for value in values])),
            "sizes": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(np.float32) / 3)),
            "flag": [row % 3 == 0 or None for row in range(num_rows)],
        },
        schema=SCHEMA,
    )


def with_dictionary(table: pa.Table) -> pa.Table:
    names = table["names"].combine_chunks()
    coded = pa.ListArray.from_arrays(names.offsets, names.values.dictionary_encode())
    return table.set_column(1, "names", coded)


@pytest.mark.parametrize("sizes", [[1], [300, 7, 1], [40] * 40])
def test_joined_row_groups_are_the_bytes_of_arrows_own_writer(sizes: list[int], tmp_path: Path) -> None:
    drawn = [draw_table(size, seed) for seed, size in enumerate(sizes)]
    with parquet_writer(tmp_path / "own.parquet", SCHEMA, PROVENANCE) as writer:
        for table in drawn:
            writer.write_table(table)
    encoded = (encode_row_group(table, SCHEMA) for table in drawn)
    join_row_groups(tmp_path / "joined.parquet", SCHEMA, PROVENANCE, encoded)
    assert (tmp_path / "joined.parquet").read_bytes() == (tmp_path / "own.parquet").read_bytes()


def test_dictionaries_come_back_as_the_strings_that_they_stand_for(tmp_path: Path) -> None:
    drawn = [draw_table(size, seed) for seed, size in enumerate([50, 60, 70])]
    encoded = (encode_row_group(with_dictionary(table), SCHEMA) for table in drawn)
    path = tmp_path / "joined.parquet"
    join_row_groups(path, SCHEMA, PROVENANCE, encoded)
    assert pq.read_table(path).replace_schema_metadata(None).equals(pa.concat_tables(drawn))
    assert pq.read_schema(path).remove_metadata() == SCHEMA
    assert read_provenance(path) == PROVENANCE
    for group, table in enumerate(drawn):
        assert pq.ParquetFile(path).read_row_group(group)["names"].to_pylist() == table["names"].to_pylist()


def test_a_dictionary_larger_than_its_limit_is_written_as_strings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.files.row_groups._DICTIONARY_BYTES", 64)
    table = draw_table(500, 0)
    join_row_groups(tmp_path / "joined.parquet", SCHEMA, {}, [encode_row_group(with_dictionary(table), SCHEMA)])
    assert pq.read_table(tmp_path / "joined.parquet").replace_schema_metadata(None).equals(table)


def test_a_footer_of_every_length_of_number_is_written_as_it_was_read(tmp_path: Path) -> None:
    """Many row groups and long names: sizes above 14 and 127, numbers of several bytes."""
    schema = pa.schema([(f"column {number:03d} {'x' * 200}", pa.int64()) for number in range(20)])
    drawn = [pa.table([pa.array(np.arange(3) * 10**seed * (-1) ** seed)] * 20, schema=schema) for seed in range(18)]
    with parquet_writer(tmp_path / "own.parquet", schema, {}) as writer:
        for table in drawn:
            writer.write_table(table)
    join_row_groups(tmp_path / "joined.parquet", schema, {}, [encode_row_group(table, schema) for table in drawn])
    assert (tmp_path / "joined.parquet").read_bytes() == (tmp_path / "own.parquet").read_bytes()


def test_a_row_group_of_other_columns_is_no_part_of_the_file(tmp_path: Path) -> None:
    other = pa.table({"id": ["a"], "names": [["b"]], "sizes": [[1.0]]})
    with pytest.raises(ValueError, match="other columns than the file"):
        join_row_groups(tmp_path / "joined.parquet", SCHEMA, {}, [encode_row_group(other, other.schema)])
    assert list(tmp_path.iterdir()) == []


def test_the_encodings_are_those_of_all_outputs() -> None:
    chosen = choose_encodings(SCHEMA)
    assert chosen["use_byte_stream_split"] == ["sizes.list.element"]
    assert chosen["use_dictionary"] == ["id", "names.list.element", "flag"]
