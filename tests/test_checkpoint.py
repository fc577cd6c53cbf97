"""Checkpoints: written whole, read safely, older ones mapped, wrong ones refused."""

import json
import math
import pickle
import resource
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from projectors import make_projector

from pipeline.config import TrainingModelSection
from pipeline.errors import InputError, PipelineError
from pipeline.retrieval.checkpoint import build_projector, hash_buildings, load_checkpoint, project, save_checkpoint
from pipeline.retrieval.projector import Projector


def make_content(projector: Projector) -> dict[str, Any]:
    return {
        "architecture": projector.architecture,
        "projector": projector.state_dict(),
        "metrics": {"val": {"projector": {"map": 0.5}}},
        "settings": {"seed": 1},
        "provenance": {"stage": "train"},
        "sampler": np.random.PCG64(5).state,
        "step": 17,
    }


def features() -> torch.Tensor:
    return torch.randn(4, 12, generator=torch.Generator().manual_seed(0))


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    projector = make_projector(num_hidden_layers=2, activation="silu")
    save_checkpoint(tmp_path / "a.pt", make_content(projector))
    found = load_checkpoint(tmp_path / "a.pt", TrainingModelSection(output_dim=5), input_dim=12)
    assert found.architecture == projector.architecture
    assert found.metrics == {"val": {"projector": {"map": 0.5}}}
    assert (found.settings, found.provenance) == ({"seed": 1}, {"stage": "train"})
    assert found.rest == {"sampler": np.random.PCG64(5).state, "step": 17}
    rebuilt = build_projector(found)
    assert not rebuilt.training
    torch.testing.assert_close(rebuilt(features()), projector(features()))


def test_rows_are_projected_in_float32_whatever_the_environment_says() -> None:
    projector, seen = make_projector(), set()
    projector.shortcut.register_forward_hook(lambda *_: seen.add(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("high")
    try:
        project(projector, features().numpy(), torch.device("cpu"))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == {"highest"}


def test_the_same_content_gives_the_same_bytes_under_any_name(tmp_path: Path) -> None:
    content = make_content(make_projector())
    for name in ("a.pt", "sub/b.pt"):
        save_checkpoint(tmp_path / name, content)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "sub/b.pt").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "sub"]


def test_a_disk_that_takes_only_a_part_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as a full disk does, it fails in mid-file
    try:
        with pytest.raises(PipelineError, match=r"cannot write .*a\.pt \(File too large\): free space"):
            save_checkpoint(tmp_path / "a.pt", make_content(make_projector()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_pickle_of_another_protocol_is_refused_without_a_warning(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    with pytest.raises(InputError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "a.pt")


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "a.pt", make_content(make_projector()))
    before = (tmp_path / "a.pt").read_bytes()

    def fail(_content: object, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "a.pt", {})
    assert (tmp_path / "a.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("empty", b""),
        ("text", b"hello"),
        ("cut", None),
        ("pickle", b"\x80\x02\x95"),
        ("zip", b"PK\x05\x06" + bytes(18)),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, data: bytes | None) -> None:
    path = tmp_path / f"{name}.pt"
    save_checkpoint(path, make_content(make_projector()))
    path.write_bytes(path.read_bytes()[:-500] if data is None else data)
    with pytest.raises(InputError, match=f"{name}.pt: not a checkpoint that can be loaded safely"):
        load_checkpoint(path)


def test_a_missing_file_says_which_stage_makes_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such checkpoint: run stage 6"):
        load_checkpoint(tmp_path / "checkpoint_best.pt")


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"projector": Path("/etc/passwd")}, tmp_path / "bad.pt")
    with pytest.raises(InputError, match="loaded safely"):
        load_checkpoint(tmp_path / "bad.pt")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"projector": {}}])
def test_content_that_is_no_checkpoint_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(InputError, match="make it with stage 6"):
        load_checkpoint(tmp_path / "bad.pt")


