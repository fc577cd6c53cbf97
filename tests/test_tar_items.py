"""Metadata lines, and how a tar's members are paired and judged."""

import itertools
import tarfile
from pathlib import Path

import pytest
from raw_tars import Entry, make_view, write_d_line

from pipeline.errors import Rejection
from pipeline.files.archive import Member
from preprocess_raw_data.tars.metadata import parse_metadata
from preprocess_raw_data.tars.tar_items import TarInventory

LINE = write_d_line(7, 11, dataset_id=99, street_view_id=13, lat=-33.5, lon=151.25)
UNREADABLE = Rejection("unreadable_image", "broken")
TOO_LARGE = Rejection("image_too_large", "huge")


def change(number, text):
    """Return the line with its field (0 is the first behind the d) replaced."""
    words = LINE.split()
    words[number + 1] = text
    return " ".join(words)


def problem_of(text):
    with pytest.raises(Rejection) as caught:
        parse_metadata(text.encode() if isinstance(text, str) else text)
    assert caught.value.reason == "bad_metadata"
    return caught.value.detail


def test_the_d_line_gives_ids_positions_and_the_camera():
    record = parse_metadata(LINE.encode())
    assert (record.dataset_id, record.target_id, record.patch_id, record.street_view_id) == (99, 7, 11, 13)
    assert (record.target_lat, record.target_lon) == (-33.5, 151.25)
    assert (record.street_lat, record.street_lon) == (52.2001, 0.1201)
    assert (record.distance_m, record.heading, record.pitch) == (12.25, -90.5, 10.125)


@pytest.mark.parametrize(
    "text",
    [
        LINE + "\n",
        LINE + "\r\n",
        "\ufeff" + LINE,
        "a 1 2 3\nnotes\n\n" + LINE + "\na 4 5",
        "  " + LINE.replace(" ", "\t  "),
        "d 1 2 3\n" + LINE,
        change(4, "nan") + "\n" + LINE,
        LINE + "\n" + change(2, "12"),
        LINE + "\nd broken",
        "D 5\ndd 6\n" + LINE,
        change(2, "11.0"),
        change(2, "+11"),
    ],
)
def test_the_first_valid_d_line_counts_whatever_stands_around_it(text):
    assert parse_metadata(text.encode()).patch_id == 11


def test_bytes_that_are_not_utf8_do_not_hide_the_d_line():
    assert parse_metadata(b"a caf\xe9 \xff\n" + LINE.encode() + b"\n\xfe\xff").patch_id == 11


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("", "no line that begins with d"),
        ("a 1 2 3\nx", "no line that begins with d"),
        (LINE.upper(), "no line that begins with d"),
        ("d", "0 fields behind the d, expected 17"),
        (LINE.rsplit(" ", 1)[0], "16 fields behind the d, expected 17"),
        (LINE + " 5", "18 fields behind the d, expected 17"),
        (change(4, "90.0000001"), "target position 90.0000001, 151.25 is not on Earth"),
        (change(4, "-91"), "target position -91.0, 151.25 is not on Earth"),
        (change(5, "180.5"), "target position -33.5, 180.5 is not on Earth"),
        (change(10, "152"), "street position 152.0, 0.1201 is not on Earth"),
        (change(4, "nan"), "'nan' is not a finite number"),
        (change(5, "inf"), "'inf' is not a finite number"),
        (change(15, "-Infinity"), "'-Infinity' is not a finite number"),
        (change(6, "1e999"), "'1e999' is not a finite number"),
        (change(0, "x1"), "'x1' is not a finite number"),
        (change(7, "1_0"), "'1_0' is not a finite number"),
        (change(7, "0x1F"), "'0x1F' is not a finite number"),
        (change(7, "1,5"), "'1,5' is not a finite number"),
        (change(7, "٣"), "'٣' is not a finite number"),
        (change(1, "7.5"), "'7.5' is not an id"),
        (change(1, "1.23457e+06"), "'1.23457e+06' is not an id"),  # 1234567 and 1234568 print so
        (change(1, "9007199254740993.0"), "'9007199254740993.0' is not an id"),
        (change(2, "9223372036854775808"), "'9223372036854775808' is not an id"),
        ("d 1 2\n" + change(4, "nan"), "2 fields behind the d, expected 17"),
        (LINE.encode("utf-16"), "no line that begins with d"),
    ],
)
def test_a_text_without_a_valid_d_line_says_what_is_wrong_with_its_first(text, detail):
    assert problem_of(text) == detail


