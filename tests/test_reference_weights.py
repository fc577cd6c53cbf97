"""Weights without an architecture: told apart by name, mapped exactly, or refused."""

import itertools
from pathlib import Path

import pytest
import torch
from projectors import make_projector
from published_models import make_config
from reference_projector import ReferenceProjector, list_widths
from torch import nn

from pipeline.cli import Options
from pipeline.config import TrainingModelSection
from pipeline.errors import InputError
from pipeline.retrieval.checkpoint import build_projector, load_checkpoint
from publish_model import convert_to_hf
from publish_model.modeling_spatial_embeddings import SpatialEmbeddingsModel


def features(width: int = 12, count: int = 4) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("key", [None, "projector_state_dict", "model_state_dict", "state_dict", "projector"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module.projector.", "projector."])
def test_bare_weights_of_this_projector_tell_their_widths_and_depth(
    tmp_path: Path, key: str | None, prefix: str
) -> None:
    projector = make_projector(num_hidden_layers=2, activation="relu")
    weights = {prefix + name: value for name, value in projector.state_dict().items()}
    torch.save(weights if key is None else {key: weights, "epoch": 3}, tmp_path / "old.pt")
    section = TrainingModelSection(output_dim=5, activation="relu", dropout=0.25, hidden_dim=999)
    found = load_checkpoint(tmp_path / "old.pt", section)
    assert found.architecture == projector.architecture | {"dropout": 0.25}
    assert found.rest == ({} if key is None else {"epoch": 3})
    torch.testing.assert_close(build_projector(found)(features()), projector(features()))


@pytest.mark.parametrize("use_residual", [True, False])
def test_the_weights_of_a_published_model_do_not_pass_for_a_checkpoint(tmp_path: Path, use_residual: bool) -> None:
    weights = make_projector(input_power=0.8, use_residual=use_residual).state_dict()
    both = {f"projector.{name}": value for name, value in weights.items()} | {"backbone.weight": torch.ones(3)}
    torch.save(both, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"model\.pt: a published model, whose power of the features these lack"):
        load_checkpoint(tmp_path / "model.pt")


def test_bare_weights_without_a_shortcut_are_the_branch_alone(tmp_path: Path) -> None:
    projector = make_projector(num_hidden_layers=2, use_residual=False)
    torch.save(projector.state_dict(), tmp_path / "old.pt")
    found = load_checkpoint(tmp_path / "old.pt")
    assert found.architecture == projector.architecture
    torch.testing.assert_close(build_projector(found)(features()), projector(features()))


def test_a_shortcut_alone_has_no_hidden_layers(tmp_path: Path) -> None:
    projector = make_projector(num_hidden_layers=0)
    torch.save(projector.state_dict(), tmp_path / "old.pt")
    found = load_checkpoint(tmp_path / "old.pt")
    assert found.architecture["num_hidden_layers"] == 0
    torch.testing.assert_close(build_projector(found)(features()), projector(features()))


@pytest.mark.parametrize(
    ("network", "why"),
    [
        (nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 5)), "hidden.0.weight is missing or no matrix"),
        (nn.Linear(12, 5), "hidden.0.weight is missing or no matrix"),
        (nn.ModuleDict({"fc1": nn.Linear(9, 9), "input_layer": nn.Linear(9, 9)}), "two of its layers have the same"),
    ],
)
def test_weights_that_cannot_be_mapped_are_refused_saying_why(tmp_path: Path, network: nn.Module, why: str) -> None:
    torch.save(network.state_dict(), tmp_path / "o.pt")
    with pytest.raises(InputError, match=f"o.pt: cannot be mapped onto the projector .*{why}"):
        load_checkpoint(tmp_path / "o.pt")


def test_widths_that_differ_are_inferred_from_this_projectors_own_names(tmp_path: Path) -> None:
    projector = make_projector(hidden_dims=[9, 6, 4])
    torch.save(projector.state_dict(), tmp_path / "o.pt")
    found = load_checkpoint(tmp_path / "o.pt", TrainingModelSection(output_dim=5))
    assert found.architecture["hidden_dims"] == [9, 6, 4]
    torch.testing.assert_close(build_projector(found)(features()), projector(features()))


# ---------------------------------------------------------------------------- the reference implementation's


def save_reference(path: Path, network: nn.Module, prefix: str = "") -> Path:
    weights = {prefix + name: value for name, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters()).state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model_state_dict": weights, "optimizer_state_dict": optimizer, "epoch": 7, "best_loss": 0.1}, path)
    return path


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_the_reference_projector_is_taken_over_exactly(tmp_path: Path, norm: bool, residual: bool) -> None:
    torch.manual_seed(1)
    activations = itertools.cycle(("relu", "gelu", "silu"))
    for input_dim, num_layers, multiplier in itertools.product((48, 256), (1, 2, 3, 4), (0.5, 0.75, 1, 1.25)):
        for hidden_dim in (40, 256):
            activation = next(activations)
            section = TrainingModelSection(activation=activation, dropout=0.3)
            widths = list_widths(hidden_dim, num_layers, multiplier)
            network = ReferenceProjector(input_dim, widths, 256, activation, residual=residual, norm=norm).eval()
            found = load_checkpoint(save_reference(tmp_path / "o.pt", network), section, input_dim=input_dim)
            assert found.architecture["dropout"] == 0.3
            assert found.rest["epoch"] == 7
            inputs = 3 * features(input_dim, 64) + 1
            with torch.no_grad():
                outputs, expected = build_projector(found)(inputs), network(inputs)
            torch.testing.assert_close(outputs, expected, atol=1e-6, rtol=0, msg=f"{input_dim} {widths}")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "projector."])
