"""Frozen rows are written back after an optimiser's step, and so is their state, at once or when somebody looks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from neq_cli.freezing.rows.frozen_rows import FrozenRows, Writer
from neq_cli.freezing.rows.optimizers import row_state, state_of
from neq_cli.freezing.rows.shards import local


class WriteBack:
    """Holds frozen rows and their row-shaped state at what they were, by writing them back.

    ``state_later``: state is written when somebody looks, ``write_state``. That is for optimisers that treat each
    element by itself: what becomes of frozen rows' state meanwhile is of no meaning. ``discard_momentum``: state is not
    held; momentum is zeroed, and second moments decay.
    """

    def __init__(self, optimizers: Sequence[Optimizer], *, state_later: bool, discard_momentum: bool) -> None:
        self.optimizers = optimizers
        self.state_later = state_later
        self.discard_momentum = discard_momentum
        self.rows: list[FrozenRows] = []
        self._each_step = Writer()
        self._later = Writer()
        self._forms_seen: list[tuple[int, int]] = []

    @torch.no_grad()
    def hold(self, rows: Iterable[FrozenRows]) -> None:
        """Hold these rows, and no others any more, at what they and their state are now."""
        self.rows = list(rows)
        for one in self.rows:
            one.held = {}
        self._look()
        self._each_step.write()

    def release(self, rows: Collection[FrozenRows]) -> None:
        """Hold these no longer; their state is what it was held at."""
        self.write_state()
        self.rows = [one for one in self.rows if one not in rows]
        for one in rows:
            one.held = {}
        self._look()

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Write back what ``optimizer`` has changed."""
        if self.discard_momentum:
            self._decay_second_moments(optimizer)
        if self._forms() != self._forms_seen if self.state_later else self._changed():
            self._look()
        self._each_step.write()

    @torch.no_grad()
    def write_state(self) -> None:
        """Write back what was put off."""
        if self._changed():
            self._look()
        self._later.write()

    def lose_state(self) -> None:
        """Forget what was put off: another state was loaded. ``hold`` must come next."""
        self.rows, self._later = [], Writer()

    def _forms(self) -> list[tuple[int, int]]:
        """Return for each parameter where its weights lie and how much state it has: quicker than ``_changed``."""
        state = self.optimizers[0].state
        return [(local(one.parameter).data_ptr(), len(state.get(one.parameter, ()))) for one in self.rows]

    def _changed(self) -> bool:
        return any(one.changed(state_of(self.optimizers, one.parameter)) for one in self.rows)

    @torch.no_grad()
    def _look(self) -> None:
        """Find what is to be written: after rows were frozen or loaded, and where state was born or replaced."""
        self._each_step, self._later = Writer(), Writer()
        self._forms_seen = self._forms()
        for one in self.rows:
            tensors = {"": one.parameter, **row_state(self.optimizers, one.parameter)}
            one.look(state_of(self.optimizers, one.parameter), tensors)
            for key, tensor in tensors.items():
                if key not in one.held:
                    one.held[key] = one.read(tensor)
                    if self.discard_momentum and key.split(" ")[0] in ("momentum_buffer", "exp_avg"):
                        one.held[key].zero_()
                (self._later if key and self.state_later else self._each_step).add(one, key, tensor)

    def _decay_second_moments(self, optimizer: Optimizer) -> None:
        alike = [number for number, one in enumerate(self.optimizers) if one.state is optimizer.state]
        if self.optimizers[alike[-1]] is not optimizer:
            return  # a wrapper, which has the very state of the one inside
        key = f"exp_avg_sq {alike[0]}" if alike[0] else "exp_avg_sq"
        held = {id(one.parameter): one.held[key] for one in self.rows if key in one.held}
        # Set by GradScaler while a fused optimiser steps: where it is not zero, the step is none.
        skipped: Tensor | None = getattr(optimizer, "found_inf", None)
        for group in optimizer.param_groups:
            moments = [held[id(parameter)] for parameter in group["params"] if id(parameter) in held]
            if "betas" in group and moments:
                decay = group["betas"][1]
                torch._foreach_mul_(moments, decay if skipped is None else torch.where(skipped > 0, 1.0, decay))
