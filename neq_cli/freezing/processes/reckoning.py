"""What an observation comes to on any number of processes, reckoned: bytes, messages, and how many steps hide it.

For models that are whole in every process, in the paper's definition; ``bench/growth.py`` measures the same.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from neq_cli.freezing.earlier import buffers_of
from neq_cli.freezing.freezer import Freezer

LITTLE = 0.01
"""The share of training's time that its bookkeeping may take."""
_DIGEST = 32  # bytes of SHA-256
_NUMBER = 8  # bytes of a float64 or an int64


@dataclass(frozen=True)
class Extent:
    """How much there is to be kept of a model: bytes of its tensors, and how many neurons and layers it has.

    ``names``: bytes in which the first process tells what buffers it has.
    """

    parameters: int
    buffers: int
    names: int
    neurons: int
    layers: int


def extent_of(freezer: Freezer) -> Extent:
    """Return what a Freezer has to keep."""
    buffers = buffers_of(freezer.model)
    told = {name: None if one is None else (one.shape, one.dtype) for name, one in buffers.items()}
    return Extent(
        parameters=sum(map(_bytes, freezer.model.parameters())),
        buffers=sum(_bytes(one) for one in buffers.values() if one is not None),
        names=len(pickle.dumps(told)),
        neurons=sum(layer.neurons for layer in freezer.layers.values()),
        layers=len(freezer.layers),
    )


def exchanged(extent: Extent, processes: int) -> Mapping[str, int]:
    """Return the bytes that a process hands to collective operations in ``Freezer.step()``, by what they are for.

    ``checks``: a digest of every process, before and after. ``sums``: four numbers for each neuron, two for each layer
    and two beside. ``phi``: the first process's, to the bit. ``sets``: a bit for each neuron, and whether there are
    any. ``buffers``: the first process's with their names, before the probe and after; their length beside.
    """
    if processes == 1:
        return dict.fromkeys(("checks", "sums", "phi", "sets", "buffers"), 0)
    return {
        "checks": 2 * _DIGEST * processes,
        "sums": _NUMBER * (4 * extent.neurons + 2 * extent.layers + 2),
        "phi": _NUMBER * extent.neurons,
        "sets": _NUMBER + math.ceil(extent.neurons / 8),
        "buffers": 2 * (_NUMBER + extent.names + extent.buffers),
    }


def hops(processes: int, reduced: int, told: int) -> int:
    """Return how many messages follow on each other: ``reduced`` all-reduces in rings, ``told`` broadcasts in trees."""
    return reduced * 2 * (processes - 1) + told * math.ceil(math.log2(processes))


def held(extent: Extent) -> int:
    """Return the bytes that a process keeps from one observation to the next where nothing is frozen.

    The weights and buffers before, phi, delta_phi and velocity in float64, and who trains. Less where much is frozen
    whole.
    """
    return extent.parameters + extent.buffers + (3 * _NUMBER + 1) * extent.neurons


def steps_that_hide(observation: float, step: float, rows: float = 0.0, share: float = LITTLE) -> int | None:
    """Return after how many steps an observation leaves the bookkeeping at most ``share`` of them; None: after none.

    Seconds: of an ``observation``, of a ``step``, and of that in which ``rows`` were held.
    """
    left = share * step - rows
    return math.ceil(observation / left) if left > 0 else None


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
