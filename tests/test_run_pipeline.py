"""The whole pipeline in one process: order, range, ledger, and what a failure leaves."""

import re
import subprocess
import sys
from collections import Counter

import pytest
from raw_tars import make_view, write_tar

import run_pipeline
from pipeline.cli import Options, StageResult
from pipeline.config import load_config
from pipeline.errors import ConfigError, InputError
from pipeline.stages import STAGES


@pytest.fixture
def config(tmp_path, write_config, toy_backbone):
    return write_config(tmp_path, embedding_model={"model_name": str(toy_backbone)})


@pytest.fixture
def pipeline(config, run_main):
    def run(*arguments):
        return run_main(run_pipeline.main, "--config", config, *arguments)

    return run


def read_ledger(outcome):
    """Return the numbers of the ledger's lines by stage."""
    lines = outcome.stderr.splitlines()
    start = next(number for number, line in enumerate(lines) if line.split()[:2] == ["stage", "in"])
    rows = [line.split() for line in lines[start + 1 :] if not line.startswith(("error:", "every stage"))]
    return {row[0]: [int(word) for word in row[-5:-1]] for row in rows}


def test_stages_one_to_three_end_with_a_ledger_that_adds_up(tmp_path, pipeline, make_tar):
    make_tar(tmp_path / "raw", 1, (3, 2, 1, 4))
    make_tar(tmp_path / "raw", 2, (1, 2))
    write_tar(
        tmp_path / "raw" / "0003.tar", make_view("a", 1, 1) + make_view("b", 1, 2) + make_view("c", 1, 3, image=b"x")
    )
    outcome = pipeline("--to-stage", 3)
    assert outcome.code == 0
    assert read_ledger(outcome) == {
        "process_tar": [16, 15, 1, 0],
        "generate_embeddings": [15, 15, 0, 0],
        "merge_and_split": [15, 13, 0, 2],
    }
    folders = {"process_tar": 3, "generate_embeddings": 3, "merge_and_split": 3}
    assert len(outcome.stdout.splitlines()) == sum(folders.values())
    for stage in folders:
        assert (tmp_path / "logs" / f"{stage}.log").is_file()


def test_a_second_run_redoes_nothing_says_so_and_has_the_same_ledger(tmp_path, pipeline, make_tar):
    make_tar(tmp_path / "raw", 1, (3, 2, 1))
    first = pipeline("--to-stage", 3)
    second = pipeline("--to-stage", 3)
    assert (second.code, second.stdout) == (0, "")
    assert read_ledger(second) == read_ledger(first)
    assert second.stderr.splitlines()[-1] == "every stage is complete and up to date: nothing was redone"
    assert re.search(r"^process_tar .* kept$", second.stderr, re.MULTILINE)
    assert pipeline("--to-stage", 3, "--overwrite").stdout == first.stdout


def test_a_range_runs_only_its_stages(tmp_path, pipeline, make_tar):
    make_tar(tmp_path / "raw", 1, (3, 2))
    assert list(read_ledger(pipeline("--to-stage", 1))) == ["process_tar"]
    assert not (tmp_path / "embeddings").exists()
    assert list(read_ledger(pipeline("--from-stage", 2, "--to-stage", 3))) == ["generate_embeddings", "merge_and_split"]


def test_a_failing_stage_stops_the_run_and_its_line_is_in_the_ledger(tmp_path, pipeline, make_tar):
    make_tar(tmp_path / "raw", 1, (3, 2))
    make_tar(tmp_path / "raw", 2).write_bytes(b"damaged")
    outcome = pipeline("--to-stage", 3)
    assert outcome.code == 1
    assert read_ledger(outcome) == {"process_tar": [5, 5, 0, 0]}
    assert outcome.stderr.splitlines()[-1].startswith("error: 1 of 2 tars failed, the others are done")
    assert not (tmp_path / "embeddings").exists()
    make_tar(tmp_path / "raw", 2, (2,))
    assert list(read_ledger(pipeline("--to-stage", 3)).values()) == [[7, 7, 0, 0]] * 3


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--from-stage", 3, "--to-stage", 2], "--from-stage 3 lies behind --to-stage 2"),
        (["--from-stage", 0], "invalid choice: 0"),
        (["--to-stage", 10], "invalid choice: 10"),
        (["--to-stage", "x"], "invalid int value"),
        (["--shard", "0/2"], "unrecognized arguments"),
    ],
)
def test_a_wrong_range_is_exit_code_two(pipeline, arguments, complaint):
    outcome = pipeline(*arguments)
    assert outcome.code == 2
    assert complaint in outcome.stderr
    assert len([line for line in outcome.stderr.splitlines() if line.startswith("error: ")]) == 1


