"""How a run is divided: passes over the data into optimiser steps, and these into what each observation ends."""

from __future__ import annotations

from dataclasses import dataclass

from neq_cli.recipe import Recipe


@dataclass(frozen=True)
class Course:
    """A run's division. ``probe_every``: the optimiser steps between two observations; None: one ends every pass."""

    passes: int  # over the training data: the recipe's epochs
    updates: int  # optimiser steps of a pass, the last of which may be of fewer batches
    probe_every: int | None

    @classmethod
    def of(cls, recipe: Recipe, batches: int) -> Course:
        """Return how ``recipe`` divides a run whose passes have so many ``batches`` in each process."""
        every = None if recipe.probe_every == "epoch" else recipe.probe_every
        return cls(recipe.epochs, -(-batches // recipe.gradient_accumulation), every)

    @property
    def observations(self) -> int:
        """How many the run has. The last follows fewer steps where they do not come out even."""
        return self.begun_before(self.passes * self.updates)

    def begun_before(self, updates: int) -> int:
        """Return how many observations' steps have begun once so many optimiser steps are taken."""
        return -(-updates // (self.probe_every or self.updates))
