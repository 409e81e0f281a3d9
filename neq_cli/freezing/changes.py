"""Model and optimiser are compared with the last look at them: parameters may have joined, left or been replaced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from neq_cli.errors import FreezingError
from neq_cli.freezing.equilibrium import Dynamics
from neq_cli.freezing.model.layers import Layer, everything


@dataclass(frozen=True)
class Standing:
    """Which modules and parameters a model had at a moment, and which parameters its optimiser updated.

    They are kept themselves: another object may come to lie where a lost one lay.
    """

    modules: Mapping[str, nn.Module]
    parameters: Mapping[str, nn.Parameter]
    shapes: Mapping[str, torch.Size]
    optimized: Mapping[int, nn.Parameter]  # those of the model, by identity

    def now(self, model: nn.Module, optimizer: Optimizer) -> Standing:
        """Return how it stands now. What was optimised before still is where its gradients are switched off."""
        there = standing(model, optimizer, switched_off=True)
        known = {key: one for key, one in there.optimized.items() if one.requires_grad or key in self.optimized}
        return replace(there, optimized=known)

    def differs(self, now: Standing) -> bool:
        """Whether there is anything to be looked at anew."""
        return bool(
            self.replaced(now)
            or _identities(self.modules) != _identities(now.modules)
            or self.optimized.keys() != now.optimized.keys()
        )

    def replaced(self, now: Standing) -> list[str]:
        """Return the names of parameters that are others now, or gone, or new, or of another shape."""
        names = [*self.parameters, *(name for name in now.parameters if name not in self.parameters)]
        return [
            name
            for name in names
            if self.parameters.get(name) is not now.parameters.get(name)
            or self.shapes.get(name) != now.shapes.get(name)
        ]

    def compared(self, now: Standing) -> str:
        """Return what processes that train copies of one model must find alike: what changed, and what is optimised."""
        names = [name for name, one in now.parameters.items() if id(one) in now.optimized]
        return f"{self.replaced(now)} {names} {self.differs(now)}"

    def carried(
        self,
        now: Standing,
        before: Mapping[str, Layer],
        layers: Mapping[str, Layer],
        dynamics: Mapping[str, Dynamics],
        trainable: Mapping[str, Tensor],
    ) -> tuple[dict[str, Dynamics], dict[str, Tensor]]:
        """Return dynamics and sets of ``layers``: as ``before``, or unknown and trainable where a layer is new.

        All are where parameters were replaced: what lies above is another network's, too.
        """
        alike = {name for name, layer in layers.items() if name in before and before[name].rows == layer.rows}
        known = set() if self.replaced(now) else alike
        unknown = {name: Dynamics.unknown(layer.neurons) for name, layer in layers.items()}
        return (
            {**unknown, **{name: dynamics[name] for name in known}},
            {**everything(layers), **{name: trainable[name] for name in known}},
        )

    def told(self, now: Standing, layers: Mapping[str, Layer]) -> str:
        """Return in words what changed, where ``layers`` are those that neurons are observed in from now on."""
        if replaced := self.replaced(now):
            return f"{_some(replaced)}: replaced in the model, which is looked at anew; all of it trains for an epoch"
        names = {id(one): name for name, one in now.parameters.items()}
        joined = {names[key] for key in now.optimized if key not in self.optimized}
        found = [name for name, layer in layers.items() if any(rows.parameter in joined for rows in layer.rows)]
        if found:
            return f"{_some(found)}: joined the optimiser; observed from now on"
        return "modules or what the optimiser updates have changed: the model is looked at anew"

    def check(self, now: Standing, layers: Mapping[str, Layer]) -> None:
        """Raise FreezingError where a layer's parameter was replaced by one that trains but is in no optimiser."""
        known = {id(one) for one in self.parameters.values()}
        strangers = [
            name
            for name, one in now.parameters.items()
            if id(one) not in known and one.requires_grad and id(one) not in now.optimized
        ]
        for layer in layers.values():
            owners = {rows.parameter.rpartition(".")[0] for rows in layer.rows}
            for name in strangers:
                if any(name.startswith(f"{owner}.") if owner else "." not in name for owner in owners):
                    raise FreezingError(
                        f"layer {layer.name!r}: its parameters were replaced after the Freezer was made, and the "
                        f"optimiser does not update {name!r}; add it to the optimiser, or make a new optimiser and a "
                        "new Freezer"
                    )


def standing(model: nn.Module, optimizer: Optimizer, *, switched_off: bool = False) -> Standing:
    """Return how it stands now; parameters whose gradients are switched off are optimised only if told so."""
    parameters = dict(model.named_parameters())
    mine = {id(one) for one in parameters.values()}
    optimized = {id(one): one for group in optimizer.param_groups for one in group["params"] if id(one) in mine}
    return Standing(
        dict(model.named_modules()),
        parameters,
        {name: one.shape for name, one in parameters.items() if not is_lazy(one)},
        {key: one for key, one in optimized.items() if switched_off or one.requires_grad},
    )


class Places:
    """Where parameters lie in a model, to be looked up quickly: by which modules on the way, and under which names."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.links: dict[tuple[int, str], tuple[Mapping[str, object], str, object, list[str]]] = {}
        for name in names:
            *way, last = name.split(".")
            module: nn.Module | None = model
            for key in way:
                if module is not None:
                    self._add(module._modules, key, name)
                    module = module._modules.get(key)
            if module is not None:
                self._add(module._parameters, last, name)

    def _add(self, members: Mapping[str, object], key: str, name: str) -> None:
        self.links.setdefault((id(members), key), (members, key, members.get(key), []))[3].append(name)

    def left(self) -> set[str]:
        """Return the names of the parameters that are not there any more."""
        return {
            name
            for members, key, expected, names in self.links.values()
            if members.get(key) is not expected
            for name in names
        }


@contextmanager
def gradients_switched_on(parameters: Mapping[int, Tensor]) -> Iterator[None]:
    """Have all ``parameters`` require gradients inside, and afterwards those only that did before."""
    off = [one for one in parameters.values() if not one.requires_grad]
    for one in off:
        one.requires_grad_(True)
    try:
        yield
    finally:
        for one in off:
            one.requires_grad_(False)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _identities(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    return {name: id(module) for name, module in modules.items()}
