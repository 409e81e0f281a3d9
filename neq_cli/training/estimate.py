"""What one sample's back-propagation comes to under a recipe, without training, data or weights: `neq flops`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from neq_cli.errors import RecipeValueError
from neq_cli.freezing.anatomy import Anatomy, anatomy_of
from neq_cli.freezing.coverage import Coverage, coverage_of
from neq_cli.recipe import FrontPolicy, Recipe, StochasticPolicy
from neq_cli.training.data.catalogue import class_count
from neq_cli.training.models.build import build_on_meta
from neq_cli.training.models.outline import images_shape
from neq_cli.training.policies import chosen_share, match, mean_front_flops, mean_stochastic_flops


@dataclass(frozen=True)
class FlopsEstimate:
    """One sample's back-propagation in multiply-adds, averaged over the recipe's epochs; ``layers`` by layer, dense."""

    flops_paper: float
    flops_executed: float
    flops_paper_dense: float
    flops_executed_dense: float
    layers: Mapping[str, Mapping[str, Any]]
    notes: Sequence[str] = ()  # how near a matched p comes


def estimate_flops(recipe: Recipe, matched_flops: float | None = None) -> FlopsEstimate:
    """Count without training, data or weights: the model is built without numbers, on the meta device.

    A stochastic policy and a front by schedule are averaged over the epochs; the sets of any other policy are known
    only to training, so it counts as dense. Raises RecipeError where the data does not tell the size of its images.
    """
    model, shape, anatomy = _outline(recipe)
    dense = anatomy.flops(dict.fromkeys(anatomy.neurons.layers, 1.0))
    recipe, notes = match(recipe, model, (1, *shape), matched_flops)
    paper, executed = dense.paper, dense.executed
    policy, epochs, mode = recipe.policy, recipe.epochs, recipe.backward
    if isinstance(policy, StochasticPolicy):
        paper, executed = mean_stochastic_flops(anatomy, chosen_share(policy), epochs, mode, policy.scope)
    if isinstance(policy, FrontPolicy):
        paper, executed = mean_front_flops(anatomy, policy, epochs, mode)
    layers = {
        name: {
            "kind": layer.kind,
            "neurons": layer.neurons,
            "flops_paper": dense.layers[name].paper,
            "flops_executed": dense.layers[name].executed,
        }
        for name, layer in anatomy.neurons.layers.items()
    }
    return FlopsEstimate(paper, executed, dense.paper, dense.executed, layers, notes)


def estimate_coverage(recipe: Recipe) -> Coverage:
    """Return what share of the recipe's model are neurons, built as ``estimate_flops`` does."""
    model, _, anatomy = _outline(recipe)
    return coverage_of(anatomy, dict(model.named_parameters()))


def _outline(recipe: Recipe) -> tuple[nn.Module, tuple[int, ...], Anatomy]:
    """Return the recipe's model on the meta device, the shape of an image, and what a look at the model tells."""
    model = build_on_meta(recipe.model, class_count(recipe.data))
    shape = images_shape(recipe.data, model)
    if shape is None:
        raise RecipeValueError("data.image_size", "the images' size is not known without opening them; give it")
    return model, shape, anatomy_of(model, torch.zeros((1, *shape), device="meta"), exclude=recipe.exclude)
