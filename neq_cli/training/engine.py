"""The training loop: yields records of what happens, knows neither files nor screens, waits for the device rarely."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from neq_cli.errors import FreezingError, TrainingError
from neq_cli.freezing import Freezer, LayerFlops, Observation
from neq_cli.recipe import Recipe
from neq_cli.records import EpochRecord, LayerState, Record, StepProgress
from neq_cli.training.checkpoint import random_states
from neq_cli.training.graph import GraphedStep
from neq_cli.training.loaders import Loaders
from neq_cli.training.tasks import Task

PROGRESS_SECONDS = 0.25
"""Between two ``StepProgress`` records; reading the loss for one waits for the device."""

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Trainer:
    """A run in progress: everything that training changes, built by ``neq_cli.training.session``."""

    recipe: Recipe
    device: torch.device
    channels_last: bool
    model: nn.Module
    loaders: Loaders
    task: Task
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    freezer: Freezer

    def __post_init__(self) -> None:
        self.epoch = 0
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.recipe.precision == "fp16")
        self.forward: nn.Module = torch.compile(self.model) if self.recipe.compile else self.model  # type: ignore[assignment]
        self.averaged = None
        if self.recipe.ema is not None:
            average = get_ema_multi_avg_fn(self.recipe.ema)  # type: ignore[no-untyped-call]
            self.averaged = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)

    @property
    def tested_model(self) -> nn.Module:
        """The network whose accuracy is reported: the averaged weights where the recipe has ``ema``."""
        return self.averaged.module if self.averaged is not None else self.model

    def run(self) -> Iterator[Record]:
        """Train the epochs that are left; yields progress and one ``EpochRecord`` per epoch.

        Raises TrainingError where the loss is not finite, the device's memory is full or the policy's answer is wrong.
        """
        while self.epoch < self.recipe.epochs:
            epoch = self.epoch + 1
            try:
                yield from self._run_epoch(epoch)
            except torch.OutOfMemoryError as error:
                raise TrainingError(f"epoch {epoch}: {self.device} is out of memory; lower batch_size") from error
            except FreezingError as error:
                raise TrainingError(f"epoch {epoch}: {error}") from error

    def _run_epoch(self, epoch: int) -> Iterator[Record]:
        started, bookkeeping_before = time.perf_counter(), self.freezer.bookkeeping_seconds
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        trained = dict(self.freezer.trainable)
        trained_on = yield from self._train(epoch)
        train_seconds = time.perf_counter() - started
        flops = self.freezer.flops()  # now that it is known which kernels ran
        score = self.task.metric.removeprefix("test_")
        tested_on: Mapping[str, float] = {"loss": math.nan, score: math.nan}
        if epoch % self.recipe.eval_every == 0 or epoch == self.recipe.epochs:
            tested_on = yield from self._test(epoch)
        yield StepProgress(epoch, 0, 1, "probe", math.nan, trained_on["loss"])
        probe_started = time.perf_counter()
        observations = self.freezer.step()
        probe_seconds = time.perf_counter() - probe_started
        probe_seconds += self.freezer.bookkeeping_seconds - bookkeeping_before
        if self.scheduler is not None:
            self.scheduler.step()
        self.epoch = epoch
        layers = tuple(
            _layer_state(name, self.freezer.layers[name].kind, trained[name], observation, flops.layers[name])
            for name, observation in observations.items()
        )
        metrics = {
            "epoch": epoch,
            "lr": learning_rate,
            **{f"train_{name}": value for name, value in trained_on.items()},
            **{f"test_{name}": value for name, value in tested_on.items()},
            "neurons": sum(layer.neurons for layer in layers),
            "frozen": sum(layer.frozen for layer in layers),
            "flops_paper": flops.paper,
            "flops_executed": flops.executed,
            "flops_paper_dense": flops.paper_dense,
            "flops_executed_dense": flops.executed_dense,
            "images_per_second": len(self.loaders.train) * self.recipe.batch_size / train_seconds,
            "epoch_seconds": time.perf_counter() - started,
            "probe_seconds": probe_seconds,
        }
        yield EpochRecord(epoch, metrics, layers)

    def _train(self, epoch: int) -> Generator[Record, None, dict[str, float]]:
        """One pass over the training data; returns its metrics."""
        self.model.train()
        self.loaders.start_epoch(epoch)
        steps, group = len(self.loaders.train), self.recipe.gradient_accumulation
        totals = self.task.new_totals(self.device)
        # The first step whose loss was not finite, kept on the device: looking at every loss would wait every step.
        first_bad = torch.full((), steps + 1, device=self.device)
        started = shown = time.perf_counter()
        graphed = GraphedStep(partial(self._whole_step, totals)) if self.recipe.cuda_graph else None
        for step, (inputs, targets) in enumerate(self.loaders.train, 1):
            inputs, targets = self._to_device(inputs), self._to_device(targets)
            if graphed is not None:
                loss = graphed(inputs, targets)
            else:
                # The last group of an epoch may be smaller.
                batches = min(group, steps - (step - 1) // group * group)
                loss = self._backward(inputs, targets, totals, batches)
                if step % group == 0 or step == steps:
                    self._update()
            if self.averaged is not None and (step % group == 0 or step == steps):
                self.averaged.update_parameters(self.model)
            first_bad = torch.where(torch.isfinite(loss), first_bad, first_bad.clamp(max=step))
            now = time.perf_counter()
            if now - shown >= PROGRESS_SECONDS:
                shown = now
                self._check_finite(epoch, first_bad, steps)
                speed = step * self.recipe.batch_size / (now - started)
                yield StepProgress(epoch, step, steps, "train", speed, self.task.results(totals)["loss"])
        self._check_finite(epoch, first_bad, steps)
        return self.task.results(totals)

    def _backward(self, inputs: Tensor, targets: Any, totals: Tensor, batches: int) -> Tensor:
        with self._autocast():
            outputs = self.forward(inputs)
            loss = self.task.loss(outputs, targets)
        self.scaler.scale(loss / batches).backward()  # type: ignore[no-untyped-call]
        self.task.update(totals, outputs, targets, loss)
        return loss.detach()

    def _update(self) -> None:
        if self.recipe.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _whole_step(self, totals: Tensor, inputs: Tensor, targets: Any) -> Tensor:
        loss = self._backward(inputs, targets, totals, 1)
        self._update()
        return loss

    def _test(self, epoch: int) -> Generator[Record, None, dict[str, float]]:
        """One pass over the test data; returns its metrics."""
        model = self.tested_model
        model.eval()
        totals = self.task.new_totals(self.device)
        steps, shown = len(self.loaders.test), -math.inf
        with torch.no_grad():
            for step, (inputs, targets) in enumerate(self.loaders.test, 1):
                inputs, targets = self._to_device(inputs), self._to_device(targets)
                with self._autocast():
                    outputs = model(inputs)
                    loss = self.task.loss(outputs, targets)
                self.task.update(totals, outputs, targets, loss)
                if time.perf_counter() - shown >= PROGRESS_SECONDS:
                    shown = time.perf_counter()
                    yield StepProgress(epoch, step, steps, "test", math.nan, math.nan)
        return self.task.results(totals)

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST[self.recipe.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.channels_last and tensor.dim() == 4:
            return tensor.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return tensor.to(self.device, non_blocking=True)

    def _check_finite(self, epoch: int, first_bad: Tensor, steps: int) -> None:
        step = int(first_bad.item())
        if step <= steps:
            raise TrainingError(
                f"epoch {epoch}, step {step}: the loss is not a finite number any more; "
                "try a lower optimizer.lr, clip_grad_norm, or precision=fp32"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on: nested tensors and plain values."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "scaler": self.scaler.state_dict(),
            "freezer": self.freezer.state_dict(),
            "random": random_states(),
        }


def _layer_state(name: str, kind: str, trained: Tensor, observation: Observation, flops: LayerFlops) -> LayerState:
    return LayerState(
        name=name,
        kind=kind,
        phi=observation.phi.numpy(),
        delta_phi=observation.delta_phi.numpy(),
        velocity=observation.velocity.numpy(),
        trained=trained.numpy(),
        trainable=observation.trainable.numpy(),
        flops_paper=flops.paper,
        flops_executed=flops.executed,
    )
