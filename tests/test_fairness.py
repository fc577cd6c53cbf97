"""The warning where a checkpoint may have been trained on buildings of the split that is scored."""

from pathlib import Path

import pyarrow as pa
import pytest

from evaluate_embeddings.scores.fairness import doubt_split
from pipeline.files import tables
from pipeline.retrieval.checkpoint import Checkpoint, hash_buildings


@pytest.mark.parametrize(
    ("trained_on", "settings", "doubt"),
    [
        (["0001_1", "0001_9"], {}, "a.pt was trained on 1 of the 2 buildings of this split"),
        (["0001_8", "0001_9"], {}, None),
        (None, {"split_file": "abc"}, "a.pt does not name its training buildings; the scores hold if they are the spl"),
        (None, {}, "a.pt does not name its training buildings, and nothing tells if they are in this split"),
    ],
)
def test_the_doubt_follows_the_training_buildings_where_they_are_named(tmp_path, trained_on, settings, doubt):
    tables.write_parquet(tmp_path / "test.parquet", pa.table({"a": [1]}), {"stage": "x", "settings": settings})
    rest = {} if trained_on is None else {"trained_on": hash_buildings(trained_on)}
    found = doubt_split(
        Checkpoint(Path("a.pt"), {}, {}, rest=rest), tmp_path / "test.parquet", pa.array(["0001_1", "0001_2"])
    )
    assert found is None if doubt is None else f"Mind: {doubt}" in found
