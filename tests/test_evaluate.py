"""Stage 9: what metrics.json says, when it is kept or refused, and how it fails."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from closed_forms import fit_within_class_whitening
from evaluation_data import (
    IMAGES_PER_BUILDING,
    NUM_BUILDINGS,
    WIDTH,
    make_table,
    make_workplace,
    write_checkpoint,
    write_split,
)

from evaluate_embeddings.evaluate import STAGE, main, read_commit, run
from evaluate_embeddings.scores import metrics as metrics_module
from evaluate_embeddings.scores.metrics import (
    describe_headline,
    sample_gallery,
    summarize_datasets,
)
from evaluate_embeddings.scores.standalone import EvaluateOptions
from evaluate_embeddings.scores.tables import describe_gains, format_metrics_table
from pipeline.config import load_config
from pipeline.errors import InputError, PipelineError, StaleOutputError
from pipeline.files import tables
from pipeline.files.identity import identify
from pipeline.retrieval.checkpoint import save_checkpoint
from pipeline.retrieval.features import load_features
from pipeline.retrieval.scores import SCORE_KEYS, normalise_rows, score_queries, score_queries_twice, summarize_scores
from pipeline.retrieval.whitening import DEFAULT_SHRINKAGE

NUM_IMAGES = NUM_BUILDINGS * IMAGES_PER_BUILDING
SCORE_DICT_KEYS = {name for key in SCORE_KEYS for name in (key, f"{key}_ci95")}


def evaluate(config_path, *overrides, overwrite=False, ignore_pairs=None):
    options = EvaluateOptions(overwrite=overwrite, ignore_pairs=ignore_pairs)
    return run(load_config(config_path, list(overrides)), options)


def read_outputs(config_path):
    folder = config_path.parent / "report"
    return json.loads((folder / "metrics.json").read_text()), (folder / "report.html").read_text()


@pytest.fixture
def workplace(tmp_path):
    return make_workplace(tmp_path, photos=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workplace evaluated once, for tests that only read."""
    config_path = make_workplace(tmp_path_factory.mktemp("finished"), photos=False)
    evaluate(config_path)
    return config_path


# ------------------------------------------------------------------------------------------------ metrics.json


def test_metrics_have_their_fixed_keys_and_the_counts_of_the_split(finished):
    metrics, _ = read_outputs(finished)
    assert list(metrics) == [
        "split", "queries", "gallery", "buildings", "ignored_pairs", "raw", "pca_whitened", "whitening",
        "projector", "projector_gain", "headline", "by_dataset", "without_same_panorama", "by_gallery_size",
        "groups", "warning", "provenance",
    ]  # fmt: skip
    assert metrics["split"] == "test"
    assert metrics["queries"] == metrics["gallery"] == NUM_IMAGES
    assert metrics["buildings"] == NUM_BUILDINGS
    assert metrics["ignored_pairs"] == 0
    groups = [metrics, metrics["without_same_panorama"], *metrics["by_dataset"].values()]
    for scores in [group[kind] for group in groups for kind in ("raw", "pca_whitened", "whitening", "projector")]:
        assert set(scores) == SCORE_DICT_KEYS
        assert all(scores[f"{key}_ci95"][0] <= scores[key] <= scores[f"{key}_ci95"][1] for key in SCORE_KEYS)
    assert metrics["projector"]["recall_at_10"] <= metrics["projector"]["recall_at_100"] <= 1.0
    assert metrics["by_gallery_size"] == {}
    assert metrics["warning"] is None
    provenance = metrics["provenance"]
    assert (provenance["seed"], provenance["split_hash"]) == (42, "feedbeef")
    assert len(provenance["weights_hash"]) == 32
    assert {item["name"] for item in provenance["inputs"]} == {"train.parquet", "test.parquet", "checkpoint_best.pt"}


def test_the_rows_are_what_each_embedding_scores(finished):
    metrics, _ = read_outputs(finished)
    test = load_features(finished.parent / "merged" / "test.parquet")
    train = load_features(finished.parent / "merged" / "train.parquet")
    centred = train.embeddings.astype(np.float64) - train.embeddings.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    whitened = (test.embeddings - train.embeddings.mean(axis=0)) @ (vectors / np.sqrt(values))
    whitening = fit_within_class_whitening(train.embeddings, train.building_codes, 8, DEFAULT_SHRINKAGE)
    expected = {"raw": test.embeddings, "pca_whitened": whitened, "whitening": whitening.apply(test.embeddings)}
    for kind, embeddings in expected.items():
        summary = summarize_scores(score_queries(normalise_rows(embeddings), test.building_codes))
        assert {key: metrics[kind][key] for key in SCORE_KEYS} == pytest.approx(summary, abs=1e-6)
    assert metrics["projector"]["map"] != metrics["raw"]["map"]


