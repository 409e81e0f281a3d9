"""Trainable rows that step alone, in parameters of the size where they do, beside steps with all rows."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from frozen import Sets
from rounding import apart, apart_after_steps
from states import whole_state
from torch import Tensor, nn, optim

from neq_cli import Freezer
from neq_cli.freezing.rows import keeper
from neq_cli.freezing.rows.handed_over import RowsGradient


class Some(Sets):
    """A policy that has the given share of every layer's neurons train, others in every epoch."""

    def __init__(self, share: float = 0.25) -> None:
        super().__init__({})
        self.share = share

    def choose(self, observations: Mapping[str, Any], epoch: int) -> Mapping[str, Tensor]:
        generator = torch.Generator().manual_seed(epoch)
        chosen = {}
        for name, seen in observations.items():
            count = len(seen.trainable)
            order = torch.randperm(count, generator=generator)
            chosen[name] = torch.zeros(count, dtype=torch.bool)
            chosen[name][order[: max(1, int(self.share * count))]] = True
        return chosen


class Net(nn.Module):
    """Large weights of every layout: rows along dimension 0, in channels_last too, and along dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(600, 256)
        self.conv = nn.Conv2d(64, 256, 3, stride=2)
        self.up = nn.ConvTranspose2d(256, 64, 3)
        self.hidden = nn.Linear(1600, 128)
        self.head = nn.Linear(128, 5)

    def forward(self, words: Tensor) -> Tensor:
        images = self.words(words).view(-1, 64, 8, 8)
        hidden = torch.tanh(self.up(torch.tanh(self.conv(images))))
        return self.head(torch.tanh(self.hidden(hidden.flatten(1))))


LARGE = ("words.weight", "conv.weight", "up.weight", "hidden.weight")
BY_DIMENSION_1 = ("words.weight", "up.weight")


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(600, (3, 16), generator=generator), torch.randint(5, (3,), generator=generator)


def loss_of(net: nn.Module, seed: int) -> Tensor:
    words, labels = batch(seed)
    return nn.functional.cross_entropy(net(words), labels)


Make = Callable[[Iterable[nn.Parameter]], optim.Optimizer]
KINDS: Mapping[str, Make] = {
    "SGD": lambda some: optim.SGD(some, lr=0.1, weight_decay=0.1),
    "SGD momentum": lambda some: optim.SGD(some, lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD fused": lambda some: optim.SGD(some, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "AdamW": lambda some: optim.AdamW(some, lr=1e-3),
    "AdamW foreach": lambda some: optim.AdamW(some, lr=1e-3, foreach=True, amsgrad=True),
    "AdamW fused": lambda some: optim.AdamW(some, lr=1e-3, fused=True),
    "RMSprop": lambda some: optim.RMSprop(some, lr=1e-4, momentum=0.9, centered=True),
    "Rprop": lambda some: optim.Rprop(some, lr=1e-3),
    "groups": lambda some: optim.AdamW([{"params": [one], "lr": 1e-3 * (n % 3 + 1)} for n, one in enumerate(some)]),
}
ADAMW = KINDS["AdamW"]


class Training:
    """A net that trains for some steps in each epoch; without rows that step alone, or gradients handed over, if so."""

    def __init__(self, make: Make = ADAMW, *, share: float = 0.25, channels_last: bool = False) -> None:
        torch.manual_seed(0)
        self.net = Net()
        if channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = make(self.net.parameters())
        self.freezer = Freezer(self.net, self.optimizer, [batch(99)[0]], Some(share))
        self.steps = 0
        self.before_step: Callable[[], object] = lambda: None

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss_of(self.net, self.steps).backward()
        self.before_step()
        self.optimizer.step()
        self.steps += 1

    def train(self, epochs: int, steps: int = 2) -> Training:
        for _ in range(epochs):
            for _ in range(steps):
                self.step()
            self.freezer.step()
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of all weights and whole states, by name."""
        found = {name: tensor.detach().clone() for name, tensor in self.net.state_dict().items()}
        names = {parameter: name for name, parameter in self.net.named_parameters()}
        for parameter, state in whole_state(self.optimizer).items():
            found |= {f"{names[parameter]} {key}": one.clone() for key, one in state.items() if isinstance(one, Tensor)}
        return found

    def frozen_bits(self) -> dict[str, Tensor]:
        """Return copies of the frozen rows of large weights, and of their state."""
        found = {}
        for name, tensor in self.tensors().items():
            parameter = name.split(" ")[0]
            if parameter in LARGE and tensor.dim() > 1:
                rows = ~self.freezer.trainable[parameter.removesuffix(".weight")]
                found[name] = tensor.transpose(0, 1)[rows] if parameter in BY_DIMENSION_1 else tensor[rows]
        return found


