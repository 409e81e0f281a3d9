"""How the elements of a parameter fall into rows, and what layers cost: what all layer families share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Cost = Literal["convolution", "transposed", "linear", "bilinear", "recurrent", "norm", "lookup"]


@dataclass(frozen=True)
class RowLayout:
    """How the elements of a parameter (and of its row-shaped optimiser state) fall into rows.

    ``leading``: dimension 0. ``flat``: every element is a row (LayerNorm over several dimensions).
    ``transposed``: dimension 1, group by group, as transposed convolutions store their output channels, and embeddings
    their features. ``gates``: dimension 0 holds that many groups one after the other, and a row is what has the same
    place in each, as recurrent layers store theirs. ``stacked``: dimensions 0 and 1, of experts with their outputs;
    ``stacked_transposed``: dimensions 0 and 2.
    """

    kind: Literal["leading", "flat", "transposed", "gates", "stacked", "stacked_transposed"] = "leading"
    groups: int = 1

    def view(self, tensor: Tensor) -> Tensor:
        """Return a view whose first dimension counts the rows (first two where these are two, all where ``flat``)."""
        if self.kind == "transposed" and self.groups > 1:
            return tensor.view(self.groups, -1, *tensor.shape[1:]).transpose(1, 2)
        if self.kind == "transposed":
            return tensor.transpose(0, 1)
        if self.kind == "gates":
            return tensor.view(self.groups, -1, *tensor.shape[1:]).transpose(0, 1)
        if self.kind == "stacked_transposed":
            return tensor.transpose(1, 2)
        return tensor

    def count(self, tensor: Tensor) -> int:
        """Return the number of rows of ``tensor``."""
        if self.kind == "flat":
            return tensor.numel()
        view = self.view(tensor)
        return view.shape[0] * view.shape[1] if self._in_two_dimensions else view.shape[0]

    def index(self, tensor: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """Return what indexes ``rows`` (int64, [k]) of ``tensor`` in its view."""
        if self.kind == "flat" and tensor.dim() > 1:
            return torch.unravel_index(rows, tensor.shape)
        if not self._in_two_dimensions:
            return (rows,)
        per_group = self.view(tensor).shape[1]
        return (rows // per_group, rows % per_group)

    @property
    def _in_two_dimensions(self) -> bool:
        return self.kind.startswith("stacked") or (self.kind == "transposed" and self.groups > 1)
