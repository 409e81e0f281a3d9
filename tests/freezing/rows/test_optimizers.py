from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from neq_cli import Freezer, Observation
from neq_cli.errors import FreezingError


class First:
    """Freezes neurons 0 and 2 of the first layer."""

    def choose(self, observations: Mapping[str, Observation], epoch: int) -> Mapping[str, Tensor]:
        return {"0": torch.tensor([False, True, False, True, True])}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Elementwise(optim.Optimizer):
    """Sign of a momentum: element by element."""

    def __init__(self, params: Any, lr: float = 0.01, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    momentum.mul_(group["beta"]).add_(parameter.grad)
                    parameter.sub_(group["lr"] * momentum.sign())


class Noise(Elementwise):
    """Adds noise to every step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(group["lr"] * torch.randn_like(parameter))


class LayerWise(optim.Optimizer):
    """Divides each weight's gradient by its norm."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad / parameter.grad.norm())


class Named(Elementwise):
    """Has a default that is no argument of its constructor, and arguments that are no defaults."""

    def __init__(self, params: Any, secret: str) -> None:
        optim.Optimizer.__init__(self, params, {"lr": 0.01, "beta": 0.9, "max_lr_snapshot": secret})


class Uncopyable(Elementwise):
    """Has something that no copy can be made of."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.lock = threading.Lock()


class Cautious(optim.Optimizer):
    """Leaves out of its update what points against the gradient, and makes up for it by the share left in."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    momentum.mul_(0.9).add_(parameter.grad)
                    agree = (momentum * parameter.grad > 0).to(parameter)
                    parameter.sub_(group["lr"] * momentum * agree / agree.mean().clamp_min(1e-3))


class MixesAtRank(LayerWise):
    """Divides by the norm what has as many dimensions as told; the rest it takes as it is."""

    def __init__(self, params: Any, dimensions: int, first_step: int = 1) -> None:
        super().__init__(params)
        self.dimensions, self.first_step, self.steps = dimensions, first_step, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mixes = parameter.dim() == self.dimensions and self.steps >= self.first_step
                    parameter.sub_(group["lr"] * parameter.grad / (parameter.grad.norm() if mixes else 1))


class ByOutput(LayerWise):
    """Divides each row along dimension 0 by its norm."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    norms = parameter.grad.flatten(1).norm(dim=1) if parameter.dim() > 1 else parameter.grad.abs()
                    parameter.sub_(group["lr"] * parameter.grad / norms.view(-1, *[1] * (parameter.dim() - 1)))


class SAM(optim.Optimizer):
    """Goes uphill first and takes the gradients there: two evaluations by closure, and another optimiser's step."""

    def __init__(self, params: Any, base: type[optim.Optimizer], rho: float = 0.05, **arguments: Any) -> None:
        super().__init__(params, {"rho": rho, **arguments})
        self.base_optimizer = base(self.param_groups, **arguments)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is not None, "a closure is needed"
        closure = torch.enable_grad()(closure)
        parameters = [one for group in self.param_groups for one in group["params"] if one.grad is not None]
        norm = torch.stack([one.grad.norm() for one in parameters]).norm()
        for one in parameters:
            self.state[one]["old"] = one.data.clone()
            one.add_(one.grad, alpha=float(self.param_groups[0]["rho"] / (norm + 1e-12)))
        closure()
        for one in parameters:
            one.data = self.state[one]["old"]
        self.base_optimizer.step()


class Lookahead(optim.Optimizer):
    """Goes back half of the way every third step; as such wrappers do, it leaves out the base class's constructor."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0
        self.param_groups, self.defaults = optimizer.param_groups, optimizer.defaults
        self.state: Any = collections.defaultdict(dict)
        self.zero_grad = optimizer.zero_grad  # type: ignore[method-assign]
        self.slow = [[one.detach().clone() for one in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.optimizer.step()
        self.steps += 1
        if self.steps % 3 == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=True):
                for one, behind in zip(group["params"], slow, strict=True):
                    behind.lerp_(one, 0.5)
                    one.copy_(behind)


class ScheduleFree(optim.Optimizer):
    """Averages what it steps to; the weights are the average to be evaluated, or a mixture to be trained."""

    def __init__(self, params: Any, lr: float = 0.05, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})

    @torch.no_grad()
    def _mode(self, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train:
                weight = 1 - group["beta"] if train else 1 - 1 / group["beta"]
                for one in group["params"]:
                    if "z" in self.state[one]:
                        one.lerp_(self.state[one]["z"], weight)
            group["train_mode"] = train

    def train(self) -> None:
        self._mode(True)

    def eval(self) -> None:
        self._mode(False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            for one in group["params"]:
                if one.grad is not None:
                    z = self.state[one].setdefault("z", one.detach().clone())
                    one.lerp_(z, 1 / group["k"]).sub_(one.grad, alpha=group["lr"] * (1 - group["beta"]))
                    z.sub_(one.grad, alpha=group["lr"])


class OddState(Elementwise):
    """Keeps something beside each weight that is neither a number nor of the weight's shape."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for parameter in self.state:
            self.state[parameter]["history"] = torch.zeros(2, *parameter.shape)


def freezer_with(kind: type[optim.Optimizer], **arguments: Any) -> Freezer:
    net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False))
    return Freezer(net, kind(net.parameters(), **arguments), [torch.randn(3, 4)], First())


