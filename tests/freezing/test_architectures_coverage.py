"""Of real architectures, all parameters are neurons but those that are listed, and the same ones for every seed."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from typing import Any

import torch
from architectures.case import Case
from architectures.ownership import owners
from architectures.table import draw, each_case, freezer_of, make, quietly

from neq_cli.freezing.coverage import FIXED

pytestmark = [each_case, quietly]

SHARE = 0.98
"""Of the parameters that train: so much are neurons at least, where nothing that is listed stays outside."""


def matching(names: Collection[str], globs: Collection[str]) -> set[str]:
    """Return the ``names`` that ``globs`` match, each of them one at least."""
    for glob in globs:
        assert fnmatch.filter(names, glob), f"{glob} matches nothing"
    return {name for name in names if any(fnmatch.fnmatch(name, glob) for glob in globs)}


def test_parameters_are_neurons_but_for_those_that_are_listed(case: Case) -> None:
    model = make(case)
    freezer = freezer_of(case, model, draw(case))
    coverage, sizes = freezer.coverage(), {name: one.numel() for name, one in model.named_parameters()}
    training = {name for name, one in model.named_parameters() if one.requires_grad}
    outside = {name for part in coverage.outside if part.reason != FIXED for name in part.names}
    fixed = {name for part in coverage.outside if part.reason == FIXED for name in part.names}
    assert outside == matching(training, case.outside)
    assert fixed == sizes.keys() - training
    counted = {
        name: int(torch.stack([number >= 0 for _, number in found]).any(0).sum())
        for name, found in owners(freezer).items()
    }
    assert counted == {name: sizes[name] for name in training - outside}
    assert coverage.parameters == sum(sizes.values())
    assert coverage.parameters_of_neurons == sum(counted.values())
    assert coverage.parameters_of_neurons + sum(part.parameters for part in coverage.outside) == coverage.parameters
    assert case.outside or sum(counted.values()) >= SHARE * sum(sizes[name] for name in training)


def test_only_what_is_listed_never_freezes(case: Case) -> None:
    freezer = freezer_of(case, make(case), draw(case))
    never = freezer.anatomy.never_frozen
    assert set(never) == matching(freezer.layers, case.never), never


def test_layers_are_the_same_for_every_seed(case: Case) -> None:
    found = []
    for seed in range(3):
        freezer = freezer_of(case, make(case, seed), draw(case, seed))
        found.append([told(layer) for layer in freezer.layers.values()])
    assert found[0] == found[1] == found[2]


def told(layer: Any) -> tuple[Any, ...]:
    return layer.name, layer.kind, layer.cost, layer.neurons, layer.axis, layer.axis_dimensions, layer.rows
