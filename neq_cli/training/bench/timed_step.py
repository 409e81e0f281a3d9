"""One training step on one batch, timed by its parts: as the engine does it, but for metrics, averaging and loading."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from neq_cli.freezing.model.observing import map_tensors
from neq_cli.recipe import Recipe
from neq_cli.training.batches.loaders import make_loaders
from neq_cli.training.data.parts import Data
from neq_cli.training.loop.calling import forward_of, parts_of
from neq_cli.training.loop.optimizers import build_optimizer
from neq_cli.training.loop.step import autocast_of, update_weights
from neq_cli.training.loop.tasks import build_task
from neq_cli.training.machine.device import seed_everything
from neq_cli.training.models.build import build_model
from neq_cli.training.sample import check_together

PARTS = ("forward", "backward", "optimizer", "row_keeping")
_SMALL_STEPS = 1e-6
"""The learning rate is multiplied by this: hundreds of steps on one batch shall not change what is measured."""
_SCALE = 2.0**10  # of the loss in fp16: the default starts so high that the first steps are skipped


class Stopwatch:
    """Adds up seconds by part; those of a GPU by its own clock, so that it is not waited for between the parts."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Any]] = [("", self._now())]

    def lap(self, part: str) -> None:
        """Count what passed since the last lap as ``part``."""
        self.marks.append((part, self._now()))

    def read(self) -> dict[str, float]:
        """Return the seconds of every part, once the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, after) in zip(self.marks[:-1], self.marks[1:], strict=True):
            seconds[part] += before.elapsed_time(after) / 1e3 if self.device.type == "cuda" else after - before
        return seconds

    def _now(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.device))
            return event
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


class TimedStep:
    """Model, optimiser and one batch of a recipe on ``device``; weights are random, drawn from the recipe's seed.

    ``inputs``: images [batch, channels, height, width], or whatever else the data yields. Raises RecipeError or
    NeqError where model and data do not fit.
    """

    def __init__(self, recipe: Recipe, device: torch.device, data: Data, *, channels_last: bool = False) -> None:
        self.recipe = recipe
        self.device = device
        seed_everything(recipe.seed, deterministic=recipe.deterministic)
        self.model = build_model(recipe.model, data.num_classes, recipe.task)
        self.task = build_task(recipe.task, recipe.label_smoothing, data.num_classes)
        self.sample = check_together(recipe, self.model, data, self.task)
        self.call = forward_of(self.task, self.model)
        self.model.to(device)
        loaders = make_loaders(data, recipe.batch_size, 0, recipe.seed, device, cache="none")
        self.inputs, self.targets = map_tensors(lambda tensor: tensor.to(device), parts_of(next(iter(loaders.train))))
        self.scaler = torch.amp.GradScaler(device.type, init_scale=_SCALE, enabled=recipe.precision == "fp16")
        self.forward_model: nn.Module = torch.compile(self.model) if recipe.compile else self.model  # type: ignore[assignment]
        self.stopwatch = Stopwatch(device)
        self.lay_out(channels_last=channels_last)

    def lay_out(self, *, channels_last: bool) -> None:
        """Put weights and images into this memory format; the optimiser starts anew."""
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if tensor.dim() == 4:
                # A clone: where the kernel is 1x1, `to` leaves the strides of the other format.
                tensor.data = tensor.data.clone(memory_format=memory_format)
        self.inputs = map_tensors(
            lambda tensor: tensor.clone(memory_format=memory_format) if tensor.dim() == 4 else tensor, self.inputs
        )
        self.channels_last = channels_last
        self.optimizer = build_optimizer(self.recipe.optimizer, self.model)
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * _SMALL_STEPS
        self.model.train()

    def loss(self) -> Tensor:
        """Return the batch's loss, to differentiate."""
        with autocast_of(self.recipe, self.device):
            return self.task.loss(self.call(self.forward_model, self.inputs, self.targets), self.targets)

    def run(self) -> Stopwatch:
        """Take one step, and return its stopwatch."""
        self.stopwatch = Stopwatch(self.device)
        loss = self.loss()
        self.lap("forward")
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.lap("backward")
        update_weights(self.recipe, self.model, self.optimizer, self.scaler)
        self.lap("optimizer")
        return self.stopwatch

    def lap(self, part: str) -> None:
        """Count what passed of the running step since the last lap as ``part``."""
        self.stopwatch.lap(part)

    def saved_for_backward(self) -> int:
        """Return the bytes that a forward pass keeps for the backward pass, beside the model's own tensors."""
        own = {tensor.untyped_storage().data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())}
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            # Not the tensor itself: a node that saves its own output would hold itself, and all of the graph, for ever.
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self.loss()  # while it lives, no storage makes room for another
        del loss
        return sum(saved.values())
