"""Whether an input is the one that an output was made from: content decides, a time is a reason to look closer."""

import io
import os
import shutil
import tarfile

import pyarrow as pa
import pytest
from raw_tars import make_city, replace_tar, write_tar

from pipeline.errors import InputError, StaleOutputError
from pipeline.files import identity, tables
from pipeline.files.identity import RunningDigest, identify, identify_tar, look_at, note_digest
from preprocess_raw_data import compute_fingerprints, process_tar

TABLE = pa.table({"id": range(100)})


def test_parquets_are_told_apart_by_content_and_name_never_by_path_or_time(tmp_path):
    path, moved = tmp_path / "a.parquet", tmp_path / "deep" / "a.parquet"
    tables.write_parquet(path, TABLE, {"settings": {"a": 1}})
    found = identify(path)
    assert found["name"] == "a.parquet"
    assert found["size"] == path.stat().st_size
    moved.parent.mkdir()
    shutil.copy(path, moved)
    os.utime(moved, (1, 1))
    assert identify(moved) == found
    tables.write_parquet(path, pa.table({"id": range(1, 101)}), {"settings": {"a": 1}})
    assert identify(path) != found
    tables.write_parquet(path, TABLE, {"settings": {"a": 2}})
    assert path.stat().st_size == found["size"]
    assert identify(path) != found


def test_other_files_are_told_apart_by_all_their_bytes(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"12345")
    first = identify(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes(b"12346")
    assert identify(tmp_path / "a.csv") != first
    with pytest.raises(InputError, match=r"b\.csv: no such file"):
        identify(tmp_path / "b.csv")


@pytest.fixture
def identify_file(tmp_path):
    """Identify a file of 300 bytes, or another one of its name, whose digest is noted."""
    (tmp_path / "0001.tar").write_bytes(b"x" * 300)

    def find(path=tmp_path / "0001.tar", **options):
        return identify_tar(path, tmp_path / "_inputs" / "0001.tar.json", **options)

    return find


def count_reads(monkeypatch):
    """Return a list that grows by the path of each file that is read whole."""
    reads, read = [], identity.digest_file
    monkeypatch.setattr(identity, "digest_file", lambda path: reads.append(path) or read(path))
    return reads


def test_a_file_at_its_noted_time_is_not_read_again(tmp_path, identify_file, monkeypatch):
    reads = count_reads(monkeypatch)
    first = identify_file()
    assert (first["name"], first["size"], len(reads)) == ("0001.tar", 300, 1)
    assert identify_file() == first
    assert len(reads) == 1
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "0001.tar", tmp_path / "copy")
    os.utime(tmp_path / "copy" / "0001.tar", (1, 1))
    for _ in range(2):  # one read, and the new time is noted
        assert identify_file(tmp_path / "copy" / "0001.tar") == first
        assert len(reads) == 2


def test_a_file_of_the_same_size_with_other_content_is_another(tmp_path, identify_file):
    first = identify_file()
    (tmp_path / "0001.tar").write_bytes(b"y" * 300)
    os.utime(tmp_path / "0001.tar", (1, 1))
    assert identify_file() == first | {"digest": identity.digest_file(tmp_path / "0001.tar")} != first


def test_what_its_maker_reads_anyway_is_not_read_before(tmp_path, identify_file, monkeypatch):
    path = tmp_path / "0001.tar"
    digest, seen, reads = identity.digest_file(path), look_at(path), count_reads(monkeypatch)
    assert identify_file(read=False) == {"name": "0001.tar", "size": 300}
    note_digest(path, digest, seen, tmp_path / "_inputs" / "0001.tar.json")
    assert identify_file(read=False) == identify_file() == {"name": "0001.tar", "size": 300, "digest": digest}
    assert reads == []
    (tmp_path / "_inputs" / "0001.tar.json").unlink()
    assert identify_file()["digest"] == digest


def test_a_note_that_cannot_be_written_is_none(tmp_path, identify_file):
    (tmp_path / "_inputs").write_text("a file")
    assert identify_file() == identify_file()


def test_a_digest_grows_while_a_file_is_read_with_leaps_and_steps_back(tmp_path):
    data = bytes(range(256)) * 20_000
    (tmp_path / "a").write_bytes(data)
    with open(tmp_path / "a", "rb") as file:
        digest = RunningDigest(file)
        for start, size in ((0, 512), (4_000_000, 100), (1_000, 512), (4_000_050, 100)):
            file.seek(start)
            assert file.read(size) == data[start : start + size]
            digest.read_to(file.tell())
        assert digest.read_to(len(data)) == identity.digest_file(tmp_path / "a")


def test_a_file_that_changes_while_it_is_read_is_not_noted_as_it_was(tmp_path, identify_file, monkeypatch):
    read = identity.digest_file

    def read_and_change(path):
        digest = read(path)
        os.utime(path, (1, 1))
        return digest

    monkeypatch.setattr(identity, "digest_file", read_and_change)
    with pytest.raises(InputError, match=r"0001\.tar: changed while it was read: run this again"):
        identify_file()
    assert not (tmp_path / "_inputs").exists()