@pytest.fixture
def with_all_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what has every optimiser step with all rows from then on, and frozen ones written back."""

    def switch() -> None:
        monkeypatch.setattr(keeper, "steps_by_element", lambda optimizer: False)

    return switch


def assert_alike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], steps: int) -> None:
    assert found.keys() == expected.keys()
    for name, other in expected.items():
        most = apart_after_steps(steps, 64, torch.float32, float(other.abs().max()) + 1e-3)
        assert torch.allclose(found[name], other, rtol=0, atol=most), name


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_step_alone_train_as_those_that_step_with_all(
    kind: str, channels_last: bool, with_all_rows: Callable[[], None]
) -> None:
    ours = Training(KINDS[kind], channels_last=channels_last).train(1)
    start = ours.frozen_bits()
    assert set(ours.freezer.hold.keeper.stepping.rows) == {id(ours.net.get_parameter(name)) for name in LARGE}
    for _ in range(2):
        ours.step()
    for name, bits in ours.frozen_bits().items():
        assert torch.equal(bits, start[name]), name
    ours.train(2)
    with_all_rows()
    theirs = Training(KINDS[kind], channels_last=channels_last).train(1)
    assert not theirs.freezer.hold.keeper.stepping.rows
    for _ in range(2):
        theirs.step()
    theirs.train(2)
    # Rprop's steps go by the signs of gradients, and where one is all rounding it may go either way.
    if kind != "Rprop":
        assert_alike(ours.tensors(), theirs.tensors(), 8)


def test_the_state_is_that_of_the_trainable_rows_while_a_set_is_in_force() -> None:
    training = Training(share=0.125).train(1)
    for name in LARGE:
        parameter = training.net.get_parameter(name)
        assert training.optimizer.state[parameter]["exp_avg"].numel() * 8 == parameter.numel()
        assert whole_state(training.optimizer)[parameter]["exp_avg"].shape == parameter.shape
    training.step()
    assert all(one.shape == Net().get_parameter(name).shape for name, one in training.net.named_parameters())
    training.freezer.detach()
    for parameter, state in training.optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape
    assert "__getstate__" not in vars(training.optimizer)


def test_a_weight_of_which_many_rows_train_is_stepped_with_whole() -> None:
    assert not Training(share=0.7).train(1).freezer.hold.keeper.stepping.rows


@pytest.mark.parametrize("kind", ["SGD", "SGD momentum", "AdamW", "AdamW fused"])
def test_a_resumed_run_goes_on_to_the_bit(kind: str) -> None:
    """Saved in the middle of an epoch and at its end."""
    whole = Training(KINDS[kind]).train(2)
    whole.step()
    saved = [copy.deepcopy(one.state_dict()) for one in (whole.net, whole.optimizer, whole.freezer)]
    whole.step()
    whole.freezer.step()
    whole.train(1)
    resumed = Training(KINDS[kind])
    for one, state in zip((resumed.net, resumed.optimizer, resumed.freezer), saved, strict=True):
        one.load_state_dict(state)
    resumed.steps = 5
    resumed.step()
    resumed.freezer.step()
    resumed.train(1)
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name


def test_loading_in_the_middle_of_an_epoch() -> None:
    training = Training().train(1)
    training.step()
    at_first = copy.deepcopy(training.optimizer.state_dict())
    training.step()
    training.optimizer.load_state_dict(at_first)
    assert all(torch.equal(a, b) for a, b in zip(tensors_in(at_first), tensors_in(training.optimizer), strict=True))
    start = training.frozen_bits()
    training.step()
    training.net.load_state_dict({name: one + 1 for name, one in training.net.state_dict().items()})
    moved = training.frozen_bits()
    training.step()
    for name, bits in training.frozen_bits().items():
        assert torch.equal(bits, moved[name]), name
        assert torch.equal(bits, start[name] if " " in name else start[name] + 1), name


def tensors_in(state: Any) -> list[Tensor]:
    state = state if isinstance(state, dict) else state.state_dict()
    return [one for values in state["state"].values() for one in values.values() if isinstance(one, Tensor)]


def test_copies_and_pickles_of_the_optimiser_have_whole_state() -> None:
    training = Training().train(1)
    training.step()
    expected = tensors_in(training.optimizer)
    buffer = io.BytesIO()
    torch.save(training.optimizer, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(training.optimizer),
        pickle.loads(pickle.dumps(training.optimizer)),
        torch.load(buffer, weights_only=False),
    ):
        state = [one for values in other.state.values() for one in values.values()]
        assert all(torch.equal(a, b) for a, b in zip(state, expected, strict=True))
        for parameter in other.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(tensors_in(training.optimizer), expected, strict=True))


def test_a_closure_is_called_once_and_sees_whole_weights() -> None:
    training, calls = Training().train(1), []
    other = Training().train(1)

    def closure() -> Tensor:
        training.optimizer.zero_grad()
        loss = loss_of(training.net, training.steps)
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss

    assert torch.equal(training.optimizer.step(closure), loss_of(other.net, other.steps))
    training.optimizer.step(closure=closure)
    assert calls == [True, True]
    other.step()
    other.steps -= 1
    other.step()
    for name, tensor in other.tensors().items():
        assert torch.equal(tensor, training.tensors()[name]), name


@pytest.mark.parametrize("where", ["in the rows' step", "in the step", "in a hook"])
def test_a_step_that_fails_leaves_model_and_optimiser_whole(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(KINDS["groups"]).train(1)
    shapes = {name: one.shape for name, one in training.net.named_parameters()}
    groups = [len(group["params"]) for group in training.optimizer.param_groups]
    calls: list[int] = []

    def fail(*_: Any, **__: Any) -> None:
        calls.append(1)
        if where != "in the step" or len(calls) == 5:  # after those of four large weights
            raise KeyboardInterrupt

    if where == "in a hook":
        hook = training.optimizer.register_step_pre_hook(fail)
    else:
        monkeypatch.setattr(sys.modules["torch.optim.adam"], "adam", fail)  # what AdamW's step calls for each group
    with pytest.raises(KeyboardInterrupt):
        training.step()
    monkeypatch.undo()
    if where == "in a hook":
        hook.remove()
    assert {name: one.shape for name, one in training.net.named_parameters()} == shapes
    assert [len(group["params"]) for group in training.optimizer.param_groups] == groups
    start = training.frozen_bits()
    training.step()
    assert all(torch.equal(bits, start[name]) for name, bits in training.frozen_bits().items())


def test_a_parameter_group_that_joins_in_the_middle_of_an_epoch() -> None:
    training = Training().train(1)
    extra = nn.Parameter(torch.ones(4))
    training.optimizer.add_param_group({"params": [extra]})
    extra.grad = torch.ones(4)
    start = training.frozen_bits()
    training.step()
    assert all(torch.equal(bits, start[name]) for name, bits in training.frozen_bits().items())
    assert len(training.optimizer.param_groups) == 2


def test_averaged_weights_in_a_hook_of_the_user_are_whole() -> None:
    training = Training().train(1)
    averaged = optim.swa_utils.AveragedModel(training.net)
    training.optimizer.register_step_post_hook(lambda *_: averaged.update_parameters(training.net))
    training.step()
    for ours, theirs in zip(averaged.module.parameters(), training.net.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# Gradients that are handed over.


@pytest.fixture
def sliced(force: Callable[[str], None]) -> None:
    """Have no layer compute its gradients whole, as the timing may choose for layers as small as these."""
    force("sliced")


@pytest.fixture
def through_autograd(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what has all gradients come through autograd from then on, whole."""
    return lambda: monkeypatch.setattr(keeper, "hand_for", lambda *_: None)


