"""Transforms over layers with frozen neurons are those of the plain model, and so is all inside ``suspended()``."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from frozen import freeze
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from neq_cli import Freezer
from neq_cli.errors import FreezingError

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning"),
]

HALF, NONE = torch.arange(8) % 2 == 0, torch.zeros(8, dtype=torch.bool)


class Own(nn.Linear):
    """Computes its output its own way: it is dense, or frozen whole."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sin()


class Net(nn.Module):
    """One layer of each kind that changes class."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.second = nn.Conv2d(3, 8, 2), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.up, self.passed = nn.ConvTranspose2d(8, 8, 2), nn.Linear(8, 8)
        self.own, self.linear, self.head = Own(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.up(torch.tanh(self.second(torch.tanh(self.norm(self.conv(images))))))
        tokens = hidden.flatten(2).transpose(1, 2)
        tokens = tokens + nn.functional.linear(tokens, self.passed.weight, self.passed.bias)
        return self.head(torch.tanh(self.linear(self.own(tokens.mean(1)))))


SETS = {"conv": HALF, "norm": NONE, "second": NONE, "up": HALF, "passed": HALF, "own": NONE, "linear": HALF}
WHOLE = dict.fromkeys(SETS, NONE)


def images() -> Tensor:
    return torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(3))


def in_force(sets: Mapping[str, Tensor] = SETS, **options: Any) -> tuple[Net, Net, Freezer]:
    """Return a net with frozen sets, in eval mode as transforms want it, and a plain copy of it."""
    model = Net().eval()
    reference = copy.deepcopy(model)
    freezer = freeze(model, images(), sets, **options)
    assert sum(one is not other for one, other in zip(classes(model), classes(reference), strict=True)) == 7
    return model, reference, freezer


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(images()).sin().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def loss(model: nn.Module, parameters: Any, inputs: Tensor) -> Tensor:
    output: Tensor = functional_call(model, parameters, (inputs,))
    return output.sin().sum()


def own(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def per_sample(model: nn.Module) -> Any:
    one = grad(lambda parameters, sample: loss(model, parameters, sample[None]))
    return vmap(one, in_dims=(None, 0))(own(model), images())


def forward_mode(model: nn.Module) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(images(), images().cos()))).tangent


def batched_errors(model: nn.Module) -> Any:
    output = model(images())
    errors = torch.eye(output.numel()).view(-1, *output.shape)
    trainable = [p for name, p in model.named_parameters() if name.startswith("head")]
    return torch.autograd.grad(output, trainable, errors, is_grads_batched=True)


def batched_by_vmap(model: nn.Module) -> Any:
    output, weight = model(images()), model.head.weight
    errors = torch.eye(output.numel()).view(-1, *output.shape)
    return vmap(lambda error: torch.autograd.grad(output, weight, error, retain_graph=True)[0])(errors)


def exported(model: nn.Module) -> Any:
    program = torch.export.export(model, (images(),))
    assert "neq" not in str(program.graph)
    return program.module()(images())


def traced(model: nn.Module) -> Any:
    found = torch.jit.trace(model, (images(),), check_trace=False)
    assert "Python" not in str(found.graph)  # every operation is PyTorch's
    inputs = images().requires_grad_()
    return found(inputs), torch.autograd.grad(found(inputs).sum(), inputs)


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "grad": lambda model: grad(lambda parameters: loss(model, parameters, images()))(own(model)),
    "grad of parameters in place": lambda model: grad(lambda inputs: model(inputs).sin().sum())(images()),
    "per sample": per_sample,
    "vmap": lambda model: vmap(lambda sample: model(sample[None])[0])(images()),
    "jacrev": lambda model: jacrev(lambda parameters: functional_call(model, parameters, (images(),)))(own(model)),
    "jacfwd": lambda model: jacfwd(model)(images()),
    "jvp": lambda model: jvp(model, (images(),), (images().cos(),)),
    "vjp": lambda model: vjp(model, images())[1](torch.ones(3, 2)),
    "hessian": lambda model: hessian(lambda inputs: model(inputs).sin().sum())(images()[:1]),
    "forward mode": forward_mode,
    "batched errors": batched_errors,
    "batched by vmap": batched_by_vmap,
    "vectorised jacobian": lambda model: torch.autograd.functional.jacobian(model, images(), vectorize=True),
    "jacobian": lambda model: torch.autograd.functional.jacobian(model, images()),
    "trace": traced,
    "export": exported,
    "symbolic trace": lambda model: torch.fx.symbolic_trace(model)(images()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sets", ["some", "all"])
def test_transforms_are_those_of_the_plain_model(sets: str, way: str) -> None:
    model, reference, freezer = in_force(SETS if sets == "some" else WHOLE)
    expected = WAYS[way](reference)
    tolerance = {"rtol": 1e-11, "atol": 1e-12}  # sums of at most 300 terms, some layers deep
    torch.testing.assert_close(WAYS[way](model), expected, **tolerance)
    with freezer.suspended():
        torch.testing.assert_close(WAYS[way](model), expected, **tolerance)


def test_errors_of_a_batch_reach_the_trainable_rows(kernel: str) -> None:
    """``is_grads_batched`` with respect to a weight with frozen rows."""
    model, reference, _ = in_force()
    found = []
    for net in (model, reference):
        output = net(images())
        errors = torch.eye(output.numel()).view(-1, *output.shape)
        weights = [net.conv.weight, net.linear.weight, net.passed.bias]
        by_flag = torch.autograd.grad(output, weights, errors, is_grads_batched=True, retain_graph=True)
        by_vmap = vmap(lambda e: torch.autograd.grad(output, weights, e, retain_graph=True))(errors)  # noqa: B023
        found.append((*by_flag, *by_vmap))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one[:, HALF], other[:, HALF], rtol=1e-11, atol=1e-12)


def test_what_a_module_takes_is_what_it_took() -> None:
    model, reference, _ = in_force()
    for one, other in zip(model.modules(), reference.modules(), strict=True):
        found, expected = (list(inspect.signature(module.forward).parameters) for module in (one, other))
        assert found == expected


# Suspended.


def test_inside_everything_is_plain_and_afterwards_as_it_was(kernel: str, assert_gradients: Any) -> None:
    model, reference, freezer = in_force()
    stock, dense = classes(reference), gradients(reference)
    assert_gradients(freezer, gradients(model), dense)
    kernels, plans, flops = freezer.kernels(), dict(freezer.hold.slicing.plans), freezer.flops()
    changed, discarding = classes(model), freezer.hold.keeper.discarding
    with freezer.suspended() as nothing:
        assert nothing is None
        assert classes(model) == stock
        for name, gradient in gradients(model).items():
            assert torch.equal(gradient, dense[name]), name
        found = torch.autograd.grad(model(images()).sin().sum(), list(model.parameters()))
        assert all(torch.equal(one, dense[name]) for one, name in zip(found, dense, strict=True))
        assert freezer.kernels() == kernels
    assert classes(model) == changed
    assert freezer.hold.slicing.plans == plans
    assert freezer.kernels() == kernels
    assert freezer.flops() == flops
    assert freezer.hold.keeper.discarding is discarding
    assert_gradients(freezer, gradients(model), dense)


def test_may_be_nested_and_ends_with_an_error_too() -> None:
    model, reference, freezer = in_force()
    changed, stock = classes(model), classes(reference)
    with freezer.suspended():
        with pytest.raises(ZeroDivisionError), freezer.suspended():
            _ = 1 / int(classes(model) != stock)
        assert classes(model) == stock
        assert gradients(model)["second.weight"] is not None
    assert classes(model) == changed
    assert gradients(model)["second.weight"] is None


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_frozen_rows_are_held_whatever_gradients_they_have(kind: Any, decay: float) -> None:
    torch.manual_seed(5)
    model = Net()
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=decay, **options)
    freezer = freeze(model, images(), SETS, optimizer=optimizer)
    trainable = {**SETS, "head": torch.ones(2, dtype=torch.bool)}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for inside in (True, True, False, True):
        if inside:
            with freezer.suspended():
                assert gradients(model)["second.weight"].any()
                optimizer.step()
                states = {name: copy.deepcopy(optimizer.state[model.get_parameter(name)]) for name in before}
        else:
            gradients(model)
            optimizer.step()
    for name, parameter in model.named_parameters():
        layer = name.rpartition(".")[0]
        rows = parameter.detach().transpose(0, 1) if name == "up.weight" else parameter.detach()
        old = before[name].transpose(0, 1) if name == "up.weight" else before[name]
        mask = trainable[layer]
        assert torch.equal(rows[~mask], old[~mask]), name
        assert (rows[mask] != old[mask]).any() or not mask.any(), name
        assert bool(states[name]) == bool(mask.any())  # what is frozen whole was never updated


def test_a_step_inside_takes_force_afterwards(assert_gradients: Any) -> None:
    model, reference, freezer = in_force()
    stock, dense = classes(reference), gradients(reference)
    with freezer.suspended():
        freezer.policy.sets = {"linear": ~HALF}
        freezer.step()
        assert classes(model) == stock
        assert gradients(model)["linear.weight"][HALF].any()
    own_classes = [one is other for one, other in zip(classes(model), stock, strict=True)]
    assert [name for name, own in zip(dict(model.named_modules()), own_classes, strict=True) if not own] == ["linear"]
    assert_gradients(freezer, gradients(model), dense)
    with freezer.suspended():
        freezer.detach()
    assert classes(model) == stock
    assert all(torch.equal(gradient, dense[name]) for name, gradient in gradients(model).items())


@pytest.mark.parametrize("layer", SETS)
def test_scripting_names_the_way(layer: str) -> None:
    model = Net().eval()
    freezer = freeze(model, images(), {layer: SETS[layer]})
    with pytest.raises(FreezingError, match=r"^torch\.jit\.script: a \w+ .* `with freezer\.suspended\(\):`"):
        torch.jit.script(model)
    assert model(images()).shape == (3, 2)  # nothing has changed
    if layer not in ("own", "passed"):
        with freezer.suspended():
            del model.own  # its super() is not for scripts
            model.own = nn.Identity()
            scripted = torch.jit.script(model)
        torch.testing.assert_close(scripted(images()), model(images()))


def test_in_compiled_code(assert_gradients: Any) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    reference, inputs = copy.deepcopy(model), torch.randn(3, 4)
    compiled = torch.compile(model, backend="aot_eager")
    freezer = freeze(compiled, inputs, {"0": HALF, "2": NONE})
    found = torch.autograd.grad(reference(inputs).sum(), list(reference.parameters()))
    dense = dict(zip(own(reference), found, strict=True))
    for _ in range(2):
        with freezer.suspended():
            model.zero_grad()
            compiled(inputs).sum().backward()
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(parameter.grad, dense[name])
        model.zero_grad()
        compiled(inputs).sum().backward()
        assert_gradients(freezer, {name: p.grad for name, p in model.named_parameters()}, dense)
