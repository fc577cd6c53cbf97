"""The projector: its formula, its start, float types, and that it stands alone."""

import ast
from pathlib import Path

import pytest
import torch

from pipeline.retrieval import projector as projector_module
from pipeline.retrieval.projector import Projector


def features(count: int = 6, width: int = 12) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0)) + 2


def randomised(**arguments: object) -> Projector:
    """Return a projector in evaluation mode whose branch is not zero."""
    torch.manual_seed(1)
    projector = Projector(12, **arguments).eval()
    if projector.output is not None:
        torch.nn.init.normal_(projector.output.weight)
    return projector


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("num_hidden_layers", [0, 1, 3])
def test_the_output_is_the_normalised_sum_of_shortcut_and_branch(activation: str, num_hidden_layers: int) -> None:
    projector = randomised(output_dim=5, hidden_dim=7, num_hidden_layers=num_hidden_layers, activation=activation)
    state, inputs = projector.state_dict(), features()
    expected = inputs @ state["shortcut.weight"].T + state["shortcut.bias"]
    hidden = inputs
    for layer in range(num_hidden_layers):
        hidden = hidden @ state[f"hidden.{layer}.weight"].T + state[f"hidden.{layer}.bias"]
        hidden = getattr(torch.nn.functional, activation)(hidden)
    if num_hidden_layers:
        expected = expected + hidden @ state["output.weight"].T + state["output.bias"]
    expected = expected / expected.pow(2).sum(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(projector(inputs), expected)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_without_a_residual_the_output_is_the_branch_alone(layer_norm: bool) -> None:
    projector = randomised(output_dim=5, hidden_dim=7, layer_norm=layer_norm, use_residual=False)
    assert not [name for name in projector.state_dict() if name.startswith("shortcut")]

    def norm(rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(rows, rows.shape[1:]) if layer_norm else rows

    hidden = torch.nn.functional.gelu(norm(projector.hidden[0](features())))
    expected = torch.nn.functional.normalize(norm(projector.output(hidden)), dim=1)
    torch.testing.assert_close(projector(features()), expected)


def test_without_hidden_layers_the_linear_map_is_all_there_is() -> None:
    projector = Projector(12, 5, num_hidden_layers=0, use_residual=False)
    assert projector.state_dict().keys() == {"shortcut.weight", "shortcut.bias"}


def test_autocast_does_not_round_a_branch_that_centres() -> None:
    projector = randomised(output_dim=5, hidden_dim=7, use_residual=False)
    rows = features(64) * 0.05 + 40
    with torch.no_grad():
        projector.hidden[0].bias.copy_(-projector.hidden[0].weight @ rows.mean(dim=0))
        expected = projector(rows)
        with torch.autocast("cpu", torch.bfloat16):
            found = projector(rows)
    torch.testing.assert_close(found, expected)


def test_the_widths_of_the_hidden_layers_may_differ() -> None:
    projector = Projector(12, 5, hidden_dims=[9, 4])
    assert [tuple(layer.weight.shape) for layer in projector.hidden] == [(9, 12), (4, 9)]


def test_autocast_rounds_the_branch_and_not_the_shortcut_that_centres() -> None:
    projector = Projector(12, 5).eval()
    rows = features(64) * 0.05 + 40
    with torch.no_grad():
        projector.shortcut.bias.copy_(-projector.shortcut.weight @ rows.mean(dim=0))
        expected = projector(rows)
        with torch.autocast("cpu", torch.bfloat16):
            found = projector(rows)
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32


def test_a_new_projector_equals_its_shortcut() -> None:
    projector = Projector(12, 5).eval()
    expected = torch.nn.functional.normalize(projector.shortcut(features()), dim=1)
    torch.testing.assert_close(projector(features()), expected)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_float_type_gives_float32_of_norm_one(weights: torch.dtype, inputs: torch.dtype) -> None:
    projector = randomised(output_dim=5, hidden_dim=7)
    reference = projector(features())
    outputs = projector.to(weights)(features().to(inputs))
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs.norm(dim=1), torch.ones(6), atol=1e-6, rtol=0)
    assert (outputs * reference).sum(dim=1).min() > 0.999


def test_a_zero_vector_does_not_give_nan() -> None:
    projector = randomised(output_dim=5)
    assert torch.isfinite(projector(torch.zeros(2, 12))).all()
    torch.nn.init.zeros_(projector.shortcut.bias)
    without_branch = Projector(12, 5, num_hidden_layers=0).eval()
    torch.nn.init.zeros_(without_branch.shortcut.bias)
    assert (without_branch(torch.zeros(2, 12)) == 0).all()


def test_the_result_does_not_depend_on_the_batch() -> None:
    projector = randomised(output_dim=5)
    one_by_one = torch.cat([projector(row[None]) for row in features()])
    torch.testing.assert_close(projector(features()), one_by_one)


def test_dropout_acts_in_training_alone() -> None:
    projector = randomised(output_dim=5, dropout=0.5)
    torch.testing.assert_close(projector(features()), projector(features()))
    projector.train()
    assert not torch.equal(projector(features()), projector(features()))


def test_the_architecture_makes_the_same_projector_again() -> None:
    projector = randomised(output_dim=5, hidden_dim=7, num_hidden_layers=2, activation="silu")
    again = Projector(**projector.architecture).eval()
    again.load_state_dict(projector.state_dict())
    torch.testing.assert_close(again(features()), projector(features()))


def test_gradients_reach_every_weight_but_those_behind_the_zero_layer() -> None:
    projector = Projector(12, 5, hidden_dim=7)
    projector(features())[:, 0].sum().backward()
    assert projector.shortcut.weight.grad.abs().sum() > 0
    assert projector.output.weight.grad.abs().sum() > 0


def test_a_feature_of_zero_has_a_finite_gradient_whatever_the_power() -> None:
    projector = Projector(3, 2, num_hidden_layers=0, input_power=0.8)
    inputs = torch.tensor([[0.0, -1.0, 2.0]], requires_grad=True)
    projector(inputs)[0, 0].backward()
    assert inputs.grad.isfinite().all()
    assert inputs.grad[0, 1] != 0


def test_an_unknown_activation_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="activation 'tanh': must be one of relu, gelu, silu"):
        Projector(12, activation="tanh")


def test_the_file_imports_nothing_but_torch_and_the_standard_library() -> None:
    tree = ast.parse(Path(projector_module.__file__).read_text(encoding="utf-8"))
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add(str(node.module).split(".")[0])
    assert modules == {"torch", "typing"}


@pytest.mark.parametrize("power", [0.5, 0.8])
def test_an_input_power_keeps_the_signs(power: float) -> None:
    plain, powered = randomised(output_dim=5), randomised(output_dim=5, input_power=power)
    powered.load_state_dict(plain.state_dict())
    rows = features() - 2
    expected = plain(torch.tensor([[abs(x) ** power * (1 if x >= 0 else -1) for x in row] for row in rows.tolist()]))
    torch.testing.assert_close(powered(rows), expected)
    assert torch.isfinite(powered(torch.zeros(1, 12))).all()


def test_the_map_is_the_embedding_before_it_is_normalised() -> None:
    projector = randomised(output_dim=5)
    mapped = projector.map(features())
    assert (mapped.norm(dim=1) - 1).abs().min() > 1e-3
    torch.testing.assert_close(torch.nn.functional.normalize(mapped, dim=1), projector(features()))
