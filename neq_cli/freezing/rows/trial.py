"""An experiment tells whether an optimiser works row by row: a copy of it acts on small copies of its parameters.

Gradients are given, whatever the weights: an optimiser that asks for them at another point, as SAM does, is judged by
what it does with them. What first happens after a dozen steps, or to weights that are larger still, is not seen.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neq_cli.freezing.model.layouts import RowLayout
from neq_cli.freezing.rows.shards import whole

# Enough for what begins after some steps: RAdam's rectification (6), Lookahead's slow weights (6), SOAP's bases (10).
_STEPS = 12
# No side of the copies is longer: the first two, and the others. Adafactor's kin factor sides of 16 and more.
_LEADING, _OTHER = 24, 3


def updates_row_by_row(
    optimizers: Sequence[Optimizer], layouts: Mapping[int, RowLayout]
) -> tuple[bool, list[Optimizer]]:
    """Return whether an optimiser's update of a row is the same whatever becomes of the others, and the copy tried.

    ``optimizers``: itself and those that it wraps. ``layouts``: of the parameters with neurons, by identity. Some rows
    get the same gradients in every trial; the others get gradients as large, none, or larger ones of other signs.
    """
    try:
        plain, copied = _trial(optimizers, layouts, "plain", closure=False)
        closure = False
    except Exception:
        plain, copied = _trial(optimizers, layouts, "plain", closure=True)
        closure = True
    others = [_trial(optimizers, layouts, treatment, closure=closure)[0] for treatment in ("held", "loud")]
    return all(_same_bits(a, b) for other in others for a, b in zip(plain, other, strict=True)), copied


def _trial(
    optimizers: Sequence[Optimizer], layouts: Mapping[int, RowLayout], others: str, *, closure: bool
) -> tuple[list[Tensor], list[Optimizer]]:
    """Return what ``_STEPS`` steps made of the elements that train, by parameter, and the copies that took them.

    ``others``: what becomes of the other rows. ``plain``: they train as well. ``held``: they get zeros and are put back
    after each step, as frozen rows are. ``loud``: their gradients are large.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = list({id(one): one for group in groups for one in group["params"]}.values())
    devices = list({one.device for one in parameters if one.device.type == "cuda"})
    # The same draws in every trial, where the optimiser adds noise; the caller's random numbers stay as they are.
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        twins = {id(one): _twin(one) for one in parameters}
        trains = [_which_train(twins[id(one)], layouts.get(id(one))) for one in parameters]
        starts = [twins[id(one)].detach().clone() for one in parameters]
        copies = _copied(optimizers, twins)
        for _ in range(_STEPS):
            gradients = []
            for start, mask in zip(starts, trains, strict=True):
                # Drawn in every trial, so that what comes after is the same.
                own, factor = torch.randn_like(start), 50 * torch.randn_like(start)
                scale = {"held": mask, "loud": factor.masked_fill(mask, 1)}.get(others, torch.ones_like(mask))
                gradients.append(own * scale)
            _step(copies[0], list(twins.values()), gradients, closure)
            if others == "held":
                with torch.no_grad():
                    for twin, start, mask in zip(twins.values(), starts, trains, strict=True):
                        twin.copy_(torch.where(mask, twin, start))
    return [twin.detach()[mask] for twin, mask in zip(twins.values(), trains, strict=True)], copies


def _step(optimizer: Optimizer, twins: Sequence[nn.Parameter], gradients: Sequence[Tensor], closure: bool) -> None:
    def evaluate() -> Any:
        for twin, gradient in zip(twins, gradients, strict=True):
            twin.grad = gradient.clone()
        return torch.zeros(())

    evaluate()
    if closure:
        optimizer.step(evaluate)
    else:
        optimizer.step()


def _twin(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.randn_like(_cut(parameter)))


def _cut(tensor: Tensor) -> Tensor:
    """Return a copy of a corner of ``tensor``: the same one of all tensors of its shape, so that they fit together."""
    sides = (_LEADING, _LEADING, *[_OTHER] * tensor.dim())[: tensor.dim()]
    return whole(tensor.detach())[tuple(slice(side) for side in sides)].clone()


def _which_train(twin: Tensor, layout: RowLayout | None) -> Tensor:
    """Return which elements of ``twin`` train in the trial: every third row; all where no row is a neuron's."""
    mask = torch.ones_like(twin, dtype=torch.bool)
    if layout is not None:
        layout = RowLayout(layout.kind)  # the corner of a grouped weight has rows along dimension 1 all the same
        others = [row for row in range(layout.count(mask)) if row % 3]
        rows = torch.tensor(others, dtype=torch.int64, device=mask.device)
        layout.view(mask)[layout.index(mask, rows)] = False
    return mask


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _copied(optimizers: Sequence[Optimizer], twins: Mapping[int, nn.Parameter]) -> list[Optimizer]:
    """Return deep copies whose parameters are ``twins`` and whose other tensors are cut alike; without any hook.

    ``copy.deepcopy`` alone leaves out an optimiser's own attributes, and would copy every tensor whole.
    """
    memo: dict[int, Any] = dict(twins)
    copies = [object.__new__(type(optimizer)) for optimizer in optimizers]
    memo.update({id(one): new for one, new in zip(optimizers, copies, strict=True)})
    for optimizer in optimizers:
        for tensor in _tensors_in(vars(optimizer).values(), 4):
            if id(tensor) not in memo:
                memo[id(tensor)] = _cut(tensor)
    for optimizer, new in zip(optimizers, copies, strict=True):
        vars(new).update({f"_optimizer_step_{when}_hooks": OrderedDict() for when in ("pre", "post")})
        for key, value in vars(optimizer).items():
            of_hooks = key.startswith("_optimizer_") and key.endswith("_hooks")
            if not of_hooks and not (callable(value) and hasattr(type(optimizer), key)):
                # A method put over the class's, as a learning rate's scheduler does with `step`, acts on the original.
                vars(new)[key] = copy.deepcopy(value, memo)
    for new in copies:
        for group in new.param_groups:
            if "lr" in group:  # which may be zero at the start of a warm-up: nothing would move
                group["lr"] = torch.full_like(group["lr"], 0.01) if isinstance(group["lr"], Tensor) else 0.01
    return copies


def _tensors_in(values: Iterable[Any], depth: int) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif depth and isinstance(value, (list, tuple, set, dict)):
            yield from _tensors_in([*value, *value.values()] if isinstance(value, dict) else value, depth - 1)
