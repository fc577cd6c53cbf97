"""Streaming a raw tar: what is yielded, and which damage is found."""

import gzip
import os
import random
import re
import shutil
import subprocess
import tarfile
import tracemalloc

import pyarrow.parquet as pq
import pytest
from raw_tars import Entry, find_member, make_city, replace_tar, write_tar

from pipeline.errors import InputError, Rejection
from pipeline.files import archive
from pipeline.files.archive import read_placed, stream_members
from preprocess_raw_data import compute_fingerprints, process_tar
from preprocess_raw_data.tars.metadata import is_metadata_name

BLOCK = tarfile.BLOCKSIZE
ENTRIES = [Entry("a.jpg", b"x" * 700), Entry("b.txt", b"y" * 512), Entry("c.jpg", b""), Entry("d.txt", b"z" * 5)]


def list_names(path):
    return [member.name for member in stream_members(path)]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_come_in_their_order_with_their_bytes(tmp_path, tar_format):
    long_name = "/".join(["folder" * 8] * 4) + "/ü.jpg"
    entries = ENTRIES + ([Entry(long_name, b"long")] if tar_format != tarfile.USTAR_FORMAT else [])
    path = write_tar(tmp_path / "0001.tar", entries, tar_format)
    found = [(member.name, member.read(), member.is_file) for member in stream_members(path)]
    assert found == [(entry.name, entry.data, True) for entry in entries]


def test_bytes_are_read_only_when_asked_for_and_no_more_than_the_limit(tmp_path):
    path = write_tar(tmp_path / "0001.tar", ENTRIES)
    assert [member.read(3) for member in stream_members(path)] == [b"xxx", b"yyy", b"", b"zzz"]
    assert [member.size for member in stream_members(path)] == [700, 512, 0, 5]


def test_an_offset_says_where_the_bytes_lie(tmp_path):
    path = write_tar(tmp_path / "0001.tar", ENTRIES)
    whole = path.read_bytes()
    for member, entry in zip(stream_members(path), ENTRIES, strict=True):
        assert whole[member.offset_data : member.offset_data + member.size] == entry.data


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_place_counts_only_where_a_member_of_its_size_begins(tmp_path, tar_format):
    name = "ü" * (40 if tar_format == tarfile.USTAR_FORMAT else 200)
    path = write_tar(tmp_path / "0001.tar", [*ENTRIES, Entry(name, b"w" * 800)], tar_format)
    for member in stream_members(path):
        if member.size:
            assert read_placed(path, member.offset_data, member.size) == member.read()
        for offset, size in ((0, -1), (0, 1), (BLOCK, 0), (-BLOCK, 0)):
            with pytest.raises(Rejection, match=r"not at byte \d+ any more|no place is known"):
                read_placed(path, member.offset_data + offset, member.size + size)
    with open(path, "r+b") as file:
        file.truncate(member.offset_data + 700)
    with pytest.raises(Rejection):
        read_placed(path, member.offset_data, member.size)


def test_files_folders_links_and_devices_are_told_apart(tmp_path):
    kinds = [
        Entry("folder.jpg", kind=tarfile.DIRTYPE),
        Entry("symbolic.jpg", kind=tarfile.SYMTYPE, link="a.jpg"),
        Entry("hard.jpg", kind=tarfile.LNKTYPE, link="a.jpg"),
        Entry("pipe.jpg", kind=tarfile.FIFOTYPE),
        Entry("device.jpg", kind=tarfile.CHRTYPE),
        Entry("file.jpg"),
    ]
    found = list(stream_members(write_tar(tmp_path / "0001.tar", kinds)))
    assert [member.isdir() for member in found] == [True] + [False] * 5
    assert [member.is_file for member in found] == [False] * 5 + [True]


def test_a_name_that_is_not_utf8_is_shown_by_its_bytes_under_any_locale(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "0001.tar", [Entry("f\udce9e.jpg", b"1"), Entry("grün.jpg", b"2")])
    for encoding in ("utf-8", "iso-8859-1"):
        monkeypatch.setattr(tarfile, "ENCODING", encoding)
        assert list_names(path) == ["f\\xe9e.jpg", "grün.jpg"]


