"""Parquet as the stages exchange it: in one piece, with provenance, read with checks."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import workspace
from pipeline.errors import DamagedError, InputError, PipelineError, Rejection, StaleOutputError
from pipeline.files import column_types, identity, tables

PROVENANCE = {"stage": "somewhere", "version": "1", "inputs": [], "settings": {"a": 1}}
SCHEMA = pa.schema([("id", pa.int64()), ("name", pa.string()), ("embedding", pa.list_(pa.float32(), 8))])


def make_table(rows=100, kind=None):
    kind = kind or pa.float32()
    values = np.random.default_rng(0).normal(size=rows * 8).astype("f2" if kind == pa.float16() else "f4")
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(values), 8)
    return pa.table({"id": list(range(rows)), "name": [f"n{row % 3}" for row in range(rows)], "embedding": embedding})


def list_files(folder):
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("content", [None, b"{", b"[1]", b"null", b"\xff\xfe", b'"text"'])
def test_json_that_is_missing_damaged_or_no_object_reads_as_empty(tmp_path, content):
    path = tmp_path / "state.json"
    if content is not None:
        path.write_bytes(content)
    assert workspace.read_json_object(path) == {}
    workspace.write_json(path, {"a": [1]})
    assert workspace.read_json_object(path) == {"a": [1]}


def test_a_file_appears_only_when_its_block_has_ended_well(tmp_path):
    path = tmp_path / "new" / "a.bin"
    with workspace.writing_to(path) as temporary:
        temporary.write_bytes(b"all of it")
        assert not path.exists()
        assert temporary.parent.samefile(path.parent)
        assert temporary.name.startswith(".")
    assert path.read_bytes() == b"all of it"
    assert list_files(path.parent) == ["a.bin"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, InputError, OSError])
def test_whatever_goes_wrong_the_old_file_stays_and_nothing_else(tmp_path, failure):
    path = tmp_path / "a.parquet"
    tables.write_parquet(path, make_table(), PROVENANCE)
    before = path.read_bytes()

    def fail():
        with tables.parquet_writer(path, SCHEMA, PROVENANCE) as writer:
            writer.write_table(make_table(5).cast(SCHEMA))
            raise failure("it went wrong")

    with pytest.raises((failure, PipelineError)):
        fail()
    assert path.read_bytes() == before
    assert list_files(tmp_path) == ["a.parquet"]


def test_a_kill_leaves_nothing_under_the_final_name_and_the_next_write_clears_up(tmp_path):
    path = tmp_path / "a.parquet"
    script = (
        "import os, sys; from pathlib import Path; from pipeline import workspace\n"
        "with workspace.writing_to(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script, path], check=False).returncode == -9
    (left,) = list_files(tmp_path)
    assert left.startswith(".a.parquet.")
    tables.write_parquet(path, make_table(), PROVENANCE)
    assert list_files(tmp_path) == ["a.parquet"]


def test_temporaries_of_running_processes_other_hosts_and_other_kinds_are_left_alone(tmp_path):
    path = tmp_path / "a.bin"
    own, host, token = workspace.temporary_path(path).name, workspace._host(), "0" * 16
    strangers = {own, f".a.bin.{host}-1-{token}.tmp", f".a.bin.elsewhere-9999999-{token}.tmp", ".a.bin.rows"}
    for name in {f".a.bin.{host}-9999999-{token}.tmp"} | strangers:
        (tmp_path / name).touch()
    (tmp_path / f".a.bin.{host}-9999998-{token}.tmp").mkdir()
    workspace.clear_temporaries.cache_clear()
    workspace.clear_temporaries(tmp_path)
    assert set(list_files(tmp_path)) == strangers


def test_the_first_write_into_a_folder_clears_it_of_dead_processes_and_no_later_one_looks_again(tmp_path):
    ours = workspace.temporary_path(tmp_path / "b.bin").name
    dead = f".b.bin.{workspace._host()}-9999999-{'0' * 16}.tmp"
    for name in (ours, dead):
        (tmp_path / name).touch()
    workspace.write_json(tmp_path / "a.json", 1)
    assert set(list_files(tmp_path)) == {"a.json", ours}  # another thread of ours may be at work on it
    (tmp_path / dead).touch()
    workspace.write_json(tmp_path / "a.json", 2)
    assert dead in list_files(tmp_path)


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workspace.os, "fsync", refuse)
    with pytest.raises(PipelineError) as caught:
        workspace.write_json(tmp_path / "a.json", {"a": 1})
    assert str(caught.value) == (
        f"cannot write {tmp_path}/a.json (No space left on device): "
        "free space or allow writing there, then run this again"
    )
    assert list_files(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte; skips where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("only root can mount a small file system")
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_keeps_the_old_file(small_disk):
    path = small_disk / "a.parquet"
    tables.write_parquet(path, make_table(), PROVENANCE)
    with pytest.raises(PipelineError, match=r"cannot write .*a\.parquet \(No space left on device\)"):
        tables.write_parquet(path, make_table(60_000), PROVENANCE)
    assert pq.read_table(path).num_rows == 100
    assert list_files(small_disk) == ["a.parquet"]


def test_a_read_only_disk_is_one_line(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for path in (small_disk / "a.parquet", small_disk / "new" / "a.parquet"):
        with pytest.raises(PipelineError, match=r"cannot write .*a\.parquet \(Read-only file system\)"):
            tables.write_parquet(path, make_table(), PROVENANCE)


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PipelineError, match=r"cannot write .*file/a\.json"):
        workspace.write_json(tmp_path / "file" / "a.json", 1)


def test_an_error_of_another_file_is_not_blamed_on_the_output(tmp_path):
    with pytest.raises(FileNotFoundError), workspace.writing_to(tmp_path / "a.bin"):
        (tmp_path.parent / "nowhere" / "input").read_bytes()


@pytest.mark.parametrize("kind", [pa.float32(), pa.float16()])
def test_floats_of_one_length_are_really_split_by_byte(tmp_path, kind):
    table = make_table(kind=kind)
    tables.write_parquet(tmp_path / "a.parquet", table, PROVENANCE)
    group = pq.read_metadata(tmp_path / "a.parquet").row_group(0)
    columns = {group.column(number).path_in_schema: group.column(number) for number in range(group.num_columns)}
    assert "BYTE_STREAM_SPLIT" in columns["embedding.list.element"].encodings
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert columns["name"].has_dictionary_page
    assert not columns["embedding.list.element"].has_dictionary_page
    found = pq.read_table(tmp_path / "a.parquet")
    assert found.schema.field("embedding").type == pa.list_(kind, 8)
    assert found.equals(table)


def test_provenance_is_seen_by_every_reader(tmp_path):
    path = tmp_path / "a.parquet"
    tables.write_parquet(path, make_table(), PROVENANCE)
    for metadata in (
        pq.read_schema(path).metadata,
        pq.read_metadata(path).metadata,
        pq.read_table(path).schema.metadata,
    ):
        assert json.loads(metadata[b"spatial_building_embeddings"]) == PROVENANCE
    assert tables.read_provenance(path) == PROVENANCE


def test_rejects_are_listed_in_one_schema_beside_the_output(tmp_path):
    path = tables.rejects_path(tmp_path / "0001.parquet")
    assert path == tmp_path / "_rejects" / "0001.parquet"
    tables.write_rejects(path, [("a", Rejection("unreadable_image", "0 bytes"))], PROVENANCE)
    assert pq.read_table(path).to_pylist() == [{"member": "a", "reason": "unreadable_image", "detail": "0 bytes"}]
    tables.write_rejects(path, [], PROVENANCE)
    assert pq.read_table(path).schema.equals(tables.REJECT_SCHEMA)


# ------------------------------------------------------------------------------------------------ reading


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.parquet: no such file: run the stage that writes it"):
        tables.open_parquet(tmp_path / "none.parquet")
    tables.write_parquet(tmp_path / "a.parquet", make_table(), PROVENANCE)
    whole = (tmp_path / "a.parquet").read_bytes()
    for content in (b"", b"PAR1", b"hello world, hello", whole[:-9], whole[: len(whole) // 2]):
        (tmp_path / "b.parquet").write_bytes(content)
        for read in (tables.open_parquet, tables.read_provenance, identity.identify):
            with pytest.raises(InputError, match=r"b\.parquet: not a readable parquet file .*: remove it and make it"):
                read(tmp_path / "b.parquet")
    with pytest.raises(InputError):
        tables.open_parquet(tmp_path)


def test_damage_behind_the_footer_is_named_when_it_is_read(tmp_path):
    path = tmp_path / "a.parquet"
    tables.write_parquet(path, make_table(), PROVENANCE)
    whole = bytearray(path.read_bytes())
    whole[200:900] = bytes(700)
    path.write_bytes(whole)
    with pytest.raises(InputError, match=r"a\.parquet: damaged \(.*\): remove it"), tables.reading(path):
        tables.open_parquet(path).read()


def test_every_missing_or_mistyped_column_is_named_at_once(tmp_path):
    found = pa.schema([("id", pa.bool_()), ("name", pa.large_string()), ("embedding", pa.list_(pa.float32()))])
    with pytest.raises(InputError) as caught:
        column_types.check_columns(tmp_path / "a.parquet", found, [*SCHEMA, pa.field("tar_file", pa.string())])
    kind, wanted = found.field("embedding").type, SCHEMA.field("embedding").type
    assert str(caught.value) == (
        f"{tmp_path}/a.parquet: column id is bool, expected int64, column embedding is {kind}, expected {wanted}, "
        "column tar_file is missing: make the file again with the stage that writes it"
    )
    column_types.check_columns(tmp_path / "a.parquet", SCHEMA, SCHEMA)


@pytest.mark.parametrize("rows", [-5, 10**15])
def test_a_footer_that_claims_rows_the_file_cannot_hold_is_damage(tmp_path, rows):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1, 2, 3]}), path)
    data = path.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    body, footer = data[: -8 - length], data[-8 - length : -8]
    places = [place for place in range(len(footer)) if footer[place : place + 2] == b"\x16\x06"]  # an i64 that is 3
    zigzag, number = (rows << 1) ^ (rows >> 63), b""
    while zigzag > 0x7F:
        number, zigzag = number + bytes([zigzag & 0x7F | 0x80]), zigzag >> 7
    number += bytes([zigzag])
    found = set()
    for place in places:
        changed = footer[: place + 1] + number + footer[place + 2 :]
        path.write_bytes(body + changed + len(changed).to_bytes(4, "little") + b"PAR1")
        try:
            found.add(tables.open_parquet(path).metadata.num_rows)
        except InputError as error:
            found.add(re.sub(r".*\(its", "its", str(error)).partition(")")[0])
    assert f"its footer claims {rows} rows" in found
    assert rows not in found


def test_a_value_that_is_stored_once_does_not_fill_the_memory_with_its_copies(tmp_path, monkeypatch):
    path, large = tmp_path / "a.parquet", "x" * 100_000
    pq.write_table(pa.table({"name": [large] * 5_000 + ["y"]}), path, dictionary_pagesize_limit=2**24)
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(tables, "BATCH_BYTES", 2**20)
    sizes = [(batch.num_rows, batch.nbytes) for batch in tables.read_batches(path, ["name"], 1_000)]
    assert sum(rows for rows, _ in sizes) == 5_001
    assert max(size for _, size in sizes) < 2**20
    monkeypatch.undo()
    assert [batch.num_rows for batch in tables.read_batches(path, ["name"], 1_000)] == [1_000] * 5 + [1]


# ------------------------------------------------------------------------------------------------ provenance


def test_a_parquet_of_someone_else_says_nothing(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(make_table(), path)
    assert tables.read_provenance(path) is None
    for text in (b"not json", b"[1]"):
        pq.write_table(make_table().replace_schema_metadata({tables.PROVENANCE_KEY: text}), path)
        assert tables.read_provenance(path) is None


def test_an_output_is_kept_refused_or_made_again(tmp_path):
    path = tmp_path / "a.parquet"
    assert not tables.is_complete(path, PROVENANCE, overwrite=False)
    tables.write_parquet(path, make_table(), PROVENANCE | {"counts": {"in": 1}})
    assert tables.is_complete(path, PROVENANCE, overwrite=False)
    assert not tables.is_complete(path, PROVENANCE, overwrite=True)
    with pytest.raises(StaleOutputError) as caught:
        tables.is_complete(path, PROVENANCE | {"settings": {"a": 2}}, overwrite=False)
    assert str(caught.value) == (
        f"{path}: made from other inputs or settings (a was 1 and is now 2): give --overwrite to make it again, "
        "or set another output path"
    )
    pq.write_table(make_table(), path)
    with pytest.raises(StaleOutputError, match="it does not say what it was made from"):
        tables.is_complete(path, PROVENANCE, overwrite=False)


TAR = {"name": "0001.tar", "size": 5}
FILE = {"name": "0001.parquet", "size": 7, "footer": "f"}


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ({"inputs": [TAR, FILE]}, {"inputs": [FILE, TAR]}, None),
        ({"counts": 1, "version": "1"}, {"counts": 2, "version": "2"}, None),
        ({"stage": "a"}, {"stage": "b"}, "it was made by a"),
        ({"settings": {"k": 1}}, {"settings": {"k": 2}}, "k was 1 and is now 2"),
        ({"settings": {}}, {"settings": {"k": "x"}}, "k was None and is now 'x'"),
        ({"settings": {"k": 1}}, {}, "k was 1 and is now None"),
        ({"inputs": [FILE]}, {"inputs": []}, "input 0001.parquet is gone"),
        ({"inputs": []}, {"inputs": [FILE]}, "input 0001.parquet was not among its inputs"),
        ({"inputs": [FILE]}, {"inputs": [FILE | {"footer": "g"}]}, "input 0001.parquet has changed"),
        ({"inputs": [TAR]}, {"inputs": [TAR | {"size": 6}]}, "input 0001.tar has changed"),
        ({"inputs": [TAR, FILE]}, {"inputs": [FILE]}, None),  # a tar may be deleted once it has been read
    ],
)
def test_the_first_difference_of_two_provenances_is_named(old, new, difference):
    assert tables.describe_difference(old, new) == difference


def test_a_hash_of_plain_values_does_not_depend_on_their_order():
    assert identity.hash_json({"a": 1, "b": [2]}) == identity.hash_json({"b": [2], "a": 1})
    assert identity.hash_json({"a": 1}) != identity.hash_json({"a": 2})


def test_an_encrypted_parquet_is_not_called_damaged(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PARE" + bytes(range(200)) + (100).to_bytes(4, "little") + b"PARE")
    with pytest.raises(InputError, match=r"a\.parquet: cannot be read \(.*encrypted") as caught:
        tables.open_parquet(tmp_path / "a.parquet")
    assert not isinstance(caught.value, DamagedError)
