"""A model that the processes hold together: each has a part of every weight (`parallel: fsdp`, by ``fully_shard``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from neq_cli.errors import RecipeValueError, one_line
from neq_cli.freezing import Freezer
from neq_cli.freezing.rows.shards import is_sharded
from neq_cli.recipe import NEqPolicy, OptimizerSection, Recipe
from neq_cli.training.loop.optimizers import find_optimizer, make_optimizer
from neq_cli.training.loop.shard_storage import divided, read_shards
from neq_cli.training.processes.blocks import blocks_of
from neq_cli.training.processes.joined import Processes

_OR_WHOLE = "or use parallel: ddp"


@dataclass(frozen=True)
class Divided:
    """How a model is divided over the processes of ``mesh``, and its averaged weights like it, where it has any."""

    mesh: DeviceMesh
    units: tuple[FSDPModule, ...]
    averaged: AveragedModel | None
    note: str

    def reshard(self) -> None:
        """Have each process hold its part alone: after a forward pass without a backward one, it holds more."""
        for unit in self.units:
            unit.reshard()

    def state(self, state: Mapping[str, Any], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Return a trainer's ``state`` with this process's parts of what is divided: weights, and optimiser state.

        It may lie in shards, of any number of processes, or be whole in every process.
        """
        found: dict[str, Any] = read_shards(state, self.mesh)
        found = {**found, "model": self._like(model.state_dict(), found["model"])}
        if self.averaged is not None:
            found["averaged"] = self._like(self.averaged.state_dict(), found["averaged"])
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        moments: dict[int, dict[str, Any]] = {}
        for number, values in found["optimizer"]["state"].items():
            shaped = [
                key for key, one in values.items() if isinstance(one, Tensor) and one.shape == parameters[number].shape
            ]
            moments[number] = self._like(dict.fromkeys(shaped, parameters[number]), values)
        return {**found, "optimizer": {**found["optimizer"], "state": moments}}

    def _like(self, here: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``values``, of which those are divided that are so ``here``."""
        return {
            key: divided(one, self.mesh) if is_sharded(here.get(key, 0)) and not is_sharded(one) else one
            for key, one in values.items()
        }

    def bytes_sent(self, freezer: Freezer) -> int:
        """Return how many bytes of gradients a process hands over after each batch, with the sets in force.

        Of parameters that have a trainable row, their rows filled up to the same number for each process.
        """
        count, still = self.mesh.size(), set(map(id, freezer.hold.keeper.discarding.whole))
        sent = [one for one in freezer.model.parameters() if one.requires_grad and id(one) not in still]
        return sum(-(-len(one) // count) * count * math.prod(one.shape[1:]) * one.element_size() for one in sent)


def check_dividable(recipe: Recipe) -> None:
    """Raise RecipeValueError where the recipe asks for what a divided model cannot do."""
    what = "is not for a model that parallel: fsdp divides"
    if recipe.compile:
        raise RecipeValueError("compile", f"{what}; set it to false, {_OR_WHOLE}")
    if recipe.channels_last is True:
        raise RecipeValueError("channels_last", f"{what}, whose weights must be contiguous; set it to false")
    if isinstance(recipe.policy, NEqPolicy) and recipe.policy.front_mode == "inference":
        raise RecipeValueError("policy.front_mode", f"inference {what}; use train, {_OR_WHOLE}")


def divide(
    recipe: Recipe, model: nn.Module, averaged: AveragedModel | None, device: torch.device, processes: Processes
) -> Divided:
    """Divide ``model``, which lies on ``device``, and ``averaged`` in place, block by block.

    All processes begin with the first one's weights. Raises RecipeValueError where there are no such blocks, or where
    torch cannot divide the model.
    """
    blocks = [*blocks_of(model, recipe.fsdp.blocks)]
    processes.copy_from_first([*model.parameters(), *model.buffers()])
    mesh = init_device_mesh(device.type, (processes.count,))
    models = [model] if averaged is None else [model, averaged.module]
    try:
        for one in models:
            for name in reversed(blocks):  # those within others first
                fully_shard(one.get_submodule(name), mesh=mesh)
            fully_shard(one, mesh=mesh)
    except Exception as error:
        raise RecipeValueError("parallel", f"fsdp cannot divide the model ({one_line(error)}); use ddp") from error
    units = tuple(module for one in models for module in one.modules() if isinstance(module, FSDPModule))
    return Divided(mesh, units, averaged, _note(model, blocks, processes.count))


def check_divided(section: OptimizerSection, mesh: DeviceMesh) -> None:
    """Raise RecipeValueError where the optimiser's steps with a parameter divided over ``mesh`` fail, or are others.

    All processes try it together.
    """
    kind = find_optimizer(section.name)
    whole = nn.Parameter(torch.linspace(-1, 1, 3 * (2 * mesh.size() + 1), device=mesh.device_type).view(-1, 3))
    part = nn.Parameter(divided(whole.detach().clone(), mesh))
    mend = "use another, such as sgd, adam or adamw, or parallel: ddp"
    try:
        steppers = [make_optimizer(kind, section, [{"params": [one]}]) for one in (whole, part)]
        for number in range(3):
            gradient = (whole.detach() + number).sin()
            whole.grad, part.grad = gradient, divided(gradient, mesh)
            for stepper in steppers:
                stepper.step()
        found = part.detach().full_tensor()  # type: ignore[attr-defined]
    except Exception as error:
        reason = f"{section.name} takes no step with weights that parallel: fsdp divides ({one_line(error)})"
        raise RecipeValueError("optimizer.name", f"{reason}; {mend}") from error
    if not torch.allclose(found, whole.detach(), rtol=1e-4, atol=1e-6):
        reason = f"{section.name} comes to other weights where parallel: fsdp divides them"
        raise RecipeValueError("optimizer.name", f"{reason}; {mend}")


def _note(model: nn.Module, blocks: Sequence[str], count: int) -> str:
    if not blocks:
        return (
            f"parallel: fsdp over {count} processes; no blocks were found, so that each process gathers all weights at "
            "once while the model runs: name some by fsdp.blocks"
        )
    # The class that fully_shard puts before a module's own is not its name.
    kinds = sorted({_own_class(model.get_submodule(name)).__name__ for name in blocks})
    return f"parallel: fsdp over {count} processes, in {len(blocks)} blocks ({', '.join(kinds)}) and the rest"


def _own_class(module: nn.Module) -> type[Any]:
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