@pytest.mark.parametrize(
    ("name", "is_image", "is_metadata", "stem"),
    [
        ("0001/a.jpg", True, False, "0001/a"),
        ("0001/a.JPEG", True, False, "0001/a"),
        ("a.b.Jpg", True, False, "a.b"),
        ("a.txt", False, True, "a"),
        ("a.png", False, False, "a"),
        ("ajpg", False, False, ""),
        ("/a.jpg", True, False, "/a"),
        ("x/../a.jpg", True, False, "x/../a"),
        ("../a.txt", False, True, "../a"),
        ("x/..a/a..jpg", True, False, "x/..a/a."),
    ],
)
def test_a_name_says_what_a_member_is(name, is_image, is_metadata, stem):
    member = archive.Member(name)
    assert member.is_image_name == is_image
    assert is_metadata_name(member.name) == is_metadata
    assert member.stem == stem


def test_a_tar_cut_anywhere_before_its_end_blocks_is_refused(tmp_path):
    path = write_tar(tmp_path / "0001.tar", make_city(1, [2, 2]))
    whole = path.read_bytes()
    last = find_member(path, "0001/0001/0001_000004_1_000002.txt")
    end = last.offset_data + -(-last.size // BLOCK) * BLOCK
    assert whole[end : end + BLOCK] == bytes(BLOCK)
    generator = random.Random(0)
    cuts = {
        1,
        BLOCK - 1,
        BLOCK,
        BLOCK + 1,
        last.offset,
        last.offset_data,
        last.offset_data + 1,
        end - 1,
        end,
        end + BLOCK - 1,
    }
    for cut in cuts | {generator.randrange(1, end) for _ in range(30)}:
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"0001\.tar: .*: fetch the tar again") as caught:
            [member.read() for member in stream_members(path)]
        assert "\n" not in str(caught.value)


def test_one_or_two_end_blocks_are_enough(tmp_path):
    path = write_tar(tmp_path / "0001.tar", ENTRIES)
    end = find_member(path, "d.txt").offset_data + BLOCK
    for blocks in (1, 2, 5):
        path.write_bytes(path.read_bytes()[:end] + bytes(blocks * BLOCK))
        assert len(list_names(path)) == len(ENTRIES)


@pytest.mark.parametrize("damage", [b"\xff" * BLOCK, bytes(BLOCK), b"d 1 2 3".ljust(BLOCK)])
def test_a_damaged_header_in_the_middle_is_no_end(tmp_path, damage):
    path = write_tar(tmp_path / "0001.tar", ENTRIES)
    place = find_member(path, "b.txt").offset
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + damage + whole[place + BLOCK :])
    said = "truncated or damaged at byte 1536" if any(damage) else r"data behind the end .* at byte 2048 .* byte 1536"
    with pytest.raises(InputError, match=said):
        list_names(path)


def test_tars_put_together_with_cat_are_no_tar_that_is_read_to_the_first_end(tmp_path):
    first = write_tar(tmp_path / "a.tar", ENTRIES).read_bytes()
    path = tmp_path / "0001.tar"
    path.write_bytes(first + write_tar(tmp_path / "b.tar", [Entry("e.jpg", b"e")]).read_bytes())
    end = find_member(tmp_path / "a.tar", "d.txt").offset_data + BLOCK
    with pytest.raises(InputError) as caught:
        list_names(path)
    assert str(caught.value) == (
        f"{path}: data behind the end of the archive, at byte {len(first)} (the end is at byte {end}): fetch the tar "
        "again, or, if it was put together from several, make one with tar --concatenate"
    )


@pytest.mark.parametrize("hole", [3 * BLOCK, 3 << 20])
def test_a_download_whose_middle_was_never_written_is_refused(tmp_path, hole):
    path = write_tar(tmp_path / "0001.tar", [Entry(f"{number}.jpg", b"x" * 40_000) for number in range(100)])
    whole = bytearray(path.read_bytes())
    start = find_member(path, "7.jpg").offset
    whole[start : start + hole] = bytes(hole)
    path.write_bytes(whole)
    with pytest.raises(InputError, match=f"data behind the end of the archive, .*the end is at byte {start}"):
        list_names(path)