def test_recall_at_one_of_the_raw_embeddings_counted_by_hand(finished):
    metrics, _ = read_outputs(finished)
    test = load_features(finished.parent / "merged" / "test.parquet")
    right = 0
    for query, vector in enumerate(test.embeddings):
        cosines = test.embeddings @ vector / np.linalg.norm(test.embeddings, axis=1)
        cosines[query] = -np.inf
        right += test.building_codes[np.argmax(cosines)] == test.building_codes[query]
    assert metrics["raw"]["recall_at_1"] == pytest.approx(right / len(test))


def test_a_panorama_id_counts_only_within_its_dataset(finished):
    features = load_features(finished.parent / "merged" / "test.parquet")
    codes = features.panorama_codes
    pairs = list(zip(features.dataset_ids.tolist(), features.street_view_ids.tolist(), strict=True))
    for row, pair in enumerate(pairs):
        assert (codes == codes[row]).tolist() == [other == pair for other in pairs]
    metrics, _ = read_outputs(finished)
    _, apart = score_queries_twice(normalise_rows(features.embeddings), features.building_codes, codes)
    assert apart is not None
    assert metrics["without_same_panorama"]["raw"]["map"] == pytest.approx(summarize_scores(apart)["map"])
    assert metrics["without_same_panorama"]["queries"] == len(apart.query)


def test_datasets_are_scored_apart_among_the_whole_gallery_and_their_mean_counts_each_alike(finished):
    features = load_features(finished.parent / "merged" / "test.parquet")
    whole = score_queries(normalise_rows(features.embeddings), features.building_codes)
    kept = np.flatnonzero((features.dataset_ids == 1) | (np.arange(len(features)) < 30))
    scores = {"raw": whole.take(kept)}
    found = summarize_datasets(scores, features.building_codes, features.dataset_ids, seed=1)
    assert list(found) == ["1", "2", "mean"]
    for dataset_id in (1, 2):
        chosen = features.dataset_ids[kept] == dataset_id
        expected = whole.average_precision[kept][chosen].mean()
        assert found[str(dataset_id)]["raw"]["map"] == pytest.approx(expected)
        assert found[str(dataset_id)]["queries"] == chosen.sum()
    assert found["1"]["queries"] != found["2"]["queries"]
    assert found["mean"]["raw"]["map"] == pytest.approx((found["1"]["raw"]["map"] + found["2"]["raw"]["map"]) / 2)
    low, high = found["mean"]["raw"]["map_ci95"]
    assert low < found["mean"]["raw"]["map"] < high


def test_gallery_sizes_that_the_split_is_large_enough_for_are_scored(workplace, monkeypatch):
    monkeypatch.setattr(metrics_module, "GALLERY_SIZES", (30, 60, 1000))
    evaluate(workplace)
    metrics, page = read_outputs(workplace)
    assert list(metrics["by_gallery_size"]) == ["30", "60"]
    features = load_features(workplace.parent / "merged" / "test.parquet")
    rows = sample_gallery(features.building_codes, 30, seed=42)
    expected = summarize_scores(score_queries(normalise_rows(features.embeddings[rows]), features.building_codes[rows]))
    assert metrics["by_gallery_size"]["30"]["raw"]["recall_at_5"] == pytest.approx(expected["recall_at_5"])
    assert metrics["by_gallery_size"]["30"]["queries"] == 30
    assert "gallery of 30 images" in page


def test_where_no_building_was_seen_from_two_panoramas_there_is_no_score_without_them(workplace):
    table = make_table(2)
    same = np.repeat(np.arange(NUM_BUILDINGS), IMAGES_PER_BUILDING)
    write_split(workplace.parent, "test", table.set_column(1, "street_view_id", [same]))
    evaluate(workplace)
    metrics, page = read_outputs(workplace)
    assert metrics["without_same_panorama"] is None
    assert "own panorama" not in page.split("<tbody>")[2]


# ------------------------------------------------------------------------------------------------ ignored pairs


def test_ignored_pairs_are_counted_once_and_raise_the_scores(workplace, tmp_path):
    evaluate(workplace)
    before, _ = read_outputs(workplace)
    ids = [f"{1 + b % 2:04d}_{b}" for b in range(NUM_BUILDINGS)]
    pairs = [(a, b) for a in ids[:12] for b in ids[:12]] + [("0009_1", "0001_0"), (ids[0], ids[1])]
    pairs_path = tmp_path / "overlaps.csv"
    pairs_path.write_text("building_id_b,note,building_id_a\n" + "".join(f"{a},x,{b}\n" for a, b in pairs))
    evaluate(workplace, overwrite=True, ignore_pairs=pairs_path)
    after, page = read_outputs(workplace)
    assert after["ignored_pairs"] == 12 * 11 // 2
    assert after["raw"]["map"] > before["raw"]["map"]
    assert "66 pairs of buildings count as neither right nor wrong" in page


