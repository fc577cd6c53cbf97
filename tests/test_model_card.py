"""The model card and what it names: licences, results with intervals, snippets that run, the sample of embeddings."""

import json
import re
import shutil
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from published_models import make_config, make_picture, write_checkpoint
from stage7_fixtures import read_config

import run_pipeline
from pipeline.cli import Options, StageResult
from pipeline.config import load_config
from pipeline.errors import InputError, PipelineError
from pipeline.files.identity import identify
from pipeline.inference.model_files import identify_model, is_within
from pipeline.retrieval.checkpoint import load_checkpoint
from publish_model import convert_to_hf as stage
from publish_model.model_folder.model_card import add_test_results
from publish_model.model_folder.published_folder import measure_pairs
from publish_model.model_folder.published_model import RATES_NAME


def snippets(folder):
    """The card's blocks of Python, in order."""
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


def write_metrics(path, hash_, value=0.5):
    """What stage 9 writes, as far as the card reads it."""
    keys = ("recall_at_1", "recall_at_5", "recall_at_10", "map", "mrr")
    scores = dict.fromkeys(keys, value) | {f"{key}_ci95": [value - 0.125, value + 0.125] for key in keys}
    rows = dict.fromkeys(("raw", "pca_whitened", "whitening", "projector"), scores)
    counts = {"queries": 40, "gallery": 41, "buildings": 10, "ignored_pairs": 3}
    inputs = [{"name": "test.parquet", "size": 1}, {"name": "checkpoint_best.pt", "size": 1, "hash": hash_}]
    path.parent.mkdir(exist_ok=True)
    counts["headline"] = "The projector cannot be told from whitening"
    path.write_text(json.dumps(counts | rows | {"provenance": {"inputs": inputs}}))
    return path


@pytest.fixture
def published(config, tmp_path):
    stage.run(config, Options())
    return tmp_path / "published"


def test_every_snippet_of_the_card_runs(published, monkeypatch):
    make_picture(1).save(published / "a.jpg")
    make_picture(2).save(published / "b.jpg")
    monkeypatch.chdir(published)
    blocks = snippets(published)
    assert len(blocks) == 2
    names: dict = {}
    for code in blocks:
        exec(compile(code, "README.md", "exec"), names)
    assert names["embeddings"].shape == (2, 256)
    assert abs(float(names["embeddings"][0] @ names["embeddings"][0]) - 1) < 1e-5
    assert len(names["embedding"]) == 256


def test_a_start_from_another_checkpoint_may_have_seen_the_validation_split(config, published, tmp_path):
    clean = "No building of the split was trained on."
    assert clean in (published / "README.md").read_text()
    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt", start={"init": "checkpoint"})
    stage.run(config, Options(overwrite=True))
    card = (published / "README.md").read_text()
    assert "may have been trained on buildings of the split" in card
    assert clean not in card


@pytest.mark.parametrize("name", ["LICENSE", "LICENSE.md", "LICENCE.txt", "NOTICE", "COPYING", "license.txt"])
def test_licence_texts_of_the_backbone_travel_and_the_card_names_them(toy_backbone, tmp_path, name):
    backbone = shutil.copytree(toy_backbone, tmp_path / "backbone")
    (backbone / name).write_text("Do as you like.")
    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt")
    stage.run(make_config(tmp_path, backbone), Options())
    assert (tmp_path / "published" / name).read_text() == "Do as you like."
    card = (tmp_path / "published" / "README.md").read_text()
    assert f"The text lies beside this file: `{name}`." in card.replace("\n", " ")
    assert f"license_link: {name}" in card


def test_a_backbone_without_a_licence_is_said_to_have_none(published):
    from huggingface_hub import ModelCard

    card = ModelCard.load(published / "README.md")
    assert "Its own folder does not name its licence. It came without a licence text" in card.text.replace("\n", " ")
    assert (card.data.license, card.data.license_name) == ("other", "unknown")
    assert card.data.get("license_link") is None


