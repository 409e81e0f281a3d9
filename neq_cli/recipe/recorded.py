"""Recipes that a training loop of somebody's own recorded: they tell of a run, and `neq train` runs none of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RECORDED = {"recorded": True}
"""What such a recipe begins with."""


def is_recorded(values: Mapping[str, Any]) -> bool:
    """Return whether a recipe's ``values`` are of a loop of somebody's own."""
    return values.items() >= RECORDED.items()