# ------------------------------------------------------------------------------------------------ keep, refuse


def test_a_rerun_keeps_what_is_there_without_torch_and_another_folder_changes_nothing(finished, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(finished.parent, moved)
    before = {path.name: path.read_bytes() for path in (moved / "report").iterdir()}
    code = (
        "import sys; from evaluate_embeddings.evaluate import main; main(sys.argv[1:]);"
        "bad = {'torch', 'matplotlib', 'sklearn'} & set(sys.modules); assert not bad, bad"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--config", str(moved / "config.toml"), "--set", "infrastructure.device=cpu"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "nothing redone" in done.stderr
    assert f"{NUM_IMAGES} in = {NUM_IMAGES} out + 0 rejected + 0 dropped; 0 written, 2 kept" in done.stderr
    assert before == {path.name: path.read_bytes() for path in (moved / "report").iterdir()}


def test_two_runs_give_the_same_bytes(finished, tmp_path):
    config_path = make_workplace(tmp_path / "again", photos=False)
    result = evaluate(config_path)
    assert [path.name for path in result.written] == ["report.html", "metrics.json"]
    for name in ("metrics.json", "report.html"):
        assert (config_path.parent / "report" / name).read_bytes() == (finished.parent / "report" / name).read_bytes()


@pytest.mark.parametrize("missing", ["report.html", "metrics.json"])
def test_half_of_the_outputs_is_made_again(workplace, missing):
    evaluate(workplace)
    before = {path.name: path.read_bytes() for path in (workplace.parent / "report").iterdir()}
    (workplace.parent / "report" / missing).unlink()
    assert evaluate(workplace).written
    assert before == {path.name: path.read_bytes() for path in (workplace.parent / "report").iterdir()}


def test_outputs_of_other_inputs_or_settings_are_refused_with_the_difference_named(workplace, tmp_path):
    evaluate(workplace)
    with pytest.raises(StaleOutputError, match="seed was 42 and is now 7.*--overwrite"):
        evaluate(workplace, "global.seed=7")
    pairs_path = tmp_path / "pairs.csv"
    pairs_path.write_text("building_id_a,building_id_b\n")
    with pytest.raises(StaleOutputError, match=r"input --ignore-pairs pairs\.csv was not among its inputs"):
        evaluate(workplace, ignore_pairs=pairs_path)
    write_checkpoint(workplace.parent / "checkpoints" / "checkpoint_best.pt", seed=1)
    with pytest.raises(StaleOutputError, match=r"input checkpoint_best\.pt has changed"):
        evaluate(workplace)
    assert evaluate(workplace, overwrite=True).written
    (workplace.parent / "report" / "metrics.json").write_text("{")
    with pytest.raises(StaleOutputError, match="does not say what it was made from"):
        evaluate(workplace)


def test_the_page_of_other_inputs_is_refused(workplace):
    evaluate(workplace)
    page_path = workplace.parent / "report" / "report.html"
    page = page_path.read_text(encoding="utf-8")
    page_path.write_text(page.replace(identify(workplace.parent / "merged/test.parquet")["footer"], "0" * 32))
    with pytest.raises(StaleOutputError, match=r"report\.html: not the page of these inputs"):
        evaluate(workplace)


# ------------------------------------------------------------------------------------------------ failures


def test_a_split_without_a_query_is_an_error(workplace):
    write_split(workplace.parent, "test", make_table(2, images=1))
    with pytest.raises(InputError, match=r"test\.parquet: every building has one image"):
        evaluate(workplace)


def test_an_empty_split_is_an_error(workplace):
    write_split(workplace.parent, "test", make_table(2).slice(0, 0))
    with pytest.raises(InputError, match=r"test\.parquet: holds no rows"):
        evaluate(workplace)


def test_splits_of_two_widths_are_an_error(workplace):
    write_split(workplace.parent, "train", make_table(1, width=WIDTH + 1))
    with pytest.raises(InputError, match=r"train\.parquet: embeddings of 17 numbers, those of test\.parquet have 16"):
        evaluate(workplace)


def test_splits_of_two_runs_are_an_error(workplace):
    tables.write_parquet(workplace.parent / "merged" / "train.parquet", make_table(1), {"stage": "merge_and_split"})
    tables.write_parquet(workplace.parent / "merged" / "test.parquet", make_table(2), {"settings": {"seed": 2}})
    with pytest.raises(InputError, match=r"test\.parquet: not of the same run as train\.parquet"):
        evaluate(workplace)


def test_a_checkpoint_of_another_width_is_an_error(workplace):
    write_checkpoint(workplace.parent / "checkpoints" / "checkpoint_best.pt", width=WIDTH + 1)
    with pytest.raises(InputError, match=r"checkpoint_best\.pt: its projector takes embeddings of 17 numbers"):
        evaluate(workplace)


def test_a_damaged_checkpoint_is_an_error(workplace):
    (workplace.parent / "checkpoints" / "checkpoint_best.pt").write_bytes(b"nothing of the sort")
    with pytest.raises(InputError, match=r"checkpoint_best\.pt: not a checkpoint"):
        evaluate(workplace)


def test_a_projector_that_maps_to_zero_is_named(workplace):
    path = workplace.parent / "checkpoints" / "checkpoint_best.pt"
    content = torch.load(path, weights_only=True)
    for weight in content["projector"].values():
        weight.zero_()
    save_checkpoint(path, content)
    with pytest.raises(InputError, match="projector embeddings: row 0 is not finite or all zero"):
        evaluate(workplace)


@pytest.mark.parametrize("missing", ["merged/test.parquet", "merged/train.parquet", "checkpoints/checkpoint_best.pt"])
def test_a_missing_input_is_named(workplace, missing):
    (workplace.parent / missing).unlink()
    with pytest.raises(InputError, match=f"{Path(missing).name}: no such file"):
        evaluate(workplace)


def test_the_command_line_says_what_it_is_and_answers_with_the_usual_exit_codes(tmp_path, run_main):
    assert run_main(main, "--help").stdout.splitlines()[0].startswith("Stage 9: ")
    config_path = make_workplace(tmp_path, photos=False)
    wrong_key = run_main(main, "--config", config_path, "--set", "paths.report=x")
    assert wrong_key.code == 2
    assert "report_dir" in wrong_key.stderr
    (tmp_path / "merged" / "test.parquet").unlink()
    missing = run_main(main, "--config", config_path)
    assert missing.code == 1
    assert missing.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in missing.stderr


def test_it_writes_both_files_and_prints_their_paths_and_the_table(tmp_path, run_main):
    config_path = make_workplace(tmp_path, photos=False)
    done = run_main(main, "--config", config_path)
    assert done.code == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "report" / name) for name in ("report.html", "metrics.json")]
    assert "PCA-whitened" in done.stderr
    assert (tmp_path / "logs" / f"{STAGE}.log").is_file()


