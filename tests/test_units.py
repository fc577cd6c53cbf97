"""The per-tar stages' work: which tars, what is kept, what fails, what is counted."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cli import Options, StageResult
from pipeline.config import load_config
from pipeline.errors import ConfigError, InputError, PipelineError, StaleOutputError
from pipeline.files import listing
from pipeline.files.identity import identify
from pipeline.files.listing import find_tars
from pipeline.files.tables import make_provenance, write_parquet
from pipeline.files.units import (
    Unit,
    UnitState,
    do_tars,
    find_complete,
    find_state,
    keep_complete,
    list_tar_units,
)
from pipeline.ids import Shard
from pipeline.stages import STAGES
from pipeline.workspace import write_json


@pytest.fixture
def config(tmp_path, write_config):
    return load_config(write_config(tmp_path))


def list_units(config, options, number=1, describe=None):
    return list_tar_units(STAGES[number], config, options, describe)


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(name.encode())


def test_a_unit_is_a_tar_its_intermediate_and_its_output(tmp_path, config):
    touch(tmp_path / "raw", "0002.tar", "0001.tar", ".0003.tar")
    first, second = list_units(config, Options(), 2)
    assert (first.dataset_id, second.dataset_id) == (1, 2)
    assert first.tar_path == tmp_path / "raw" / "0001.tar"
    assert first.intermediate_path == tmp_path / "intermediates" / "0001.parquet"
    assert first.output_path == tmp_path / "embeddings" / "0001_embeddings.parquet"


def test_an_intermediate_whose_tar_is_gone_is_a_unit_of_the_later_stages_only(tmp_path, config):
    touch(tmp_path / "raw", "0002.tar")
    touch(tmp_path / "intermediates", "0001.parquet", ".0004.parquet", "notes.parquet")
    assert [unit.dataset_id for unit in list_units(config, Options(), 2)] == [1, 2]
    assert [unit.dataset_id for unit in list_units(config, Options())] == [2]
    (tmp_path / "raw" / "0002.tar").unlink()
    (tmp_path / "raw").rmdir()
    assert [unit.dataset_id for unit in list_units(config, Options(), 2)] == [1]
    with pytest.raises(InputError, match="no such folder"):
        list_units(config, Options())


def test_nothing_at_all_is_an_error(tmp_path, config):
    with pytest.raises(InputError, match=r"raw: no such folder"):
        list_units(config, Options(), 2)


def test_named_tars_win_over_the_folder_and_shards_cut_either(tmp_path, config):
    touch(tmp_path / "raw", "0001.tar", "0002.tar", "0003.tar")
    named = Options(tar_files=(Path("x/0009.tar"), Path("0008.tar")))
    assert [unit.tar_path for unit in list_units(config, named)] == [
        Path("0008.tar"),
        Path("x/0009.tar"),
    ]
    shard = Options(shard=Shard(0, 2))
    assert [unit.dataset_id for unit in list_units(config, shard)] == [1, 3]
    with pytest.raises(ConfigError, match="--tar-file: two have one name"):
        list_units(config, Options(tar_files=(Path("x/0009.tar"), Path("y/0009.tar"))))


@pytest.fixture
def run(tmp_path, config):
    """Run units that write a parquet of one row; the tars named in `broken` cannot be read."""

    def start(settings=None, overwrite=False, broken=(), units=None):
        result = StageResult("stage")
        made = []

        def describe(unit):
            return make_provenance("stage", [identify(unit.tar_path)], settings or {})

        def make(unit, provenance):
            if unit.tar_path.name in broken:
                raise InputError(f"{unit.tar_path}: damaged")
            made.append(unit.dataset_id)
            counts = {"in": 3, "out": 2, "rejected": 1}
            provenance = provenance | {"counts": counts, "reasons": {"unreadable_image": 1}}
            write_parquet(unit.output_path, pa.table({"a": [1]}), provenance)
            return provenance

        units = [replace(unit, describe=describe) for unit in units or list_units(config, Options())]
        try:
            do_tars(units, result, overwrite, make)
        except PipelineError as error:
            return made, result, error
        return made, result, None

    touch(tmp_path / "raw", "0001.tar", "0002.tar", "0003.tar")
    return start


def test_made_and_kept_units_are_counted_alike(run, tmp_path):
    made, first, error = run()
    assert (made, error) == ([1, 2, 3], None)
    (tmp_path / "intermediates" / "0002.parquet").unlink()
    made, second, error = run()
    assert (made, error) == ([2], None)
    assert (
        (second.counts["in"], second.counts["out"], second.counts["rejected"])
        == (first.counts["in"], first.counts["out"], first.counts["rejected"])
        == (9, 6, 3)
    )
    assert second.reasons == {"unreadable_image": 3}
    assert (len(second.written), len(second.kept)) == (1, 2)


def test_a_tar_that_fails_leaves_the_others_done_and_is_told_in_the_end(run, tmp_path):
    made, result, error = run(broken=("0002.tar",))
    assert made == [1, 3]
    assert str(error) == f"1 of 3 tars failed, the others are done: {tmp_path}/raw/0002.tar: damaged"
    assert error.result is result
    assert result.counts["in"] == 6
    made, _, error = run(broken=("0002.tar", "0003.tar"), overwrite=True)
    assert made == [1]
    assert (
        str(error)
        == f"2 of 3 tars failed, the others are done: {tmp_path}/raw/0002.tar: damaged (and 1 more, see the log)"
    )


def test_a_tar_whose_inputs_are_missing_fails_before_and_counts_once(run, tmp_path, config):
    units = list_units(config, Options())
    (tmp_path / "raw" / "0001.tar").unlink()
    made, _, error = run(units=units)
    assert made == [2, 3]
    assert str(error).startswith("1 of 3 tars failed")


def test_a_stale_output_is_refused_before_anything_is_made(run, tmp_path):
    run()
    (tmp_path / "intermediates" / "0001.parquet").unlink()
    made, _, error = run(settings={"size": 2})
    assert made == []
    assert isinstance(error, StaleOutputError)
    assert "0002.parquet: made from other inputs or settings (size was None and is now 2)" in str(error)
    assert run(settings={"size": 2}, overwrite=True)[0] == [1, 2, 3]


@pytest.mark.parametrize(("stage", "overwrite"), [("merge_and_split", False), ("merge_and_split", True), (None, True)])
def test_what_another_stage_or_program_wrote_stays(run, tmp_path, stage, overwrite):
    path = tmp_path / "intermediates" / "0002.parquet"
    write_parquet(path, pa.table({"a": [1]}), {"stage": stage} if stage else {})
    made, _, error = run(overwrite=overwrite)
    whose = stage or "another program"
    assert (made, str(error)) == ([], f"{path}: {whose} wrote it, so it stays: set another path for the output")


def test_a_file_that_is_no_parquet_is_not_replaced_by_one(tmp_path):
    (tmp_path / "raw.tar").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"raw\.tar: another program wrote it"):
        keep_complete(Unit("a", (tmp_path / "raw.tar",), lambda _: provenance()), StageResult("stage"), overwrite=True)


def test_no_stage_writes_into_an_embeddings_dataset(run, tmp_path):
    (tmp_path / "state.json").write_text('{"embedding_version": "0"}')
    assert "is an embeddings dataset: give another path" in str(run(overwrite=True)[2])


def test_too_many_rejects_fail_the_run_with_the_counts(tmp_path, write_config, caplog):
    result = StageResult("stage", Counter({"in": 10, "out": 7, "rejected": 3}))
    for allowed, fails in ((0.2, True), (0.3, False), (1.0, False), (0.0, True)):
        config = load_config(write_config(tmp_path, data={"max_reject_fraction": allowed}))
        if not fails:
            result.check_reject_fraction(config.data.max_reject_fraction)
            continue
        with pytest.raises(
            PipelineError, match=rf"stage: 3 of 10 items were rejected, .* = {allowed:g} allows"
        ) as caught:
            result.check_reject_fraction(config.data.max_reject_fraction)
        assert caught.value.result is result
    StageResult("stage").check_reject_fraction(config.data.max_reject_fraction)
    assert not caplog.records
    StageResult("stage", Counter({"in": 5, "rejected": 3, "dropped": 2})).check_reject_fraction(1.0)
    assert "stage: none of the 3 items could be used" in caplog.text


def test_tars_are_listed_by_dataset_and_what_is_none_is_counted(tmp_path, caplog, monkeypatch):
    for name in ("0010.tar", "0002.tar", ".0003.tar", "12345.tar", "0004.tar.aria2"):
        (tmp_path / name).touch()
    monkeypatch.setattr(listing.logger, "propagate", True)
    assert [path.name for _, path in sorted(find_tars(tmp_path).items())] == ["0002.tar", "0010.tar", "12345.tar"]
    assert "1 files are not *.tar and are passed over (.aria2 1), as 0004.tar.aria2" in caplog.text


def test_a_missing_or_empty_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such folder: set \[paths\]\.raw_dir"):
        find_tars(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no \*\.tar"):
        find_tars(tmp_path)


@pytest.mark.parametrize("name", ["backup.tar", "0002.TAR"])
def test_a_wrongly_named_tar_in_the_folder_is_refused(tmp_path, name):
    (tmp_path / "0001.tar").touch()
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=rf"{name}: a raw tar must be named NNNN\.tar"):
        find_tars(tmp_path)


# ------------------------------------------------------------------------------------------------ the state of a unit


def provenance(**settings):
    return make_provenance("stage", [], settings) | {"counts": {"in": 2, "out": 2}, "reasons": {}}


def test_a_unit_that_lacks_an_output_is_made(tmp_path):
    unit = Unit("a", (tmp_path / "a.json", tmp_path / "b.pt"), lambda _: provenance())
    assert find_complete(unit, overwrite=False) is None
    write_json(unit.outputs[0], provenance())
    assert find_complete(unit, overwrite=False) is None
    unit.outputs[1].touch()
    assert find_complete(unit, overwrite=False) is not None
    assert find_complete(unit, overwrite=True) is None


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_a_unit_is_complete_or_stale_or_neither(tmp_path, kind):
    outputs = (tmp_path / "a.json", tmp_path / "b.pt") if kind == "json" else (tmp_path / "a", tmp_path / "b")

    def judge(size=1):
        return find_state(Unit("a", outputs, lambda _: provenance(size=size)))

    assert judge() == UnitState()
    if kind == "json":
        write_json(outputs[0], {"value": 1, "provenance": provenance(size=1)})
    else:
        write_parquet(outputs[0], pa.table({"a": [1]}), provenance(size=1))
    assert judge() == UnitState()
    shutil.copy(outputs[0], outputs[1])
    assert (judge().is_complete, judge().counts) == (True, {"in": 2, "out": 2})
    state = judge(size=2)
    assert not state.is_complete
    assert f"{outputs[0]}: made from other inputs or settings (size was 1 and is now 2)" in state.problem


def test_an_output_without_provenance_is_stale_unless_the_stage_takes_it_over(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    unit = Unit("a", (path,), lambda _: provenance())
    assert "it does not say what it was made from" in find_state(unit).problem
    state = find_state(replace(unit, take_over=lambda _: UnitState(True, {"in": 1, "out": 1}, note="from elsewhere")))
    assert (state.is_complete, state.counts, state.note) == (True, {"in": 1, "out": 1}, "from elsewhere")


def test_what_a_check_finds_makes_a_unit_stale_or_is_an_error(tmp_path):
    def complain(error):
        raise error

    assert find_state(Unit("a", (), check=lambda: complain(StaleOutputError("another one")))).problem == "another one"
    with pytest.raises(InputError, match="not ours"):
        find_state(Unit("a", (), check=lambda: complain(InputError("not ours"))))