def test_positions_on_the_edge_of_the_earth_are_on_it():
    record = parse_metadata(change(4, "-90").replace("151.25", "180").encode())
    assert (record.target_lat, record.target_lon) == (-90, 180)
    assert parse_metadata(change(2, "9223372036854775807").encode()).patch_id == 2**63 - 1


def judge(entries, rejections=None):
    """Feed members without a tar; `rejections` says which image (by its number) cannot be used, and why."""
    inventory, images = TarInventory(), 0
    for number, entry in enumerate(entries):
        member = Member(entry.name)
        member.type, member.offset_data, member.size = entry.kind, 512 * number, len(entry.data)
        if not inventory.wants(member):
            continue
        if member.is_image_name:
            inventory.add_image(member, (rejections or {}).get(images))
            images += 1
        else:
            inventory.add_metadata(member, entry.data)
    views, rejects = inventory.judge()
    return [view.image.name for view in views], [(name, why.reason) for name, why in rejects], dict(inventory.ignored)


def make_pair(stem, patch_id=1, suffix=".jpg", text=None):
    return make_view(stem, 1, patch_id, image=b"x", suffix=suffix, text=text)


def make_link(name):
    return Entry(name, kind=tarfile.SYMTYPE, link="else")


def test_pairs_are_made_by_path_without_suffix_in_any_order():
    entries = make_pair("0001/a", 3) + make_pair("0001/b", 1, ".JPEG") + make_pair("b", 2, ".Jpg")
    for order in itertools.permutations(entries):
        assert judge(order) == (["0001/b.JPEG", "b.Jpg", "0001/a.jpg"], [], {})


def test_what_has_no_partner_is_rejected_under_its_full_name():
    entries = [make_pair("x/a")[0], make_pair("y/a")[1], make_pair("b.1")[0], make_pair("b.2")[1]]
    assert judge(entries) == (
        [],
        [
            ("b.1.jpg", "missing_metadata"),
            ("b.2.txt", "missing_image"),
            ("x/a.jpg", "missing_metadata"),
            ("y/a.txt", "missing_image"),
        ],
        {},
    )


def test_folders_other_members_and_links_of_other_names_are_ignored_and_counted():
    entries = [
        Entry("0001", kind=tarfile.DIRTYPE),
        Entry("0001/folder.jpg", kind=tarfile.DIRTYPE),
        Entry("0001/readme.md"),
        Entry("0001/._a.jpg"),
        Entry("._a.txt"),
        Entry("/etc/passwd"),
        make_link("0001/latest"),
        Entry("0001/pipe", kind=tarfile.FIFOTYPE),
        *make_pair("0001/a"),
    ]
    assert judge(entries) == (["0001/a.jpg"], [], {"folders": 2, "other members": 6})


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_a_link_device_or_pipe_named_as_an_image_or_text_is_no_file(kind):
    image, text = make_pair("a")
    assert judge([Entry("a.jpg", kind=kind, link="b")])[1] == [("a.jpg", "not_a_file")]
    assert judge([Entry("a.txt", kind=kind, link="b")])[1] == [("a.txt", "not_a_file")]
    assert judge([Entry("a.jpg", kind=kind, link="b"), text])[:2] == ([], [("a", "not_a_file")])
    assert judge([image, Entry("a.txt", kind=kind, link="b")])[:2] == ([], [("a", "not_a_file")])


def test_a_link_beside_a_whole_pair_costs_only_itself():
    assert judge([*make_pair("a"), make_link("a.jpeg")])[:2] == (["a.jpg"], [("a.jpeg", "not_a_file")])
    assert judge([make_link("a.jpg"), *make_pair("a")])[:2] == (["a.jpg"], [("a.jpg", "not_a_file")])


@pytest.mark.parametrize("stem", ["/abs/a", "../a", "x/../../a", "x/.."])
def test_a_path_out_of_the_tar_is_unsafe_single_or_paired(stem):
    stem = stem if stem != "x/.." else "x/../b"
    image, text = make_pair(stem)
    assert judge([image, text])[1] == [(stem, "unsafe_path")]
    assert judge([image])[1] == [(stem + ".jpg", "unsafe_path")]
    assert judge([text])[1] == [(stem + ".txt", "unsafe_path")]


