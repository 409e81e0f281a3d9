"""What one sample's back-propagation comes to under a recipe, without training, data or weights: `neq flops`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from neq_cli.errors import NeqError, RecipeValueError
from neq_cli.freezing.anatomy import Anatomy
from neq_cli.freezing.coverage import Coverage, coverage_of
from neq_cli.recipe import FrontPolicy, Recipe, StochasticPolicy
from neq_cli.training.data.catalogue import class_count
from neq_cli.training.data.parts import Data, load_data
from neq_cli.training.loop.calling import probe_call
from neq_cli.training.loop.tasks import build_task
from neq_cli.training.machine.device import seed_everything
from neq_cli.training.models.build import build_model, build_on_meta, misfit
from neq_cli.training.models.outline import images_shape
from neq_cli.training.policies import chosen_share, match, mean_front_flops, mean_stochastic_flops
from neq_cli.training.sample import Sample, check_together


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
    """Count without training or weights: the model is built without numbers, on the meta device.

    Data is not opened either, but for a dataset of the user's own whose images have a size that only it knows, or that
    yields other things than images: it gives one sample, for which the model has its numbers. A stochastic policy and a
    front by schedule are averaged over the epochs; the sets of any other policy are known only to training, so it
    counts as dense. Raises RecipeError where the data does not tell the size of its images.
    """
    model, sample = outline(recipe)
    anatomy = look(recipe, model, sample)
    dense = anatomy.flops(dict.fromkeys(anatomy.neurons.layers, 1.0))
    recipe, notes = match(recipe, model, sample, matched_flops, recipe.epochs)
    paper, executed = dense.paper, dense.executed
    policy, epochs, mode = recipe.policy, recipe.epochs, recipe.backward
    if isinstance(policy, StochasticPolicy):
        paper, executed = mean_stochastic_flops(anatomy, chosen_share(policy), epochs, mode, policy.scope)
    if isinstance(policy, FrontPolicy):
        paper, executed = mean_front_flops(anatomy, policy, epochs, mode)
    if isinstance(policy, StochasticPolicy | FrontPolicy) and recipe.probe_every != "epoch":
        notes = [*notes, f"probe_every: {recipe.probe_every}: averaged as if it were epoch; only data tells its steps"]
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
    model, sample = outline(recipe)
    return coverage_of(look(recipe, model, sample), dict(model.named_parameters()))


def look(recipe: Recipe, model: nn.Module, sample: Sample) -> Anatomy:
    """Return what a look at ``model`` tells; NeqError, one line, where it does not take what the data has."""
    try:
        return sample.anatomy(model, recipe.exclude)
    except NeqError:
        raise
    except Exception as error:
        if sample.given:  # tried already: the mistake is another one
            raise
        raise misfit(model, recipe.data.name or "the data", sample.batch.shape[1:], error) from error


def outline(recipe: Recipe, data: Data | None = None) -> tuple[nn.Module, Sample]:
    """Return the recipe's model, on the meta device where it can be, and one sample of what it takes.

    ``data`` is the recipe's where it is open already. RecipeValueError where the recipe alone does not tell enough.
    """
    classes = class_count(recipe.data) if data is None else data.num_classes
    task = build_task(recipe.task, recipe.label_smoothing, classes) if recipe.task_is_own else None
    if (task is None or probe_call(task) is None) and (data is None or not data.as_it_is):
        model = build_on_meta(recipe.model, classes, recipe.task)
        shape = images_shape(recipe.data, model) if data is None else data.image_shape
        if shape is not None:
            return model, Sample(torch.zeros((1, *shape), device="meta"))
    if data is None and recipe.data.entrypoint is None:
        raise RecipeValueError("data.image_size", "the images' size is not known without opening them; give it")
    if data is None:
        data = load_data(recipe.data, recipe.seed, own_task=recipe.task_is_own)
    task = build_task(recipe.task, recipe.label_smoothing, data.num_classes)
    seed_everything(recipe.seed, deterministic=False)
    model = build_model(recipe.model, data.num_classes, recipe.task)
    return model, check_together(recipe, model, data, task)
