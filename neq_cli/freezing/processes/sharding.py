"""How ``fully_shard`` (FSDP2) divides a model over processes, and what stands where while it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from neq_cli.errors import FreezingError
from neq_cli.freezing.earlier import buffers_of
from neq_cli.freezing.model.restoring import found_again, install
from neq_cli.freezing.processes.gathering import StandIns, Unit
from neq_cli.freezing.rows.shards import is_sharded, local, part_of, whole

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Sharding:
    """What of a model is divided, by name; nothing of a model that ``fully_shard`` was not given.

    ``units``: what is gathered together, as ``fully_shard`` was called for it. ``parameters``: the sharded ones.
    """

    modules: tuple[Any, ...]  # FSDPModules
    units: tuple[Unit, ...]
    parameters: Mapping[str, nn.Parameter]

    def __bool__(self) -> bool:
        return bool(self.parameters)

    def check(self, *, compiled: bool, resting: bool, processes: int) -> None:
        """Raise FreezingError where something is asked for that a sharded model cannot do.

        ``compiled``: torch.compile runs it. ``resting``: its frozen front is to run as at inference. ``processes``: so
        many look at it.
        """
        if not self:
            return
        if compiled:
            raise FreezingError("model: fully_shard divides it, and torch.compile runs it; leave one of them out")
        if resting:
            raise FreezingError(
                "policy: front_mode inference is not for what fully_shard divides; use front_mode train"
            )
        count = next(iter(self.parameters.values())).device_mesh.size()  # type: ignore[attr-defined]
        if processes != count:
            raise FreezingError(
                f"process_group: has {processes} processes, but fully_shard divides the model over {count}; give the "
                "group of these"
            )

    def reshard(self) -> None:
        """Have the sharded parameters in their places: after a forward pass alone, the outermost ones are not."""
        for module in self.modules:
            module.reshard()

    def seen(self, parameter: Tensor) -> Tensor:
        """Return what stands in the place of ``parameter`` while its module runs."""
        # Born in the first forward pass.
        seen: Tensor = getattr(self._managed.get(id(parameter)), "_unsharded_param", parameter)
        return seen

    @cached_property
    def _managed(self) -> dict[int, Any]:
        """What fully_shard knows of each sharded parameter, by its identity."""
        return {id(self.parameters[name]): one for unit in self.units for name, one in unit.parameters.items()}

    def group(self) -> ProcessGroup | None:
        """Return the processes that hold the model together, where all of one device mesh's dimension do."""
        from torch import distributed

        mesh = next(iter(self.parameters.values())).device_mesh  # type: ignore[attr-defined]
        group: ProcessGroup | None = mesh.get_group() if mesh.ndim == 1 else distributed.group.WORLD
        return group

    def named(self, parts: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Return ``parts`` with those of sharded parameters as DTensors of the whole's shape, in the same memory."""
        return {
            name: self.joined(name, part) if name in self.parameters and part is not None else part
            for name, part in parts.items()
        }

    def joined(self, name: str, part: Tensor) -> Tensor:
        """Return the DTensor whose part in this process is ``part``."""
        from torch.distributed.tensor import DTensor

        like: Any = self.parameters[name]
        return DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def gathered(self, parts: Mapping[str, Tensor | None], *, keep: bool) -> dict[str, Tensor | None]:
        """Return ``parts`` whole and on the CPU, one gathered after the other; nothing where they are not to be kept.

        Every process must ask alike.
        """
        found: dict[str, Tensor | None] = {}
        for name, one in self.named(parts).items():
            everything = None if one is None else whole(one)
            if keep:
                found[name] = None if everything is None else everything.cpu()
        return found

    def own(self, name: str, tensor: Tensor | None) -> Tensor | None:
        """Return the part of ``tensor`` that is here, of a whole one or of a DTensor, in any way divided.

        Every process must ask alike.
        """
        like: Any = self.parameters.get(name)
        if like is None or tensor is None:
            return None if tensor is None else whole(tensor)
        if is_sharded(tensor):
            given: Any = tensor
            if given.device_mesh == like.device_mesh and given.placements == like.placements:
                return local(tensor)
        part = part_of(like)
        assert part is not None
        return part.cut(whole(tensor))

    @contextmanager
    def undivided(self, model: nn.Module, *, values: bool = True) -> Iterator[Mapping[int, Tensor]]:
        """Have all of ``model`` in this process inside, as if it had never been divided, and afterwards as it was.

        Yields what stands in the sharded parameters' places, by their identity. Every process must do so alike, unless
        their shapes are enough, without ``values``.
        """
        if not self:
            yield {}
            return
        self.reshard()
        parts = {name: local(one) for name, one in self.parameters.items()}
        with self.stand_ins(parts, at_once=values) as there, found_again(model):
            install(model, {**there.parameters, **buffers_of(model)})
            there.take_over()
            yield {id(one): there.parameters[name] for name, one in self.parameters.items()}

    @contextmanager
    def stand_ins(self, parts: Mapping[str, Tensor | None], *, at_once: bool) -> Iterator[StandIns]:
        """Yield plain parameters for the sharded ones, made of these ``parts``; to be installed.

        ``at_once``: they have their values for as long as this lasts. Else each unit has while it runs.
        """
        given = {name: one for name in self.parameters if (one := parts[name]) is not None}
        there = StandIns(self.units, self.parameters, {name: self.joined(name, one) for name, one in given.items()})
        with ExitStack() as stack:
            stack.callback(there.free)
            stack.enter_context(there.instead(at_once=at_once))
            yield there


UNDIVIDED = Sharding((), (), {})
"""Of a model that is whole in every process."""


def sharding_of(model: nn.Module) -> Sharding:
    """Return how ``fully_shard`` divides ``model``. Raises FreezingError where it does in a way that is not known."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    modules = tuple(one for one in model.modules() if isinstance(one, fsdp.FSDPModule)) if fsdp is not None else ()
    for module in modules:
        module.reshard()
    parameters = {name: one for name, one in model.named_parameters() if is_sharded(one)}
    names = {id(one): name for name, one in parameters.items()}
    units: dict[int, Unit] = {}
    for module in modules:
        state = module._get_fsdp_state()
        managed = {id(one.sharded_param): one for group in _groups(state) for one in group.fsdp_params}
        units[id(state)] = Unit(state, {names[key]: one for key, one in managed.items() if key in names})
    known = {name: one for unit in units.values() for name, one in unit.parameters.items()}
    for name, parameter in parameters.items():
        _check(name, parameter, known.get(name))
    return Sharding(modules, tuple(units.values()), parameters)


def _groups(state: Any) -> list[Any]:
    """Return what a state of fully_shard gathers together; at most one in older versions of torch."""
    several = getattr(state, "_fsdp_param_groups", None)
    return [one for one in ([state._fsdp_param_group] if several is None else several) if one is not None]


def _check(name: str, parameter: Any, managed: Any) -> None:
    """Raise FreezingError where a parameter is divided in a way that its rows cannot be told by."""
    mend = "let fully_shard alone divide the model"
    if managed is None:
        raise FreezingError(f"model: parameter {name!r} is a DTensor that fully_shard does not manage; {mend}")
    placements = [str(type(one).__name__) for one in parameter.placements]
    if sorted(placements) not in (["Shard"], ["Replicate", "Shard"]):
        raise FreezingError(f"model: parameter {name!r} is divided by {', '.join(placements)}; {mend}")
    if managed.offload_to_cpu:
        raise FreezingError(
            f"model: parameter {name!r} is kept on the CPU by fully_shard; leave CPUOffloadPolicy out, or train "
            "without a Freezer"
        )
    if parameter.is_meta:
        raise FreezingError(f"model: parameter {name!r} has no values yet; make the Freezer once it has")