def test_several_images_of_one_stem_leave_the_first_usable_one():
    pair, second = make_pair("a"), Entry("a.jpeg", b"y")
    assert judge([*pair, second])[:2] == (["a.jpg"], [("a.jpeg", "duplicate_image_id")])
    assert judge([second, *pair])[:2] == (["a.jpeg"], [("a.jpg", "duplicate_image_id")])
    assert judge([*pair, second], {0: UNREADABLE})[:2] == (["a.jpeg"], [("a.jpg", "unreadable_image")])
    assert judge([*pair, second], {1: UNREADABLE})[:2] == (["a.jpg"], [("a.jpeg", "unreadable_image")])
    assert judge([*pair, second], {0: UNREADABLE, 1: TOO_LARGE})[:2] == (
        [],
        [("a", "unreadable_image"), ("a.jpeg", "image_too_large")],
    )


def test_a_name_that_is_there_twice_counts_once():
    pair = make_pair("a")
    assert judge([*pair, pair[0]])[:2] == (["a.jpg"], [("a.jpg", "duplicate_image_id")])
    assert judge([*pair, pair[0]], {1: UNREADABLE})[:2] == (["a.jpg"], [("a.jpg", "unreadable_image")])
    corrected = Entry("a.txt", b"broken")
    assert judge([*pair, corrected]) == (["a.jpg"], [("a.txt", "duplicate_image_id")], {})
    assert judge([*pair, pair[0], corrected])[:2] == (
        ["a.jpg"],
        [("a.jpg", "duplicate_image_id"), ("a.txt", "duplicate_image_id")],
    )
    assert judge([*pair, Entry("a.TXT", b"d")])[:2] == (["a.jpg"], [("a.TXT", "duplicate_image_id")])


def test_of_two_valid_items_with_one_patch_the_first_image_in_the_tar_wins():
    first, second = make_pair("b", 5), make_pair("a", 5)
    assert judge(first + second)[:2] == (["b.jpg"], [("a", "duplicate_image_id")])
    assert judge([second[1], *first, second[0]])[:2] == (["b.jpg"], [("a", "duplicate_image_id")])
    assert judge(first + second, {0: UNREADABLE})[:2] == (["a.jpg"], [("b", "unreadable_image")])
    bad = make_pair("b", 5, text=b"d 1 2")
    assert judge(bad + second)[:2] == (["a.jpg"], [("b", "bad_metadata")])


def test_reasons_are_tested_in_their_fixed_order():
    link, bad = make_link("/a.jpg"), Entry("/a.txt", b"no line")
    assert judge([link, bad])[1] == [("/a", "not_a_file")]
    assert judge([Entry("/a.jpg"), bad], {0: TOO_LARGE})[1] == [("/a", "unsafe_path")]
    assert judge([Entry("/a.jpg")], {0: TOO_LARGE})[1] == [("/a.jpg", "unsafe_path")]
    assert judge([Entry("a.jpg")], {0: TOO_LARGE})[1] == [("a.jpg", "missing_metadata")]
    assert judge([Entry("a.txt", b"no line")])[1] == [("a.txt", "missing_image")]
    assert judge([Entry("a.jpg"), Entry("a.txt", b"no line")], {0: TOO_LARGE})[1] == [("a", "bad_metadata")]
    assert judge(make_pair("a") + make_pair("b"), {1: TOO_LARGE})[1] == [("b", "image_too_large")]
    assert judge(make_pair("a") + make_pair("b"), {1: UNREADABLE})[1] == [("b", "unreadable_image")]


def test_every_image_and_lone_text_is_out_or_rejected_once():
    entries = []
    for number in range(200):
        pair = make_pair(f"{number:03d}", number // 2)
        entries += [pair, pair[:1], pair[1:], [*pair, Entry(f"{number:03d}.jpeg")], [make_link(pair[0].name), pair[1]]][
            number % 5
        ]
    views, rejects, _ = judge(entries, dict.fromkeys(range(0, 200, 7), UNREADABLE))
    items = {entry.name for entry in entries if entry.name.endswith(("jpg", "jpeg"))}
    items |= {entry.name for entry in entries if f"{Path(entry.name).stem}.jpg" not in items}
    assert len(views) + len(rejects) == len(items)
    assert [int(Path(name).stem) // 2 for name in views] == sorted({int(Path(name).stem) // 2 for name in views})