def test_every_missing_path_of_a_later_stage_is_reported_before_anything_runs(tmp_path, run_main, make_tar):
    make_tar(tmp_path / "raw")
    (tmp_path / "config.toml").write_text('[paths]\nraw_dir = "raw"\nintermediates_dir = "intermediates"\n')
    outcome = run_main(run_pipeline.main, "--config", tmp_path / "config.toml")
    assert outcome.code == 2
    missing = [line.split("[paths].")[1].split(":")[0] for line in outcome.stderr.splitlines() if "[paths]" in line]
    assert missing == [
        "embeddings_dir", "merged_dir", "fingerprints_dir", "difficulty_metadata_path", "checkpoint_dir",
        "published_model_dir", "report_dir",
    ]  # fmt: skip
    assert not (tmp_path / "intermediates").exists()


@pytest.mark.parametrize(
    "setting", ["embedding_model.model_name", "data.split_file", "new_data.input", "new_data.output"]
)
def test_an_undefined_variable_that_a_later_stage_uses_is_reported_before_anything_runs(tmp_path, pipeline, setting):
    outcome = pipeline("--set", f"{setting}=$NOWHERE_AT_ALL/x")
    assert outcome.code == 2
    assert "$NOWHERE_AT_ALL in '$NOWHERE_AT_ALL/x' is unset or empty: export it" in outcome.stderr
    assert not (tmp_path / "logs").exists()


@pytest.fixture
def fake_stages(monkeypatch):
    """Replace every stage by one that notes its number."""
    ran = []

    def run(name, _run, _config, _options):
        ran.extend(number for number, stage in STAGES.items() if stage.name == name)
        return StageResult(name, Counter({"in": 1, "out": 1}), written=["x"])

    monkeypatch.setattr(run_pipeline.cli, "run_stage", run)
    return ran


def test_all_nine_run_in_order_and_the_eighth_only_where_it_has_data(tmp_path, write_config, fake_stages, capsys):
    config = load_config(write_config(tmp_path))
    run_pipeline.run_stages(config, Options(), [])
    assert fake_stages == [1, 2, 3, 4, 5, 6, 7, 9]
    assert "stage 8: [new_data].input and output are not set: passed over" in capsys.readouterr().err
    fake_stages.clear()
    config = load_config(write_config(tmp_path, new_data={"input": "a.parquet", "output": "b"}))
    run_pipeline.run_stages(config, Options(), [])
    assert fake_stages == list(range(1, 10))


def test_the_ledger_fits_a_terminal_whatever_the_numbers(capsys):
    results = [
        StageResult(
            "generate_embeddings_from_parquet",
            Counter({"in": 25_000_000, "out": 24_000_000, "rejected": 999_999, "dropped": 1}),
            kept=["x"],
            seconds=86_400.0,
        ),
        StageResult("train", Counter({"in": 5, "out": 5}), written=["x"]),
    ]
    lines = run_pipeline.format_ledger(results).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) == 3
    assert "nothing was redone" not in lines[-1]
    assert run_pipeline.format_ledger([]).count("\n") == 0


def test_what_stages_did_before_a_failure_is_in_the_ledger(tmp_path, write_config, monkeypatch):
    config = load_config(write_config(tmp_path))

    def run(name, _run, _config, _options):
        if name == STAGES[3].name:
            raise InputError("no result")
        if name == STAGES[2].name:
            error = InputError("a tar failed")
            error.result = StageResult("second", Counter({"in": 4, "out": 4}))
            raise error
        return StageResult("first", Counter({"in": 4, "out": 4}))

    monkeypatch.setattr(run_pipeline.cli, "run_stage", run)
    results = []
    with pytest.raises(InputError, match="a tar failed"):
        run_pipeline.run_stages(config, Options(), results)
    assert [result.stage for result in results] == ["first", "second"]
    with pytest.raises(InputError, match="no result"):
        run_pipeline.run_stages(config, Options(), results, first=3)
    with pytest.raises(ConfigError):
        run_pipeline.run_stages(load_config(tmp_path / "config.toml", ["paths.raw_dir=$NO_SUCH"]), Options(), [])


def test_a_run_that_keeps_everything_imports_no_torch(tmp_path, config, pipeline, make_tar):
    make_tar(tmp_path / "raw", 1, (3, 2))
    assert pipeline("--to-stage", 3).code == 0
    code = (
        f"import sys, run_pipeline; run_pipeline.main(['--config', {str(config)!r}, '--to-stage', '3'])\n"
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_tars_without_embeddings_or_fingerprints_are_named(tmp_path, pipeline, make_tar):
    for dataset, images in ((1, (3, 2)), (2, (2, 4)), (3, (2, 2))):
        make_tar(tmp_path / "raw", dataset, images)
    assert pipeline("--to-stage", 4).code == 0
    for number, stage, what in (("0002", 3, "embeddings"), ("0003", 5, "fingerprints")):
        (tmp_path / what / f"{number}_{what}.parquet").unlink()
        outcome = pipeline("--from-stage", stage, "--to-stage", stage, "--overwrite")
        assert outcome.code == 1
        assert outcome.stderr.splitlines()[-1] == (
            f"error: 1 of 3 tars of {tmp_path}/intermediates have no {what} ({number}): run the stage that makes them, "
            "or move these files away to go on without"
        )
