"""The training loop, against steps written out by hand on a network small enough to follow."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from rounding import apart, apart_after_steps, apart_behind_layers, gamma
from timings import TIMINGS
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from neq_cli.errors import TrainingError
from neq_cli.events import EpochRecord, Pause, StepProgress
from neq_cli.recipe import Recipe
from neq_cli.training.loop.tasks import Classification
from neq_cli.training.loop.trainer import GO_ON, STOP, Trainer
from neq_cli.training.session import prepare


@pytest.fixture(autouse=True)
def _not_deterministic_afterwards() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def noise(size: int = 42) -> tuple[TensorDataset, TensorDataset]:
    """Images [1, 4, 4] whose first pixel is their number, so that a test can tell which of them were seen."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(size + 12, 1, 4, 4, generator=generator)
    images[:, 0, 0, 0] = torch.arange(size + 12) / 100
    labels = torch.randint(0, 3, (size + 12,), generator=generator)
    labels[-1] = labels[0] = 2
    return TensorDataset(images[:size], labels[:size]), TensorDataset(images[size:], labels[size:])


def plain_network() -> nn.Module:
    """A network in which every image is worth the same, whatever the others in its batch."""
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def normalised_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


class InDouble(nn.Sequential):
    """A network in double precision, of images in single precision."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.double())  # type: ignore[no-any-return]


def plain_in_double() -> nn.Module:
    return InDouble(*plain_network()).double()  # type: ignore[misc]


def normalised_in_double() -> nn.Module:
    return InDouble(*normalised_network()).double()  # type: ignore[misc]


# No value here is rounded more than 100 times forward (64 of them in the linear layer) and as often backward, and 32
# images of 16 positions are added up.
ROUNDINGS = 1000


def make_recipe(network: str = "plain_network", size: int = 42, **changes: Any) -> Recipe:
    values = {
        "model": {"entrypoint": f"{__name__}:{network}"},
        "data": {"entrypoint": f"{__name__}:noise", "kwargs": {"size": size}, "probe_size": 10, "workers": 0},
        "epochs": 1,
        "batch_size": 8,
        "optimizer": {"name": "sgd", "lr": 0.1},
        "policy": {"kind": "baseline"},
        "device": "cpu",
    }
    return Recipe.model_validate(values | changes)


def make_trainer(**changes: Any) -> Trainer:
    return prepare(make_recipe(**changes), "test").trainer


def epochs_of(trainer: Trainer) -> list[EpochRecord]:
    return [record for record in trainer.run() if isinstance(record, EpochRecord)]


def train_up_to(epoch: int, trainer: Trainer) -> None:
    next(one for one in trainer.run() if isinstance(one, EpochRecord) and one.epoch == epoch)


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def train_by_hand(trainer: Trainer, groups: list[int], clip: float | None = None) -> dict[str, Tensor]:
    """Plain steps of SGD, each on the mean loss of so many joined batches."""
    model, rate = trainer.model, trainer.recipe.optimizer.lr
    assert rate is not None
    trainer.loaders.start_epoch(1)
    batches = list(trainer.loaders.train)
    assert sum(groups) == len(batches)
    for group in groups:
        inputs = torch.cat([batch[0] for batch in batches[:group]])
        targets = torch.cat([batch[1] for batch in batches[:group]])
        del batches[:group]
        gradients = torch.autograd.grad(functional.cross_entropy(model(inputs), targets), list(model.parameters()))
        norm = torch.sqrt(sum(((gradient**2).sum() for gradient in gradients), torch.zeros(())))
        norm = float(norm) + 1e-6  # as torch's own clipping has it
        scale = 1.0 if clip is None else min(1.0, clip / norm)
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= rate * scale * gradient
    return weights_of(trainer)


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor], steps: int = 4) -> None:
    """``steps``: after which the weights, all below 1, are compared."""
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=apart_after_steps(steps, ROUNDINGS), rtol=0)


@pytest.mark.parametrize(
    ("accumulation", "groups"), [(1, [1, 1, 1, 1]), (4, [4]), (3, [3, 1]), (9, [4])], ids=["no", "all", "rest", "more"]
)
def test_accumulated_batches_are_one_large_batch(accumulation: int, groups: list[int]) -> None:
    trainer = make_trainer(network="plain_in_double", gradient_accumulation=accumulation)
    by_hand = train_by_hand(make_trainer(network="plain_in_double"), groups)
    epochs_of(trainer)
    assert_close(weights_of(trainer), by_hand)


@pytest.mark.parametrize(("clip", "accumulation", "groups"), [(0.05, 1, [1] * 4), (0.05, 2, [2, 2]), (100.0, 4, [4])])
def test_gradients_are_clipped_once_per_step(clip: float, accumulation: int, groups: list[int]) -> None:
    trainer = make_trainer(network="plain_in_double", clip_grad_norm=clip, gradient_accumulation=accumulation)
    by_hand = train_by_hand(make_trainer(network="plain_in_double"), groups, clip)
    start = weights_of(trainer)
    epochs_of(trainer)
    assert_close(weights_of(trainer), by_hand)
    moved = torch.sqrt(sum(((weights_of(trainer)[name] - start[name]) ** 2).sum() for name in start))
    if clip < 1:
        assert float(moved) <= 0.1 * clip * len(groups) * (1 + apart_behind_layers(ROUNDINGS))


def test_averaged_weights_are_the_closed_form() -> None:
    decay = 0.8
    trainer = make_trainer(network="normalised_in_double", ema=decay, epochs=2)
    after_steps: list[dict[str, Tensor]] = []
    trainer.optimizer.register_step_post_hook(lambda *_: after_steps.append(weights_of(trainer)))
    last = epochs_of(trainer)[-1]
    steps = len(after_steps)
    assert steps == 8
    averaged = trainer.tested_model.state_dict()
    for name in ("0.weight", "1.weight", "1.running_mean", "4.bias"):
        # The first step's weights are taken as they are.
        expected = decay ** (steps - 1) * after_steps[0][name]
        for step in range(2, steps + 1):
            expected = expected + (1 - decay) * decay ** (steps - step) * after_steps[step - 1][name]
        # Eight products, rounded three times each, of weights below 2; the shares add up to 1.
        torch.testing.assert_close(averaged[name], expected, atol=apart(24, magnitude=2), rtol=0)
        assert not torch.equal(averaged[name], weights_of(trainer)[name])
    trainer.tested_model.eval()
    batches = list(trainer.loaders.test)
    hits = sum(int((trainer.tested_model(x).argmax(1) == y).sum()) for x, y in batches)
    assert last.metrics["test_top1"] == pytest.approx(100 * hits / 12)


def test_losses_are_means_over_all_images_and_smoothing_is_in_the_training_loss() -> None:
    smoothing = 0.2
    trainer = make_trainer(network="plain_in_double", optimizer={"name": "sgd", "lr": 0.0}, label_smoothing=smoothing)
    (record,) = epochs_of(trainer)
    trainer.loaders.start_epoch(1)
    batches = list(trainer.loaders.train)
    inputs, targets = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    logs = functional.log_softmax(trainer.model(inputs), 1).detach()
    truth = -logs.gather(1, targets[:, None]).mean()
    spread = -logs.mean()
    expected = float((1 - smoothing) * truth + smoothing * spread)
    assert record.metrics["train_loss"] == pytest.approx(expected, rel=apart_behind_layers(ROUNDINGS))
    hits = float((trainer.model(inputs).argmax(1) == targets).double().mean())
    assert record.metrics["train_top1"] == pytest.approx(100 * hits)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_follow_fp32(precision: str) -> None:
    full, lower = make_trainer(epochs=2), make_trainer(epochs=2, precision=precision, clip_grad_norm=10.0)
    assert lower.step.scaler.is_enabled() == (precision == "fp16")
    full_records, records = epochs_of(full), epochs_of(lower)
    # bfloat16, the coarser, rounds inputs, weights and outputs of two layers forward, and as many numbers backward.
    close = gamma(12, torch.bfloat16)
    assert records[-1].metrics["train_loss"] == pytest.approx(float(full_records[-1].metrics["train_loss"]), rel=close)
    assert all(tensor.dtype == torch.float32 for tensor in weights_of(lower).values())
    assert not torch.equal(weights_of(lower)["0.weight"], weights_of(full)["0.weight"])


def test_a_step_that_fp16_skips_holds_frozen_rows_and_goes_on() -> None:
    trainer = make_trainer(precision="fp16", epochs=1)
    trainer.step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    start = weights_of(trainer)
    epochs_of(trainer)
    assert_close(weights_of(trainer), start, steps=0)
    assert trainer.step.scaler.get_scale() == 2.0**56


@pytest.mark.parametrize("network", ["plain_in_double", "normalised_in_double"])
def test_channels_last_changes_the_layout_only(network: str) -> None:
    plain, other = make_trainer(network=network), make_trainer(network=network, channels_last=True)
    weight = other.model.get_parameter("0.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    epochs_of(plain)
    epochs_of(other)
    assert_close(weights_of(plain), weights_of(other))


STOCHASTIC = {"kind": "stochastic", "p": 0.5}


@pytest.mark.parametrize("policy", [STOCHASTIC, {"kind": "neq", "epsilon": 0.05}], ids=["stochastic", "neq"])
def test_the_same_seed_gives_the_same_bits(policy: dict[str, Any]) -> None:
    def run(seed: int) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        torch.rand(seed + 5)  # what was drawn before must not matter
        trainer = make_trainer(
            network="normalised_network", seed=seed, epochs=3, policy=policy, deterministic=True, ema=0.9
        )
        records = epochs_of(trainer)
        kept = [{key: v for key, v in record.metrics.items() if key not in TIMINGS} for record in records]
        return weights_of(trainer), kept

    weights, metrics = run(1)
    same_weights, same_metrics = run(1)
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)
    assert metrics == same_metrics
    other_weights, other_metrics = run(2)
    assert not torch.equal(weights["0.weight"], other_weights["0.weight"])
    assert metrics != other_metrics


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "the loss is not a finite number any more; try a lower optimizer.lr or clip_grad_norm"),
        ({"clip_grad_norm": 1e30}, "the loss is not a finite number any more; try a lower optimizer.lr"),
        (
            {"precision": "bf16"},
            "the loss is not a finite number any more; try a lower optimizer.lr or clip_grad_norm or precision=fp32",
        ),
    ],
)
def test_of_what_may_help_against_a_loss_that_is_not_finite_only_what_is_not_done_yet(
    changes: dict[str, Any], said: str
) -> None:
    trainer = make_trainer(epochs=2, optimizer={"name": "sgd", "lr": 1e38}, **changes)
    with pytest.raises(TrainingError) as raised:
        list(trainer.run())
    assert str(raised.value).endswith(said)


def test_no_learning_rate_is_to_blame_before_the_first_update() -> None:
    trainer = make_trainer(epochs=2)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError) as raised:
        list(trainer.run())
    assert str(raised.value) == (
        "epoch 1, step 1: the loss is not a finite number; no update came before it: look at the images (data.mean, "
        "data.std) and at the model's weights"
    )


def test_a_loss_that_is_not_finite_names_epoch_and_step() -> None:
    # The first epoch ends well; the second one's first step makes the weights huge, its second loss shows it.
    trainer = make_trainer(epochs=3, scheduler={"name": "multistep", "milestones": [1], "gamma": 1e38})
    records = trainer.run()
    seen: list[int] = []
    with pytest.raises(TrainingError) as raised:
        seen.extend(record.epoch for record in records if isinstance(record, EpochRecord))
    assert str(raised.value).startswith("epoch 2, step 2: the loss is not a finite number")
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 1
    assert trainer.epoch == 1


def test_a_loss_that_only_the_test_set_makes_infinite_is_a_measurement() -> None:
    trainer = make_trainer(optimizer={"name": "sgd", "lr": 1e38}, batch_size=32)
    (record,) = epochs_of(trainer)  # one step: the training loss was taken before it
    assert not torch.isfinite(torch.tensor(float(record.metrics["test_loss"])))


def slowed(trainer: Trainer, seconds: float) -> Trainer:
    """A trainer whose steps take so long."""
    train = trainer.step.train

    def slow(*given: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return train(*given, **options)

    trainer.step.train = slow  # type: ignore[method-assign]
    return trainer


def test_an_epoch_shorter_than_what_lies_between_two_reports_tells_how_far_it_is_all_the_same() -> None:
    # 32 steps of 5 ms at least. How long an epoch is, the first one tells.
    records = list(slowed(make_trainer(epochs=3, batch_size=1), 0.005).run())
    within = {2: set(), 3: set()}  # type: dict[int, set[int]]
    for record in records:
        if isinstance(record, StepProgress) and record.phase == "train" and 0 < record.step < 32 and record.epoch > 1:
            within[record.epoch].add(record.step)
            assert record.images_per_second > 0
    assert all(3 <= len(steps) <= 16 for steps in within.values()), within


def test_where_it_stops_is_told_before_it_is_saved() -> None:
    trainer = make_trainer(epochs=3)
    trainer.wish = lambda: STOP if trainer.updates == 2 else GO_ON
    records = []
    for record in trainer.run():
        records.append(record)
        if isinstance(record, Pause):
            break
    told, pause = records[-2:]
    assert isinstance(told, StepProgress)
    assert isinstance(pause, Pause)
    assert (told.epoch, told.step, told.steps) == (pause.epoch, pause.step, 4) == (1, 2, 4)


def test_epochs_between_tests_have_no_test_metrics() -> None:
    records = epochs_of(make_trainer(epochs=5, eval_every=2))
    tested = [record.epoch for record in records if record.metrics["test_top1"] == record.metrics["test_top1"]]
    assert tested == [2, 4, 5]
    assert all(record.metrics["train_loss"] == record.metrics["train_loss"] for record in records)


def test_the_learning_rate_is_the_one_an_epoch_started_with() -> None:
    records = epochs_of(make_trainer(epochs=5, scheduler={"name": "multistep", "milestones": [2, 4], "gamma": 0.5}))
    assert [record.metrics["lr"] for record in records] == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])


def test_columns_of_an_epoch_tell_the_sets_in_force_during_it() -> None:
    records = epochs_of(make_trainer(epochs=3, policy=STOCHASTIC))
    # Paper, one sample: the convolution 2 x 9 x 16 x 4 multiply-adds, the linear layer 2 x 64 x 3.
    convolution, linear = 2 * 9 * 16 * 4, 2 * 64 * 3
    frozen = [0, 2, 2]  # int(0.5 * 4) of the convolution; the output layer never
    for record, count in zip(records, frozen, strict=True):
        assert record.metrics["neurons"] == 7
        assert record.metrics["frozen"] == count
        assert record.metrics["flops_paper_dense"] == convolution + linear
        assert record.metrics["flops_paper"] == convolution * (1 - count / 4) + linear
    for before, after in pairwise(records):
        for layer, later in zip(before.layers, after.layers, strict=True):
            assert (layer.trainable == later.trained).all()
    assert list(records[0].metrics)[:6] == ["epoch", "lr", "train_loss", "train_top1", "test_loss", "test_top1"]


def test_frozen_rows_do_not_move_during_their_epoch() -> None:
    trainer = make_trainer(
        epochs=3, policy=STOCHASTIC, optimizer={"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    )
    before = weights_of(trainer)
    for record in epochs_of_one_by_one(trainer):
        after = weights_of(trainer)
        trained = torch.from_numpy(record.layers[0].trained)
        for name in ("0.weight", "0.bias"):
            same = (
                (before[name] == after[name]).flatten(1).all(1)
                if after[name].dim() > 1
                else before[name] == after[name]
            )
            assert torch.equal(same, ~trained)
        before = after


def epochs_of_one_by_one(trainer: Trainer) -> Iterator[EpochRecord]:
    yield from (record for record in trainer.run() if isinstance(record, EpochRecord))


def test_probe_images_are_never_trained_on() -> None:
    trainer = make_trainer(epochs=2, policy=STOCHASTIC)
    trained_on: set[int] = set()
    observed: set[int] = set()

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (trained_on if module.training else observed).update((inputs[0][:, 0, 0, 0] * 100).round().int().tolist())

    trainer.model.register_forward_pre_hook(note)
    epochs_of(trainer)
    probe = {round(float(image[0, 0, 0]) * 100) for images, _ in trainer.loaders.probe for image in images}
    test = set(range(42, 54))
    assert len(probe) == 10
    assert trained_on == set(range(42)) - probe
    # The prober may call the network by other ways than through its hooks; whatever else it saw, it saw in eval mode.
    assert observed <= probe | test


def test_state_names_all_that_the_rest_of_a_run_depends_on() -> None:
    trainer = make_trainer(epochs=2, scheduler={"name": "cosine"}, precision="fp16", ema=0.9)
    epochs_of(trainer)
    state = trainer.state_dict()
    assert state["epoch"] == 2
    assert state["averaged"].keys() >= {"module.0.weight", "n_averaged"}
    for part in ("model", "optimizer", "scheduler", "scaler", "freezer", "processes"):
        assert state[part], part


class Merging(nn.Linear):
    """Adds a part to its weight in eval mode and takes it off again in training mode."""

    merged = False

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.part = nn.Parameter(torch.ones(outputs, inputs))

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if self.merged == mode:
            self.weight.data += self.part.data * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.weight if self.merged else self.weight + self.part, self.bias)


def merging_network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), Merging(16, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("ema", [None, 0.5])
def test_what_a_run_saves_is_what_trains(ema: float | None) -> None:
    trainer = make_trainer(network="merging_network", epochs=3, ema=ema)
    other = make_trainer(network="merging_network", epochs=3, ema=ema)
    records = trainer.run()
    for record in records:
        if isinstance(record, EpochRecord):
            models = [trainer.model, trainer.tested_model]
            assert not any(module.merged for model in models for module in model.modules() if hasattr(module, "merged"))
            if record.epoch == 1:
                other.load_state_dict(trainer.state_dict())
    assert [record.epoch for record in epochs_of(other)] == [2, 3]
    for name, tensor in weights_of(trainer).items():
        assert torch.equal(weights_of(other)[name], tensor), name


STILL = {"policy": {"kind": "neq", "epsilon": 1e9}, "epochs": 9}
"""All that may freeze is frozen from epoch 2 on."""


@pytest.mark.parametrize(
    ("changes", "last"),
    [
        ({}, 9),
        ({"stop_when_frozen": 1}, 2),
        ({"stop_when_frozen": 3}, 4),
        ({"stop_when_frozen": 3, "epochs": 3}, 3),
        # The rate falls for epoch 6: epochs 6 and 7 are the first two of the last rate.
        ({"stop_when_frozen": 2, "scheduler": {"name": "multistep", "milestones": [5]}}, 7),
        ({"stop_when_frozen": 2, "scheduler": {"name": "cosine"}}, 9),
        ({"stop_when_frozen": 2, "policy": {"kind": "baseline"}}, 9),
    ],
)
def test_a_run_ends_once_all_has_stood_still_for_long_enough(changes: dict[str, Any], last: int) -> None:
    trainer = make_trainer(**{**STILL, "eval_every": 5, **changes})
    epochs = epochs_of(trainer)
    assert [record.epoch for record in epochs] == list(range(1, last + 1))
    assert (trainer.passes < trainer.recipe.epochs) == (last < trainer.recipe.epochs)
    assert math.isfinite(epochs[-1].metrics["test_loss"]), "the last epoch is tested, whichever it is"
    assert all(math.isnan(record.metrics["test_loss"]) for record in epochs[:-1] if record.epoch % 5)


def test_what_has_stood_still_is_remembered() -> None:
    changes = {**STILL, "stop_when_frozen": 3}
    trainer = make_trainer(**changes)
    train_up_to(3, trainer)
    resumed = make_trainer(**changes)
    resumed.load_state_dict(trainer.state_dict())
    assert [record.epoch for record in epochs_of(resumed)] == [4]
    again = make_trainer(**changes)
    again.load_state_dict(resumed.state_dict())
    assert epochs_of(again) == []


@pytest.mark.parametrize(
    "policy",
    [
        {"kind": "neq", "epsilon": 0.3, "scope": "front", "share": 0.5, "thaw_at_lr_drop": 10},
        {"kind": "neq", "epsilon": 0.3, "scope": "front", "share": 0.5, "front_mode": "inference"},
        {"kind": "neq", "epsilon": 0.3, "scope": "layer", "share": 0.7},
        {"kind": "stochastic", "p": 0.5, "scope": "layer"},
        {"kind": "stochastic", "p": 0.5, "scope": "front"},
        {"kind": "front", "start": 0.2, "level": 1.0},
        {"kind": "budget", "flops": 0.5},
    ],
)
def test_every_policy_goes_on_to_the_bit(policy: dict[str, Any]) -> None:
    def rows(trainer: Trainer) -> list[str]:
        return [repr({k: v for k, v in one.metrics.items() if k not in TIMINGS}) for one in epochs_of(trainer)]

    changes = {
        "policy": policy,
        "network": "normalised_network",
        "epochs": 6,
        "deterministic": True,
        "scheduler": {"name": "multistep", "milestones": [3]},
    }
    whole = make_trainer(**changes)
    half = make_trainer(**changes)
    train_up_to(3, half)
    resumed = make_trainer(**changes)
    resumed.load_state_dict(half.state_dict())
    assert rows(resumed) == rows(whole)[3:]
    for name, weights in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], weights), name
    assert resumed.freezer.still == whole.freezer.still
    for name, trainable in whole.freezer.trainable.items():
        assert torch.equal(resumed.freezer.trainable[name], trainable)


class WithMore(Classification):
    def results(self, totals: Tensor) -> dict[str, float]:
        return {**super().results(totals), "wrong": 100 - super().results(totals)["top1"]}


def test_columns_are_the_same_whether_an_epoch_is_tested_or_not() -> None:
    session = prepare(make_recipe(epochs=2, eval_every=2, task=f"{__name__}:WithMore"), "more")
    records = [record for record in session.trainer.run() if isinstance(record, EpochRecord)]
    untested, tested = (record.metrics for record in records)
    assert list(untested) == list(tested)
    assert math.isnan(untested["test_wrong"])
    assert tested["test_wrong"] == pytest.approx(100 - tested["test_top1"])
