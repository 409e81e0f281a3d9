"""Which rows of a weight a kernel computes the gradient of: the trainable ones, and what it takes on to fit them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neq_cli.freezing.model.neurons import Layout


@dataclass(frozen=True)
class Slice:
    """Rows of a weight with ``groups`` groups of as many rows each, as one smaller layer.

    ``computed`` are all rows of that smaller layer, group by group, ``kept`` the places in it of those that train (the
    others are there to fill up). ``inputs`` are the input channels of its groups; None: all of the layer's.
    """

    computed: Tensor  # int64, [rows computed]
    kept: Tensor | None  # int64, [rows kept]; None: all
    trainable: Tensor  # int64, [rows kept]: computed[kept]
    groups: int
    inputs: Tensor | None  # int64

    def rows_of_weight(self, weight: Tensor, layout: Layout) -> Tensor:
        """Return the smaller layer's weight."""
        if layout.kind == "leading":
            return weight.index_select(0, self.computed)
        rows = layout.view(weight)[layout.index(weight, self.computed)]  # [rows, inputs per group, *kernel]
        return self._with_inputs_first(rows)

    def in_place_of_weight(self, weight: Tensor, layout: Layout) -> Tensor:
        """Return what looks like the smaller layer's weight, for kernels that do not read it; nothing is copied."""
        return (
            weight.narrow(0, 0, len(self.computed)) if layout.kind == "leading" else self.rows_of_weight(weight, layout)
        )

    def _with_inputs_first(self, rows: Tensor) -> Tensor:
        """Swap rows and inputs within each group: [groups * a, b, *kernel] becomes [groups * b, a, *kernel]."""
        return rows.reshape(self.groups, -1, *rows.shape[1:]).transpose(1, 2).flatten(0, 1)

    def gradient_of_weight(self, gradient: Tensor, weight: Tensor, layout: Layout) -> Tensor:
        """Return the whole weight's gradient, zero but for the trainable rows, from the smaller layer's."""
        if layout.kind != "leading":
            gradient = self._with_inputs_first(gradient)
        if self.kept is not None:
            gradient = gradient.index_select(0, self.kept)
        whole = torch.zeros_like(weight)
        if layout.kind == "leading":
            return whole.index_copy_(0, self.trainable, gradient)
        layout.view(whole).index_put_(layout.index(whole, self.trainable), gradient)
        return whole

    def gradient_of_bias(self, gradient: Tensor, rows: int) -> Tensor:
        """Return the gradient of a bias of ``rows``, zero but for the trainable ones, from the smaller layer's."""
        if self.kept is not None:
            gradient = gradient.index_select(0, self.kept)
        return gradient.new_zeros(rows).index_copy_(0, self.trainable, gradient)

    def only_trainable(self, weight: Tensor, layout: Layout) -> Tensor:
        """Return the smaller layer's weight with zeros in the rows that are there to fill up: they pass no error."""
        if self.kept is None:
            return weight
        trains = torch.zeros_like(self.computed, dtype=weight.dtype).index_fill_(0, self.kept, 1)
        if layout.kind == "leading":
            return weight * trains.view(-1, *[1] * (weight.dim() - 1))
        by_group = trains.view(self.groups, 1, -1).expand(-1, len(weight) // self.groups, -1).flatten(0, 1)
        return weight * by_group.view(*by_group.shape, *[1] * (weight.dim() - 2))


def slice_rows(trainable: Tensor, *, groups: int, inputs: int, multiple: int, device: torch.device) -> Slice:
    """Return the smallest slice that holds the rows of ``trainable`` (bool, [rows], CPU, at least one true).

    Every group of it has as many rows, a ``multiple`` where the layer has so many; groups without a trainable row are
    left out. ``inputs`` are the input channels of one group. The slice's tensors lie on ``device``.
    """
    by_group = trainable.view(groups, -1)
    chosen = by_group.any(1).nonzero()
    by_group = by_group[chosen.squeeze(1)]
    most = int(by_group.sum(1).max())
    count = min(-(-most // multiple) * multiple, by_group.shape[1])
    # Trainable rows first, then as many frozen ones as fill the group up; both in their order.
    order = by_group.int().argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values
    kept = by_group.gather(1, order).flatten()
    computed = (order + chosen * by_group.shape[1]).flatten()
    channels = None
    if len(chosen) < groups:
        channels = (chosen * inputs + torch.arange(inputs, device="cpu")).flatten().to(device)
    places = None if bool(kept.all()) else kept.nonzero().squeeze(1).to(device)
    computed = computed.to(device)
    return Slice(computed, places, computed if places is None else computed[places], len(chosen), channels)
