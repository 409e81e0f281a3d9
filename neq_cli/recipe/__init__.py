"""What a recipe may say (keys.py), and how one is read, checked, resolved and shipped; never imports torch."""

from neq_cli.recipe.keys import (
    BaselinePolicy,
    Check,
    CustomPolicy,
    DataSection,
    ModelSection,
    NEqPolicy,
    OptimizerSection,
    ParameterGroup,
    PolicySection,
    Problem,
    Recipe,
    SchedulerSection,
    Section,
    StochasticPolicy,
)

__all__ = [
    "BaselinePolicy",
    "Check",
    "CustomPolicy",
    "DataSection",
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
