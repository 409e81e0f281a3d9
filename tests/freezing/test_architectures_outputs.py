"""What modules of real architectures put out: phi is its cosine, and that of frozen neurons stands still."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from architectures.case import Case
from architectures.table import call, draw, each_case, freezer_of, loss_of, make, map_tensors, quietly, trained
from rounding import GROWTH, phi_apart
from torch import Tensor, nn

from neq_cli import Freezer

pytestmark = [each_case, quietly]


def test_phi_is_the_cosine_of_what_modules_put_out(case: Case) -> None:
    model, item = make(case, dtype=case.precision), draw(case, dtype=case.precision)
    freezer = freezer_of(case, model, item)
    before = outputs_of(case, model, item, freezer.layers)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(torch.randn_like(parameter) * parameter.abs().mean(), alpha=0.2)
    after = outputs_of(case, model, item, freezer.layers)
    freezer.step()
    # An expert that is a module gets other tokens from a router that has changed: nothing there can be compared.
    rerouted = {name for name, old in before.items() if name not in after or after[name].shape != old.shape}
    assert all(freezer.dynamics[name].phi.isnan().all() for name in rerouted)
    expected = {name: cosine(after[name], old) for name, old in before.items() if name not in rerouted}
    assert len(expected) >= len(freezer.layers) / 4
    single = case.precision == torch.float32
    # What cannot be computed in double precision is a few layers deep only.
    roundings, growth = (2**6, 2.0**4) if single else (2**12, GROWTH)
    apart = {name: phi_apart(roundings, old.shape[1], case.precision, growth) for name, old in before.items()}
    turned = [bool((phi < 1 - 10 * apart[name]).any()) for name, phi in expected.items()]
    assert sum(turned) > len(turned) / 2, "next to nothing has changed"
    for name, phi in expected.items():
        difference = float((freezer.dynamics[name].phi - phi).abs().max())
        assert difference <= apart[name], (name, difference)


def test_outputs_of_frozen_neurons_stand_still(case: Case) -> None:
    """For the same inputs, as long as nothing else but parameters changes."""
    model, item = make(case), draw(case)
    calls = calls_of(case, model, item)
    optimizer = torch.optim.SGD(trained(model), lr=0.01, weight_decay=0.1)
    freezer = freezer_of(case, model, item, optimizer)
    freezer.step()
    calls = {
        name: one
        for name, one in calls.items()
        if name in freezer.layers and not any(fnmatch.fnmatch(name, glob) for glob in case.coupled)
    }
    before = again(model, calls, freezer)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loss_of(case, model.train(), item).backward()
    optimizer.step()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])  # statistics that move whatever is frozen
    moved = total = 0
    for name, after in again(model, calls, freezer).items():
        still = (before[name] == after).all(1)
        trainable = freezer.trainable[name]
        assert still[~trainable].all(), name
        moved, total = moved + int((~still[trainable]).sum()), total + int(trainable.sum())
    assert moved >= total / 3, "next to nothing trains"


def calls_of(case: Case, model: nn.Module, item: Any) -> dict[str, tuple[Any, Any]]:
    """Return what every module that puts out one tensor is first called with in eval mode: positions and keywords."""
    seen: dict[str, tuple[Any, Any]] = {}
    inputs: dict[str, tuple[Any, Any]] = {}
    handles = []

    def before(name: str) -> Any:
        def hook(_: nn.Module, arguments: Any, keywords: Any) -> None:
            inputs[name] = copied((arguments, keywords))

        return hook

    def after(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                seen.setdefault(name, inputs[name])

        return hook

    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None or "parametrizations" in module._modules:
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name)))
    call(case, model.eval(), item)
    for handle in handles:
        handle.remove()
    return seen


def again(model: nn.Module, calls: Mapping[str, tuple[Any, Any]], freezer: Freezer) -> dict[str, Tensor]:
    """Return [neurons, everything else] of what modules put out in eval mode when they are called so."""
    model.eval()
    found = {}
    for name, one in calls.items():
        arguments, keywords = copied(one)
        module = model.get_submodule(name)
        with torch.no_grad():
            found[name] = by_neuron(module, freezer.layers[name], module(*arguments, **keywords))
    return found


def copied(inputs: Any) -> Any:
    return map_tensors(lambda tensor: tensor.detach().clone(), inputs)


def outputs_of(case: Case, model: nn.Module, item: Any, layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return by layer [neurons, everything else] of what modules put out in eval mode, of those that show it."""
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            for layer, shown in shown_by(name, module, output):
                if layer in layers:
                    seen.setdefault(layer, []).append(by_neuron(module, layers[layer], shown.detach().clone()))

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    call(case, model.eval(), item)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found, 1) for name, found in seen.items()}


def shown_by(name: str, module: nn.Module, output: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield layers and outputs that a module called ``name`` shows by its own; of recurrent ones the last layer's."""
    if isinstance(module, nn.RNNBase):
        last = f"{name}.{'hr_' if module.proj_size else ''}l{module.num_layers - 1}"
        for ending, part in zip(("", "_reverse"), output[0].chunk(1 + module.bidirectional, -1), strict=False):
            yield f"{last}{ending}", part
    elif isinstance(module, nn.LSTMCell):
        yield name, output[0]
    elif isinstance(output, Tensor):
        yield name, output


def by_neuron(module: nn.Module, layer: Any, output: Tensor) -> Tensor:
    """Return [neurons, everything else] of an output, by its module's class where that says which axis counts them."""
    axis = layer.axis
    if type(module).forward is nn.LayerNorm.forward:
        output, axis = output.flatten(-len(module.normalized_shape)), -1
    elif type(module).forward in (nn.Linear.forward, nn.Bilinear.forward, nn.Embedding.forward):
        axis = -1
    elif type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward, nn.BatchNorm2d.forward):
        axis = 1
    elif layer.axis_dimensions > 1:
        output, axis = output.flatten(axis), -1
    return output.movedim(axis, 0).flatten(1).double()


def cosine(new: Tensor, old: Tensor) -> Tensor:
    """Return Eq. 1 of each row; both zero: 1, one zero: 0."""
    lengths = new.norm(dim=1) * old.norm(dim=1)
    zero = (new == 0).all(1) & (old == 0).all(1)
    return torch.where(lengths > 0, (new * old).sum(1) / lengths.where(lengths > 0, 1), zero.double())
