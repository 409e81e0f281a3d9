"""What the bench compares: frozen sets by share and order, put in force without a policy or a probe."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import cast

import torch
from torch import Tensor

from neq_cli.freezing import Freezer, NEq
from neq_cli.freezing.anatomy import Anatomy
from neq_cli.freezing.backward.dispatch import Dispatch
from neq_cli.freezing.backward.sliced import BackwardMode, KernelUse
from neq_cli.freezing.model.layers import everything
from neq_cli.freezing.rows.optimizers import first_after_step
from neq_cli.freezing.yardsticks import frozen_count
from neq_cli.recipe import NEqPolicy
from neq_cli.training.bench.options import BenchOptions
from neq_cli.training.bench.timed_step import TimedStep

_FIRST_STEPS = 2  # the optimiser's state is born in the first

Sets = dict[str, Tensor]
"""Which neurons train, by layer: bool, [neurons], on the CPU."""


@dataclass(frozen=True, eq=False)
class Arm:
    """Frozen sets and a backward mode; ``orders`` are all those that come to these sets."""

    mode: BackwardMode
    fraction: float
    orders: tuple[str, ...]
    trainable: Sets

    @property
    def label(self) -> str:
        """The arm in words: "exact random 0.5"."""
        return f"{self.mode} {' and '.join(self.orders)} {self.fraction:g}"


def make_arms(anatomy: Anatomy, options: BenchOptions, seed: int) -> list[Arm]:
    """Return what ``options`` ask for; orders that come to the same sets, as where nothing is frozen, are one arm."""
    arms: list[Arm] = []
    for mode, order, fraction in product(options.modes, options.orders, options.fractions):
        sets = _SETS[order](anatomy, fraction, seed)
        alike = [arm for arm in arms if (arm.mode, arm.fraction) == (mode, fraction) and _equal(arm.trainable, sets)]
        if alike:
            arms[arms.index(alike[0])] = replace(alike[0], orders=(*alike[0].orders, order))
        else:
            arms.append(Arm(cast(BackwardMode, mode), fraction, (order,), sets))
    return arms


def random_sets(anatomy: Anatomy, fraction: float, seed: int) -> Sets:
    """Freeze this share of every layer that may freeze, as ``Stochastic`` does; a larger share freezes those too."""
    generator = torch.Generator().manual_seed(seed)
    sets = everything(anatomy.neurons.layers)
    for name, trainable in sets.items():
        order = torch.randperm(len(trainable), generator=generator)
        if name not in anatomy.never_frozen:
            trainable[order[: frozen_count(fraction, len(trainable))]] = False
    return anatomy.neurons.tied(sets)


def front_sets(anatomy: Anatomy, fraction: float, seed: int) -> Sets:
    """Freeze this share of all neurons that may, layer after layer from the input; the last layer in part."""
    sets = everything(anatomy.neurons.layers)
    may_freeze = [trainable for name, trainable in sets.items() if name not in anatomy.never_frozen]
    left = frozen_count(fraction, sum(map(len, may_freeze)))
    for trainable in may_freeze:
        trainable[:left] = False
        left -= min(left, len(trainable))
    return anatomy.neurons.tied(sets)


_SETS: Mapping[str, Callable[[Anatomy, float, int], Sets]] = {"random": random_sets, "front": front_sets}


def _equal(sets: Sets, others: Sets) -> bool:
    return all(torch.equal(trainable, others[name]) for name, trainable in sets.items())


class Rig:
    """A training step with the Freezer of one backward mode on it; ``mode`` None: plain PyTorch.

    The step's laps then tell row keeping and optimiser apart. ``resident`` is what it holds of a GPU's memory, in
    bytes, between its steps while nothing is frozen.
    """

    def __init__(
        self, device: torch.device, make_step: Callable[[], TimedStep], mode: BackwardMode | None, dispatch: Dispatch
    ) -> None:
        gc.collect()
        before = _allocated(device)
        self.step = make_step()
        self.mode = mode
        self.freezer = None if mode is None else self._attach(mode, dispatch)
        for _ in range(_FIRST_STEPS):
            self.step.run().read()
        self.resident = _allocated(device) - before

    def _attach(self, mode: BackwardMode, dispatch: Dispatch) -> Freezer:
        recipe, optimizer, lap = self.step.recipe, self.step.optimizer, self.step.lap
        optimizer.register_step_pre_hook(lambda *_: lap("optimizer"))
        freezer = Freezer(
            self.step.model,
            optimizer,
            [self.step.sample.batch],
            NEq(
                definition=recipe.policy.definition if isinstance(recipe.policy, NEqPolicy) else "paper", scope="front"
            ),
            backward=mode,
            dispatch=dispatch,
            compiled=recipe.compile,
            exclude=recipe.exclude,
            call=self.step.sample.call,
            sample=self.step.sample.batch,
        )
        optimizer.register_step_pre_hook(lambda *_: lap("row_keeping"))
        first_after_step(optimizer, lambda *_: lap("optimizer"))
        optimizer.register_step_post_hook(lambda *_: lap("row_keeping"))
        return freezer

    @contextmanager
    def in_force(self, arm: Arm | None) -> Iterator[None]:
        """Freeze what ``arm`` freezes, and thaw it again; None: for plain PyTorch, where nothing is to be done."""
        if self.freezer is None or arm is None:
            yield
            return
        _put_in_force(self.freezer, arm.trainable)
        try:
            yield
        finally:
            _put_in_force(self.freezer, {name: torch.ones_like(trains) for name, trains in arm.trainable.items()})


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _put_in_force(freezer: Freezer, sets: Sets) -> None:
    """Have ``freezer`` hold these sets, without a policy or a probe."""
    state = freezer.state_dict()
    for name, trainable in sets.items():
        state["layers"][name]["trainable"] = trainable
    freezer.load_state_dict(state)


def flops_ratio(freezer: Freezer) -> float:
    """Return forward and back-propagation of one sample as executed, over the same with nothing frozen."""
    flops = freezer.flops()
    return (flops.forward + flops.executed) / (flops.forward + flops.executed_dense)


def kernels(freezer: Freezer) -> dict[str, KernelUse]:
    """Return for every layer how its gradients were computed in the last step, and why."""
    used = freezer.kernels()
    return {
        name: used[name] if name in used else KernelUse("dense", layer.neurons, _why_stock(freezer, name))
        for name, layer in freezer.layers.items()
    }


def _why_stock(freezer: Freezer, name: str) -> str:
    if name in freezer.anatomy.never_frozen:
        return f"never frozen ({freezer.anatomy.never_frozen[name]})"
    return "all neurons train" if bool(freezer.trainable[name].all()) else "backward: dense computes everything"
