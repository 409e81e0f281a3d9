"""One training step, forward, backward and update, in the recipe's precision; on any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from neq_cli.freezing.model.observing import map_tensors
from neq_cli.freezing.processes.replica import Replica
from neq_cli.freezing.rows.shards import local, whole
from neq_cli.recipe import Recipe
from neq_cli.training.loop.calling import forward_of
from neq_cli.training.loop.tasks import Task
from neq_cli.training.machine.graph import Graph, GraphedStep, captured
from neq_cli.training.startup import Startup

if TYPE_CHECKING:
    from neq_cli.training.processes.divided import Divided

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_of(recipe: Recipe, device: torch.device) -> torch.autocast:
    """Return the context of the recipe's precision."""
    dtype = AUTOCAST[recipe.precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def moved_to(device: torch.device, value: Any, *, channels_last: bool) -> Any:
    """Return a batch's inputs or targets on the device, images in the model's memory format."""

    def moved(tensor: Tensor) -> Tensor:
        memory_format = torch.channels_last if channels_last and tensor.dim() == 4 else torch.preserve_format
        return tensor.to(device, non_blocking=True, memory_format=memory_format)

    return map_tensors(moved, value)


@torch.no_grad()
def test_batch(
    task: Task, outputs_of: Callable[[], Any], targets: Any, totals: Tensor, autocast: torch.autocast
) -> Any:
    """Add what a batch's ``targets`` and outputs come to to the ``totals`` of a test; returns the outputs."""
    with autocast:
        outputs = outputs_of()
        loss = task.loss(outputs, targets)
    task.update(totals, outputs, targets, loss)
    return outputs


def update_weights(
    recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """Have the ``optimizer`` take its step by the gradients there are, clipped where the recipe says so; drop them."""
    if recipe.clip_grad_norm is not None:
        scaler.unscale_(optimizer)
        parameters = [*model.parameters()]
        norm = nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
        # Of a divided model it is the norm over all processes; torch 2.9 would scale by one rounded to seven digits.
        nn.utils.clip_grads_with_norm_(parameters, recipe.clip_grad_norm, whole(norm))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def averaged_of(recipe: Recipe, model: nn.Module) -> AveragedModel | None:
    """Return what averages the weights of ``model``, None where the recipe has no ``ema``."""
    if recipe.ema is None:
        return None
    average = get_ema_multi_avg_fn(recipe.ema)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


class TrainingStep:
    """What a step changes beside the model: loss scale and averaged weights.

    ``forward`` is ``model``, or what torch.compile made of it. Of several processes either ``replica`` is around it, or
    the model is ``divided``.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        model: nn.Module,
        forward: nn.Module,
        task: Task,
        optimizer: torch.optim.Optimizer,
        replica: Replica | None,
        divided: Divided | None = None,
        *,
        channels_last: bool,
        startup: Startup | None = None,
    ) -> None:
        self.recipe = recipe
        self.device = device
        self.model = model
        self.forward = forward
        self.task = task
        self.call = forward_of(task, model)
        self.optimizer = optimizer
        self.replica = replica
        self.divided = divided
        self.channels_last = channels_last
        self.startup = Startup() if startup is None else startup
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        # A divided model cannot be copied.
        self.averaged = averaged_of(recipe, model) if divided is None else divided.averaged
        self._bytes_a_batch = self._bytes_divided = 0
        self._graphed: GraphedStep | None = None

    def begin_epoch(self, totals: Tensor, bytes_a_batch: int = 0) -> None:
        """Get ready for the sets now in force; metrics are added up in ``totals``.

        ``bytes_a_batch``: of gradients, that a process hands over where the model is divided.
        """
        self.totals, self._bytes_a_batch = totals, bytes_a_batch
        if self.replica is not None:
            self.forward = self.replica.current()
        self._graphed = GraphedStep(self._whole, capture=self._capture) if self.recipe.cuda_graph else None

    def train(self, inputs: Any, targets: Any, *, batches: int, update: bool) -> Tensor:
        """Train on one of the ``batches`` of an update, which follows the last of them; returns the loss, detached."""
        inputs, targets = self.to_device(inputs), self.to_device(targets)
        if self._graphed is not None:
            loss = self._graphed(inputs, targets)
        else:
            loss = self._backward(inputs, targets, batches, update=update)
            if update:
                self._update()
        if update and self.averaged is not None:
            self._average(self.averaged)
        return loss

    def _whole(self, inputs: Any, targets: Any) -> Tensor:
        loss = self._backward(inputs, targets, 1, update=True)
        self._update()
        return loss

    def _capture(self, step: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        with self.startup.part("capturing the step"):
            return captured(step)

    def _backward(self, inputs: Any, targets: Any, batches: int, *, update: bool) -> Tensor:
        # Gradients of several batches are sent once, with the last; but with every one where the model is divided, as a
        # process would have to hold those of the whole model in between.
        wrapper = self.forward if isinstance(self.forward, DistributedDataParallel) and not update else None
        with wrapper.no_sync() if wrapper is not None else nullcontext():
            with self.autocast():
                outputs = self.call(self.forward, inputs, targets)
                loss = self.task.loss(outputs, targets)
            self.scaler.scale(loss / batches).backward()  # type: ignore[no-untyped-call]
        self._bytes_divided += self._bytes_a_batch
        self.task.update(self.totals, outputs, targets, loss)
        return loss.detach()

    def _update(self) -> None:
        update_weights(self.recipe, self.model, self.optimizer, self.scaler)

    def _average(self, averaged: AveragedModel) -> None:
        """Do what ``averaged.update_parameters`` does; from the second time on that would wait for the device."""
        if not averaged.n_averaged:  # it lies on the CPU
            averaged.update_parameters(self.model)
            return
        by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        olds, news = (chain(one.parameters(), one.buffers()) for one in (averaged.module, self.model))
        for old, new in zip(olds, news, strict=True):
            pairs = by_type.setdefault(old.dtype, ([], []))
            pairs[0].append(local(old.detach()))
            pairs[1].append(local(new.detach()))
        for pairs in by_type.values():
            cast(Any, averaged.multi_avg_fn)(*pairs, averaged.n_averaged)
        averaged.n_averaged += 1

    @property
    def tested_model(self) -> nn.Module:
        """The network whose accuracy is reported: the averaged weights where the recipe has ``ema``."""
        return self.averaged.module if self.averaged is not None else self.model

    @property
    def bytes_sent(self) -> int:
        """Bytes of gradients that this process has handed over to be averaged so far."""
        return self.replica.bytes_sent if self.replica is not None else self._bytes_divided

    def autocast(self) -> torch.autocast:
        """Return the context of the recipe's precision."""
        return autocast_of(self.recipe, self.device)

    def to_device(self, value: Any) -> Any:
        """Return a batch's inputs or targets where they are trained on, in the model's memory format."""
        return moved_to(self.device, value, channels_last=self.channels_last)