def clip(training: Training) -> None:
    nn.utils.clip_grad_norm_(training.net.parameters(), 0.01)


def log(training: Training) -> None:
    for parameter in training.net.parameters():
        if parameter.grad is not None:
            repr(parameter.grad), float(parameter.grad.norm()), parameter.grad.data.numpy(), parameter.grad.tolist()


def change_in_place(training: Training) -> None:
    for parameter in training.net.parameters():
        if parameter.grad is not None:
            parameter.grad += 0.1 * parameter.detach()
            parameter.grad.mul_(2.0)


def unscale(training: Training) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    scaler.unscale_(training.optimizer)


def accumulate(training: Training) -> None:
    for seed in (50, 51):
        loss_of(training.net, seed).backward()


def accumulate_by_hand(training: Training) -> None:
    """A use of the weights beside the layers' own, and another pass through these."""
    (training.net.conv.weight.square().sum() + training.net.hidden.weight.square().sum()).backward()
    loss_of(training.net, 50).backward()


def replace(training: Training) -> None:
    for parameter in training.net.parameters():
        if parameter.grad is not None:
            parameter.grad = 3 * parameter.grad


def zero_in_place(training: Training) -> None:
    training.optimizer.zero_grad(set_to_none=False)
    loss_of(training.net, 50).backward()


def nothing(training: Training) -> None:
    pass


