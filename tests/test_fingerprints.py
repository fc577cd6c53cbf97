import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fingerprint_data import WIDTH, draw_table, write_run

from difficulty_metadata.compute_visual_neighbors import main


@pytest.fixture
def make_run(tmp_path: Path, write_config: Callable[..., Path]) -> Callable[..., tuple[Path, Path]]:
    return partial(write_run, tmp_path, write_config)


def without(name: str) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.drop_columns([name])


def cast(name: str, kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.schema.get_field_index(name), name, table[name].cast(kind))


def with_null(name: str) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[3] = None
        field = table.schema.field(name)
        return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))

    return change


def with_row(values: list[int | None]) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        rows = table["fingerprint"].to_pylist()
        rows[3] = values
        listed = pa.array(rows, pa.list_(pa.int64()))
        return table.set_column(table.schema.get_field_index("fingerprint"), "fingerprint", listed)

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (without("building_id"), "column building_id is missing"),
        (without("fingerprint"), "column fingerprint is missing"),
        (cast("target_lat", pa.string()), "column target_lat is string, expected double"),
        (cast("fingerprint", pa.list_(pa.float32())), "column fingerprint is list<"),
        (cast("fingerprint", pa.list_(pa.float64())), "not lists of one length of whole numbers"),
        (with_row([0] * (WIDTH - 1)), f"row 3 is empty or has not {WIDTH} numbers"),
        (with_row([0] * (WIDTH - 1) + [256]), "row 3 holds an empty value or no byte"),
        (with_row([0] * (WIDTH - 1) + [-1]), "row 3 holds an empty value or no byte"),
        (with_row([0] * (WIDTH - 1) + [None]), "row 3 holds an empty value"),
        (with_null("streetview_image_id"), "column streetview_image_id has empty values"),
        (with_null("fingerprint"), "column fingerprint: row 3 is empty"),
    ],
)
def test_a_bad_column_is_named_with_its_file(
    change: Callable[[pa.Table], pa.Table], problem: str, make_run: Callable, run_main: Callable
) -> None:
    config, output = make_run(draw_table(20), change(draw_table(20, dataset_id=2)))
    outcome = run_main(main, "--config", config)
    assert outcome.code == 1
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "0002_fingerprints.parquet" in errors[0]
    assert problem in errors[0]
    assert "stage 4" in errors[0] or "the stage that writes it" in errors[0]
    assert not output.exists()


def test_widths_that_differ_are_refused_naming_both_files(make_run: Callable, run_main: Callable) -> None:
    config, _ = make_run(draw_table(20), draw_table(20, dataset_id=2, width=27))
    outcome = run_main(main, "--config", config)
    assert outcome.code == 1
    assert "0002_fingerprints.parquet: fingerprints of 27 numbers, " in outcome.stderr
    assert "0001_fingerprints.parquet has 48" in outcome.stderr


def test_an_image_that_is_there_twice_is_named(make_run: Callable, run_main: Callable) -> None:
    config, _ = make_run(draw_table(20), draw_table(30))
    outcome = run_main(main, "--config", config)
    assert outcome.code == 1
    where = "in 0001_fingerprints.parquet, 0002_fingerprints.parquet"
    assert f"image 0001_0 is there more than once, {where}: remove one" in outcome.stderr


def test_a_folder_that_is_missing_or_empty_or_holds_no_image_is_said(make_run: Callable, run_main: Callable) -> None:
    config, output = make_run()
    outcome = run_main(main, "--config", config)
    assert outcome.code == 1
    assert "holds no *_fingerprints.parquet: run stage 4" in outcome.stderr
    make_run(draw_table(20).slice(0, 0))
    assert "the fingerprint files hold no image" in run_main(main, "--config", config).stderr
    shutil.rmtree(output.parent / "fingerprints")
    outcome = run_main(main, "--config", config)
    assert outcome.code == 1
    assert "no such folder: run stage 4" in outcome.stderr


def test_a_damaged_file_is_named(make_run: Callable, run_main: Callable) -> None:
    config, output = make_run(draw_table(20))
    (output.parent / "fingerprints" / "0002_fingerprints.parquet").write_bytes(b"not parquet at all")
    outcome = run_main(main, "--config", config)
    assert outcome.code == 1
    assert "0002_fingerprints.parquet: not a readable parquet file" in outcome.stderr


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.list_(pa.uint8()), pa.list_(pa.int16(), WIDTH)])
def test_fingerprints_as_lists_of_whole_numbers_give_the_same_neighbours(
    kind: pa.DataType, make_run: Callable, run_main: Callable
) -> None:
    config, output = make_run(draw_table(40), draw_table(20, dataset_id=2))
    assert run_main(main, "--config", config).code == 0
    expected = pq.read_table(output)
    output.unlink()
    make_run(cast("fingerprint", kind)(draw_table(40)), draw_table(20, dataset_id=2))
    assert run_main(main, "--config", config).code == 0
    assert pq.read_table(output).equals(expected)


def test_composite_ids_that_a_file_lacks_are_made_of_its_numbers(make_run: Callable, run_main: Callable) -> None:
    config, output = make_run(draw_table(40))
    assert run_main(main, "--config", config).code == 0
    expected = pq.read_table(output)
    output.unlink()
    table = draw_table(40)
    for name, column in (("target_id", "building_id"), ("patch_id", "streetview_image_id")):
        table = table.append_column(name, pa.array([int(id_.split("_")[1]) for id_ in table[column].to_pylist()]))
    table = table.append_column("dataset_id", pa.array([1] * 40))
    make_run(table.drop_columns(["building_id", "streetview_image_id"]))
    assert run_main(main, "--config", config).code == 0
    assert pq.read_table(output).equals(expected)
