"""Stage 1 on whole and on damaged tars."""

import json
import os
import tarfile
from collections import Counter
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_tars import Entry, draw_view, encode, find_member, make_city, make_view, write_d_line, write_tar

from pipeline.files.tables import INTERMEDIATE_SCHEMA, PROVENANCE_KEY, REJECT_SCHEMA
from pipeline.log import Stopwatch
from preprocess_raw_data import process_tar

CONTRACT_COLUMNS = dict.fromkeys(("dataset_id", "target_id", "patch_id", "street_view_id"), pa.int64())
CONTRACT_COLUMNS |= dict.fromkeys(("target_lat", "target_lon"), pa.float64())
CONTRACT_COLUMNS |= dict.fromkeys(("building_id", "streetview_image_id", "image_path", "tar_file"), pa.string())
CONTRACT_COLUMNS |= dict.fromkeys(("street_lat", "street_lon", "distance_m", "heading", "pitch"), pa.float64())


@pytest.fixture
def stage(tmp_path, write_config, run_main):
    """Run stage 1 on tmp_path/raw; what it writes lies in tmp_path/intermediates."""
    config = write_config(tmp_path)

    def run(*arguments):
        return run_main(process_tar.main, "--config", config, *arguments)

    return run


def read(tmp_path, name="0001"):
    """Return the rows and the rejects of a tar."""
    folder = tmp_path / "intermediates"
    return pq.read_table(folder / f"{name}.parquet"), pq.read_table(folder / "_rejects" / f"{name}.parquet")


def reasons(rejects):
    return dict(zip(rejects["member"].to_pylist(), rejects["reason"].to_pylist(), strict=True))


def test_a_sound_tar_gives_every_column(tmp_path, stage, make_tar):
    path = make_tar(tmp_path / "raw", 7, (3, 2, 1))
    outcome = stage()
    assert outcome.code == 0
    assert outcome.stdout == f"{tmp_path}/intermediates/0007.parquet\n"
    rows, rejects = read(tmp_path, "0007")
    types = {field.name: field.type for field in rows.schema}
    assert {name: types[name] for name in CONTRACT_COLUMNS} == CONTRACT_COLUMNS
    assert rows.schema.equals(INTERMEDIATE_SCHEMA)
    assert rejects.schema.equals(REJECT_SCHEMA)
    assert (len(rows), len(rejects)) == (6, 0)
    assert rows.slice(3, 1).drop_columns(["image_offset", "image_size"]).to_pylist() == [
        {
            "dataset_id": 7, "target_id": 2, "patch_id": 4, "street_view_id": 500,
            "target_lat": 52.2008, "target_lon": 0.19, "building_id": "0007_2", "streetview_image_id": "0007_4",
            "image_path": "0007/0007/0007_000004_0_000002.jpg", "tar_file": "0007.tar",
            "street_lat": 52.2001, "street_lon": 0.1201, "distance_m": 12.25, "heading": -90.5, "pitch": 10.125,
        }
    ]  # fmt: skip
    whole = path.read_bytes()
    for row in rows.to_pylist():
        data = whole[row["image_offset"] : row["image_offset"] + row["image_size"]]
        with tarfile.open(path) as tar:
            assert data == tar.extractfile(row["image_path"]).read()


def test_rows_are_sorted_by_patch_id_whatever_their_order_in_the_tar(tmp_path, stage):
    patches = [30, 4, 100, 5, 2**40]
    entries = [entry for patch in patches for entry in make_view(f"x/{patch}", 1, patch)]
    write_tar(tmp_path / "raw" / "0001.tar", entries[::-1])
    assert stage().code == 0
    rows, _ = read(tmp_path)
    assert rows["patch_id"].to_pylist() == sorted(patches)
    assert len(set(rows["streetview_image_id"].to_pylist())) == len(patches)


def test_the_tars_name_wins_over_the_dataset_in_the_line_and_the_difference_is_counted(tmp_path, stage):
    entries = make_view("a", 1, 1, dataset_id=1) + make_view("b", 1, 2, dataset_id=5)
    write_tar(tmp_path / "raw" / "0001.tar", entries)
    outcome = stage()
    assert set(read(tmp_path)[0]["building_id"].to_pylist()) == {"0001_1"}
    assert "WARNING 0001.tar: 2 views, 1 of them name another dataset id; 0 rejected; ignored nothing" in outcome.stderr


