"""Outputs of an old and a new network are compared while batches go by: sums from which every neuron's phi follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neq_cli.freezing.equilibrium import cosine
from neq_cli.freezing.model.layers import Layer, rows_by_neuron
from neq_cli.freezing.model.observing import LayerCall
from neq_cli.freezing.processes.agreement import add_up

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CHUNK = 1 << 20
"""Output elements that are turned into float64 at a time (8 MB), so that the sums need next to no memory."""


@dataclass(frozen=True)
class _Kept:
    """What the old network put out in one call of a layer; ``tokens`` as in ``LayerCall``."""

    first: int
    output: Tensor
    tokens: Tensor | None


class Comparison:
    """The three sums of every neuron, <new, old>, <new, new> and <old, old>, while batches go by.

    A fourth tells whether the neuron was called at all: an expert that gets no token is not known to be still.
    """

    def __init__(self, *, per_sample: bool) -> None:
        self.per_sample = per_sample
        # The old network's calls of this batch, in order, by layer; each expert's by themselves.
        self.kept: dict[tuple[str, int], list[_Kept]] = {}
        self.layers: dict[str, Layer] = {}
        self.batch: dict[str, Tensor] = {}  # [4, samples or 1, neurons] of this batch
        self.total: dict[str, Tensor] = {}  # paper: [4, neurons]; reference: [2, neurons], sum of cosines and count
        self.unlike: set[str] = set()

    def keep(self, call: LayerCall) -> None:
        self.layers[call.layer.name] = call.layer
        # A copy: an in-place activation is about to overwrite the output.
        kept = _Kept(call.first, call.output.clone(), call.tokens)
        self.kept.setdefault(_key(call.layer, call.first), []).append(kept)

    def compare(self, call: LayerCall) -> None:
        calls = self.kept.get(_key(call.layer, call.first))
        old = calls.pop(0) if calls else None
        if call.layer.of_experts:
            self._compare_tokens(call.layer, _Kept(call.first, call.output, call.tokens), old)
        elif old is None or old.first != call.first or old.output.shape != call.output.shape:
            self.unlike.add(call.layer.name)
        else:
            self._add(call.layer, call.first, call.output, old.output)

    def _compare_tokens(self, layer: Layer, new: _Kept | None, old: _Kept | None) -> None:
        """Compare what an expert put out for each token; for one that did not come to it, that was nothing."""
        there = [one for one in (new, old) if one is not None]
        if all(one.tokens is not None for one in there):
            tokens = torch.unique(torch.cat([one.tokens for one in there if one.tokens is not None]))
            blank = there[0].output.new_zeros(len(tokens), there[0].output.shape[1])
            outputs = [blank if one is None else _at(tokens, one, blank) for one in (new, old)]
            self._add(layer, there[0].first, *outputs)
        elif new is not None and old is not None and new.output.shape == old.output.shape:
            self._add(layer, new.first, new.output, old.output)
        else:
            self._add(layer, there[0].first, *[torch.full_like(there[0].output, torch.nan)] * 2)

    def _add(self, layer: Layer, first: int, new: Tensor, old: Tensor) -> None:
        if not new.numel():
            return
        sums = sums_by_neuron(layer, new, old, per_sample=self.per_sample)
        samples, count = sums.shape[1], sums.shape[2]
        held = self.batch.get(layer.name)
        if held is None or held.shape[1] != samples:
            if held is not None:
                self._finish(layer.name)
            held = self.batch[layer.name] = sums.new_zeros(4, samples, layer.neurons)
        held[:3, :, first : first + count] += sums
        held[3, :, first : first + count] += 1

    def end_batch(self) -> None:
        for (name, _), calls in self.kept.items():
            for left in calls:
                if self.layers[name].of_experts:
                    self._compare_tokens(self.layers[name], None, left)
                else:
                    self.unlike.add(name)
        self.kept.clear()
        for name in list(self.batch):
            self._finish(name)

    def _finish(self, name: str) -> None:
        sums = self.batch.pop(name)
        if self.per_sample:
            called = sums[3] > 0
            cosines = torch.where(called, cosine(sums[:3]), torch.zeros_like(sums[0]))
            sums = torch.stack([cosines.sum(0), called.to(cosines).sum(0)])
        else:
            sums = sums.sum(1)
        total = self.total.get(name)
        self.total[name] = sums if total is None else total + sums

    def add_up(self, layers: Mapping[str, Layer], seen: int, device: torch.device, group: ProcessGroup) -> int:
        """Add all sums up over the processes, in one message; return how many batches they have ``seen`` together."""
        device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        kinds = 2 if self.per_sample else 4
        # Neither a layer that some processes' batches do not reach nor one that none reaches is lost in the sums.
        flags = torch.tensor(
            [[seen, 0], *([name in self.total, name in self.unlike] for name in layers)],
            dtype=torch.float64,
            device=device,
        )
        sums = [self.total.get(name, flags.new_zeros(kinds, layer.neurons)) for name, layer in layers.items()]
        everyone = add_up(torch.cat([part.flatten() for part in (flags, *sums)]), group)
        flags, everyone = everyone[: flags.numel()].view_as(flags), everyone[flags.numel() :]
        reached, unlike = flags[1:].bool().unbind(1)
        parts = torch.split(everyone, [kinds * layer.neurons for layer in layers.values()])
        self.total = {
            name: part.view(kinds, -1)
            for name, part, there in zip(layers, parts, reached.tolist(), strict=True)
            if there
        }
        self.unlike = {name for name, differs in zip(layers, unlike.tolist(), strict=True) if differs}
        return int(flags[0, 0])

    def phi(self, layer: Layer) -> Tensor:
        total = self.total.get(layer.name)
        if total is None or layer.name in self.unlike:
            return torch.full((layer.neurons,), torch.nan, dtype=torch.float64, device="cpu")
        if self.per_sample:
            return (total[0] / total[1]).cpu()
        return torch.where(total[3] > 0, cosine(total[:3]), torch.full_like(total[3], torch.nan)).cpu()


def _key(layer: Layer, first: int) -> tuple[str, int]:
    return layer.name, first if layer.of_experts else 0


def _at(tokens: Tensor, one: _Kept, blank: Tensor) -> Tensor:
    """Return the outputs, [n, neurons], at the places of their tokens among ``tokens``, in order; zero at others."""
    assert one.tokens is not None
    return blank.index_copy(0, torch.searchsorted(tokens, one.tokens), one.output)


def sums_by_neuron(layer: Layer, new: Tensor, old: Tensor, *, per_sample: bool) -> Tensor:
    """Return <new, old>, <new, new>, <old, old>: float64, [3, samples where ``per_sample`` else 1, neurons]."""
    if layer.axis + new.dim() == 0:  # called with a single sample, without a dimension for samples
        new, old = new.unsqueeze(0), old.unsqueeze(0)
    parts = []
    step = max(1, CHUNK // max(1, new[0].numel()))
    for a, b in zip(torch.split(new, step), torch.split(old, step), strict=True):
        a, b = (_samples_and_neurons(layer, part, per_sample=per_sample) for part in (a, b))
        sums = torch.stack([(a * b).sum(-1), (a * a).sum(-1), (b * b).sum(-1)])
        parts.append(sums if sums.dtype == torch.float64 else sums.cpu().double())
    if per_sample:
        return torch.cat(parts, 1)
    return torch.stack(parts).sum(0)


def _samples_and_neurons(layer: Layer, output: Tensor, *, per_sample: bool) -> Tensor:
    """Return ``output`` as [samples or 1, neurons, positions], in float64 where the device knows it."""
    if per_sample:
        by_neuron = rows_by_neuron(output, layer.axis, layer.axis_dimensions)
        result = by_neuron.view(len(by_neuron), len(output), -1).transpose(0, 1)
    else:
        result = rows_by_neuron(output, layer.axis, layer.axis_dimensions).unsqueeze(0)
    # MPS has no float64: products in float32 there, sums of chunks on the CPU.
    return result.to(torch.float32 if output.device.type == "mps" else torch.float64)
