"""Byte-identical images under different ids."""

import base64
import collections
import random
import re

import numpy as np
import pyarrow as pa
import pytest

from pipeline.embeddings_dataset.columns import hash_bytes, hash_ids
from pipeline.embeddings_dataset.duplicates import describe_duplicates
from pipeline.embeddings_dataset.parts import HASHES_KEY
from pipeline.files.tables import write_parquet


def write_part(folder, name, rows):
    """Write a part of (id, image) rows as stage 8 does."""
    ids, images = [row[0] for row in rows], [row[1] for row in rows]
    path = folder / "parts" / f"{name}.parquet"
    hashes = base64.b64encode(np.array([hash_bytes(image) for image in images], "<u8").tobytes())
    write_parquet(path, pa.table({"OSMID": pa.array(ids, pa.string())}), {}, {HASHES_KEY: hashes})
    return path


def count_plainly(rows):
    """The oracle: a dictionary of every image's ids."""
    ids_of = collections.defaultdict(list)
    for name, image in rows:
        ids_of[image].append(name)
    shared = [names for names in ids_of.values() if len(set(names)) > 1]
    return sum(map(len, shared)), len(shared), sorted(map(len, shared), reverse=True)[:3]


@pytest.mark.parametrize("num_images", [1, 20, 100, 100_000])
def test_the_count_equals_a_dictionary_of_all_images(tmp_path, num_images):
    generator = random.Random(num_images)
    rows = [(f"way/{generator.randrange(40)}", str(generator.randrange(num_images)).encode()) for _ in range(300)]
    paths = [write_part(tmp_path, start, rows[start : start + 37]) for start in range(0, 300, 37)]
    num_shared, num_pictures, counts = count_plainly(rows)
    found = [line for line in describe_duplicates(paths) if "another OSMID" in line]
    assert [line.partition(":")[0] for line in found] == (
        [f"{num_shared} images are byte for byte the same as an image of another OSMID ({num_pictures} pictures)"]
        if num_shared
        else []
    )
    examples = re.findall(r"(\d+) times, among them (\S+) and ([^\s;:]+)", "".join(found))
    assert [int(count) for count, _, _ in examples] == counts
    for _, one, other in examples:
        holders = [image for name, image in rows if name in (one, other)]
        assert one != other
        assert collections.Counter(holders).most_common(1)[0][1] >= 2


def test_the_examples_are_the_first_two_ids_in_input_order(tmp_path):
    rows = [("c", b"1"), ("b", b"2"), ("a", b"1"), ("a", b"1"), ("d", b"1")]
    found = describe_duplicates([write_part(tmp_path, "p", rows)])
    assert "4 images are byte for byte the same" in found[0]
    assert "(1 pictures): 4 times, among them c and a: is" in found[0]


def test_images_that_one_id_repeats_are_counted_apart(tmp_path):
    rows = [("a", b"1"), ("a", b"1"), ("b", b"2"), ("c", b"1"), ("a", b"1"), ("d", b"3"), ("d", b"3")]
    found = describe_duplicates([write_part(tmp_path, "p", rows)])
    assert "4 images are byte for byte the same as an image of another OSMID (1 pictures): 4 times" in found[0]
    assert "3 images are byte for byte the same as an earlier image of their own OSMID, among them one of a" in found[1]
    (alone,) = describe_duplicates([write_part(tmp_path, "q", rows[-2:])])
    assert "1 images are byte for byte the same as an earlier image of their own OSMID, among them one of d" in alone


def test_parts_without_rows_are_no_trouble(tmp_path):
    assert describe_duplicates([write_part(tmp_path, "p", [])]) == []


def test_ids_that_differ_have_different_hashes():
    values = [1, "1", b"1", None, "None", 1.5, "é", True]
    assert len(set(hash_ids(values))) == len(values)
