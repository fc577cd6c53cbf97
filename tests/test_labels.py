"""The pairs of buildings that an evaluation leaves out."""

import pyarrow as pa
import pytest

from pipeline.errors import InputError
from pipeline.retrieval.labels import read_ignore_pairs, resolve_pairs


def test_unknown_ids_in_ignored_pairs_are_passed_over(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("building_id_a,building_id_b\n0001,2\n2,0001\n2,2\n7,8\n0001,8\n")
    pairs = resolve_pairs(read_ignore_pairs(path), pa.array(["2", "0001", "3"]))
    assert pairs.tolist() == [[0, 1]]
    assert len(resolve_pairs(None, pa.array(["2"]))) == 0


def test_pairs_of_which_no_id_occurs_are_a_warning(tmp_path, caplog):
    (tmp_path / "pairs.csv").write_text("building_id_a,building_id_b\n1_2,1_3\n")
    with caplog.at_level("WARNING", "spatial_building_embeddings"):
        resolve_pairs(read_ignore_pairs(tmp_path / "pairs.csv"), pa.array(["0001_3", "1_3"]))
        assert caplog.text == ""
        resolve_pairs(read_ignore_pairs(tmp_path / "pairs.csv"), pa.array(["0001_2", "0001_3"]))
    assert "ignore pairs: 1 read, 0 of them between buildings of the split" in caplog.text


def test_a_byte_order_mark_before_the_pairs_is_passed_over(tmp_path):
    (tmp_path / "pairs.csv").write_text("building_id_a,building_id_b\na,b\n", encoding="utf-8-sig")
    pairs = resolve_pairs(read_ignore_pairs(tmp_path / "pairs.csv"), pa.array(["a", "b"]))
    assert pairs.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read .No such file or directory"),
        (
            "building_id_a,other\n1,2\n",
            "no column building_id_b: --ignore-pairs takes a CSV with the columns building_id_a and",
        ),
        ("", "no column building_id_a"),
        ("building_id_a,building_id_b\n1\n", "row 1 below the names has 1 values for 2 columns"),
    ],
)
def test_a_bad_list_of_ignored_pairs_is_refused_with_the_remedy(tmp_path, content, message):
    path = tmp_path / "pairs.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=rf"pairs\.csv: .*{message}"):
        read_ignore_pairs(path)