def test_the_shared_bad_tar_comes_out_as_expected(tmp_path, shared_dir, stage):
    expected = json.loads((shared_dir / "data" / "bad" / "expected.json").read_text())["tar"]
    tar = shared_dir / "data" / "bad" / "0099.tar"
    outcome = stage("--tar-file", tar, "--set", "data.max_reject_fraction=0.9")
    assert outcome.code == 0
    rows, rejects = read(tmp_path, "0099")
    found = zip(rows["streetview_image_id"].to_pylist(), rows["building_id"].to_pylist(), strict=True)
    assert sorted(map(list, found)) == sorted(expected["accepted_streetview_image_id_and_building_id"])
    stems = {name.removesuffix(".jpg").removesuffix(".txt"): reason for name, reason in reasons(rejects).items()}
    assert stems == expected["rejected_member_without_suffix"]
    assert len(rejects) == len(stems)


def test_by_default_so_many_rejects_make_the_run_fail_with_counts_and_keep_everything(tmp_path, shared_dir, stage):
    tar = shared_dir / "data" / "bad" / "0099.tar"
    for _ in range(2):  # what is kept is judged like what is made
        outcome = stage("--tar-file", tar)
        assert outcome.code == 1
        assert outcome.stderr.splitlines()[-1].startswith(
            "error: process_tar: 19 of 58 items were rejected, more than [data].max_reject_fraction = 0.2 allows"
        )
        rows, rejects = read(tmp_path, "0099")
        assert (len(rows), len(rejects)) == (39, 19)
    log = (tmp_path / "logs" / "process_tar.log").read_text().splitlines()[-1]
    assert "58 in = 39 out + 19 rejected + 0 dropped" in log


SOUND_JPEG = encode(draw_view(1))


