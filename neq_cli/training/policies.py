"""From a recipe's policy section to a policy, and to what a run calls it; a share that matches another run is found."""

from __future__ import annotations

import warnings
from itertools import pairwise

from torch import nn

from neq_cli.errors import NeqError, RecipeValueError, one_line
from neq_cli.freezing import Baseline, Budget, Front, NEq, Policy, Stochastic
from neq_cli.freezing.anatomy import Anatomy
from neq_cli.freezing.answers import settle
from neq_cli.freezing.backward.sliced import BackwardMode
from neq_cli.freezing.equilibrium import Dynamics
from neq_cli.freezing.model.layers import everything
from neq_cli.freezing.policies import Scope, observe
from neq_cli.freezing.yardsticks import frozen_count
from neq_cli.recipe import (
    BaselinePolicy,
    BudgetPolicy,
    FrontPolicy,
    NEqPolicy,
    PolicySection,
    Recipe,
    StochasticPolicy,
)
from neq_cli.recipe.entrypoints import load_entrypoint
from neq_cli.training.sample import Sample

_DRAWS = 200  # of random layers, whose mean is told


def build_policy(section: PolicySection, seed: int, epochs: int) -> Policy:
    """Return the policy that ``section`` names; random draws follow from ``seed``, schedules from ``epochs``.

    ``p: match:RUN_DIR`` needs ``matched_p``, see ``matching_p``. Raises RecipeValueError for an entrypoint that fails
    or whose result is no policy.
    """
    if isinstance(section, BaselinePolicy):
        return Baseline()
    if isinstance(section, NEqPolicy):
        with warnings.catch_warnings():
            # Whoever loads the recipe says it, with the key's name.
            warnings.filterwarnings("ignore", message="mu=")
            return NEq(
                section.epsilon,
                section.mu,
                section.definition,
                scope=section.scope,
                share=section.share,
                thaw_at_lr_drop=section.thaw_at_lr_drop,
                front_mode=section.front_mode,
            )
    if isinstance(section, StochasticPolicy):
        return Stochastic(chosen_share(section), seed, scope=section.scope)
    if isinstance(section, FrontPolicy):
        return Front(section.start, section.level, epochs)
    if isinstance(section, BudgetPolicy):
        return Budget(section.flops, section.mu)
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


def section_of(policy: Policy) -> PolicySection | None:
    """Return what a recipe says for ``policy``; None for one of a user's own class."""
    if type(policy) is Baseline:
        return BaselinePolicy()
    if type(policy) is NEq:
        keys = ("epsilon", "mu", "definition", "scope", "share", "thaw_at_lr_drop", "front_mode")
        return NEqPolicy(**{key: getattr(policy, key) for key in keys})
    if type(policy) is Stochastic:
        return StochasticPolicy(kind="stochastic", p=policy.p, scope=policy.scope)
    if type(policy) is Front:
        return FrontPolicy(kind="front", start=policy.start, level=policy.level)
    if type(policy) is Budget:
        return BudgetPolicy(kind="budget", flops=policy.flops, mu=policy.mu)
    return None


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


def mean_stochastic_flops(
    anatomy: Anatomy, p: float, epochs: int, mode: BackwardMode = "exact", scope: Scope = "neuron"
) -> tuple[float, float]:
    """Return (paper, executed) multiply-adds per sample, averaged over a run whose first epoch trains everything.

    Where whole layers freeze, what is executed depends on which: it is the mean of many draws.
    """
    if scope == "neuron":
        flops = anatomy.flops(trainable_shares(anatomy, p), mode)
        dense, later = (flops.paper_dense, flops.executed_dense), (flops.paper, flops.executed)
    else:
        dense = _flops_after(1, Baseline(), anatomy, mode)
        policy = Stochastic(p, scope=scope)
        drawn = [_flops_after(1, policy, anatomy, mode) for _ in range(_DRAWS)]
        later = (dense[0] - 2 * p * _freezable(anatomy), sum(executed for _, executed in drawn) / _DRAWS)
    return tuple((first + (epochs - 1) * other) / epochs for first, other in zip(dense, later, strict=True))  # type: ignore[return-value]


def mean_front_flops(anatomy: Anatomy, section: FrontPolicy, epochs: int, mode: BackwardMode) -> tuple[float, float]:
    """Return (paper, executed) multiply-adds per sample, averaged over the schedule's ``epochs``."""
    policy = Front(section.start, section.level, epochs)
    of_epochs = [_flops_after(1, Baseline(), anatomy, mode)]
    of_epochs += [_flops_after(epoch, policy, anatomy, mode) for epoch in range(1, epochs)]
    return tuple(sum(each) / epochs for each in zip(*of_epochs, strict=True))


