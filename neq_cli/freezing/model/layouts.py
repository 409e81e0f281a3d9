"""How the elements of a parameter fall into rows, and what layers cost: what all layer families share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Cost = Literal["convolution", "transposed", "linear", "norm", "lookup"]


@dataclass(frozen=True)
class RowLayout:
    """How the elements of a parameter (and of its row-shaped optimiser state) fall into rows.

    ``leading``: dimension 0. ``flat``: every element is a row (LayerNorm over several dimensions).
    ``transposed``: dimension 1, group by group, as transposed convolutions store their output channels, and embeddings
    their features.
    """

    kind: Literal["leading", "flat", "transposed"] = "leading"
    groups: int = 1

    def view(self, tensor: Tensor) -> Tensor:
        """Return a view whose first dimension counts the rows (first two where ``groups`` > 1, all where ``flat``)."""
        if self.kind != "transposed":
            return tensor
        if self.groups == 1:
            return tensor.transpose(0, 1)
        return tensor.view(self.groups, -1, *tensor.shape[1:]).transpose(1, 2)

    def count(self, tensor: Tensor) -> int:
        """Return the number of rows of ``tensor``."""
        if self.kind == "flat":
            return tensor.numel()
        view = self.view(tensor)
        return view.shape[0] * view.shape[1] if self.groups > 1 else view.shape[0]

    def index(self, tensor: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """Return what indexes ``rows`` (int64, [k]) of ``tensor`` in its view."""
        if self.kind == "flat" and tensor.dim() > 1:
            return torch.unravel_index(rows, tensor.shape)
        if self.groups == 1:
            return (rows,)
        per_group = self.view(tensor).shape[1]
        return (rows // per_group, rows % per_group)
