"""What must not be in the code: unsafe loading, remote code of others, secrets in what is written."""

import ast
import base64
import io
import json
import logging
import os
import shutil
import tomllib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from published_models import encode, list_parts, make_config, make_picture, write_checkpoint
from safetensors.torch import load_file, save_file

from pipeline.errors import InputError, PipelineError
from pipeline.inference.backbone import Embedder
from pipeline.inference.images import decode_rgb
from pipeline.pages import to_data_uri
from pipeline.workspace import parse_json, read_json_object
from publish_model import aggregate_embeddings, convert_to_hf

REPO = Path(__file__).resolve().parents[1]
FOLDERS = (
    "pipeline", "preprocess_raw_data", "generate_embeddings", "difficulty_metadata", "train_specialized_embeddings",
    "publish_model", "evaluate_embeddings", "sample_data", "slurm", "benchmarks",
)  # fmt: skip
PARSED = {
    path: ast.parse(path.read_text(encoding="utf-8"))
    for path in [*REPO.glob("*.py"), *(path for folder in FOLDERS for path in (REPO / folder).rglob("*.py"))]
}


def calls(name):
    """Return every call whose function is written as `name`, as (file, call)."""
    found = []
    for path, tree in PARSED.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
                found.append((path, node))
    return found


def keyword(call, name):
    return next((ast.unparse(one.value) for one in call.keywords if one.arg == name), None)


def test_checkpoints_are_loaded_as_weights_only():
    found = calls("torch.load")
    assert found
    assert [str(path) for path, call in found if keyword(call, "weights_only") != "True"] == []


def test_arrays_are_loaded_without_pickle():
    assert [str(path) for path, call in calls("np.load") if keyword(call, "allow_pickle") not in (None, "False")] == []


def test_rows_of_a_foreign_parquet_are_read_in_bounded_batches():
    found = {path.stem: ast.unparse(call.args[0]) for path, call in calls("file.iter_batches")}
    assert found == {"packaged_input": "bound_rows(path, group, batch_rows)", "tables": "bound"}


@pytest.mark.parametrize(
    "name",
    [
        "pickle.load", "pickle.loads", "cPickle.load", "dill.load", "joblib.load", "torch.jit.load", "yaml.load",
        "eval", "exec", "os.system", "marshal.loads", "shelve.open",
    ],
)  # fmt: skip
def test_nothing_that_could_run_data_is_called(name):
    assert [str(path) for path, _ in calls(name)] == []


def test_one_function_reads_json_so_that_no_depth_of_it_is_a_traceback(tmp_path):
    found = {
        path.name for name in ("json.loads", "json.load") for path, _ in calls(name) if "benchmarks" not in str(path)
    }
    assert found == {"workspace.py", "run_demo.py", "model_files.py"}  # the others read what they wrote
    (tmp_path / "deep.json").write_text('{"a":' * 100_000)
    assert read_json_object(tmp_path / "deep.json") == {}
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)


def test_no_shell_runs_a_command_line():
    for name in ("subprocess.run", "subprocess.Popen", "subprocess.check_call", "subprocess.check_output"):
        assert [str(path) for path, call in calls(name) if keyword(call, "shell") == "True"] == []


def test_code_of_others_is_trusted_nowhere_by_default():
    trusted = {
        path.relative_to(REPO).parts[0] + "/" + path.name
        for path, tree in PARSED.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) == "True"
    }
    assert {name for name in trusted if not name.startswith(("sample_data/", "benchmarks/"))} == set()


def test_the_token_reaches_neither_logs_nor_the_folder_nor_the_error(toy_backbone, tmp_path, monkeypatch, caplog):
    """The hub answers with an error that repeats the token, as some proxies do."""
    import huggingface_hub

    token = "hf_" + "verysecrettoken"
    monkeypatch.setenv("HF_TOKEN", token)

    def refuse(self, *_arguments, **_options):
        raise ValueError(f"401: bad header 'Bearer {self.token}'")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt")
    config = make_config(tmp_path, toy_backbone)
    with caplog.at_level(logging.DEBUG), pytest.raises(PipelineError, match="cannot publish to the hub") as refused:
        convert_to_hf.run(config, convert_to_hf.PublishOptions(push_to_hub="someone/model"))
    assert token not in str(refused.value)
    assert token not in caplog.text
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(token.encode() in text for text in texts)
    assert token not in json.dumps(config.model_dump(mode="json"), default=str)