def _flops_after(
    epoch: int, policy: Baseline | Stochastic | Front, anatomy: Anatomy, mode: BackwardMode
) -> tuple[float, float]:
    """Return (paper, executed) of one sample with what ``policy`` chooses, whatever the neurons do."""
    layers = anatomy.neurons.layers
    dynamics = {name: Dynamics.start(layer.neurons) for name, layer in layers.items()}
    scope = getattr(policy, "scope", "neuron")
    if not isinstance(policy, Baseline):
        policy.look(anatomy, 0.0)
    chosen = policy.choose(observe(dynamics, everything(layers)), epoch)
    sets = settle(chosen, type(policy).__name__, anatomy, dynamics)
    flops = anatomy.flops(sets, mode, still=anatomy.outside_front(sets) if scope == "front" else ())
    return flops.paper, flops.executed


def _freezable(anatomy: Anatomy) -> float:
    return sum(anatomy.costs[name] for name in anatomy.may_freeze)


def matching_p(anatomy: Anatomy, paper_flops: float, epochs: int, scope: Scope = "neuron") -> float:
    """Return the p whose mean paper FLOPs over ``epochs`` come closest to ``paper_flops``.

    For single neurons the mean falls with p in steps, one wherever int(p * n) changes in some layer; p is taken from
    the middle of a step.
    """
    if scope != "neuron":
        dense, all_frozen = (mean_stochastic_flops(anatomy, p, epochs, scope=scope)[0] for p in (0.0, 1.0))
        return min(1.0, max(0.0, (dense - paper_flops) / (dense - all_frozen))) if dense > all_frozen else 0.0
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
    reached = mean_stochastic_flops(anatomy, chosen_share(policy), epochs, scope=policy.scope)[0]
    return (
        f"{policy.p}: p={chosen_share(policy):.4g} comes to {reached:.6g} mean paper FLOPs, "
        f"{100 * (reached / paper_flops - 1):+.2f}% beside the {paper_flops:.6g} to be matched; no p comes nearer, "
        "for neurons are whole"
    )


def match(
    recipe: Recipe, model: nn.Module, sample: Sample, matched_flops: float | None, observations: int
) -> tuple[Recipe, list[str]]:
    """Return ``recipe`` with the p that ``p: match:RUN_DIR`` comes to, and how near; as it is where it does not ask.

    ``observations`` is how many the run has; it trains everything before the first.
    """
    policy = recipe.policy
    if not isinstance(policy, StochasticPolicy) or policy.run_to_match is None:
        return recipe, []
    if matched_flops is None:
        raise RecipeValueError("policy.p", f"'{policy.p}' needs the run it names; give policy.matched_p instead")
    anatomy = sample.anatomy(model, recipe.exclude)
    dense = anatomy.flops(dict.fromkeys(anatomy.neurons.layers, 1.0)).paper
    if not 0 < matched_flops <= dense * (1 + 1e-9):
        raise RecipeValueError(
            "policy.p",
            f"'{policy.p}' has {matched_flops:.6g} mean FLOPs, and this model {dense:.6g} with nothing frozen; "
            "match a run of the same model on images of the same size",
        )
    matched = policy.model_copy(update={"matched_p": matching_p(anatomy, matched_flops, observations, policy.scope)})
    note = matching_note(matched, anatomy, matched_flops, observations)
    return recipe.model_copy(update={"policy": matched}), [note]


def describe_policy(policy: PolicySection) -> str:
    """Return what a run calls its policy: "neq epsilon=0.001 mu=0.5"."""
    if isinstance(policy, NEqPolicy):
        reference = "" if policy.definition == "paper" else f" definition={policy.definition}"
        share = "" if policy.share == 1 else f" share={policy.share:g}"
        thaws = "" if policy.thaw_at_lr_drop is None else f" thaw_at_lr_drop={policy.thaw_at_lr_drop:g}"
        mode = "" if policy.front_mode == "train" else f" front_mode={policy.front_mode}"
        return f"neq epsilon={policy.epsilon:g} mu={policy.mu:g}{reference}{_scope(policy.scope)}{share}{thaws}{mode}"
    if isinstance(policy, StochasticPolicy):
        matched = f" ({policy.p})" if policy.matched_p is not None else ""
        return f"stochastic p={chosen_share(policy):.4g}{_scope(policy.scope)}{matched}"
    if isinstance(policy, FrontPolicy):
        return f"front start={policy.start:g} level={policy.level:g}"
    if isinstance(policy, BudgetPolicy):
        return f"budget flops={policy.flops:g} mu={policy.mu:g}"
    return getattr(policy, "entrypoint", policy.kind)


def _scope(scope: str) -> str:
    return "" if scope == "neuron" else f" scope={scope}"
