"""The store of a tar's usable pairs: what goes in comes out, in order, and none of it stays in memory."""

import random
import tracemalloc

import pytest

from pipeline.errors import PipelineError
from pipeline.files.archive import Member
from preprocess_raw_data.tars.tar_items import TarInventory
from preprocess_raw_data.tars.views import FoundImage, View, ViewRecord, ViewStore


def make_view(number: int, patch_id: int | None = None) -> View:
    patch_id = number if patch_id is None else patch_id
    record = ViewRecord(1, 2**63 - 1, patch_id, -7, -0.0, 1e-300, 52.0, 0.1, 2.0, -90.5, 0.1 + 0.2)
    return View(f"stëm/{number}", FoundImage(number, f"stëm/{number}.jpg", 2**40 + number, 3), record)


def test_views_come_back_by_patch_id_exactly_as_they_went_in() -> None:
    views = [make_view(number, 1000 - number) for number in range(200)]
    store = ViewStore()
    for view in random.Random(0).sample(views, len(views)):
        store.add(view, f"{view.stem}.txt")
    assert len(store) == 200
    for _ in range(2):
        found = list(store)
        assert found == views[::-1]
        assert [str(view.record.target_lat) for view in found[:1]] == ["-0.0"]


def test_a_view_is_taken_out_once_with_its_metadata_s_name() -> None:
    store = ViewStore()
    store.add(make_view(3), "three.TXT")
    assert store.pop("stëm/4") is None
    assert store.pop("stëm/3") == (make_view(3), "three.TXT")
    assert store.pop("stëm/3") is None
    assert not store


def test_of_one_patch_id_the_image_that_comes_first_stays() -> None:
    store = ViewStore()
    for number in (5, 2, 9, 4):
        store.add(make_view(number, 0 if number != 4 else 1), "x.txt")
    assert [(view.stem, first.stem) for view, first in store.pop_repeated()] == [
        ("stëm/5", "stëm/2"),
        ("stëm/9", "stëm/2"),
    ]
    assert list(store) == [make_view(2, 0), make_view(4, 1)]


def test_sound_pairs_leave_nothing_in_memory() -> None:
    inventory = TarInventory()
    peaks = []
    tracemalloc.start()
    try:
        for number in range(6000):
            image, text = (Member(f"a/{number}.{suffix}", True, False, 0, 9, None) for suffix in ("jpg", "txt"))
            assert inventory.wants(image)
            assert inventory.wants(text)
            inventory.add_metadata(text, b"d 1 2 %d 5 52.2 0.1 7 0 0 0 52.2 0.1 1 9 9 1 0" % number)
            inventory.add_image(image, None)
            if number in (2999, 5999):
                peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 20_000  # a pair as objects is over a kilobyte
    views, rejects = inventory.judge()
    assert (len(views), rejects) == (6000, [])


def test_a_full_temporary_folder_is_one_error_that_says_what_to_do() -> None:
    store = ViewStore()
    store._base.execute("PRAGMA max_page_count = 8")

    def fill() -> None:
        for number in range(10_000):
            store.add(make_view(number), "x.txt")

    with pytest.raises(PipelineError, match=r"the temporary folder cannot take .*full.*free space there or set TMPDIR"):
        fill()
