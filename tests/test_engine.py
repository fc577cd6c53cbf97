"""The engine: order, rejections, ends, damage on the way, what is held, and where the time went."""

import threading

import numpy as np
import pytest
import torch
from raw_tars import draw_view, encode

from pipeline.errors import InputError, Rejection
from pipeline.inference import devices
from pipeline.inference.backbone import Embedder, Launched, Staged
from pipeline.inference.devices import choose_device
from pipeline.inference.engine import End, embed_stream
from pipeline.log import Stopwatch, logging_to

PICTURES = [encode(draw_view(seed)) for seed in range(11)]


@pytest.fixture(autouse=True)
def two_threads():
    """Let torch have two threads, so that two passes are under way on a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Fake:
    """An embedder that squares numbers, in passes of four; it stands in for a GPU where `on_gpu` is set."""

    def __init__(self, on_gpu=False, micro_batch=4):
        self.on_gpu, self.micro_batch = on_gpu, micro_batch
        self.log = []

    def stage(self, images):
        return Staged([torch.stack(images)] if images else [])

    def launch(self, staged):
        self.log.append("launch")
        fake = self

        class Fetched(Launched):
            def result(self):
                fake.log.append("fetch")
                return torch.cat(self.parts).numpy()

        return Fetched([batch**2 for batch in staged.batches], [])


def decode(number):
    if number % 5 == 3:
        raise Rejection("unreadable_image", str(number))
    return torch.tensor([float(number)])


def run(items, embedder=None, watch=None):
    return embed_stream(embedder or Fake(), items, decode, 3, watch or Stopwatch())


@pytest.mark.parametrize("on_gpu", [False, True])
def test_passes_come_full_and_in_order_and_a_bad_item_costs_itself_alone(on_gpu):
    passes = list(run(range(14), Fake(on_gpu)))
    assert [done.items for done in passes] == [[0, 1, 2, 4], [5, 6, 7, 9], [10, 11, 12]]
    assert [done.is_full for done in passes] == [True, True, False]
    assert [done.taken for done in passes] == [5, 5, 4]
    rejected = [(item, rejection.detail) for done in passes for item, rejection in done.rejected]
    assert rejected == [(3, "3"), (8, "8"), (13, "13")]
    for done in passes:
        assert done.embeddings[:, 0].tolist() == [item**2 for item in done.items]


def test_no_pass_spans_an_end():
    ends = [End(), End(), End()]
    passes = list(run([0, 1, ends[0], ends[1], 3, ends[2], *range(10, 13)]))
    assert [done.items for done in passes] == [[0, 1], [], [], [10, 11, 12]]
    assert [done.end for done in passes] == [*ends, None]
    assert [done.embeddings is None for done in passes] == [False, True, True, False]
    assert [item for item, _ in passes[2].rejected] == [3]


def test_nothing_comes_of_nothing():
    assert list(run([])) == []


@pytest.mark.parametrize("on_gpu", [False, True])
def test_damage_on_the_way_comes_out(on_gpu):
    def items():
        yield from range(100)
        raise InputError("0001.tar: truncated")

    found = []
    with pytest.raises(InputError, match="truncated"):
        found += (done.items for done in run(items(), Fake(on_gpu)))
    assert found[0] == [0, 1, 2, 4]


def test_a_bug_in_a_decoder_comes_out():
    stream = embed_stream(Fake(), range(5), lambda number: number // 0, 2, Stopwatch())
    with pytest.raises(ZeroDivisionError):
        list(stream)


def test_on_a_gpu_a_pass_is_started_before_the_last_one_is_fetched():
    gpu, cpu = Fake(on_gpu=True), Fake()
    list(run([0, 1, 2, 4] * 3, gpu))
    assert gpu.log == ["launch", "launch", "fetch", "launch", "fetch", "fetch"]
    list(run([0, 1, 2, 4] * 3, cpu))
    assert sorted(cpu.log) == ["fetch"] * 3 + ["launch"] * 3


@pytest.mark.parametrize("on_gpu", [False, True])
def test_what_is_held_is_bounded_by_the_settings_and_not_by_the_input(on_gpu):
    taken = consumed = most = 0

    def items():
        nonlocal taken
        for _ in range(400):
            taken += 1
            yield 0

    for done in run(items(), Fake(on_gpu)):
        most = max(most, taken - consumed)
        consumed += done.taken
    assert consumed == 400
    passes = torch.get_num_threads()
    assert most <= max(2 * 4 * passes, 2 * 3) + 4 * (2 * passes + 5)  # decoded; gathered, ready, under way and here


def test_a_consumer_that_stops_early_leaves_no_thread_and_closes_the_input():
    closed = []

    def items():
        try:
            yield from [0] * 1000
        finally:
            closed.append(True)

    before = threading.active_count()
    threads = torch.get_num_threads()
    stream = run(items())
    next(stream)
    stream.close()
    assert threading.active_count() == before
    assert closed == [True]
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_caller_never_decodes_and_each_core_of_a_cpu_computes_for_itself(on_gpu):
    where = {}

    class Noting(Fake):
        def launch(self, staged):
            where.setdefault("compute", set()).add((threading.get_ident(), torch.get_num_threads()))
            return super().launch(staged)

    def decode_here(number):
        where.setdefault("decode", set()).add((threading.get_ident(), torch.get_num_threads()))
        return decode(number)

    list(embed_stream(Noting(on_gpu), [0] * 20, decode_here, 2, Stopwatch()))
    here = (threading.get_ident(), torch.get_num_threads())
    assert (here in where["compute"]) == on_gpu
    assert on_gpu or {threads for _, threads in where["compute"]} == {1}
    assert threading.get_ident() not in {ident for ident, _ in where["decode"]}
    assert {threads for _, threads in where["decode"]} == {1}  # torch starts none of its own in each of ours


def test_the_watch_says_rate_share_and_parts():
    watch = Stopwatch()
    assert watch.describe_parts() == ""
    list(run(range(14), watch=watch))
    assert set(watch.seconds) == {"read", "decode in threads", "stage", "wait", "compute"}
    assert watch.images == 11
    watch.wall_seconds, watch.busy_seconds, watch.device = 2.0, 1.5, "GPU"
    watch.seconds = {"read": 1.0}
    assert watch.describe_parts() == "; 5.5 img/s, the GPU computed 75% of 2.00 s (read 1.0)"


def test_the_real_embedder_gives_the_same_through_the_stream(toy_backbone):
    embedder = Embedder(toy_backbone, device="cpu", batch_size=4)
    stream = embed_stream(embedder, PICTURES, embedder.decode, 3, Stopwatch())
    found = np.concatenate([done.embeddings for done in stream])
    expected = embedder.embed([embedder.decode(data) for data in PICTURES])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_gpu_that_is_there_and_not_used_is_said_at_once(tmp_path, monkeypatch):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(devices, "NVIDIA_DEVICE", tmp_path / "nvidia0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with logging_to(tmp_path / "a.log"):
        assert choose_device("auto").type == "cpu"
    assert f"a GPU is present but not used: torch {torch.__version__} cannot use it" in (tmp_path / "a.log").read_text()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with logging_to(tmp_path / "b.log"):
        assert choose_device("cpu").type == "cpu"
    assert "a GPU is present but not used: the device is set to cpu" in (tmp_path / "b.log").read_text()