def test_a_start_or_provenance_that_is_no_table_is_passed_over(tmp_path: Path) -> None:
    torch.save(make_content(make_projector()) | {"start": 5, "provenance": {"inputs": 5}}, tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert "start" not in loaded.rest
    assert loaded.provenance == {}


def test_another_width_is_refused_naming_both_and_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, make_content(make_projector()))
    with pytest.raises(InputError, match=r"a.pt: its projector takes embeddings of 12 numbers, these have 1280: use"):
        load_checkpoint(path, input_dim=1280)
    with pytest.raises(InputError, match=r"its input_dim is 12, \[training_model\].input_dim asks for 1280: correct"):
        load_checkpoint(path, TrainingModelSection(input_dim=1280, output_dim=5))
    with pytest.raises(InputError, match=r"its output_dim is 5, \[training_model\].output_dim asks for 256: correct"):
        load_checkpoint(path, TrainingModelSection())


def test_weights_that_do_not_fit_the_architecture_are_refused(tmp_path: Path) -> None:
    content = make_content(make_projector())
    content["architecture"] = content["architecture"] | {"hidden_dim": 8}
    save_checkpoint(tmp_path / "a.pt", content)
    with pytest.raises(InputError, match="weights and architecture do not fit"):
        load_checkpoint(tmp_path / "a.pt")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    projector = make_projector()
    with torch.no_grad():
        projector.shortcut.weight[0, 0] = torch.nan
    save_checkpoint(tmp_path / "a.pt", make_content(projector))
    with pytest.raises(InputError, match="shortcut.weight holds numbers that are not finite"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"architecture": {"input_dim": 12, "num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000"),
        ({"architecture": {}, "projector": {}}, "num_hidden_layers is 1, of 0 weights"),
        ({"architecture": {"input_dim": 12, "hidden_dim": 10**9, "output_dim": 10**9}}, "size mismatch"),
        ({"architecture": {"input_dim": 12}}, "size mismatch"),
        ({"architecture": {"input_dim": 12, "input_power": "x"}}, "could not convert string to float"),
        ({"architecture": make_projector().architecture | {"dropout": math.nan}}, "dropout or input_power is out of"),
        ({"architecture": make_projector().architecture | {"input_power": 10**9}}, "dropout or input_power is out of"),
        (
            {"projector": {"shortcut.weight": torch.zeros(1).expand(10**9, 10**9)}},
            "claims more numbers",
        ),
        (
            {"projector": make_projector().state_dict() | {"x": torch.zeros(1, dtype=torch.complex64)}},
            "complex numbers",
        ),
        ({"history": [{"loss": torch.zeros(1).expand(10**9)}]}, "claims more numbers"),
    ],
)
def test_a_small_file_that_claims_much_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    torch.save(make_content(make_projector()) | change, tmp_path / "a.pt")
    with pytest.raises(InputError, match=f"a.pt: .*{problem}") as caught:
        load_checkpoint(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)


def test_an_archive_that_unfolds_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "plain.pt", make_content(make_projector()) | {"bias": torch.zeros(10**6)})
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(InputError, match="a.pt: .*compressed: torch stores weights as they are"):
        load_checkpoint(tmp_path / "a.pt")


def test_it_counts_the_buildings_that_it_was_trained_on(tmp_path: Path) -> None:
    content = make_content(make_projector())
    save_checkpoint(tmp_path / "silent.pt", content)
    assert load_checkpoint(tmp_path / "silent.pt").count_trained_on(["0001_1"]) is None
    save_checkpoint(tmp_path / "a.pt", content | {"trained_on": hash_buildings(["0001_1", "0001_2", "0002_1"])})
    found = load_checkpoint(tmp_path / "a.pt")
    assert found.count_trained_on(["0002_1", "0003_1", "0001_1"]) == 2
    assert found.count_trained_on([]) == 0


def test_metrics_and_settings_are_plain_enough_for_json(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", make_content(make_projector()))
    found = load_checkpoint(tmp_path / "a.pt")
    assert json.loads(json.dumps([found.metrics, found.settings, found.architecture]))[2] == found.architecture
