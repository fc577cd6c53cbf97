"""The training features on their way to the device."""

from pathlib import Path

import numpy as np
import pytest
import torch

from train_specialized_embeddings.sampling import feature_store
from train_specialized_embeddings.sampling.feature_store import FeatureStore


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("min_rows", [3, 512])
def test_each_batch_gets_the_rows_that_it_asked_for(
    tmp_path: Path, kind: type, mapped: bool, min_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "_MIN_ROWS", min_rows)
    rows = np.random.default_rng(0).standard_normal((50, 4)).astype(kind)
    np.save(tmp_path / "rows.npy", rows)
    table = np.load(tmp_path / "rows.npy", mmap_mode="r") if mapped else rows
    batches = [torch.tensor(batch) for batch in ([3, 3, 49, 0], list(range(50))[::-1], [7])]
    store = FeatureStore(table, torch.device("cpu"))
    assert not store.is_resident
    for batch, (features, places) in zip(batches, store.stream(batches), strict=True):
        np.testing.assert_array_equal(features[places].numpy(), rows[batch.numpy()])
        assert len(features) == len(set(batch.tolist()))  # an image is read, and projected, once
    assert list(store.stream([])) == []


def test_whoever_stops_early_leaves_no_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    before = threading.active_count()
    batches = [torch.arange(10)] * 20
    stream = FeatureStore(np.ones((10, 2), np.float32), torch.device("cpu")).stream(batches)
    next(stream)
    stream.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(("free", "is_tried"), [(9 * 2**30, True), (8 * 2**30, False)])
def test_features_that_the_gpu_cannot_hold_are_gathered_from_disk(
    free: int, is_tried: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def upload(store: FeatureStore) -> torch.Tensor:
        tried.append(store)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")  # another process was faster

    monkeypatch.setattr(feature_store, "measure_free_memory", lambda: free)
    monkeypatch.setattr(FeatureStore, "_upload", upload)
    store = FeatureStore(np.ones((10, 2), np.float32), torch.device("cuda"))
    assert not store.is_resident
    assert bool(tried) == is_tried
    assert "the features do not fit on the GPU" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("resident", [False, True])
def test_on_a_gpu_rows_come_to_the_device(resident: bool) -> None:
    rows = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    store = FeatureStore(rows, torch.device("cuda"), resident=resident)
    batch = torch.tensor([3, 3, 49], device="cuda")
    [(features, places)] = store.stream([batch])
    expected = torch.from_numpy(rows[[3, 3, 49]])
    torch.testing.assert_close(features[places].float().cpu(), expected, rtol=2**-8, atol=0)
    assert features.is_cuda