def test_a_report_folder_that_cannot_be_written_is_named(workplace):
    (workplace.parent / "report").write_text("a file")
    with pytest.raises(PipelineError, match="cannot write .*report.html"):
        main(["--config", str(workplace)])


# ------------------------------------------------------------------------------------------------ for people


@pytest.mark.parametrize("name", ["collect_scatters", "whiten_within_class", "whiten_by_pca"])
def test_a_gpu_too_small_for_the_closed_forms_is_one_line(workplace, monkeypatch, name):
    def refuse(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(f"pipeline.retrieval.whitening.{name}", refuse)
    with pytest.raises(PipelineError, match=r"the GPU cannot hold the scatter .*set \[infrastructure\]\.device to cpu"):
        evaluate(workplace)


def test_the_table_fits_80_columns_and_ends_with_the_gains(finished):
    metrics, _ = read_outputs(finished)
    lines = format_metrics_table(metrics).splitlines()
    assert max(map(len, lines)) <= 80
    gains = describe_gains(metrics).split()
    assert " ".join(lines).split()[-len(gains) :] == gains
    for kind in ("raw", "PCA-whitened", "projector"):
        assert any(line.startswith(kind) for line in lines)


def test_the_gains_are_those_of_the_metrics_with_their_intervals(finished):
    metrics, _ = read_outputs(finished)
    metrics["projector_gain"]["over_raw"] = {"map": 0.15, "map_ci95": [-0.1, 0.2]}
    assert "difference: +0.150 over raw (-0.100 to +0.200), " in describe_gains(metrics)


def test_the_table_and_the_metrics_say_the_same_headline(finished):
    metrics, _ = read_outputs(finished)
    assert metrics["headline"] == describe_headline(metrics["projector_gain"])
    assert f"{metrics['headline']}." in " ".join(format_metrics_table(metrics).split())


def test_the_commit_is_that_of_the_projects_own_checkout(tmp_path):
    assert read_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    subprocess.run([*git, "init", "-q"], check=True, env=environment)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True, env=environment)
    commit = read_commit(tmp_path)
    assert commit is not None
    assert len(commit) == 40
    (tmp_path / "inner").mkdir()
    assert read_commit(tmp_path / "inner") is None