def test_the_front_matter_is_what_the_hub_reads(published):
    from huggingface_hub import ModelCard

    data = ModelCard.load(published / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-feature-extraction")
    assert {"place-recognition", "street-view"} <= set(data.tags)


def test_the_card_has_every_section_that_users_look_for(published):
    text = (published / "README.md").read_text()
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles == [
        "How to use it", "Results", "Intended use and limits", "Training data and settings", "Backbone and licence",
        "Files", "Citation",
    ]  # fmt: skip
    for said in ("Google Street View", "they fetch, read and write nothing", "not made to identify people", "torch "):
        assert said in text.replace("\n", " ")


# ---------------------------------------------------------------------------------------------------- test results


def test_results_of_stage_9_reach_the_card_with_their_intervals(published, tmp_path):
    before, version = (published / "README.md").read_text(), identify_model(published)
    assert "Not measured on the test split when this card was written." in before
    hash_ = read_config(published)["spatial_building_embeddings"]["inputs"][0]["hash"]
    metrics = write_metrics(tmp_path / "metrics.json", hash_)
    assert add_test_results(published, metrics)
    card = (published / "README.md").read_text()
    cells = " | ".join(["0.500 [0.375, 0.625]"] * 5)
    for title in ("backbone alone", "backbone, PCA-whitened", "**this model**"):
        assert f"| {title} | {cells} |" in card
    flat = card.replace("\n", " ")
    assert "40 images of 10 buildings search 41 images" in flat
    assert "3 pairs of buildings count as neither" in flat
    assert "**The projector cannot be told from whitening**, by the 95 % interval of the difference in mAP." in flat
    assert identify_model(published) == version
    assert not add_test_results(published, metrics), "what is there already is not written again"
    assert add_test_results(published, write_metrics(metrics, hash_, 0.625))
    assert "0.500 [0.375" not in (published / "README.md").read_text()


def test_results_of_another_checkpoint_or_none_leave_the_card_alone(published, tmp_path):
    before = (published / "README.md").read_bytes()
    assert not add_test_results(published, write_metrics(tmp_path / "other.json", "0" * 32))
    assert not add_test_results(published, tmp_path / "nowhere.json")
    (tmp_path / "broken.json").write_text("{")
    assert not add_test_results(published, tmp_path / "broken.json")
    assert not add_test_results(tmp_path / "no-folder", tmp_path / "other.json")
    hash_ = read_config(published)["spatial_building_embeddings"]["inputs"][0]["hash"]
    for change in ({"whitening": {}}, {"projector": 1}, {"raw": {"map": "x"}}):
        damaged = write_metrics(tmp_path / "damaged.json", hash_)
        damaged.write_text(json.dumps(json.loads(damaged.read_text()) | change))
        with pytest.raises(InputError, match=r"damaged\.json: scores that cannot be shown"):
            add_test_results(published, damaged)
    assert (published / "README.md").read_bytes() == before


def test_a_card_that_somebody_has_rewritten_is_left_alone(published, tmp_path):
    (published / "README.md").write_text("# Mine\n")
    hash_ = read_config(published)["spatial_building_embeddings"]["inputs"][0]["hash"]
    assert not add_test_results(published, write_metrics(tmp_path / "metrics.json", hash_))
    assert (published / "README.md").read_text() == "# Mine\n"


def test_a_rerun_keeps_the_folder_and_brings_the_results(config_file, run_main, tmp_path):
    assert run_main(stage.main, "--config", config_file).code == 0
    folder = tmp_path / "published_model"
    hash_ = read_config(folder)["spatial_building_embeddings"]["inputs"][0]["hash"]
    write_metrics(tmp_path / "report" / "metrics.json", hash_)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    outcome = run_main(stage.main, "--config", config_file)
    assert (outcome.code, outcome.stdout) == (0, "")
    assert "0.500 [0.375, 0.625]" in (folder / "README.md").read_text()
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_the_pipeline_brings_them_when_stage_9_is_done(config_file, run_main, tmp_path, monkeypatch):
    assert run_main(stage.main, "--config", config_file).code == 0
    folder = tmp_path / "published_model"
    hash_ = read_config(folder)["spatial_building_embeddings"]["inputs"][0]["hash"]

    def evaluate(_config, _options):
        write_metrics(tmp_path / "report" / "metrics.json", hash_)
        return StageResult("evaluate", Counter({"in": 1, "out": 1}), written=["x"])

    monkeypatch.setattr("evaluate_embeddings.evaluate.run", evaluate)
    run_pipeline.run_stages(load_config(config_file), Options(), [], 9, 9)
    assert "0.500 [0.375, 0.625]" in (folder / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------- the sample


def test_the_rates_of_pairs_are_named_and_no_part_of_the_version(config, tmp_path, monkeypatch):
    monkeypatch.setattr("publish_model.model_folder.published_folder.measure_pairs", lambda *_: None)
    stage.run(config, Options())
    without = identify_model(tmp_path / "published")
    assert RATES_NAME not in (tmp_path / "published" / "README.md").read_text()
    monkeypatch.setattr("publish_model.model_folder.published_folder.measure_pairs", lambda *_: {"all": []})
    stage.run(config, Options(overwrite=True))
    card = (tmp_path / "published" / "README.md").read_text().replace("\n", " ")
    assert f"`{RATES_NAME}` says how often pairs of validation images reach a cosine" in card
    assert (tmp_path / "published" / RATES_NAME).is_file()
    assert identify_model(tmp_path / "published") == without
    (tmp_path / "published" / RATES_NAME).unlink()
    assert identify_model(tmp_path / "published") == without


def test_a_projector_that_gives_zeros_is_one_line(config, tmp_path):
    path = tmp_path / "val.parquet"
    values = pa.FixedSizeListArray.from_arrays(pa.array([0.5] * 96, pa.float32()), 24)
    pq.write_table(pa.table({"building_id": ["a", "a", "b", "b"], "embedding": values}), path)
    checkpoint = write_checkpoint(tmp_path / "zero.pt", provenance={"inputs": [identify(path)]})
    content = torch.load(checkpoint, weights_only=True)
    content["projector"] = {name: weight * 0 for name, weight in content["projector"].items()}
    torch.save(content, checkpoint)
    paths = config.paths.model_copy(update={"merged_dir": str(tmp_path)})
    with pytest.raises(
        PipelineError, match=r"zero\.pt on row 0 of val\.parquet: its embedding is not finite or all zero"
    ):
        measure_pairs(config.model_copy(update={"paths": paths}), load_checkpoint(checkpoint))


# ------------------------------------------------------------------------------------------------ what others wrote


def test_markup_in_names_settings_and_licences_stays_text(toy_backbone, tmp_path):
    backbone = shutil.copytree(toy_backbone, tmp_path / "x`<img src=y>")
    licence = "license: other\nlicense_name: '</code><script>`alert`'\nlicense_link: '[click](javascript:x)'\n"
    (backbone / "README.md").write_text(f"---\n{licence}---\n")
    provenance = {"inputs": [{"name": "`<b>train</b>\n# Title", "size": "<i>"}]}
    settings = {"<u>training": {"**note**": "[a](b)`<s>"}}
    path = tmp_path / "checkpoint" / "checkpoint_best.pt"
    write_checkpoint(path, settings=settings, provenance=provenance)
    stage.run(make_config(tmp_path, backbone), Options())
    text = (tmp_path / "published" / "README.md").read_text().partition("\n---\n")[2]
    outside = re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    assert not re.search(r"<(?!!--)|\]\(|\*\*note|# Title", outside)
    assert "`**note** [a](b)'<s>`" in text


def test_a_licence_of_lists_without_end_is_not_written_out(toy_backbone, tmp_path):
    backbone = shutil.copytree(toy_backbone, tmp_path / "backbone")
    lists = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40))
    (backbone / "README.md").write_text(
        f"---\na0: &a0 [x]\n{lists}license: *a39\nlicense_name: [mit, apache-2.0]\n---\n"
    )
    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt")
    stage.run(make_config(tmp_path, backbone), Options())
    assert "its licence as `mit, apache-2.0`" in (tmp_path / "published" / "README.md").read_text()