def make_defects():
    """Return entries with every kind of defect, and what must become of them: accepted stems, and rejects."""
    exif = encode(draw_view(2), exif=bytes.fromhex("45786966000049492a000800000001001201030001000000060000000000"))
    sound = {
        "plain": {},
        "UPPER": {"suffix": ".JPG"},
        "long": {"suffix": ".jpeg"},
        "Mixed": {"suffix": ".JPEG"},
        "crlf": {"text": b"a 1 2\r\n" + write_d_line(1, 5).encode() + b"\r\n"},
        "bom": {"text": b"\xef\xbb\xbf" + write_d_line(1, 6).encode()},
        "two lines": {"text": f"{write_d_line(1, 7)}\n{write_d_line(1, 999)}\n".encode()},
        "second line": {"text": f"d broken\n{write_d_line(1, 8)}\n".encode()},
        "latin": {"text": b"a caf\xe9\n" + write_d_line(1, 9).encode()},
        "gray": {"image": encode(draw_view(1).convert("L"))},
        "cmyk": {"image": encode(draw_view(1).convert("CMYK"))},
        "palette": {"image": encode(draw_view(1).quantize(8), "PNG")},
        "exif": {"image": exif},
        "png": {"image": encode(draw_view(1), "PNG")},
        "webp": {"image": encode(draw_view(1), "WEBP")},
        "n" * 120 + "/" + "m" * 120: {},
        "grün": {},
        "late\udce9": {},
    }
    entries, accepted, rejected = [], {}, {}
    for patch, (stem, options) in enumerate(sound.items(), start=1):
        entries += make_view(stem, 1, patch, **options)
        name = stem.replace("\udce9", "\\xe9") + options.get("suffix", ".jpg")
        accepted[f"0001_{patch}"] = name
    bad = {
        "empty": ("unreadable_image", {"image": b""}),
        "cut": ("unreadable_image", {"image": SOUND_JPEG[: len(SOUND_JPEG) // 2]}),
        "cut late": ("unreadable_image", {"image": encode(draw_view(1), "PNG")[:-60]}),
        "text": ("unreadable_image", {"image": b"d 1 2 3"}),
        "gif": ("unreadable_image", {"image": encode(draw_view(1), "GIF")}),
        "no line": ("bad_metadata", {"text": b"a 1\n"}),
        "no text": ("bad_metadata", {"text": b""}),
        "short": ("bad_metadata", {"text": b"d 1 2 3"}),
        "north": ("bad_metadata", {"lat": 91}),
        "nan": ("bad_metadata", {"lon": "nan"}),
        "word": ("bad_metadata", {"lat": "x"}),
        "../up": ("unsafe_path", {}),
        "/root": ("unsafe_path", {}),
    }
    for patch, (stem, (reason, options)) in enumerate(bad.items(), start=100):
        entries += make_view(stem, 1, patch, **options)
        rejected[stem] = reason
    entries += make_view("again", 1, 1) + make_view("two", 2, 200) + [Entry("two.jpeg", SOUND_JPEG)]
    accepted["0001_200"] = "two.jpg"
    entries += [make_view("alone", 1, 300)[0], make_view("single", 1, 301)[1], Entry("../x.jpg", SOUND_JPEG)]
    entries += [Entry("link.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd"), *make_view("pair", 1, 302)[1:]]
    entries += [Entry("pair.jpg", kind=tarfile.LNKTYPE, link="plain.jpg"), Entry("fifo.txt", kind=tarfile.FIFOTYPE)]
    entries += [Entry("folder.jpg", kind=tarfile.DIRTYPE), Entry("._plain.jpg", b"x"), Entry("notes.md", b"x")]
    rejected |= {
        "again": "duplicate_image_id", "two.jpeg": "duplicate_image_id", "alone.jpg": "missing_metadata",
        "single.txt": "missing_image", "../x.jpg": "unsafe_path", "link.jpg": "not_a_file", "pair": "not_a_file",
        "fifo.txt": "not_a_file",
    }  # fmt: skip
    return entries, accepted, rejected


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_with_every_defect_gives_each_item_its_place(tmp_path, stage, tar_format):
    entries, accepted, rejected = make_defects()
    if tar_format == tarfile.PAX_FORMAT:  # pax names are UTF-8 by definition
        entries = [entry for entry in entries if "\udce9" not in entry.name]
        accepted = {key: name for key, name in accepted.items() if "\\xe9" not in name}
    path = write_tar(tmp_path / "raw" / "0001.tar", entries, tar_format)
    outcome = stage("--set", "data.max_reject_fraction=0.9")
    assert outcome.code == 0
    rows, rejects = read(tmp_path)
    assert dict(zip(rows["streetview_image_id"].to_pylist(), rows["image_path"].to_pylist(), strict=True)) == accepted
    assert reasons(rejects) == rejected
    assert rejects["member"].to_pylist() == sorted(rejected)
    assert all(rejects["detail"].to_pylist())
    provenance = json.loads(pq.read_schema(tmp_path / "intermediates" / "0001.parquet").metadata[PROVENANCE_KEY])
    assert provenance["counts"] == {"in": len(rows) + len(rejects), "out": len(rows), "rejected": len(rejects)}
    assert provenance["reasons"] == dict(Counter(rejected.values()))
    assert "rejected; ignored 1 folders, 2 other members" in outcome.stderr
    total = f"{len(rows) + len(rejects)} in = {len(rows)} out + {len(rejects)} rejected + 0 dropped"
    assert total in outcome.stderr.splitlines()[-1]
    assert path.exists()


def test_the_bytes_of_what_is_rejected_do_not_stay_in_memory(tmp_path):
    tar = write_tar(tmp_path / "0001.tar", [Entry(f"{number}.jpg", b"no picture") for number in range(3)])
    progress = SimpleNamespace(advance=lambda: None)
    inventory = process_tar.take_inventory(tar, 1, [], progress, Stopwatch())
    kept = [image.rejection for item in inventory._items.values() for image in item.images]
    assert [(one.reason, one.__traceback__, one.__context__) for one in kept] == [("unreadable_image", None, None)] * 3


def test_a_tar_in_which_everything_is_bad_gives_no_rows_and_a_failed_run(tmp_path, stage):
    write_tar(tmp_path / "raw" / "0001.tar", make_view("a", 1, 1, image=b"x") + make_view("b", 1, 2, text=b"x"))
    outcome = stage()
    assert outcome.code == 1
    assert "2 of 2 items were rejected" in outcome.stderr
    rows, rejects = read(tmp_path)
    assert (len(rows), len(rejects)) == (0, 2)
    assert rows.schema.equals(INTERMEDIATE_SCHEMA)
    assert stage("--set", "data.max_reject_fraction=1").code == 0


@pytest.mark.parametrize("content", ["empty", "cut", "between members", "header", "text", "gzip", "folder", "nothing"])
def test_a_tar_that_cannot_be_read_fails_alone(tmp_path, stage, make_tar, content):
    good = make_tar(tmp_path / "raw", 1, (2, 2))
    bad = make_tar(tmp_path / "raw", 2, (2, 2))
    make_tar(tmp_path / "raw", 3, (2,))
    whole = bad.read_bytes()
    if content == "folder":
        bad.unlink()
        bad.mkdir()
    elif content == "nothing":
        write_tar(bad, [Entry("notes.md", b"x")])
    else:
        middle = find_member(bad, "0002/0002/0002_000003_0_000002.jpg").offset
        damaged = {
            "empty": b"",
            "cut": whole[: middle + 700],
            "between members": whole[:middle],
            "header": whole[:middle] + b"\xa5" * 512 + whole[middle + 512 :],
            "text": b"not a tar at all",
            "gzip": b"\x1f\x8b\x08" + whole,
        }
        bad.write_bytes(damaged[content])
    outcome = stage()
    assert outcome.code == 1
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: 1 of 3 tars failed, the others are done: {bad}: ")
    assert outcome.stdout.splitlines() == [f"{tmp_path}/intermediates/{name}.parquet" for name in ("0001", "0003")]
    written = sorted(path.name for path in (tmp_path / "intermediates").rglob("*.parquet"))
    assert written == ["0001.parquet", "0001.parquet", "0003.parquet", "0003.parquet"]
    assert "6 in = 6 out + 0 rejected + 0 dropped" in outcome.stderr
    assert good.exists()


def test_nothing_of_a_tar_touches_the_disk(tmp_path, stage, make_tar, monkeypatch):
    make_tar(tmp_path / "raw", 1, (3, 2))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    for name in ("extract", "extractall", "_extract_member", "extractfile"):
        monkeypatch.setattr(tarfile.TarFile, name, lambda *_, **__: pytest.fail("extracted"))
    assert stage().code == 0
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "config.toml", "raw/0001.tar", "logs/process_tar.log", "intermediates/0001.parquet",
        "intermediates/_rejects/0001.parquet", "intermediates/_inputs/0001.tar.json",
    }  # fmt: skip


def test_a_rerun_keeps_what_is_there_and_says_so(tmp_path, stage, make_tar):
    for number in (1, 2):
        make_tar(tmp_path / "raw", number)
    assert stage().code == 0
    files = sorted((tmp_path / "intermediates").rglob("*.parquet"))
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    outcome = stage()
    assert (outcome.code, outcome.stdout) == (0, "")
    assert f"kept {tmp_path}/intermediates/0001.parquet, which is complete" in outcome.stderr
    assert "everything is there already and up to date: nothing redone" in outcome.stderr
    assert "12 in = 12 out + 0 rejected + 0 dropped; 0 written, 2 kept" in outcome.stderr
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before


def test_a_moved_copied_or_touched_tar_is_the_same_input(tmp_path, stage, make_tar):
    path = make_tar(tmp_path / "raw")
    assert stage().code == 0
    os.utime(path, (1, 1))
    (tmp_path / "raw").rename(tmp_path / "moved")
    (tmp_path / "intermediates").rename(tmp_path / "other")
    outcome = stage("--set", "paths.raw_dir=moved", "--set", "paths.intermediates_dir=other")
    assert outcome.code == 0
    assert "0 written, 1 kept" in outcome.stderr


def test_a_changed_tar_is_refused_by_name_until_overwrite(tmp_path, stage, make_tar):
    make_tar(tmp_path / "raw", 1, (3,))
    make_tar(tmp_path / "raw", 2, (3,))
    assert stage().code == 0
    before = read(tmp_path)[0]
    make_tar(tmp_path / "raw", 1, (3, 2))
    make_tar(tmp_path / "raw", 3, (3,))
    outcome = stage()
    assert outcome.code == 1
    complaint = outcome.stderr.splitlines()[-1]
    assert complaint.startswith(f"error: {tmp_path}/intermediates/0001.parquet: made from other inputs or settings")
    assert "(input 0001.tar has changed): give --overwrite" in complaint
    assert read(tmp_path)[0].equals(before)
    assert not (tmp_path / "intermediates" / "0003.parquet").exists()  # refused before anything is made
    assert stage("--overwrite").code == 0
    assert len(read(tmp_path)[0]) == 5


def test_shards_together_give_the_same_bytes_as_one_run(tmp_path, stage, make_tar):
    for number in (1, 2, 4, 7, 8):
        make_tar(tmp_path / "raw", number, (2, number))
    assert stage().code == 0
    for index in (2, 0, 1):
        outcome = stage("--shard", f"{index}/3", "--set", "paths.intermediates_dir=sharded")
        assert outcome.code == 0
        assert len(outcome.stdout.splitlines()) == (1 if index == 2 else 2)
        assert (tmp_path / "logs" / f"process_tar.{index}of3.log").is_file()
    whole = {
        path.relative_to(tmp_path / "intermediates"): path for path in (tmp_path / "intermediates").rglob("*.parquet")
    }
    assert len(whole) == 10
    for name, path in whole.items():
        assert (tmp_path / "sharded" / name).read_bytes() == path.read_bytes()


def test_a_shard_without_a_tar_has_nothing_to_do(tmp_path, stage, make_tar):
    make_tar(tmp_path / "raw", 1)
    outcome = stage("--shard", "5/6")
    assert outcome.code == 0
    assert "0 in = 0 out" in outcome.stderr


def test_only_the_named_tars_are_done_and_raw_dir_is_not_needed(tmp_path, stage, make_tar):
    paths = [make_tar(tmp_path / "elsewhere", number, (2,)) for number in (1, 2, 3)]
    outcome = stage("--tar-file", paths[2], "--tar-file", paths[0])
    assert outcome.code == 0
    assert [line[-12:] for line in outcome.stdout.splitlines()] == ["0001.parquet", "0003.parquet"]


@pytest.mark.parametrize(
    ("name", "code", "complaint"),
    [
        ("photos.tar", 1, "must be named NNNN.tar after its dataset id"),
        ("0009.tar", 1, "0009.tar: cannot be read (No such file or directory): correct the path"),
    ],
)
def test_a_named_tar_that_is_wrong_is_one_clear_line(tmp_path, stage, name, code, complaint):
    outcome = stage("--tar-file", tmp_path / name)
    assert outcome.code == code
    assert complaint in outcome.stderr.splitlines()[-1]
    assert outcome.stderr.count("error: ") == 1


def test_two_tars_of_one_name_would_share_an_output_and_are_refused(tmp_path, stage, make_tar):
    paths = [make_tar(tmp_path / folder) for folder in ("a", "b")]
    outcome = stage("--tar-file", paths[0], "--tar-file", paths[1])
    assert outcome.code == 2
    assert "--tar-file: two have one name, and so the same output" in outcome.stderr
    assert stage("--tar-file", paths[0], "--tar-file", paths[0]).code == 0


def test_a_missing_or_empty_raw_dir_is_one_clear_line(tmp_path, stage):
    outcome = stage()
    assert outcome.code == 1
    assert outcome.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/raw: no such folder: set [paths].raw_dir")
    (tmp_path / "raw").mkdir()
    assert "holds no *.tar" in stage().stderr


def test_an_output_that_is_damaged_is_named_and_made_again_with_overwrite(tmp_path, stage, make_tar):
    make_tar(tmp_path / "raw")
    (tmp_path / "intermediates").mkdir()
    (tmp_path / "intermediates" / "0001.parquet").write_bytes(b"PAR1 half")
    outcome = stage()
    assert outcome.code == 1
    assert "0001.parquet: not a readable parquet file" in outcome.stderr
    assert stage("--overwrite").code == 0


def test_a_file_in_place_of_the_output_folder_is_one_clear_line(tmp_path, stage, make_tar):
    make_tar(tmp_path / "raw")
    (tmp_path / "intermediates").write_text("in the way")
    outcome = stage()
    assert outcome.code == 1
    assert outcome.stderr.splitlines()[-1].startswith("error: cannot")
    assert "intermediates" in outcome.stderr.splitlines()[-1]
    assert "Traceback" not in outcome.stderr


def test_two_runs_give_the_same_bytes(tmp_path, stage):
    write_tar(tmp_path / "raw" / "0001.tar", make_city(1, (3, 4)) + make_defects()[0])
    outputs = []
    for workers in (1, 4):
        assert stage("--overwrite", "--set", f"infrastructure.num_workers={workers}",
                     "--set", "data.max_reject_fraction=0.9").code == 0  # fmt: skip
        outputs.append([path.read_bytes() for path in sorted((tmp_path / "intermediates").rglob("*.parquet"))])
    assert outputs[0] == outputs[1]
