"""One model of the table: how it is made, what it takes, and which of its parameters no neuron owns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

POSITIONS = "a table of positions is no output of a layer"
TOKEN = "a token stands beside the samples' own"
RELATIVE = "a table of distances is added to attention's scores"
PER_HEAD = "a single number for each head"
SCALAR = "a single number scales a whole tensor"


@dataclass(frozen=True)
class Case:
    """``make``: the model, with random weights. ``item``: two samples, as a probe yields them.

    ``outside``: globs of the names of all parameters that belong to no neuron, each with the reason. ``never``: globs
    of all layers that always train, such as the output layer. ``coupled``: of layers whose weights are divided by what
    all their rows have in common, so that the output of a frozen neuron changes with the others. ``call``: how the
    model is called with an item, where not by position or keywords. ``loss``: of a batch, where that is not a weighted
    sum of all that the model puts out. ``precision``: the highest that it runs in. ``quick``: in every test run, not
    only in slow ones.
    """

    make: Callable[[], nn.Module]
    item: Callable[[], Any]
    outside: Mapping[str, str] = field(default_factory=dict)
    never: tuple[str, ...] = ()
    coupled: tuple[str, ...] = ()
    call: Callable[[nn.Module, Any], Any] | None = None
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    precision: torch.dtype = torch.float64
    quick: bool = False


def images(size: int = 32, channels: int = 3) -> Callable[[], Tensor]:
    """Return what draws two images."""
    return lambda: torch.randn(2, channels, size, size)


def tokens(length: int = 6, words: int = 40) -> Callable[[], Tensor]:
    """Return what draws two sentences; no word is a special one, such as padding, whose numbers are below 4."""
    return lambda: torch.randint(4, words, (2, length))
