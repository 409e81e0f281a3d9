"""In real architectures frozen rows keep every bit, and all others train as they do without neq."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from architectures.case import Case
from architectures.ownership import frozen_elements, owners
from architectures.table import (
    draw,
    each_case,
    freezer_of,
    halves,
    layers,
    loss_of,
    make,
    nothing,
    quietly,
    trained,
)
from torch import Tensor

pytestmark = [each_case, quietly]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda some: torch.optim.SGD(some, lr=0.01, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda some: torch.optim.AdamW(some, lr=0.01, weight_decay=0.1),
    "fused": lambda some: torch.optim.AdamW(some, lr=0.01, weight_decay=0.1, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_rows_keep_every_bit_and_all_others_move(case: Case, optimizer: str) -> None:
    plain, model, item = make(case), make(case), draw(case)
    loss_of(case, plain.train(), item).backward()
    used = {name for name, parameter in plain.named_parameters() if parameter.grad is not None}
    stepping = OPTIMIZERS[optimizer](trained(model))
    freezer = freezer_of(case, model, item, stepping)
    freezer.step()
    never, tied = freezer.anatomy.never_frozen, frozenset().union(*freezer.anatomy.neurons.ties)
    for name, trainable in freezer.trainable.items():
        if name in never:
            assert trainable.all(), name
        elif name not in tied:
            # What is not reached, as experts without tokens, trains.
            assert torch.equal(trainable, halves(name, len(trainable)) | freezer.dynamics[name].phi.isnan()), name
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moved = {name: torch.zeros(parameter.shape, dtype=torch.bool) for name, parameter in before.items()}
    model.train()
    for _ in range(2):
        stepping.zero_grad()
        loss_of(case, model, item).backward()
        stepping.step()
        for name, parameter in model.named_parameters():
            moved[name] |= parameter.detach() != before[name]
    frozen, owned_by = frozen_elements(freezer), owners(freezer)
    assert sum(int(elements.sum()) for elements in frozen.values())
    for name, changed in moved.items():
        assert not changed[frozen[name]].any(), name
        if name not in used:
            continue
        for layer, neuron in owned_by.get(name, []):
            # Weight decay moves every row that trains, whatever its gradient; two steps, since by chance a gradient may
            # just undo it, or momentum a step.
            there, moving = torch.zeros(2, freezer.layers[layer].neurons, dtype=torch.bool)
            there[neuron[neuron >= 0]] = True
            moving[neuron[changed & (neuron >= 0)]] = True
            assert moving[freezer.trainable[layer] & there].all(), (name, layer)
        if name not in owned_by:
            assert changed.any(), name


@pytest.mark.parametrize("chooses", [halves, layers, nothing])
def test_gradients_are_those_of_plain_pytorch(
    case: Case, chooses: Callable[[str, int], Tensor], force: Callable[[str], None]
) -> None:
    force("sliced")
    dtype = case.precision
    plain, model, item = make(case, dtype=dtype), make(case, dtype=dtype), draw(case, dtype=dtype)
    loss_of(case, plain.train(), item).backward()
    freezer = freezer_of(case, model, item, chooses=chooses)
    freezer.step()
    loss_of(case, model.train(), item).backward()
    frozen, dense = frozen_elements(freezer), {name: one.grad for name, one in plain.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in dense.values() if gradient is not None)
    for name, parameter in model.named_parameters():
        found, expected = parameter.grad, dense[name]
        if frozen[name].all() and frozen[name].numel():
            assert found is None, name
        elif found is None or expected is None:
            assert all(one is None or not one.any() for one in (found, expected)), name
        else:
            assert not found[frozen[name]].any(), name
            # Sums of up to 2^16 terms. What cancels, as a bias before a normalisation, is of its terms' size.
            bound = 2**16 * torch.finfo(dtype).eps * (float(expected.abs().max()) + 1e-3 * largest)
            assert float((found - expected)[~frozen[name]].abs().max()) <= bound, name