def test_a_licence_that_links_to_a_file_elsewhere_or_is_huge_is_not_published(toy_backbone, tmp_path, caplog):
    (tmp_path / "private").write_text("secret")
    backbone = shutil.copytree(toy_backbone, tmp_path / "backbone")
    (backbone / "LICENSE").symlink_to(tmp_path / "private")
    (backbone / "real").write_text("Do as you like.")
    (backbone / "NOTICE").symlink_to("real")
    (backbone / "LICENCE.txt").write_bytes(bytes(2**20 + 1))
    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt")
    stage.run(make_config(tmp_path, backbone), Options())
    published = {path.name for path in (tmp_path / "published").iterdir()}
    assert "NOTICE" in published
    assert {"LICENSE", "LICENCE.txt"}.isdisjoint(published)
    assert caplog.text.count("LICENCE.txt: over 1048576 bytes") == 1
    assert caplog.text.count("LICENSE: a link out of the model's folder") == 1


def test_licences_of_the_hubs_cache_lie_among_its_blobs(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs" / "abcd").write_text("Do as you like.")
    snapshot.mkdir(parents=True)
    (snapshot / "LICENSE").symlink_to("../../blobs/abcd")
    (snapshot / "NOTICE").symlink_to(tmp_path)
    assert is_within(snapshot / "LICENSE")
    assert not is_within(snapshot / "NOTICE")


def test_overwrite_leaves_files_of_the_users_in_the_folder(published, config):
    (published / "notes.txt").write_text("mine")
    (published / "figures").mkdir()
    (published / "figures" / "a.txt").write_text("mine too")
    (published / "LICENSE").write_text("of a backbone before")
    stage.run(config, Options(overwrite=True))
    assert (published / "notes.txt").read_text() == "mine"
    assert (published / "figures" / "a.txt").read_text() == "mine too"
    assert not (published / "LICENSE").exists()


@pytest.mark.parametrize("card", ["---\n{\n---\n", "---\n- a\n- b\n---\n", "---\n" + "[" * 5000 + "\n---\n", "\xff"])
def test_a_broken_card_of_the_backbone_is_one_line(toy_backbone, tmp_path, card):
    backbone = shutil.copytree(toy_backbone, tmp_path / "backbone")
    (backbone / "README.md").write_text(card, encoding="latin-1")
    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt")
    with pytest.raises(InputError, match=r"README\.md: its metadata cannot be read"):
        stage.run(make_config(tmp_path, backbone), Options())