@pytest.mark.parametrize("content", [{"inputs": None}, {"inputs": ["a"]}, {"settings": 1}, {"counts": []}, ["stage"]])
def test_what_another_program_keeps_under_our_key_is_no_provenance(tmp_path, content):
    path = tmp_path / "a.parquet"
    tables.write_parquet(path, TABLE, content)
    assert tables.read_provenance(path) is None
    with pytest.raises(StaleOutputError, match="it does not say what it was made from"):
        tables.is_complete(path, {"stage": "x"}, overwrite=False)


# ------------------------------------------------------------------------------------------------ stages


@pytest.fixture
def stages(tmp_path, write_config, run_main):
    """Run stages 1 and 4 on tmp_path/raw; the first that fails gives the outcome."""
    config = write_config(tmp_path)

    def run(*arguments):
        for main in (process_tar.main, compute_fingerprints.main):
            outcome = run_main(main, "--config", config, *arguments)
            if outcome.code:
                break
        return outcome

    write_tar(tmp_path / "raw" / "0001.tar", make_city(1, (3, 2)))
    assert run().code == 0
    return run


def correct_metadata(path):
    """Write a tar again with another heading, in as many bytes."""
    data = path.read_bytes()
    assert data.count(b" -90.5 ") > 0
    path.write_bytes(data.replace(b" -90.5 ", b" -91.5 "))


def test_a_tar_fetched_again_with_other_metadata_and_the_same_size_is_refused(tmp_path, stages, run_main):
    tar = tmp_path / "raw" / "0001.tar"
    status = tar.stat()
    correct_metadata(tar)
    assert tar.stat().st_size == status.st_size
    outcome = stages()
    assert outcome.code == 1
    assert "0001.parquet: made from other inputs or settings (input 0001.tar has changed)" in outcome.stderr
    fingerprints = run_main(compute_fingerprints.main, "--config", tmp_path / "config.toml")
    assert "0001_fingerprints.parquet: made from other inputs" in fingerprints.stderr
    source = tmp_path / "intermediates" / "0001.parquet"
    refused = f"{tar}: not the one that {source.name} was made from: run stage 1 again"
    assert refused in run_main(compute_fingerprints.main, "--config", tmp_path / "config.toml", "--overwrite").stderr
    assert stages("--overwrite").code == 0
    assert stages().code == 0
    values = tables.open_parquet(source).read()["heading"].to_pylist()
    assert values == [-91.5] * 5


def test_what_was_never_made_is_not_made_of_another_tar_than_stage_1_read(tmp_path, stages, run_main):
    outputs, tar = tmp_path / "fingerprints", tmp_path / "raw" / "0001.tar"
    shutil.rmtree(outputs)
    first = tar.read_bytes()
    correct_metadata(tar)
    main, config = compute_fingerprints.main, tmp_path / "config.toml"
    for _ in range(2):
        outcome = run_main(main, "--config", config)
        assert outcome.code == 1
        assert f"{tar}: not the one that 0001.parquet was made from: run stage 1 again" in outcome.stderr
        assert not list(outputs.glob("*.parquet"))
    tar.write_bytes(first)  # at another time
    assert run_main(main, "--config", config).code == 0


def test_an_intermediate_that_names_no_tar_takes_any(tmp_path, stages, run_main):
    shutil.rmtree(tmp_path / "fingerprints")
    replace_tar(tmp_path / "raw" / "0001.tar", make_city(1, (3, 2, 2)))
    assert run_main(compute_fingerprints.main, "--config", tmp_path / "config.toml").code == 0


def test_a_copied_or_moved_tar_costs_one_read_and_nothing_is_made_again(tmp_path, stages, monkeypatch):
    reads = count_reads(monkeypatch)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    assert stages().code == 0
    assert reads == []
    shutil.copy(tmp_path / "raw" / "0001.tar", tmp_path / "copy.tar")
    (tmp_path / "copy.tar").replace(tmp_path / "raw" / "0001.tar")
    for _ in range(2):
        outcome = stages()
        assert outcome.code == 0
        assert "nothing redone" in outcome.stderr
        assert reads == [tmp_path / "raw" / "0001.tar"]
    (tmp_path / "raw").rename(tmp_path / "moved")
    assert stages(f'--set=paths.raw_dir="{tmp_path}/moved"').code == 0
    assert len(reads) == 1
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_a_tar_that_changes_while_an_unfinished_run_waits_is_another(tmp_path, stages):
    """Stage 1 read the old tar; what stage 4 makes afterwards names the tar that it read."""
    (tmp_path / "fingerprints" / "0001_fingerprints.parquet").unlink()
    with tarfile.open(tmp_path / "raw" / "0001.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("notes"), io.BytesIO())
    outcome = stages()
    assert outcome.code == 1
    assert "input 0001.tar has changed" in outcome.stderr
