"""The training features on their way to the device."""

import numpy as np
import pytest
import torch

from train_specialized_embeddings.sampling import feature_store
from train_specialized_embeddings.sampling.feature_store import FeatureStore

ROWS = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)


@pytest.mark.parametrize("batch", [[3, 3, 49, 0], list(range(50))[::-1], [7], []])
def test_each_batch_gets_the_rows_that_it_asked_for(batch: list[int]) -> None:
    store = FeatureStore(ROWS, torch.device("cpu"))
    np.testing.assert_array_equal(store.gather(torch.tensor(batch, dtype=torch.int64)).numpy(), ROWS[batch])


@pytest.mark.parametrize(("free", "is_tried"), [(9 * 2**30, True), (8 * 2**30, False)])
def test_features_that_the_gpu_cannot_hold_stay_in_memory(
    free: int, is_tried: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def refuse(table: torch.Tensor, *_: object) -> torch.Tensor:
        tried.append(table)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")  # another process was faster

    monkeypatch.setattr(feature_store, "measure_free_memory", lambda: free)
    monkeypatch.setattr(torch.Tensor, "to", refuse)
    with caplog.at_level("INFO", "spatial_building_embeddings"):
        store = FeatureStore(ROWS, torch.device("cuda"))
    assert not store.is_resident
    assert bool(tried) == is_tried
    assert "the features do not fit on the GPU" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("free", [0, 9 * 2**30])
def test_on_a_gpu_rows_come_to_the_device(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_store, "measure_free_memory", lambda: free)
    store = FeatureStore(ROWS, torch.device("cuda"))
    assert store.is_resident == bool(free)
    found = store.gather(torch.tensor([3, 3, 49], device="cuda"))
    torch.testing.assert_close(found.float().cpu(), torch.from_numpy(ROWS[[3, 3, 49]]), rtol=2**-8, atol=0)
    assert found.is_cuda
