"""Losses and weights that are not finite numbers end a run, and the message names the step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from neq_cli.errors import TrainingError
from neq_cli.freezing.rows.shards import local
from neq_cli.recipe import Recipe
from neq_cli.training.errors import divergence_mend

_NONE = 2**53  # in place of the number of a step, greater than any


class FiniteLosses:
    """Remembers the first step of ``epoch`` whose loss was not finite; the device is waited for in ``check`` alone."""

    def __init__(self, recipe: Recipe, epoch: int, device: torch.device) -> None:
        self.recipe = recipe
        self.epoch = epoch
        self._first_bad = torch.full((), _NONE, device=device)

    def add(self, loss: Tensor, step: int) -> None:
        """Take note of the loss of a step, a scalar."""
        self._first_bad = torch.where(torch.isfinite(loss), self._first_bad, self._first_bad.clamp(max=step))

    def check(self) -> None:
        """Raise TrainingError where a loss was not finite."""
        step = int(self._first_bad.item())
        if step < _NONE:
            unchanged = self.epoch == 1 and step <= self.recipe.gradient_accumulation
            what = "the loss is not a finite number" + ("" if unchanged else " any more")
            place = f"{self.recipe.unit} {self.epoch}, step {step}"
            raise TrainingError(f"{place}: {what}; {divergence_mend(self.recipe, unchanged)}")


def check_weights(recipe: Recipe, model: nn.Module, epoch: int, step: int, largest: Callable[[int], int] = int) -> None:
    """Look at what is about to be saved or tested: a loss shows only what the update before it did.

    ``largest`` tells the largest of all processes' numbers, where each looks at a part of the weights.
    """
    sound = torch.stack([local(parameter.detach()).isfinite().all() for parameter in model.parameters()]).all()
    if largest(not bool(sound)):
        place = f"{recipe.unit} {epoch}, step {step}"
        raise TrainingError(f"{place}: the weights are not finite numbers any more; {divergence_mend(recipe)}")