def test_more_zeros_at_the_end_than_padding_explains_are_told_with_the_figure(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(archive.logger, "propagate", True)
    path = write_tar(tmp_path / "0001.tar", ENTRIES)
    end = find_member(path, "d.txt").offset_data + BLOCK
    whole = path.read_bytes()[:end]
    for num_zeros, told in ((archive.MAX_PADDING_BYTES, False), (archive.MAX_PADDING_BYTES + BLOCK, True)):
        path.write_bytes(whole + bytes(num_zeros))
        caplog.clear()
        assert len(list_names(path)) == len(ENTRIES)
        assert (f"0001.tar: {num_zeros} bytes of zeros behind its last member" in caplog.text) == told


def test_a_member_of_a_tar_without_magic_as_unix_v7_wrote_them_is_read(tmp_path):
    header = bytearray(BLOCK)
    header[:5], header[100:107], header[124:135], header[136:147] = b"a.jpg", b"0000644", b"00000000005", b"00000000000"
    header[148:156] = b"%06o\0 " % (sum(header) + 8 * 32)
    path = tmp_path / "0001.tar"
    path.write_bytes(bytes(header) + b"bytes".ljust(BLOCK, b"\0") + bytes(2 * BLOCK))
    assert [(member.name, member.is_file, member.read()) for member in stream_members(path)] == [
        ("a.jpg", True, b"bytes")
    ]


def test_a_name_with_a_newline_and_a_tar_in_a_tar_are_members_like_others(tmp_path):
    inner = write_tar(tmp_path / "inner.tar", ENTRIES).read_bytes()
    entries = [Entry("a\nb.jpg", b"1"), Entry("0002.tar", inner), Entry("c.jpg", b"2")]
    path = write_tar(tmp_path / "0001.tar", entries, tarfile.PAX_FORMAT)
    assert list_names(path) == ["a\nb.jpg", "0002.tar", "c.jpg"]


@pytest.mark.parametrize("kind", [["--format=gnu"], ["--format=pax"], ["--format=pax", "--sparse-version=0.1"]])
def test_a_sparse_member_is_no_file_whose_bytes_lie_in_one_piece(tmp_path, kind):
    if shutil.which("tar") is None:
        pytest.skip("no tar command here")
    with open(tmp_path / "holes.jpg", "wb") as file:
        file.write(b"begin")
        file.seek(1 << 20)
        file.write(b"end")
    (tmp_path / "z.txt").write_bytes(b"text")
    path = tmp_path / "0001.tar"
    subprocess.run(["tar", "--sparse", *kind, "-cf", path, "holes.jpg", "z.txt"], cwd=tmp_path, check=True)
    found = [(member.name, member.is_file) for member in stream_members(path)]
    if found[0] == ("holes.jpg", True):
        pytest.skip("the file system keeps no holes")
    assert found == [("holes.jpg", False), ("z.txt", True)]


def test_what_is_no_tar_is_refused(tmp_path):
    path = tmp_path / "0001.tar"
    for content in (b"", b"hello", b"\x89PNG\r\n" * 500, bytes(100)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"0001\.tar: not a readable tar .*: fetch the tar again"):
            list_names(path)


def test_a_missing_tar_a_folder_and_one_that_cannot_be_read_are_told_apart(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"0001\.tar: cannot be read \(No such file"):
        list_names(tmp_path / "0001.tar")
    with pytest.raises(InputError, match="cannot be read .Is a directory"):
        list_names(tmp_path)

    def refuse(*_):
        raise PermissionError(13, "Permission denied", "0001.tar")

    monkeypatch.setattr(archive, "open_without_waiting", refuse)
    with pytest.raises(InputError, match=r"0001\.tar: cannot be read \(Permission denied\): correct the path"):
        list_names(tmp_path / "0001.tar")


def test_any_change_of_a_header_gives_members_or_an_input_error_and_nothing_else(tmp_path):
    path = write_tar(tmp_path / "0001.tar", ENTRIES, tarfile.PAX_FORMAT)
    whole, generator = path.read_bytes(), random.Random(1)
    for _ in range(400):
        raw = bytearray(whole)
        header = generator.choice([0, 1536, 2560, 3072])
        for _ in range(generator.randint(1, 12)):
            raw[header + generator.choice([124, 125, 135, 156, generator.randrange(BLOCK)])] = generator.choice(
                [0, 0x80, 0xFF, ord("x"), ord("L"), ord("S"), ord("7")]
            )
        checksum = sum(raw[header : header + 148]) + 256 + sum(raw[header + 156 : header + BLOCK])
        raw[header + 148 : header + 156] = b"%06o\0 " % checksum
        path.write_bytes(raw)
        try:
            for number, member in enumerate(stream_members(path)):
                assert number < 100
                member.read(10)
        except InputError as error:
            assert "0001.tar" in str(error)  # noqa: PT017 (either end is right)


def test_memory_does_not_grow_with_the_number_of_members(tmp_path):
    def measure(count):
        path = write_tar(tmp_path / f"{count}.tar", (Entry(f"0001/{number:06d}.txt") for number in range(count)))
        tracemalloc.start()
        assert sum(1 for _ in stream_members(path)) == count
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert measure(5000) < measure(500) + 50_000


def test_a_tar_with_data_behind_its_end_fails_alone_in_every_stage_that_reads_tars(
    tmp_path, make_tar, write_config, run_main
):
    config = write_config(tmp_path)
    make_tar(tmp_path / "raw", 1, (2,))
    make_tar(tmp_path / "raw", 2, (2,))
    assert run_main(process_tar.main, "--config", config).code == 0
    first, second = (tmp_path / "raw" / f"000{number}.tar" for number in (1, 2))
    first.write_bytes(first.read_bytes() + second.read_bytes())
    complaint = f"{first}: data behind the end of the archive"
    outcome = run_main(process_tar.main, "--config", config, "--overwrite")
    assert outcome.code == 1
    assert outcome.stderr.splitlines()[-1].startswith(f"error: 1 of 2 tars failed, the others are done: {complaint}")
    refused = run_main(compute_fingerprints.main, "--config", config).stderr
    assert f"{first}: not the one that 0001.parquet was made from: run stage 1 again" in refused
    replace_tar(first, [])
    first.write_bytes(second.read_bytes() * 2)
    outcome = run_main(compute_fingerprints.main, "--config", config)
    assert outcome.code == 1
    assert complaint in outcome.stderr.splitlines()[-1]
    assert sorted(path.name for path in (tmp_path / "fingerprints").glob("*.parquet")) == ["0002_fingerprints.parquet"]
    names = dict.fromkeys(pq.read_table(tmp_path / "intermediates" / "0001.parquet")["image_path"].to_pylist(), 0)
    with pytest.raises(InputError, match="data behind the end of the archive"):
        list(archive.read_images(first, names))


@pytest.mark.parametrize(
    "content", [gzip.compress(b"x" * 2000), b"\n<!DOCTYPE html><title>403</title>" * 60], ids=["gzip", "web page"]
)
def test_a_file_that_is_no_tar_is_shown_by_its_first_bytes(tmp_path, content):
    (tmp_path / "0001.tar").write_bytes(content)
    complaint = f"it begins with {content[:16]!r}: fetch the tar again, or unpack it if it is compressed"
    with pytest.raises(InputError, match=re.escape(complaint)):
        list(stream_members(tmp_path / "0001.tar"))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_headers_without_end_and_of_any_size_are_one_line(tmp_path, kind):
    """Three thousand in a row, and one of a terabyte, of which nothing is read."""
    body = b"12 path=abc\n" if kind in (tarfile.XHDTYPE, tarfile.XGLTYPE) else b"name\0"
    header = tarfile.TarInfo("a")
    header.type, header.size = kind, len(body)
    chained = (header.tobuf(tarfile.USTAR_FORMAT) + body + bytes(512 - len(body))) * 3000
    header.size = 2**40
    for name, content in (("chained", chained), ("huge", header.tobuf(tarfile.GNU_FORMAT))):
        path = tmp_path / f"{name}.tar"
        path.write_bytes(content + tarfile.TarInfo("1.jpg").tobuf() + bytes(1024))
        os.truncate(path, 2**36 if name == "huge" else len(content) + 1536)
        with pytest.raises(InputError, match=f"{name}.tar: not a readable tar"):
            list(stream_members(path))


def test_a_pipe_or_device_in_a_tars_place_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "0001.tar")
    (tmp_path / "0002.tar").symlink_to("/dev/zero")
    for name in ("0001.tar", "0002.tar"):
        with pytest.raises(InputError, match=rf"{name}: cannot be read \(not a file\)"):
            next(stream_members(tmp_path / name))
