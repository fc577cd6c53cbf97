"""The warning where a checkpoint may have been trained on buildings of the split that is scored."""

import html
import json
from pathlib import Path

import evaluation_data
import pyarrow as pa
import pytest
from evaluation_data import make_workplace, write_checkpoint

from evaluate_embeddings.evaluate import main
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


@pytest.mark.parametrize(
    ("embedded_with", "doubt"),
    [
        ({"image_size": 448}, "(image_size was 448 and is now 224)"),
        ({"image_size": 224, "model": "b"}, "(model was 'b' and is now 'a')"),
        ({"image_size": 224, "dtype": "bfloat16", "embedding_dtype": "float16"}, None),
        (None, None),
    ],
)
def test_the_doubt_names_the_setting_by_which_the_split_was_embedded_otherwise(tmp_path, embedded_with, doubt):
    made_by = {"embedded_with": {"model": "a", "image_size": 224, "dtype": "auto", "embedding_dtype": "float32"}}
    tables.write_parquet(tmp_path / "test.parquet", pa.table({"a": [1]}), made_by)
    provenance = {"embedded_with": embedded_with and {"model": "a"} | embedded_with}
    rest = {"trained_on": hash_buildings([])}
    checkpoint = Checkpoint(Path("a.pt"), {}, {}, provenance=provenance, rest=rest)
    found = doubt_split(checkpoint, tmp_path / "test.parquet", pa.array(["0001_1"]))
    assert found == (doubt and f"Mind: a.pt was trained on other embeddings than this split's {doubt}")
    checkpoint.rest["trained_on"] = hash_buildings(["0001_1"])
    found = doubt_split(checkpoint, tmp_path / "test.parquet", pa.array(["0001_1"]))
    assert found == "Mind: a.pt was trained on 1 of the 1 buildings of this split"


SEEN = "Mind: checkpoint_best.pt was trained on 2 of the 24 buildings of this split"
UNKNOWN = "Mind: checkpoint_best.pt does not name its training buildings, and nothing tells if"
FROM_FILE = "Mind: checkpoint_best.pt does not name its training buildings; the scores hold if"


@pytest.mark.parametrize(
    ("trained_on", "split_file", "warning"),
    [(["0001_0", "0002_1", "0009_9"], None, SEEN), (["0001_0", "0002_1"], "feed", SEEN), (None, None, UNKNOWN),
     (None, "feed", FROM_FILE), (["0009_9"], None, None)],
)  # fmt: skip
def test_a_projector_that_may_have_seen_the_split_gets_no_clean_verdict(
    tmp_path, run_main, monkeypatch, trained_on, split_file, warning
):
    monkeypatch.setattr(evaluation_data, "SPLIT_FILE", split_file)
    config_path = make_workplace(tmp_path, photos=False)
    write_checkpoint(tmp_path / "checkpoints" / "checkpoint_best.pt", trained_on=trained_on)
    outcome = run_main(main, "--config", config_path, "--set", f"global.log_dir={tmp_path / 'logs'}")
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    page = (tmp_path / "report" / "report.html").read_text()
    if warning is None:
        assert metrics["warning"] is None
        assert metrics["headline"].startswith("The projector ")
        return
    assert metrics["warning"].startswith(warning)
    assert metrics["headline"].startswith(f"{metrics['warning']}. The projector ")
    assert f"<h1>{metrics['headline']}</h1>" in html.unescape(page)
    said = " ".join(outcome.stderr.split())
    assert f"WARNING evaluate: {warning}" in said
    assert metrics["headline"] in said
