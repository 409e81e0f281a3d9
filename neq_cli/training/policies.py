"""From a recipe's policy section to a policy, and to what a run calls it; a share that matches another run is found."""

from __future__ import annotations

import warnings
from itertools import pairwise

import torch
from torch import nn

from neq_cli.errors import NeqError, RecipeValueError, one_line
from neq_cli.freezing import Baseline, NEq, Policy, Stochastic
from neq_cli.freezing.anatomy import Anatomy, anatomy_of
from neq_cli.freezing.backward.sliced import BackwardMode
from neq_cli.freezing.policies import frozen_count
from neq_cli.recipe import BaselinePolicy, NEqPolicy, PolicySection, Recipe, StochasticPolicy
from neq_cli.recipe.entrypoints import load_entrypoint


def build_policy(section: PolicySection, seed: int) -> Policy:
    """Return the policy that ``section`` names; random draws follow from ``seed``.

    ``p: match:RUN_DIR`` needs ``matched_p``, see ``matching_p``. Raises RecipeValueError for an entrypoint that fails
    or whose result is no policy.
    """
    if isinstance(section, BaselinePolicy):
        return Baseline()
    if isinstance(section, NEqPolicy):
        with warnings.catch_warnings():
            # Whoever loads the recipe says it, with the key's name.
            warnings.filterwarnings("ignore", message="mu=")
            return NEq(section.epsilon, section.mu, section.definition)
    if isinstance(section, StochasticPolicy):
        return Stochastic(chosen_share(section), seed)
    make = load_entrypoint(section.entrypoint, "policy.entrypoint")
    try:
        policy = make(**section.kwargs)
    except NeqError:
        raise
    except Exception as error:
        raise RecipeValueError(
            "policy.entrypoint", f"'{section.entrypoint}' cannot be made: {one_line(error)}"
        ) from error
    if not isinstance(policy, Policy):
        raise RecipeValueError(
            "policy.entrypoint",
            f"'{section.entrypoint}' returned a {type(policy).__name__} without choose, state_dict and load_state_dict",
        )
    return policy


def chosen_share(section: StochasticPolicy) -> float:
    """Return p itself, or what ``match:`` came to."""
    if section.share is None:
        raise RecipeValueError("policy.p", f"'{section.p}' has not been matched yet; give policy.matched_p")
    return section.share


def trainable_shares(anatomy: Anatomy, p: float) -> dict[str, float]:
    """Return each layer's share of trainable neurons once ``Stochastic(p)`` freezes."""
    return {
        name: 1.0 if name in anatomy.never_frozen else 1 - frozen_count(p, layer.neurons) / layer.neurons
        for name, layer in anatomy.neurons.layers.items()
    }


def mean_stochastic_flops(anatomy: Anatomy, p: float, epochs: int, mode: BackwardMode = "exact") -> tuple[float, float]:
    """Return (paper, executed) multiply-adds per sample, averaged over a run whose first epoch trains everything."""
    flops = anatomy.flops(trainable_shares(anatomy, p), mode)
    return tuple(  # type: ignore[return-value]
        (dense + (epochs - 1) * frozen) / epochs
        for dense, frozen in ((flops.paper_dense, flops.paper), (flops.executed_dense, flops.executed))
    )


def matching_p(anatomy: Anatomy, paper_flops: float, epochs: int) -> float:
    """Return the p whose mean paper FLOPs over ``epochs`` come closest to ``paper_flops``.

    The mean falls with p in steps, one wherever int(p * n) changes in some layer; p is taken from the middle of a step.
    """
    sizes = {layer.neurons for name, layer in anatomy.neurons.layers.items() if name not in anatomy.never_frozen}
    edges = sorted({count / size for size in sizes for count in range(size + 1)} | {0.0, 1.0})
    middles = [0.0, *((low + high) / 2 for low, high in pairwise(edges)), 1.0]
    low, high = 0, len(middles) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if mean_stochastic_flops(anatomy, middles[middle], epochs)[0] > paper_flops:
            low = middle
        else:
            high = middle
    return min(
        (middles[low], middles[high]),
        key=lambda p: abs(mean_stochastic_flops(anatomy, p, epochs)[0] - paper_flops),
    )


def matching_note(policy: StochasticPolicy, anatomy: Anatomy, paper_flops: float, epochs: int) -> str:
    """Return how far the FLOPs of a matched p lie from ``paper_flops``, which it was to have.

    p acts on whole neurons, so that in narrow layers even the nearest may lie some percent beside.
    """
    reached = mean_stochastic_flops(anatomy, chosen_share(policy), epochs)[0]
    return (
        f"{policy.p}: p={chosen_share(policy):.4g} comes to {reached:.6g} mean paper FLOPs, "
        f"{100 * (reached / paper_flops - 1):+.2f}% beside the {paper_flops:.6g} to be matched; no p comes nearer, "
        "for neurons are whole"
    )


def match(
    recipe: Recipe, model: nn.Module, shape: tuple[int, ...], matched_flops: float | None
) -> tuple[Recipe, list[str]]:
    """Return ``recipe`` with the p that ``p: match:RUN_DIR`` comes to, and how near; as it is where it does not ask.

    ``shape`` is that of one sample, batch dimension first.
    """
    policy = recipe.policy
    if not isinstance(policy, StochasticPolicy) or policy.run_to_match is None:
        return recipe, []
    if matched_flops is None:
        raise RecipeValueError("policy.p", f"'{policy.p}' needs the run it names; give policy.matched_p instead")
    anatomy = anatomy_of(model, torch.zeros(shape, device=next(model.parameters()).device), exclude=recipe.exclude)
    dense = anatomy.flops(dict.fromkeys(anatomy.neurons.layers, 1.0)).paper
    if not 0 < matched_flops <= dense * (1 + 1e-9):
        raise RecipeValueError(
            "policy.p",
            f"'{policy.p}' has {matched_flops:.6g} mean FLOPs, and this model {dense:.6g} with nothing frozen; "
            "match a run of the same model on images of the same size",
        )
    matched = policy.model_copy(update={"matched_p": matching_p(anatomy, matched_flops, recipe.epochs)})
    note = matching_note(matched, anatomy, matched_flops, recipe.epochs)
    return recipe.model_copy(update={"policy": matched}), [note]


def describe_policy(policy: PolicySection) -> str:
    """Return what a run calls its policy: "neq epsilon=0.001 mu=0.5"."""
    if isinstance(policy, NEqPolicy):
        reference = "" if policy.definition == "paper" else f" definition={policy.definition}"
        return f"neq epsilon={policy.epsilon:g} mu={policy.mu:g}{reference}"
    if isinstance(policy, StochasticPolicy):
        matched = f" ({policy.p})" if policy.matched_p is not None else ""
        return f"stochastic p={chosen_share(policy):.4g}{matched}"
    return getattr(policy, "entrypoint", policy.kind)
