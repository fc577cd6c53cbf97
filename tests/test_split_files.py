"""Stage 3 with a split file that does not fit the embeddings."""

import pyarrow as pa
import pyarrow.parquet as pq
from embedding_files import make_rows, place_of, write

from preprocess_raw_data import merge_and_split


def test_buildings_of_a_split_file_that_are_no_embeddings_are_counted_or_refused(tmp_path, write_config, run_main):
    write(tmp_path, 1, make_rows(1, [2] * 40))
    path, config = tmp_path / "s.parquet", write_config(tmp_path)

    def stage(setting):
        return run_main(merge_and_split.main, "--config", config, "--set", setting)

    pq.write_table(pa.table({"building_id": ["0001_2", None], "split": ["test", "val"]}), path)
    outcome = stage("data.split_file=s.parquet")
    assert (outcome.code, "Traceback" in outcome.stderr) == (1, False)
    assert "s.parquet: row 2 has no building_id: give it one" in outcome.stderr.splitlines()[-1]
    for names in (["1_1", "0001_01"], []):
        pq.write_table(pa.table({"building_id": pa.array(names, pa.string()), "split": ["test"] * len(names)}), path)
        outcome = stage("data.split_file=s.parquet")
        assert outcome.code == 1
        words = f"{len(names)} of {len(names)} buildings that the split file names are not among the embeddings"
        assert words in outcome.stderr.splitlines()[-1]
        assert "such as '0001_1' (the dataset's id in four digits, _," in outcome.stderr.splitlines()[-1]
    names = ["0001_2", "1_1", "0001_999"]
    pq.write_table(pa.table({"building_id": names, "split": ["test"] * 3}), path)
    outcome = stage("data.split_file=s.parquet")
    assert (outcome.code, place_of(tmp_path)["0001_2"]) == (0, "test")
    words = "2 of 3 buildings that the split file names are not among the embeddings, such as '1_1'"
    assert words in outcome.stderr