@pytest.mark.usefixtures("sliced")
@pytest.mark.parametrize(
    "between",
    [nothing, clip, log, change_in_place, unscale, accumulate, accumulate_by_hand, replace, zero_in_place],
    ids=lambda function: function.__name__,
)
def test_whatever_is_done_with_a_gradient_is_done_with_the_whole(
    between: Callable[[Training], None], through_autograd: Callable[[], None]
) -> None:
    def trained() -> Training:
        training = Training(KINDS["SGD momentum"]).train(1)
        training.before_step = lambda: between(training)
        return training.train(2)

    ours = trained()
    ours.optimizer.zero_grad()
    loss_of(ours.net, 0).backward()
    assert isinstance(ours.net.hidden.weight.grad, RowsGradient)
    ours.optimizer.zero_grad()
    through_autograd()
    theirs = trained()
    assert_alike(ours.tensors(), theirs.tensors(), 6)
    loss_of(theirs.net, 0).backward()
    assert not isinstance(theirs.net.hidden.weight.grad, RowsGradient)


@pytest.mark.usefixtures("sliced", "double")
def test_a_gradient_that_was_handed_over_looks_like_any_other(through_autograd: Callable[[], None]) -> None:
    training = Training().train(1)
    training.optimizer.zero_grad()
    loss_of(training.net, 0).backward()
    weight = training.net.hidden.weight
    found = weight.grad
    assert isinstance(found, RowsGradient)
    assert (found.shape, found.dtype, found.device) == (weight.shape, weight.dtype, weight.device)
    assert found.handed is not None  # a look at the form makes no whole
    through_autograd()
    training.optimizer.zero_grad()
    loss_of(training.net, 0).backward()
    expected = weight.grad
    assert torch.allclose(found, expected, rtol=0, atol=apart(2**14, magnitude=float(expected.abs().max())))
    assert not isinstance(found + 0, RowsGradient)
    assert not (found != 0)[~training.freezer.trainable["hidden"]].any()


@pytest.mark.usefixtures("sliced")
def test_hooks_of_the_user_see_the_whole_gradient_through_autograd() -> None:
    training = Training().train(1)
    seen: list[Tensor] = []
    weight = training.net.hidden.weight
    first = weight.register_hook(seen.append)
    training.step()
    first.remove()
    second = weight.register_post_accumulate_grad_hook(lambda one: seen.append(one.grad.clone()))
    training.step()
    second.remove()
    assert [one.shape for one in seen] == [weight.shape] * 2
    assert all(type(one) is Tensor and one[training.freezer.trainable["hidden"]].all(1).any() for one in seen)
    training.step()
    assert isinstance(weight.grad, RowsGradient)


@pytest.mark.usefixtures("sliced")
def test_autograd_grad_and_passes_that_are_recorded_get_theirs_through_autograd() -> None:
    training = Training().train(1)
    training.optimizer.zero_grad()
    weight = training.net.hidden.weight
    (gradient,) = torch.autograd.grad(loss_of(training.net, 0), [weight])
    assert gradient[training.freezer.trainable["hidden"]].any()
    assert weight.grad is None
    loss_of(training.net, 0).backward(inputs=[training.net.conv.weight])
    assert weight.grad is None
    assert isinstance(training.net.conv.weight.grad, RowsGradient)
    with training.freezer.suspended():
        training.optimizer.zero_grad()
        loss_of(training.net, 0).backward()
        assert not isinstance(weight.grad, RowsGradient)
        assert weight.grad[~training.freezer.trainable["hidden"]].any()
        start = training.frozen_bits()
        training.optimizer.step()
    assert all(torch.equal(bits, start[name]) for name, bits in training.frozen_bits().items())


@pytest.mark.usefixtures("sliced")
def test_under_autocast_rows_are_handed_over_in_the_type_of_the_weight() -> None:
    training = Training().train(1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(training.net, 0)
    training.optimizer.zero_grad()
    loss.backward()
    gradient = training.net.hidden.weight.grad
    assert isinstance(gradient, RowsGradient)
    assert gradient.handed is not None
    assert gradient.handed.dtype == torch.float32
    training.optimizer.step()


def test_a_step_that_is_compiled_steps_with_these_rows_too() -> None:
    found = []
    for compiled in (False, True):
        training = Training().train(1)
        step = training.optimizer.step
        if compiled:
            step = torch.compile(step, backend="eager")
        start = training.frozen_bits()
        for seed in range(2):
            training.optimizer.zero_grad()
            loss_of(training.net, seed).backward()
            step()
        for name, bits in training.frozen_bits().items():
            assert torch.equal(bits, start[name]), name
        found.append(training.tensors())
    assert_alike(found[1], found[0], 2)