def test_a_wrappers_prefix_makes_no_difference(tmp_path: Path, prefix: str) -> None:
    network = ReferenceProjector(48, [32, 16], 256, "gelu", norm=True).eval()
    found = load_checkpoint(save_reference(tmp_path / "o.pt", network, prefix))
    with torch.no_grad():
        torch.testing.assert_close(build_projector(found)(features(48)), network(features(48)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("names", [("norm1", "norm2"), ("layer_norm1", "layer_norm2"), ("input_norm", "output_norm")])
@pytest.mark.parametrize(("norm", "residual"), [(False, False), (False, True), (True, False), (True, True)])
def test_the_older_names_of_its_layers_are_taken_over(
    tmp_path: Path, norm: bool, residual: bool, names: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    network = ReferenceProjector(48, [32], 256, "gelu", residual=residual, norm=norm).eval()
    older = {"input_layer": "fc1", "output_layer": "fc2", "input_norm": names[0], "output_norm": names[1]}
    weights = {}
    for name, value in network.state_dict().items():
        layer, _, part = name.rpartition(".")
        weights[f"{older.get(layer, layer)}.{part}"] = value
    torch.save({"model_state_dict": weights}, tmp_path / "o.pt")
    found = load_checkpoint(tmp_path / "o.pt")
    with torch.no_grad():
        torch.testing.assert_close(build_projector(found)(features(48)), network(features(48)), atol=1e-6, rtol=0)
    for name, layer in zip(names, ("fc1", "fc2"), strict=True):
        is_guessed = norm and name not in older
        assert (f"{name} is assumed to be a LayerNorm directly behind {layer}" in caplog.text) == is_guessed


@pytest.mark.parametrize("name", ["bn1", "gate", "norm3", "fc1.norm", "hidden_layers.0", "ln_1.scale"])
def test_another_layout_of_the_older_projector_is_refused_by_name(tmp_path: Path, name: str) -> None:
    layers = {"fc1": nn.Linear(48, 32), "fc2": nn.Linear(32, 256)}
    weights = nn.ModuleDict(layers).state_dict() | {f"{name}.weight": torch.ones(32)}
    torch.save(weights, tmp_path / "o.pt")
    name = {"hidden_layers.0": "hidden.1"}.get(name, name)
    with pytest.raises(InputError, match=rf"o.pt: (weights and arch|cannot be mapped).*{name}.weight"):
        load_checkpoint(tmp_path / "o.pt")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (TrainingModelSection(activation="relu"), "relu is assumed (as configured of [training_model].activation)"),
        (None, "gelu is assumed (the default of [training_model].activation)"),
    ],
)
def test_the_assumed_activation_is_logged_with_its_origin(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, section: TrainingModelSection | None, said: str
) -> None:
    path = save_reference(tmp_path / "o.pt", ReferenceProjector(48, [32], 256, "gelu"))
    load_checkpoint(path, section)
    assert f"{path}: names no activation: {said}" in caplog.text


def test_a_layer_without_bias_gets_one_of_zeros(tmp_path: Path) -> None:
    network = ReferenceProjector(48, [32], 256, "gelu").eval()
    network.residual_proj = nn.Linear(48, 256, bias=False)
    found = load_checkpoint(save_reference(tmp_path / "o.pt", network))
    with torch.no_grad():
        torch.testing.assert_close(build_projector(found)(features(48)), network(features(48)), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"input_norm.weight": torch.ones(32)}, "Missing key.*norms.1.weight"),
        ({"output_norm.bias": torch.ones(256)}, "Unexpected key.*norms.2.bias"),
        ({"gate.weight": torch.ones(3, 3)}, "Unexpected key.*gate.weight"),
        ({"hidden_layers.0.norm.weight": torch.ones(3)}, "Unexpected key.*hidden_layers.0.norm.weight"),
        ({"hidden_layers.5.weight": torch.ones(3, 3)}, "Unexpected key.*hidden_layers.5.weight"),
        ({"output_layer.weight": None}, "Missing key.*output.weight"),
        ({"input_layer.weight": None}, "hidden.0.weight is missing"),
        ({"input_layer.weight": torch.ones(3)}, "hidden.0.weight is missing or no matrix"),
    ],
)
def test_other_names_among_the_references_are_refused(
    tmp_path: Path, change: dict[str, torch.Tensor | None], why: str
) -> None:
    weights = ReferenceProjector(48, [32, 16], 256, "gelu").state_dict() | change
    torch.save({"model_state_dict": {k: v for k, v in weights.items() if v is not None}}, tmp_path / "o.pt")
    with pytest.raises(InputError, match=f"o.pt: (weights and architecture|cannot be mapped).*{why}"):
        load_checkpoint(tmp_path / "o.pt")


@pytest.mark.parametrize(("norm", "residual"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_reference_checkpoint_is_published_exactly(
    tmp_path: Path, toy_backbone: Path, norm: bool, residual: bool
) -> None:
    torch.manual_seed(1)
    network = ReferenceProjector(24, [384, 288, 216], 256, "gelu", norm=norm, residual=residual).eval()
    save_reference(tmp_path / "checkpoint" / "checkpoint_best.pt", network)
    convert_to_hf.run(make_config(tmp_path, toy_backbone), Options())
    model = SpatialEmbeddingsModel.from_pretrained(tmp_path / "published").eval()
    assert (model.projector.shortcut is not None) == residual
    with torch.no_grad():
        torch.testing.assert_close(model.projector(features(24, 64)), network(features(24, 64)), atol=1e-6, rtol=0)
