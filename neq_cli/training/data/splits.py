"""Which images are trained on, probed and tested where one part is divided: drawn by seed alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from neq_cli.errors import RecipeValueError

# What is tested is drawn from another number than what is probed, so that the two have nothing to do with each other.
_HELD_OUT = 0x7F4A7C159E3779B9


def split(size: int, probe_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the sorted indices that are trained on and those that are probed; together 0 to ``size`` - 1."""
    check_probe(probe_size, size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return order[probe_size:].sort().values, order[:probe_size].sort().values


def check_probe(probe_size: int, size: int) -> None:
    """Raise RecipeValueError where so many probe images leave none of ``size`` to train on."""
    if probe_size >= size:
        raise RecipeValueError(
            "data.probe_size", f"{probe_size} probe images of {size} training images leave none to train on; lower it"
        )


def count_held_out(size: int, share: float) -> int:
    """Return how many of ``size`` are tested, as ``hold_out`` has it. RecipeValueError where either part is empty."""
    count = int(size * share + 0.5)
    if not 0 < count < size:
        none, mend = ("none", "raise it") if count == 0 else ("all", "lower it")
        raise RecipeValueError("data.validation", f"{share:g} of {size} training images is {none} of them; {mend}")
    return count


def hold_out(size: int, share: float, seed: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the sorted indices that stay to be trained on and those that are tested; together 0 to ``size`` - 1.

    ``share`` of ``size``, rounded, are tested. Of each class of ``labels`` [size] it is that share too, up to less than
    one image. RecipeValueError where either part would be empty.
    """
    # Evenly spaced in an order that is random within every class: so each class gives its share, whatever its size.
    before = (torch.arange(size + 1).double() * share + 0.5).long()
    count_held_out(size, share)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed ^ _HELD_OUT))
    if labels is not None:
        order = order[labels[order].argsort(stable=True)]
    tested = before.diff() > 0
    return order[~tested].sort().values, order[tested].sort().values


def known_labels(dataset: Any) -> Tensor | None:
    """Return the labels [n] of ``dataset`` where they are known without an image being read, None where not."""
    if isinstance(dataset, Subset):
        labels = known_labels(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(dataset.indices)]
    for name in ("targets", "labels", "_labels", "samples", "_samples", "tensors"):
        found = getattr(dataset, name, None)
        if name.endswith("samples"):  # pairs of a path and a label
            pairs = found if isinstance(found, list) else []
            found = [one[1] for one in pairs if isinstance(one, tuple) and len(one) == 2]
        if name == "tensors" and isinstance(found, tuple):  # torch.utils.data.TensorDataset
            found = found[-1]
        try:
            labels = torch.as_tensor(found)
        except Exception:  # a user's own dataset may hold anything under such a name
            continue
        if labels.shape == (len(dataset),) and not labels.is_floating_point():
            return labels
    return None
