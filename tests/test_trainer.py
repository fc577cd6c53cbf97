"""A training step against slow loops, and its sums."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_band_sampler import make_features, make_neighbors

from pipeline.config import TrainingSection
from pipeline.log import Progress
from pipeline.retrieval.features import Features
from pipeline.retrieval.projector import Projector
from train_specialized_embeddings.sampling.band_sampler import BandSampler
from train_specialized_embeddings.training import trainer as trainer_module
from train_specialized_embeddings.training.losses import LOSSES, Pairs
from train_specialized_embeddings.training.step_graph import FIXED_SHAPES, TRIALS, StepGraph, may_capture
from train_specialized_embeddings.training.trainer import Trainer, choose_batch_size


def make_trainer(**settings: Any) -> tuple[Trainer, Features]:
    data = make_features(30)
    rows = np.random.default_rng(1).standard_normal((len(data), 6)).astype(np.float32)
    data = replace(data, embeddings=rows)
    torch.manual_seed(0)
    projector = Projector(6, 4, 8, 1, 0.0, "gelu")
    sampler = BandSampler(data, make_neighbors(data), 3, 15.0)
    chosen = {"loss": "triplet", "anchors_per_epoch": len(data)} | settings
    section = TrainingSection(batch_size=20, margin=0.3, input_noise=0.0).model_copy(update=chosen)
    return Trainer(projector, torch.from_numpy(rows), sampler, section, torch.ones(6)), data


def count_steps(trainer: Trainer) -> int:
    return int(trainer.optimizer.state[trainer.projector.shortcut.weight]["step"])


# A loss with parameters may depend on the whole batch, which the loop over anchors does not see.
@pytest.mark.parametrize("loss", [word for word, loss in LOSSES.items() if not isinstance(loss, type)])
@pytest.mark.parametrize("tile", [8, 1024])
def test_a_steps_loss_gradient_and_counts_equal_a_loop_over_its_anchors(
    loss: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "TILE", tile)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    trainer, data = make_trainer(loss=loss, temperature=0.3)
    [part] = trainer.sampler.draw_groups(40, 1000)
    [batch] = trainer.sampler.add_negatives([part])
    embeddings = trainer.projector(torch.from_numpy(data.embeddings))
    rows, negatives = part.rows.tolist(), batch.places.rows[len(part.rows) :].tolist()
    groups = list(itertools.pairwise([0, *part.ends.tolist()]))
    tiles: list[list[int]] = [[]]  # numbers of groups
    for number, (_, last) in enumerate(groups):
        if tiles[-1] and last - groups[tiles[-1][0]][0] > tile:
            tiles.append([])
        tiles[-1].append(number)
    losses = []
    for numbers in tiles:
        own = [rows[place] for number in numbers for place in range(*groups[number])]
        others = torch.tensor(own + [negatives[number] for number in numbers])
        for row in own:
            is_positive = (others != row) & torch.from_numpy(data.building_codes[others] == data.building_codes[row])
            is_negative = trainer.sampler.allows(torch.full_like(others, row), others)
            pairs = Pairs(
                embeddings[[row]],
                embeddings[others],
                is_positive[None],
                is_negative[None],
                torch.tensor([int(data.building_codes[row])]),
            )
            losses.append(trainer.loss(pairs))
    torch.cat(losses).mean().backward()
    expected = [weight.grad.clone() for weight in trainer.projector.parameters() if weight.grad is not None]

    judged = trainer._take_step(batch, part)
    assert judged.loss_sum.item() == pytest.approx(float(torch.cat(losses).detach().sum()), rel=1e-5)
    counts = judged.counts
    active = [0] * 8
    for (first, _), negative, band in zip(groups, negatives, batch.bands.tolist(), strict=True):
        anchor, positive, other = (embeddings[row] for row in (rows[first], rows[first + 1], negative))
        active[band] += bool((anchor - positive).norm() - (anchor - other).norm() + 0.3 > 0)
    assert counts[0].tolist() == np.bincount(batch.bands, minlength=8).tolist()
    assert counts[1].tolist() == active
    assert 0 < sum(active) < len(groups)
    found = [weight.grad for weight in trainer.projector.parameters() if weight.grad is not None]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", FIXED_SHAPES)
def test_padded_batches_of_compiled_code_give_the_same_losses_counts_and_gradients(loss: str) -> None:
    trainer, _ = make_trainer(loss=loss, temperature=0.3)
    batches = trainer.sampler.add_negatives(trainer.sampler.draw_groups(60, 20))
    graph = StepGraph(trainer.judge, 20, backend="eager")
    weights = list(trainer.projector.parameters())
    outcomes = []
    for batch, padded in zip(batches, graph.pad(batches), strict=True):
        for one, judge in ((batch, trainer.judge), (padded, graph.judge)):
            trainer.optimizer.zero_grad(set_to_none=True)
            judged = judge(trainer.features[one.places.rows], one)
            judged.loss.backward()
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            outcomes.append((judged.loss, judged.loss_sum, judged.counts, *gradients))
    assert len({len(batch.places.rows) for batch in batches}) > 1  # the padding differs
    for expected, found in zip(outcomes[::2], outcomes[1::2], strict=True):
        assert expected[2].equal(found[2])
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_an_epoch_by_compiled_code_ends_near_where_the_plain_one_does() -> None:
    plain, compiled = (make_trainer(loss="multi_similarity", anchors_per_epoch=100)[0] for _ in range(2))
    compiled.graph = StepGraph(compiled.judge, 20, backend="eager")
    reports = [trainer.run_epoch(Progress("train", None)) for trainer in (plain, compiled)]
    assert compiled.graph is not None
    assert reports[1]["num_negatives"] == reports[0]["num_negatives"]
    assert reports[1]["step_losses"] == pytest.approx(reports[0]["step_losses"], rel=1e-4)
    for one, other in zip(plain.projector.parameters(), compiled.projector.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_step_that_cannot_be_captured_is_said_and_nothing_is_spent_by_trying(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no C compiler\nwas found")

    plain, failing = (make_trainer(loss="multi_similarity", input_noise=0.1)[0] for _ in range(2))
    failing.graph = StepGraph(failing.judge, 20, backend="eager")
    failing.graph.judge = refuse
    for trainer in (plain, failing):
        torch.manual_seed(1)
        trainer.run_epoch(Progress("train", None))
    assert failing.graph is None
    assert "steps are not captured as graphs, which is slower: no C compiler was found" in caplog.messages
    for one, other in zip(plain.projector.parameters(), failing.projector.parameters(), strict=True):
        assert one.equal(other)


def test_trying_a_graph_adds_no_gradient_to_one_that_the_next_run_writes_over() -> None:
    trainer, _ = make_trainer(loss="multi_similarity")
    graph = StepGraph(trainer.judge, 20, backend="eager")
    [batch, *_] = graph.pad(trainer.sampler.add_negatives(trainer.sampler.draw_groups(20, 20)))
    weights, judge, are_clear = list(trainer.projector.parameters()), graph.judge, []

    def look(*arguments: Any) -> Any:
        are_clear.append(all(weight.grad is None for weight in weights))
        return judge(*arguments)

    graph.judge = look
    graph.try_out(trainer.features[batch.places.rows], batch, weights)
    assert graph.works
    assert are_clear == [True] * TRIALS
    assert all(weight.grad is None for weight in weights)


def test_the_runs_of_one_process_are_all_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    for temperature in (0.1, 0.2, 0.3):
        trainer, _ = make_trainer(loss="supcon", temperature=temperature, anchors_per_epoch=20)
        trainer.graph = StepGraph(trainer.judge, 20, backend="eager")
        trainer.run_epoch(Progress("train", None))
        assert trainer.graph is not None


def test_only_long_runs_of_small_batches_on_a_gpu_are_captured() -> None:
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert may_capture(cuda, "multi_similarity", 512, 20_000)
    assert not may_capture(cpu, "multi_similarity", 512, 20_000)
    assert not may_capture(cuda, "triplet", 512, 20_000)
    assert not may_capture(cuda, "supcon", 4096, 20_000)
    assert not may_capture(cuda, "supcon", 512, 100)


class ToyProxies(torch.nn.Module):
    """A learned vector for each building, to which its images are drawn: a loss with parameters."""

    def __init__(self, num_buildings: int, width: int, _: TrainingSection) -> None:
        super().__init__()
        self.proxies = torch.nn.Parameter(torch.zeros(num_buildings, width))

    def forward(self, pairs: Pairs) -> torch.Tensor:
        return (pairs.anchors - self.proxies[pairs.buildings]).square().sum(dim=1)


def test_a_losss_own_parameters_are_trained_saved_and_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "toy", ToyProxies)
    (one, data), (other, _) = (make_trainer(loss="toy", learning_rate=0.5) for _ in range(2))
    bar = Progress("train", None)
    before = one.run_epoch(bar)["train_loss"]
    state = one.state()
    assert state["loss"]["proxies"].abs().sum() > 0
    assert len(state["loss"]["proxies"]) == len(data.building_ids)
    for _ in range(5):
        report = one.run_epoch(bar)
    assert report["train_loss"] < before
    other.restore(state)
    for _ in range(5):
        other.run_epoch(bar)
    assert one.loss.proxies.equal(other.loss.proxies)


def test_an_epochs_report_is_that_of_all_its_steps() -> None:
    trainer, _ = make_trainer(anchors_per_epoch=70)
    report = trainer.run_epoch(Progress("train", None))
    assert 70 / 4 <= report["num_negatives"] <= 74 / 2  # groups of 2 to 4 images
    assert (count_steps(trainer), trainer.epoch) == (4, 1)
    assert sum(report["band_shares"]) == pytest.approx(1)


@pytest.mark.parametrize("loss", ["triplet", "multi_similarity"])
def test_the_bandit_turns_to_the_bands_whose_negatives_are_still_active(loss: str) -> None:
    trainer, _ = make_trainer(band_sampling="ucb", loss=loss, anchors_per_epoch=3000)
    assert trainer.bandit is not None
    trainer.projector.shortcut.weight.data.zero_()  # all images coincide: every negative is active
    report = trainer.run_epoch(Progress("train", None))
    assert report["active_share"] == pytest.approx(1.0, abs=0.01)
    means = [reward / pulls for reward, pulls in zip(trainer.bandit.rewards, trainer.bandit.pulls, strict=True)]
    assert means == pytest.approx([1.0] * 7, abs=0.01)


def test_a_state_of_a_gpu_goes_on_on_a_cpu_with_new_random_numbers_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, _ = make_trainer()
    first.run_epoch(Progress("train", None))
    state = first.state()
    state["random"]["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * 4
    state["sampler"]["random"] = torch.zeros(16, dtype=torch.uint8)
    trainer, _ = make_trainer()
    before = trainer.sampler.generator.get_state()
    trainer.restore(state)
    assert trainer.epoch == 1
    assert "run on a GPU, this one is on a CPU: random numbers begin anew" in caplog.records[-1].getMessage()
    assert trainer.sampler.generator.get_state().equal(before)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_image_is_an_anchor_and_every_building_has_a_banded_negative(loss: str) -> None:
    trainer, data = make_trainer(loss=loss)
    report = trainer.run_epoch(Progress("train", None))
    num_buildings = int((np.bincount(data.building_codes) > 1).sum())
    assert num_buildings <= report["num_negatives"] <= num_buildings + 3  # a pass, and the rest of a batch
    assert report["num_negatives"] < len(data) / 2
    assert report["train_loss"] > 0


@pytest.mark.parametrize(
    ("num_images", "expected"), [(2, 32), (1_599, 32), (3_400, 68), (25_600, 512), (6_000_000, 512)]
)
def test_a_step_takes_a_fiftieth_of_the_images_within_limits(num_images: int, expected: int) -> None:
    assert choose_batch_size(num_images) == expected


@pytest.mark.parametrize(("batch_size", "expected"), [("auto", 32), (20, 20)])
def test_an_epoch_is_a_pass_over_the_images_that_have_a_positive(batch_size: int | str, expected: int) -> None:
    trainer, _ = make_trainer(anchors_per_epoch="auto", batch_size=batch_size)
    trainer.run_epoch(Progress("train", None))
    assert (trainer.num_anchors, trainer.batch_size) == (76, expected)
    assert -(-76 // expected) <= count_steps(trainer) <= -(-76 // (expected - 3))  # batches are of whole groups


def test_the_learning_rate_warms_up_and_stays() -> None:
    trainer, _ = make_trainer(warmup_epochs=1.5, anchors_per_epoch=76)
    peak, bar = trainer.optimizer.param_groups[0]["peak_lr"], Progress("train", None)
    rates = [trainer.run_epoch(bar)["learning_rates"]["shortcut"] / peak for _ in range(3)]
    assert rates == pytest.approx([1 / 1.5, 1.0, 1.0])
    first, _ = make_trainer(warmup_epochs=0.0)
    first._set_rates(0.1)
    assert first.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["peak_lr"]


@pytest.mark.parametrize("batch_size", [8, 20])
def test_places_are_copied_to_the_device_once_a_draw(monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    trainer, _ = make_trainer(batch_size=batch_size, anchors_per_epoch=20 * batch_size)
    monkeypatch.setattr(trainer_module, "_MIN_ANCHORS_PER_DRAW", 1)
    copies: list[int] = []
    copy_from, draw = torch.from_numpy, trainer.sampler.add_negatives
    monkeypatch.setattr(torch, "from_numpy", lambda array: copies.append(len(array)) or copy_from(array))
    monkeypatch.setattr(trainer.sampler, "add_negatives", lambda *rest: draws.append(len(rest[0])) or draw(*rest))
    draws: list[int] = []
    trainer.run_epoch(Progress("train", None))
    assert sum(draws) >= 20 > len(draws) == len(copies)


def test_products_are_in_float32_whatever_the_environment_says() -> None:
    trainer, _ = make_trainer()
    seen = set()
    trainer.projector.shortcut.register_forward_hook(lambda *_: seen.add(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("high")
    try:
        trainer.run_epoch(Progress("train", None))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == {"highest"}


def test_noise_is_drawn_in_units_of_the_spread_within_buildings(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, data = make_trainer()
    spread = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, 0.0])
    section = trainer.section.model_copy(update={"input_noise": 1.5})
    noisy = Trainer(trainer.projector, trainer.features, trainer.sampler, section, spread)
    seen, real = [], noisy.projector.map
    monkeypatch.setattr(noisy.projector, "map", lambda rows: (seen.append(rows), real(rows))[1])
    noisy.run_epoch(Progress("train", None))
    rows = torch.cat(seen)
    exact = torch.from_numpy(data.embeddings)
    assert set(rows[:, 1].tolist()) <= set(exact[:, 1].tolist())
    nearest = torch.cdist(rows[:, [1, 3, 4, 5]], exact[:, [1, 3, 4, 5]]).argmin(dim=1)
    moved = (rows - exact[nearest]).std(dim=0)
    assert moved.tolist() == pytest.approx([1.5, 0.0, 3.0, 0.0, 0.0, 0.0], rel=0.15)


def test_the_average_follows_the_weights_by_a_fifth_each_epoch() -> None:
    trainer, _ = make_trainer()
    bar = Progress("train", None)
    names = [name for name, _ in trainer.projector.named_parameters()]
    expected = {name: value.clone() for name, value in trainer.projector.state_dict().items()}
    for _ in range(2):
        trainer.run_epoch(bar)
        now = trainer.projector.state_dict()
        expected = {name: 0.8 * expected[name] + 0.2 * now[name] for name in names}
    for name, value in expected.items():
        torch.testing.assert_close(trainer.average.state_dict()[name], value)
    assert not trainer.average.state_dict()["shortcut.weight"].equal(now["shortcut.weight"])
    assert not trainer.average.training


def test_a_layers_rate_is_the_configured_one_over_the_root_of_its_width_and_less_for_few_images() -> None:
    trainer, data = make_trainer(learning_rate=0.5, shortcut_learning_rate=0.3)
    assert len(trainer.sampler.anchors) == 76 < len(data.building_codes)  # those that have a positive
    rates = {group["name"]: group["peak_lr"] for group in trainer.optimizer.param_groups}
    expected = {"shortcut": 0.3 / 6**0.5, "hidden.0": 0.5 / 6**0.5, "output": 0.5 / 8**0.5}
    assert rates == pytest.approx({name: 76 / 1_600 * rate for name, rate in expected.items()})


@pytest.mark.parametrize("settings", [{}, {"band_sampling": "ucb"}, {"loss": "multi_similarity"}])
def test_a_state_goes_on_bit_for_bit(settings: dict[str, Any]) -> None:
    (one, _), (other, _) = make_trainer(**settings), make_trainer(**settings)
    bar = Progress("train", None)
    one.run_epoch(bar)
    state = one.state()
    one.run_epoch(bar)
    torch.manual_seed(99)
    other.restore(state)
    other.run_epoch(bar)
    for first, second in zip(one.projector.parameters(), other.projector.parameters(), strict=True):
        assert first.equal(second)
    assert one.sampler.generator.get_state().equal(other.sampler.generator.get_state())
    assert (one.bandit and vars(one.bandit)) == (other.bandit and vars(other.bandit))
