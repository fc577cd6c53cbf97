"""Where a model's files lie, and how models are told apart."""

import json
import os
import subprocess
import sys

import pytest

from generate_embeddings import generate_embeddings
from pipeline.config import load_config
from pipeline.errors import ConfigError, InputError
from pipeline.inference.model_files import digest_published, identify_model, locate_backbone, locate_model
from preprocess_raw_data import process_tar


def make_model(folder, weights=b"w" * 10, **files):
    folder.mkdir(parents=True)
    content = {"config.json": b"{}", "preprocessor_config.json": b"{}", "model.safetensors": weights}
    for name, data in (content | files).items():
        (folder / name).write_bytes(data)
    return folder


def test_a_model_is_the_same_wherever_its_folder_lies_and_whatever_its_card_says(tmp_path):
    first = identify_model(make_model(tmp_path / "a"))
    assert identify_model(make_model(tmp_path / "deep" / "b", **{"README.md": b"card", "flax.msgpack": b"x"})) == first
    os.utime(tmp_path / "a" / "config.json", (1, 1))
    assert identify_model(tmp_path / "a") == first


@pytest.mark.parametrize(
    "change",
    [
        {"weights": b"v" * 10},
        {"weights": b"w" * 11},
        {"config.json": b"{ }"},
        {"preprocessor_config.json": b'{"size": 1}'},
        {"modeling.py": b"pass"},
        {"model-2.safetensors": b""},
    ],
)
def test_weights_settings_and_code_tell_models_apart(tmp_path, change):
    assert identify_model(make_model(tmp_path / "a")) != identify_model(make_model(tmp_path / "b", **change))


def test_every_byte_of_large_weights_counts_also_after_a_change_in_place(tmp_path):
    weights = os.urandom(3 * 2**20)
    folder = make_model(tmp_path / "a", weights)
    first = identify_model(folder)
    assert identify_model(make_model(tmp_path / "same", weights)) == first
    assert identify_model(folder.rename(tmp_path / "moved")) == first
    changed_in_place = tmp_path / "same" / "model.safetensors"
    for place in (0, 5000, 2**20 + 7, len(weights) - 1):  # alone, between any pieces that a sample would take
        changed = bytearray(weights)
        changed[place] ^= 1
        assert identify_model(make_model(tmp_path / f"at_{place}", bytes(changed))) != first
        changed_in_place.write_bytes(changed)
        assert identify_model(tmp_path / "same") != first
    changed_in_place.write_bytes(weights)
    assert identify_model(tmp_path / "same") == first


def test_settings_are_the_same_before_and_after_they_are_stored(tmp_path):
    settings = {"backbone_config": {"id2label": dict.fromkeys(range(12), "building")}}
    assert digest_published(tmp_path, settings) == digest_published(tmp_path, json.loads(json.dumps(settings)))


def test_a_folder_without_config_is_no_model(tmp_path):
    with pytest.raises(InputError, match=r"not a model folder \(no config\.json\)"):
        identify_model(tmp_path)


def locate(tmp_path, name, download=True):
    path = tmp_path / "config.toml"
    path.write_text(f"[embedding_model]\nmodel_name = {json.dumps(name)}\n" if name else "")
    return locate_backbone(load_config(path), download=download)


def test_a_folder_is_found_from_the_configurations_folder(tmp_path):
    folder = make_model(tmp_path / "models" / "toy")
    assert locate(tmp_path, "models/toy") == folder
    assert locate(tmp_path, str(folder)) == folder


def test_a_name_that_is_not_set_or_no_folder_is_one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match=r"\[embedding_model\]\.model_name: not set"):
        locate(tmp_path, None)
    for name in ("/no/such/folder", "./nowhere", "~/no-such-model", "a/b/c"):
        with pytest.raises(
            InputError, match=r"no such model folder: set \[embedding_model\]\.model_name to a model folder"
        ):
            locate(tmp_path, name)
        assert locate(tmp_path, name, download=False) is None
    with pytest.raises(ConfigError, match=r"\$NO_SUCH_MODEL in .* is unset or empty"):
        locate(tmp_path, "$NO_SUCH_MODEL/x")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache that holds one model, and no way to the hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--someone--toy"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    return make_model(repo / "snapshots" / commit)


def test_a_model_in_the_hub_cache_is_used_without_the_hub(cache, monkeypatch):
    from huggingface_hub import snapshot_download

    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: snapshot_download(*a, cache_dir=cache.parents[2], **k)
    )
    assert locate_model("someone/toy", "", download=False) == cache
    assert locate_model("someone/toy", "", download=True) == cache
    assert locate_model("someone/else", "", download=False) is None


@pytest.mark.parametrize(
    "missing", ["config.json", "preprocessor_config.json", "model.safetensors", "second.safetensors"]
)
def test_a_snapshot_whose_fetch_was_interrupted_is_fetched_again(cache, monkeypatch, missing):
    weights = {"weight_map": {"a": "model.safetensors", "b": "second.safetensors"}}
    (cache / "model.safetensors.index.json").write_text(json.dumps(weights))
    (cache / "second.safetensors").touch()
    asked = []

    def snapshot_download(_repo, *, local_files_only=False, **_):
        asked.append(local_files_only)
        if not local_files_only:
            (cache / missing).touch()
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (cache / missing).unlink()
    assert locate_model("someone/toy", "", download=False) is None
    assert locate_model("someone/toy", "", download=True) == cache
    assert asked == [True, True, False]
    assert locate_model("someone/toy", "", download=True) == cache
    assert asked == [True, True, False, True]


def test_a_model_that_cannot_be_had_is_one_line_naming_it(tmp_path, write_config, make_tar, run_main, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = write_config(tmp_path, embedding_model={"model_name": "someone/no-such-model"})
    make_tar(tmp_path / "raw")
    assert run_main(process_tar.main, "--config", config).code == 0
    outcome = run_main(generate_embeddings.main, "--config", config)
    assert outcome.code == 1
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: someone/no-such-model: the model is neither a local folder nor in the hub cache")
    assert "correct the name, or fetch it where there is internet" in line
    assert "Traceback" not in outcome.stderr


def test_telling_models_apart_does_not_import_torch():
    code = "import sys, pipeline.inference.model_files; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_revision_of_a_hub_model_is_the_one_asked_for_and_logged(cache, monkeypatch, caplog):
    asked = []

    def snapshot_download(repo, *, revision, **_):
        asked.append((repo, revision))
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with caplog.at_level("INFO"):
        assert locate_model("someone/toy@v1.0", "", download=True) == cache
        assert locate_model("someone/toy", "", download=True) == cache
    assert asked == [("someone/toy", "v1.0"), ("someone/toy", None)]
    assert f"someone/toy@v1.0: revision {cache.name} of the hub" in caplog.text


def test_a_folder_in_the_current_folder_is_not_taken_for_the_configured_hub_model(cache, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    make_model(tmp_path / "elsewhere" / "someone" / "other")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(cache))
    assert locate(tmp_path, "someone/other") == cache