def step(net: nn.Module, optimizer: optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "kind", [optim.LBFGS, optim.Adafactor, optim.SparseAdam, *([optim.Muon] if hasattr(optim, "Muon") else [])]
)
def test_torch_optimisers_that_mix_rows_are_refused_by_name(kind: type[optim.Optimizer]) -> None:
    with pytest.raises(
        FreezingError, match=rf"^optimizer: {kind.__name__} cannot freeze neurons \(.+\); use "
    ) as caught:
        freezer_with(kind, lr=0.1)
    assert "\n" not in str(caught.value)


def test_a_subclass_of_a_refused_one_is_refused() -> None:
    class Mine(optim.LBFGS):
        pass

    with pytest.raises(FreezingError, match=r"^optimizer: LBFGS cannot"):
        freezer_with(Mine)


def test_an_optimiser_of_ones_own_that_mixes_rows_is_refused_whatever_its_name() -> None:
    for name in ("LayerWise", "SGD", "Adam"):
        kind = type(name, (LayerWise,), {"__module__": "somebodys.optim"})
        with pytest.raises(FreezingError, match=rf"^optimizer: {name} mixes the rows of a weight, .*; use one that"):
            freezer_with(kind)


@pytest.mark.parametrize("kind", [Elementwise, Noise])
def test_an_optimiser_of_ones_own_that_works_by_element_is_taken(kind: type[optim.Optimizer]) -> None:
    freezer = freezer_with(kind)
    net, optimizer = freezer.model, freezer.optimizer
    step(net, optimizer)
    freezer.step()
    start = {"weight": net[0].weight.detach().clone(), "momentum": optimizer.state[net[0].weight]["momentum"].clone()}
    for _ in range(2):
        step(net, optimizer)
    for name, now in (("weight", net[0].weight), ("momentum", optimizer.state[net[0].weight]["momentum"])):
        assert [i for i in range(5) if torch.equal(now[i], start[name][i])] == [0, 2], name


def test_trying_an_optimiser_draws_no_random_numbers() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    optimizer = Noise(net.parameters())
    before = torch.get_rng_state()
    Freezer(net, optimizer, [torch.zeros(1, 4)])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stock_subclass_is_taken() -> None:
    class Mine(optim.SGD):
        pass

    assert freezer_with(Mine, lr=0.1, momentum=0.9).step()


def test_defaults_need_not_be_arguments_of_the_constructor() -> None:
    assert freezer_with(Named, secret="x").step()


def test_an_optimiser_that_cannot_be_tried_is_refused_unless_the_user_vouches_for_it() -> None:
    with pytest.raises(
        FreezingError, match=r"^optimizer: Uncopyable could not be tried .*; .* Freezer\(\.\.\., row_wise=True\)$"
    ) as caught:
        freezer_with(Uncopyable)
    assert "\n" not in str(caught.value)
    net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False))
    freezer = Freezer(net, Uncopyable(net.parameters()), [torch.randn(3, 4)], First(), row_wise=True)
    assert freezer.notes == ["optimizer: Uncopyable was not tried; the user vouches that it updates row by row"]
    assert freezer_with(optim.SGD, lr=0.1).notes == []
    with pytest.raises(FreezingError, match=r"^optimizer: LBFGS cannot"):
        Freezer(net, optim.LBFGS(net.parameters()), [torch.randn(3, 4)], row_wise=True)