@pytest.mark.parametrize("terminal_answer", ["y\n", ""])
def test_code_in_a_backbones_folder_is_not_run(toy_backbone, tmp_path, monkeypatch, terminal_answer):
    """Left to itself, transformers asks on the terminal whether to run it."""
    backbone = shutil.copytree(toy_backbone, tmp_path / "backbone")
    settings = json.loads((backbone / "config.json").read_text())
    settings |= {"model_type": "toy", "auto_map": {"AutoConfig": "toy.Toy", "AutoModel": "toy.Toy"}}
    (backbone / "config.json").write_text(json.dumps(settings))
    (backbone / "toy.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Toy: pass\n")
    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt")
    monkeypatch.setattr("sys.stdin", io.StringIO(terminal_answer))
    with pytest.raises(InputError, match="comes with code of its own, which is not run unasked"):
        convert_to_hf.run(make_config(tmp_path, backbone), convert_to_hf.PublishOptions())
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "published").exists()


def test_a_model_that_is_replaced_while_it_is_loaded_gives_no_embeddings(
    embed, packaged, model_dir, tmp_path, monkeypatch
):
    """Else a dataset would hold the vectors of one model under the name of another."""
    folder = shutil.copytree(model_dir, tmp_path / "model")
    plain = Embedder.__init__

    def replace_and_load(self, *arguments, **options):
        weights = load_file(folder / "model.safetensors")
        name = next(name for name in weights if name.startswith("projector."))
        save_file(weights | {name: weights[name] * 2}, folder / "model.safetensors", {"format": "pt"})
        plain(self, *arguments, **options)

    monkeypatch.setattr(Embedder, "__init__", replace_and_load)
    outcome = embed(packaged, tmp_path / "out", model=folder)
    assert (outcome.code, f"{folder}: replaced while it was read: run this again" in outcome.stderr) == (1, True)
    assert not list_parts(tmp_path / "out")


def test_weights_that_are_not_finite_give_no_embeddings(toy_backbone, tmp_path):
    backbone = shutil.copytree(toy_backbone, tmp_path / "backbone")
    weights = load_file(backbone / "model.safetensors")
    name = next(name for name in weights if name.endswith("key.weight"))
    save_file(weights | {name: weights[name] * torch.nan}, backbone / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"{backbone}: .* holds numbers that are not finite"):
        Embedder(backbone, device="cpu")


SPARSE = ["backbone/model.safetensors", "backbone/config.json", "backbone/own.py", "backbone/README.md"]


@pytest.mark.parametrize("name", [*SPARSE, "checkpoint/checkpoint_best.pt"])
def test_a_sparse_file_of_a_model_is_not_read(toy_backbone, tmp_path, name):
    backbone = shutil.copytree(toy_backbone, tmp_path / "backbone")
    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt")
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 10**12)
    with pytest.raises(InputError, match=f"{name}: .*over [0-9]* bytes"):
        convert_to_hf.run(make_config(tmp_path, backbone), convert_to_hf.PublishOptions())
    assert not (tmp_path / "published").exists()


def test_a_picture_on_a_page_has_none_of_its_texts():
    picture = encode(make_picture(0), comment=b"<script>", exif=b"Exif\0\0<script>", icc_profile=b"<script>" * 30)
    small = base64.b64decode(to_data_uri(decode_rgb(picture), 32, 85).partition(",")[2])
    assert b"<script>" in picture
    assert b"<script>" not in small


def test_torch_is_new_enough_to_read_checkpoints_of_others():
    """Until 2.9 a checkpoint could run code in spite of weights_only."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    bound = next(line for line in project["dependencies"] if line.startswith("torch>="))
    assert tuple(map(int, bound.removeprefix("torch>=").split("."))) >= (2, 10)
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


def test_a_dataset_that_is_shared_names_no_folder_of_this_machine(embed, run_main, packaged, model_dir, tmp_path):
    """A path in a log, in the state, in a footer tells strangers names of people and projects."""
    output = tmp_path / "out"
    damaged = output / "parts" / "rg00000_rb00000.parquet"
    assert embed(packaged, output, "--limit", 4).code == 0
    damaged.write_bytes(b"PAR1")
    assert embed(packaged, output).code == 0
    assert run_main(aggregate_embeddings.main, output).code == 0
    assert run_main(aggregate_embeddings.main, output, "--by", "none").code == 2
    assert embed(tmp_path / "none.parquet", output).code == 1
    log = (output / "_logs" / "generate_embeddings_from_parquet.log").read_text()
    assert "WARNING rg00000_rb00000.parquet: damaged: it is made again" in log
    folders = [str(folder).encode() for folder in (tmp_path, model_dir.parent, REPO)]
    for path in (path for path in output.rglob("*") if path.is_file()):
        footer = str(pq.read_metadata(path).metadata).encode() if path.suffix == ".parquet" else b""
        assert not any(folder in path.read_bytes() + footer for folder in folders), path
