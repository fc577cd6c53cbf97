"""Fixtures of the tests of packages."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_models import encode, make_photographs, make_picture

from publish_model import package_images

PHOTOGRAPHS = make_photographs(7)


@pytest.fixture
def folder(tmp_path):
    """Five photographs in two folders, one cut in half, and a text."""
    place = tmp_path / "photographs"
    (place / "north").mkdir(parents=True)
    for number in range(4):
        (place / "north" / f"{number}.jpg").write_bytes(PHOTOGRAPHS[number])
    (place / "half.jpg").write_bytes(PHOTOGRAPHS[4][: len(PHOTOGRAPHS[4]) // 2])
    (place / "z.PNG").write_bytes(encode(make_picture(5), "PNG"))
    (place / "notes.txt").write_text("no picture")
    return place


@pytest.fixture
def small_files(monkeypatch):
    """Two images a row group, and a file."""
    monkeypatch.setattr(package_images, "ROW_GROUP_ROWS", 2)
    monkeypatch.setattr(package_images, "FILE_BYTES", 1)


def run(run_main, source, output, *options):
    return run_main(package_images.main, "--input", source, "--output", output, *options)


def read_package(output):
    paths = sorted(output.glob("*.parquet"))
    return pa.concat_tables([pq.read_table(path).replace_schema_metadata() for path in paths])


def read_rejects(output):
    tables = [pq.read_table(path) for path in sorted((output / "_rejects").glob("*.parquet"))]
    return {row["member"]: row["reason"] for table in tables for row in table.to_pylist()}
