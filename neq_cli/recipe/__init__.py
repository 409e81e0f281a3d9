"""What a recipe may say (keys.py), and how one is read, checked, resolved and shipped; no module here imports torch."""

from neq_cli.recipe.data_keys import DataSection
from neq_cli.recipe.keys import Check, ModelSection, Problem, Recipe
from neq_cli.recipe.optimizer_keys import OptimizerSection, ParameterGroup, SchedulerSection
from neq_cli.recipe.parallel_keys import FsdpSection
from neq_cli.recipe.policy_keys import (
    BaselinePolicy,
    BudgetPolicy,
    CustomPolicy,
    FrontPolicy,
    NEqPolicy,
    PolicySection,
    StochasticPolicy,
)
from neq_cli.recipe.values import Section

__all__ = [
    "BaselinePolicy",
    "BudgetPolicy",
    "Check",
    "CustomPolicy",
    "DataSection",
    "FrontPolicy",
    "FsdpSection",
    "ModelSection",
    "NEqPolicy",
    "OptimizerSection",
    "ParameterGroup",
    "PolicySection",
    "Problem",
    "Recipe",
    "SchedulerSection",
    "Section",
    "StochasticPolicy",
]
