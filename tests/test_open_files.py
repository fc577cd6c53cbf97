"""How many files are open at once does not grow with the number of parts: a system allows 1,024 by default."""

import resource
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded_datasets import unit_rows, write_dataset

from evaluate_embeddings import evaluate
from pipeline.embeddings_dataset.packaged_input import InputOptions, open_input
from pipeline.errors import DamagedError, InputError
from pipeline.files.tables import open_parquet
from publish_model import aggregate_embeddings, delete_ids, verify_embeddings

NUM_PARTS, SPARE = 60, 25


@pytest.fixture
def parts(tmp_path):
    return write_dataset(tmp_path / "out", pa.array(range(NUM_PARTS)), unit_rows(0, NUM_PARTS), rows_of_part=1)


@pytest.fixture
def few_files():
    """Allow a few files more than are open now."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + SPARE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    "line",
    [
        (verify_embeddings.main,), (aggregate_embeddings.main,),
        (delete_ids.main, "--delete-ids", "ids.txt"),
        (evaluate.main, "--set", "global.log_dir=logs", "--labels", "all.csv", "--embeddings"),
    ],
)  # fmt: skip
def test_a_tool_on_a_dataset_of_many_parts_keeps_few_files_open(
    run_main, parts, few_files, tmp_path, monkeypatch, line
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ids.txt").write_text("3\n59\n")
    (tmp_path / "all.csv").write_text(
        "OSMID,building_id\n" + "".join(f"{row},{row // 2}\n" for row in range(NUM_PARTS))
    )
    outcome = run_main(line[0], *line[1:], parts)
    assert outcome.code == 0, outcome.stderr


def test_a_folder_of_many_inputs_keeps_few_files_open(tmp_path, few_files):
    for number in range(NUM_PARTS):
        pq.write_table(pa.table({"OSMID": [number], "image_bytes": [b"x"]}), tmp_path / f"{number}.parquet")
    assert open_input(InputOptions(input=tmp_path)).num_rows == NUM_PARTS


def test_too_many_open_files_are_no_damage(parts, few_files):
    path = next((parts / "parts").iterdir())
    held = []

    def open_more():
        while True:
            held.append(open_parquet(path))

    with pytest.raises(InputError, match="cannot be read .*Too many open files.: put that right") as caught:
        open_more()
    held.clear()
    assert not isinstance(caught.value, DamagedError)