class Images(nn.Module):
    """Has parameters of one, two and four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.head = nn.Conv2d(2, 6, 3), nn.ConvTranspose2d(6, 4, 2), nn.Linear(36, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(torch.tanh(self.conv(images)))).flatten(1))


def test_a_mixture_by_a_share_of_the_whole_tensor_is_found() -> None:
    with pytest.raises(FreezingError, match=r"^optimizer: Cautious mixes"):
        freezer_with(Cautious)


@pytest.mark.parametrize("first_step", [1, 2, 9])
@pytest.mark.parametrize("dimensions", [1, 2, 4])
def test_a_mixture_is_found_whatever_the_dimensions_and_when_it_begins(dimensions: int, first_step: int) -> None:
    net = Images()
    with pytest.raises(FreezingError, match=r"^optimizer: MixesAtRank mixes"):
        Freezer(net, MixesAtRank(net.parameters(), dimensions, first_step), [torch.randn(2, 2, 4, 4)])
    Freezer(net, MixesAtRank(net.parameters(), 3), [torch.randn(2, 2, 4, 4)])  # nothing here has three


def test_a_mixture_is_found_although_the_learning_rate_starts_at_zero_and_gradients_are_off() -> None:
    net = Images()
    optimizer = LayerWise(net.parameters())
    optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: epoch / 10)
    assert optimizer.param_groups[0]["lr"] == 0
    net.conv.requires_grad_(False)
    with pytest.raises(FreezingError, match=r"^optimizer: LayerWise mixes"):
        Freezer(net, optimizer, [torch.randn(2, 2, 4, 4)])


def test_rows_are_those_of_the_layer_along_whichever_dimension() -> None:
    def freezer_for(layer: str) -> Freezer:
        net = Images()
        optimizer = ByOutput([*getattr(net, layer).parameters(), *net.head.parameters()])
        return Freezer(net, optimizer, [torch.randn(2, 2, 4, 4)])

    assert freezer_for("conv").step()
    with pytest.raises(FreezingError, match=r"^optimizer: ByOutput mixes"):
        freezer_for("up")


@pytest.mark.parametrize("kind", [optim.SGD, Elementwise, Named])
def test_a_trial_leaves_optimiser_model_and_schedulers_alone(kind: Any) -> None:
    net = Images()
    optimizer = kind(net.parameters(), **({"secret": "x"} if kind is Named else {"lr": 0.1}))
    optim.lr_scheduler.StepLR(optimizer, 2)  # which puts a function over the optimiser's step
    step_of_images(net, optimizer)
    before = [one.detach().clone() for one in (*net.parameters(), *tensors_of(optimizer))]
    gradients = [one.grad.clone() for one in net.parameters()]
    Freezer(net, optimizer, [torch.randn(2, 2, 4, 4)])
    assert all(map(torch.equal, before, (*net.parameters(), *tensors_of(optimizer))))
    assert all(map(torch.equal, gradients, (one.grad for one in net.parameters())))


def step_of_images(net: nn.Module, optimizer: optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.randn(3, 2, 4, 4)).square().sum().backward()
    optimizer.step()


def tensors_of(optimizer: optim.Optimizer) -> list[Tensor]:
    return [one for state in optimizer.state.values() for one in state.values() if isinstance(one, Tensor)]


WRAPPERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "SAM": lambda params: SAM(params, optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "SAM AdamW": lambda params: SAM(params, optim.AdamW, lr=0.05, weight_decay=0.1),
    "Lookahead": lambda params: Lookahead(optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.1)),
    "Lookahead of ScheduleFree": lambda params: Lookahead(ScheduleFree(params)),
    "ScheduleFree": ScheduleFree,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_an_optimiser_around_another_holds_rows_and_the_state_of_both(name: str) -> None:
    net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False)).double()
    optimizer = WRAPPERS[name](net.parameters())
    freezer = Freezer(net, optimizer, [torch.randn(3, 4).double()], First())
    inner = getattr(optimizer, "base_optimizer", getattr(optimizer, "optimizer", optimizer))

    def one_step() -> None:
        inputs = torch.randn(3, 4).double()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = net(inputs).square().sum()
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)

    def rows() -> dict[str, Tensor]:
        state = inner.state[net[0].weight]
        found = {key: one for key, one in state.items() if isinstance(one, Tensor) and one.shape == (5, 4)}
        return {key: one.detach().clone() for key, one in {**found, "weight": net[0].weight}.items()}

    for _ in range(2):
        one_step()
    freezer.step()
    before = rows()
    for _ in range(7):  # so that Lookahead has gone back twice
        one_step()
        for key, now in rows().items():
            assert [i for i in range(5) if torch.equal(now[i], before[key][i])] == [0, 2], key
    freezer.detach()
    one_step()
    assert not torch.equal(rows()["weight"][0], before["weight"][0])


def test_lookahead_trains_the_other_rows_as_it_would_without_a_freezer() -> None:
    nets = [nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [Lookahead(optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)) for net in nets]
    freezer = Freezer(nets[0], optimizers[0], [torch.randn(3, 4)], First(), backward="dense")
    freezer.step()
    start = nets[1][0].weight.detach().clone()
    for _ in range(8):
        inputs = torch.randn(3, 4)
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            net(inputs).square().sum().backward()
            optimizer.step()
        with torch.no_grad():  # by hand
            nets[1][0].weight[[0, 2]] = start[[0, 2]]
    assert torch.equal(nets[0][0].weight, nets[1][0].weight)
    assert torch.equal(nets[0][2].weight, nets[1][2].weight)


def test_rows_frozen_while_a_schedule_free_optimiser_shows_its_average_do_not_drift() -> None:
    net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False)).double()
    optimizer = ScheduleFree(net.parameters())
    freezer = Freezer(net, optimizer, [torch.randn(3, 4).double()], First())
    shown, trained = [], []
    for _ in range(5):
        optimizer.train()
        for _ in range(3):
            step_double(net, optimizer)
        trained.append(net[0].weight[[0, 2]].detach().clone())
        optimizer.eval()
        shown.append(net[0].weight[[0, 2]].detach().clone())
        freezer.step()
    # Going to the average and back rounds; what is held while training, and so the average, then stays to the bit.
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=16 * torch.finfo(torch.float64).eps)
    torch.testing.assert_close(shown[-1], shown[0], rtol=0, atol=4 * 16 * torch.finfo(torch.float64).eps)


def step_double(net: nn.Module, optimizer: optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.randn(3, 4).double()).square().sum().backward()
    optimizer.step()


def test_what_is_no_optimiser_of_torch_is_refused_in_one_line() -> None:
    class Mine:
        def step(self) -> None: ...

    with pytest.raises(FreezingError, match=r"^optimizer: Mine is no torch\.optim\.Optimizer"):
        Freezer(nn.Linear(2, 2), Mine(), [torch.zeros(1, 2)])  # type: ignore[arg-type]


def test_what_accelerate_wraps_around_an_optimiser_is_taken_off() -> None:
    accelerate = pytest.importorskip("accelerate")
    net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False))
    plain = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    wrapped = accelerate.Accelerator(cpu=True).prepare(plain)
    assert type(wrapped).__name__ == "AcceleratedOptimizer"
    _check_held(net, wrapped, plain)


def test_what_lightning_wraps_around_an_optimiser_is_taken_off() -> None:
    lightning = pytest.importorskip("lightning.pytorch.core.optimizer")
    net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False))
    plain = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    freezer = Freezer(net, lightning.LightningOptimizer(plain), [torch.randn(3, 4)], First())
    assert freezer.optimizer is plain


def _check_held(net: nn.Sequential, wrapped: Any, plain: optim.Optimizer) -> None:
    freezer = Freezer(net, wrapped, [torch.randn(3, 4)], First())
    assert freezer.optimizer is plain
    step(net, wrapped)
    freezer.step()
    start = net[0].weight.detach().clone()
    step(net, wrapped)
    assert [i for i in range(5) if torch.equal(net[0].weight[i], start[i])] == [0, 2]


@pytest.mark.parametrize("name", ["lion", "adamw", "nadamw", "adopt", "lookahead_lion"])
def test_optimisers_of_timm_that_work_by_element_are_taken(name: str) -> None:
    timm = pytest.importorskip("timm.optim")
    net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False))
    optimizer = timm.create_optimizer_v2(net, opt=name, lr=0.01)
    freezer = Freezer(net, optimizer, [torch.randn(3, 4)], First())
    step(net, optimizer)
    freezer.step()
    start = net[0].weight.detach().clone()
    for _ in range(7):
        step(net, optimizer)
    assert [i for i in range(5) if torch.equal(net[0].weight[i], start[i])] == [0, 2]


@pytest.mark.parametrize("name", ["csgdw", "clion", "cadamw", "lamb", "adafactorbv", "novograd"])
def test_optimisers_of_timm_that_mix_rows_are_refused(name: str) -> None:
    timm = pytest.importorskip("timm.optim")
    net = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 2))
    with pytest.raises(FreezingError, match=r"^optimizer: \w+ mixes the rows"):
        Freezer(net, timm.create_optimizer_v2(net, opt=name, lr=0.01), [torch.randn(3, 20)])


def test_state_without_rows_is_refused_before_training() -> None:
    with pytest.raises(FreezingError, match=r"^optimizer: OddState's state 'history' has shape \[2, "):
        freezer_with(OddState)
