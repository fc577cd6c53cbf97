"""The coordinates that training works in, and the projector of features that it is folded into."""

import numpy as np
import pytest
import torch

from pipeline.retrieval.projector import Projector
from pipeline.retrieval.whitening import LinearMap
from train_specialized_embeddings.training.starts import Coordinates, restore_coordinates


def make_coordinates(power: float = 1.0) -> Coordinates:
    drawn = np.random.default_rng(0)
    weight, bias = drawn.standard_normal((6, 10)).astype(np.float32), drawn.standard_normal(6).astype(np.float32)
    return Coordinates(LinearMap(weight, bias, power), np.ones(6, np.float32), 2.0)


def make_projector(**settings: object) -> Projector:
    torch.manual_seed(0)
    projector = Projector(6, 4, 5, **settings)  # type: ignore[arg-type]
    for weight in projector.parameters():
        weight.data.normal_()
    return projector.eval()


ROWS = np.random.default_rng(1).standard_normal((20, 10)).astype(np.float32)


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_hidden_layers": 0}, {"num_hidden_layers": 2}, {"hidden_dims": [7, 3]}, {"use_residual": False}],
)
@pytest.mark.parametrize("power", [1.0, 0.8])
def test_the_folded_projector_of_features_equals_the_one_of_coordinates(
    settings: dict[str, object], power: float
) -> None:
    start, projector = make_coordinates(power), make_projector(**settings)
    state = torch.get_rng_state()
    folded = start.fold(projector)
    assert torch.get_rng_state().equal(state)  # or a resumed run would draw other noise
    expected = projector(torch.from_numpy(start.linear_map.map_rows(ROWS))).detach().numpy()
    np.testing.assert_allclose(folded(torch.from_numpy(ROWS)).detach().numpy(), expected, atol=1e-5)
    assert folded.architecture["input_dim"] == 10
    assert folded.architecture["input_power"] == power
    rebuilt = Projector(**folded.architecture)
    rebuilt.load_state_dict(folded.state_dict())


def test_a_saved_state_gives_the_same_coordinates() -> None:
    start = make_coordinates(0.8)
    again = restore_coordinates(start.state())
    np.testing.assert_array_equal(again.linear_map.map_rows(ROWS), start.linear_map.map_rows(ROWS))
    assert (again.linear_map.input_power, again.length) == (0.8, 2.0)
    np.testing.assert_array_equal(again.spread, start.spread)
