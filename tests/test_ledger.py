"""The page's ledger: what the files of each stage say of their own making."""

import json

import pyarrow as pa
import pytest
from evaluation_data import make_workplace

from evaluate_embeddings.evaluate import run
from evaluate_embeddings.page.ledger import read_ledger
from pipeline.cli import Options
from pipeline.config import load_config
from pipeline.files.tables import write_parquet


@pytest.fixture
def config(tmp_path, write_config):
    return load_config(write_config(tmp_path, new_data={"input": "in.parquet", "output": "new"}))


def write(path, counts, reasons=None):
    write_parquet(path, pa.table({"x": [1]}), {"counts": counts, "reasons": reasons or {}})


def test_counts_of_all_files_of_a_stage_are_added_up_and_splits_count_once(config, tmp_path):
    write(tmp_path / "intermediates" / "0001.parquet", {"in": 9, "out": 7, "rejected": 2}, {"bad_metadata": 2})
    write(tmp_path / "intermediates" / "0002.parquet", {"in": 5, "out": 4, "rejected": 1}, {"bad_metadata": 1})
    write(tmp_path / "intermediates" / "_rejects" / "0002.parquet", {"in": 100, "out": 100})
    write(tmp_path / "intermediates" / ".0003.parquet", {"in": 100, "out": 100})
    for split in ("train", "val", "test"):
        write(tmp_path / "merged" / f"{split}.parquet", {"in": 11, "out": 10, "dropped": 1}, {"single_image": 1})
    write(tmp_path / "new" / "parts" / "rg00000_rb00000.parquet", {"in": 3, "out": 3})
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "provenance.json").write_text(
        json.dumps({"stage": "train", "counts": {"in": 8, "out": 8}})
    )
    found = {result.stage: result for result in read_ledger(config)}
    assert list(found) == ["process_tar", "merge_and_split", "train", "generate_embeddings_from_parquet"]
    first = found["process_tar"]
    assert (first.rows_in, first.rows_out, first.rejected, len(first.kept)) == (14, 11, 3, 2)
    assert first.reasons == {"bad_metadata": 3}
    merged = found["merge_and_split"]
    assert (merged.rows_in, merged.rows_out, merged.dropped) == (11, 10, 1)
    assert all(result.rows_in == result.rows_out + result.rejected + result.dropped for result in found.values())


def test_what_is_not_there_damaged_or_without_provenance_is_passed_over(config, tmp_path):
    (tmp_path / "intermediates").mkdir()
    (tmp_path / "intermediates" / "0001.parquet").write_bytes(b"no parquet")
    write_parquet(tmp_path / "fingerprints" / "0001_fingerprints.parquet", pa.table({"x": [1]}), {})
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "provenance.json").write_text("[")
    assert read_ledger(config) == []


def test_the_page_shows_the_stages_that_are_there_and_itself(tmp_path):
    config_path = make_workplace(tmp_path, photos=False)
    write(tmp_path / "intermediates" / "0001.parquet", {"in": 5, "out": 4, "rejected": 1}, {"<b>odd": 1})
    run(load_config(config_path, ["paths.intermediates_dir=intermediates"]), Options())
    page = (tmp_path / "report" / "report.html").read_text()
    ledger = page[page.index('id="ledger"') :]
    assert "<td>process_tar</td><td>1</td><td>5</td><td>4</td><td>1</td><td>0</td><td>&lt;b&gt;odd 1</td>" in ledger
    assert "<td>evaluate</td>" in ledger
