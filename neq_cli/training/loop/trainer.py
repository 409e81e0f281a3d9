"""The training loop: yields records of what happens, knows neither files nor screens, waits for the device rarely."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neq_cli.errors import FreezingError, TrainingError
from neq_cli.events import Pause, Record, StepProgress
from neq_cli.freezing import Freezer
from neq_cli.freezing.processes.replica import Replica
from neq_cli.freezing.rows.shards import whole
from neq_cli.recipe import Recipe
from neq_cli.training.batches.loaders import Loaders
from neq_cli.training.loop.calling import parts_of
from neq_cli.training.loop.course import Course
from neq_cli.training.loop.divergence import FiniteLosses, check_weights
from neq_cli.training.loop.epoch_record import Scores, epoch_record
from neq_cli.training.loop.running_epoch import Clock, RunningEpoch
from neq_cli.training.loop.schedules import Schedule, steps_before_last_drop
from neq_cli.training.loop.step import TrainingStep, test_batch
from neq_cli.training.loop.tasks import Task, checked_results
from neq_cli.training.loop.trainer_state import restore, state_of
from neq_cli.training.machine.energy.measured import Energy
from neq_cli.training.machine.full_memory import full_memory_named
from neq_cli.training.processes.joined import Agreement, Processes
from neq_cli.training.startup import Startup

if TYPE_CHECKING:
    from neq_cli.training.processes.divided import Divided

PROGRESS_SECONDS = 0.25
"""Between two ``StepProgress`` records; reading the loss for one waits for the device."""
_FEWEST_PROGRESS = 8
"""Records of an epoch that would be too short for so many: as many, as far as the last one tells how long it is."""
_LEAST_PROGRESS_SECONDS = 0.02

GO_ON, SAVE, STOP = 0, 1, 2
"""What may be wished for between two steps; of several processes' wishes the largest counts."""


@dataclass
class Trainer:
    """A run in progress: everything that training changes, built by ``neq_cli.training.session``.

    ``epoch`` counts what observations have ended: passes over the training data, or ``probe_every`` optimiser steps;
    ``passes`` those over the data alone. ``wish`` is asked between steps whether to ``SAVE`` or ``STOP``; what all
    agree on is yielded as ``Pause``.
    """

    recipe: Recipe
    device: torch.device
    channels_last: bool
    model: nn.Module
    loaders: Loaders
    task: Task
    optimizer: torch.optim.Optimizer
    course: Course
    schedule: Schedule
    freezer: Freezer
    processes: Processes = field(default_factory=Processes)
    startup: Startup = field(default_factory=Startup)
    energy: Energy = field(default_factory=Energy)
    divided: Divided | None = None
    wish: Callable[[], int] = lambda: GO_ON

    def __post_init__(self) -> None:
        self.epoch = self.passes = self.updates = 0
        self.so_far: RunningEpoch | None = None
        self.batches: Iterator[Any] | None = None  # of the pass that runs
        self.loaded = False
        self.agreement = Agreement(self.processes)
        self.progress_seconds = PROGRESS_SECONDS
        self.begun_before_drop = 0
        if self.recipe.stop_when_frozen is not None:
            steps = steps_before_last_drop(self.recipe.scheduler, self.course.passes, self.course.updates)
            self.begun_before_drop = self.course.begun_before(steps)
        forward: Any = torch.compile(self.model) if self.recipe.compile else self.model
        replica = None
        if self.processes.group is not None and self.divided is None:
            devices = [self.device.index] if self.device.type == "cuda" else None
            replica = Replica(forward, self.freezer, self.processes.group, device_ids=devices)
        self.step = TrainingStep(
            self.recipe,
            self.device,
            self.model,
            forward,
            self.task,
            self.optimizer,
            replica,
            self.divided,
            channels_last=self.channels_last,
            startup=self.startup,
        )

    @property
    def tested_model(self) -> nn.Module:
        """The network whose accuracy is reported: the averaged weights where the recipe has ``ema``."""
        return self.step.tested_model

    def whole_weights(self) -> dict[str, Tensor]:
        """Return what is tested, whole, in the first process, and nothing in the others; all call it together."""
        found = {}
        for name, tensor in self.tested_model.state_dict().items():
            everything = whole(tensor)
            if self.processes.first:
                found[name] = everything.cpu() if self.divided is not None else everything
        return found

    @property
    def ended(self) -> bool:
        """Whether nothing is left to train: all passes are made, or ``stop_when_frozen`` ends the run here."""
        return self.passes >= self.recipe.epochs or self._rested(self.epoch)

    @property
    def planned(self) -> int:
        """How many observations there are when all is trained; more than a straight run has where one was extended."""
        every = self.course.probe_every
        if every is None:
            return self.recipe.epochs
        begun = self.updates - (self.so_far.updates if self.so_far is not None else 0)
        return self.epoch - (begun - self.course.passes * self.course.updates) // every

    def _rested(self, epoch: int, more: int = 0) -> bool:
        """Whether nothing has learnt for long enough, at a rate that stays."""
        wanted, rest = self.recipe.stop_when_frozen, self.freezer.at_rest + more
        return wanted is not None and min(rest, epoch - self.begun_before_drop) >= wanted

    def run(self) -> Iterator[Record | Pause]:
        """Train what is left; yields progress, pauses and one ``EpochRecord`` per observation.

        Raises TrainingError where the loss is not finite, memory is full or the policy's answer is wrong.
        """
        while not self.ended:
            place = f"{self.recipe.unit} {self.epoch + 1}"
            try:
                with full_memory_named(place):
                    yield from self._run_epoch(self.epoch + 1)
            except FreezingError as error:
                raise TrainingError(f"{place}: {error}") from error

    def _run_epoch(self, epoch: int) -> Iterator[Record | Pause]:
        if self.so_far is None:
            self.so_far = RunningEpoch(epoch, self.task.new_totals(self.device))
        so_far, started, before = self.so_far, time.perf_counter(), self.so_far.seconds
        if math.isnan(so_far.lr):
            so_far.lr = so_far.last_lr = self._learning_rate
        self.energy.begin()
        for record in self._train(so_far):
            so_far.seconds = before + time.perf_counter() - started
            yield record
        # Buffers, such as batch norm's statistics, are each process's own during an epoch.
        self.processes.copy_from_first(self.model.buffers())
        if self.step.averaged is not None:
            self.processes.copy_from_first(self.step.averaged.buffers())
        trained_on = checked_results(self.task, self.processes.sum(so_far.totals.clone()))
        tested_on: Mapping[str, float] = dict.fromkeys(trained_on, math.nan)  # tables have the same columns every epoch
        pass_ends = not self._left(so_far)
        is_last = pass_ends and self.passes + 1 == self.recipe.epochs
        if epoch % self.recipe.eval_every == 0 or is_last or (self.freezer.all_frozen and self._rested(epoch, 1)):
            tested_on = yield from self._test(so_far)
            self.schedule.after_test(tested_on[self.task.metric.removeprefix("test_")])
        yield StepProgress(epoch, 0, 1, "probe", math.nan, trained_on["loss"])
        place = self._place(so_far)
        if pass_ends:
            self._end_pass(so_far)  # first: a policy may go by the next epoch's learning rate
        probe_started = time.perf_counter()
        self.freezer.step()
        probe_seconds = so_far.bookkeeping_seconds + time.perf_counter() - probe_started
        so_far.joules += self.energy.lap()
        self.epoch = epoch
        self.so_far = None if pass_ends else so_far.next(self.task.new_totals(self.device))
        self.startup.finish()
        took = so_far.train_seconds / _FEWEST_PROGRESS
        self.progress_seconds = min(max(took, _LEAST_PROGRESS_SECONDS), PROGRESS_SECONDS)
        yield epoch_record(
            so_far,
            Scores(trained_on, tested_on),
            self.freezer,
            place=place,
            by_step=self.recipe.scheduler.interval == "step",
            epoch_seconds=before + time.perf_counter() - started,
            probe_seconds=probe_seconds,
            energy=self.energy.row(so_far.joules),
        )

    def _place(self, so_far: RunningEpoch) -> dict[str, float | int]:
        """Return the columns that say where an observation by steps is taken; none where each ends a pass."""
        if self.course.probe_every is None:
            return {}
        images = so_far.pass_images + self._left(so_far) * self._images_per_step
        return {"step": self.updates, "passed_epochs": self.passes + so_far.pass_images / images}

    def _left(self, so_far: RunningEpoch) -> int:
        """Return how many batches of the pass are left to this process, and to each other one."""
        return self.loaders.steps(so_far.pass_images)

    def _end_pass(self, so_far: RunningEpoch) -> None:
        self.passes += 1
        so_far.pass_steps = so_far.pass_images = 0
        self.batches = None
        self.schedule.after_pass()

    def _train(self, so_far: RunningEpoch) -> Iterator[Record | Pause]:
        """All steps up to the next observation."""
        yield from self._train_pass(so_far)
        while not self._complete(so_far):  # steps that reach over the end of a pass
            self._end_pass(so_far)
            yield from self._train_pass(so_far)

    def _complete(self, so_far: RunningEpoch) -> bool:
        """Whether all is trained that the observation is to follow."""
        every = self.course.probe_every
        if every is not None and so_far.updates >= every:
            return True
        return not self._left(so_far) and (every is None or self.passes + 1 == self.recipe.epochs)

    def _train_pass(self, so_far: RunningEpoch) -> Iterator[Record | Pause]:
        """Train until the observation or, before that, the end of the pass."""
        left = self._left(so_far)
        if not left or self._complete(so_far):
            return
        epoch, group, images = so_far.epoch, self.recipe.gradient_accumulation, self._images_per_step
        steps = so_far.pass_steps + left
        self.model.train()
        if self.batches is None:
            self.loaders.start_epoch(self.passes + 1, so_far.pass_images)
            self.batches = iter(self.loaders.train)
        if not self.loaded:  # the first batch may wait for all images to be decoded
            yield self._progress(so_far, "load")
        batch = self._next_batch(so_far)
        yield self._progress(so_far, "train")
        self.step.begin_epoch(so_far.totals, 0 if self.divided is None else self.divided.bytes_sent(self.freezer))
        clock = Clock(so_far, self.step, self.freezer)
        losses = FiniteLosses(self.recipe, epoch, self.device)
        shown = time.perf_counter()
        while True:
            step = so_far.pass_steps + 1
            update = step % group == 0 or step == steps
            # The last group of an epoch may be smaller.
            in_group = min(group, steps - (step - 1) // group * group)
            with self.startup.step(compiled=self.recipe.compile):
                loss = self.step.train(*parts_of(batch), batches=in_group, update=update)
            so_far.add(images, update=update)
            if update:
                self.updates += 1
                if self.recipe.scheduler.interval == "step":
                    so_far.last_lr = self._learning_rate
                self.schedule.after_step()
            losses.add(loss, so_far.steps)
            agreed, ends = GO_ON, self._complete(so_far) or step == steps
            if update:
                agreed = self.agreement.of(self.wish()) if not ends else self.agreement.finish()
            now = time.perf_counter()
            if now - shown >= self.progress_seconds or agreed or ends:
                losses.check()
                clock.read()
            if agreed or ends:
                largest = int if self.divided is None else self.processes.largest
                check_weights(self.recipe, self.model, epoch, so_far.steps, largest)
            if now - shown >= self.progress_seconds or agreed == STOP:
                shown = now
                speed = so_far.images / so_far.train_seconds
                yield self._progress(so_far, "train", speed, checked_results(self.task, so_far.totals)["loss"])
            if agreed:
                yield self._pause(so_far, stop=agreed == STOP)
                clock.start()
            if ends:
                break
            batch = self._next_batch(so_far)
        if step == steps:
            next(self.batches, None)  # which lets go of what the pass held

    def _pause(self, so_far: RunningEpoch, *, stop: bool) -> Pause:
        so_far.joules += self.energy.lap()  # what is saved has all that was spent
        return Pause(so_far.epoch, so_far.steps, stop=stop)

    def _next_batch(self, so_far: RunningEpoch) -> Any:
        assert self.batches is not None, "the pass has begun"
        started = time.perf_counter()
        batch = next(self.batches)
        if self.loaded:
            so_far.data_seconds += time.perf_counter() - started
        self.loaded = True
        return batch

    def _progress(
        self, so_far: RunningEpoch, phase: str, images_per_second: float = math.nan, loss: float = math.nan
    ) -> StepProgress:
        """Return where the training stands, in batches of a pass or in the optimiser steps that are observed."""
        if self.course.probe_every is None:
            step, steps = so_far.steps, so_far.steps + self._left(so_far)
        else:
            step, left = so_far.updates, self.course.passes * self.course.updates - self.updates
            steps = min(self.course.probe_every, step + left)
        return StepProgress(so_far.epoch, step, steps, phase, images_per_second, loss)

    @property
    def _learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def _images_per_step(self) -> int:
        return self.recipe.batch_size * self.processes.count

    def _test(self, so_far: RunningEpoch) -> Generator[Record | Pause, None, dict[str, float]]:
        """One pass over the test data; returns its metrics."""
        model = self.tested_model
        model.eval()
        totals = self.task.new_totals(self.device)
        steps, shown = len(self.loaders.test), -math.inf
        idle = 0 if self.divided is None else self.processes.largest(steps) - steps
        for step, batch in enumerate(self.loaders.test, 1):
            inputs, targets = map(self.step.to_device, parts_of(batch))
            test_batch(
                self.task, partial(self.step.call, model, inputs, targets), targets, totals, self.step.autocast()
            )
            if time.perf_counter() - shown >= PROGRESS_SECONDS:
                shown = time.perf_counter()
                yield StepProgress(so_far.epoch, step, steps, "test", math.nan, math.nan)
                # Of several processes, which may have more batches than others, all end the epoch first.
                if self.processes.count == 1 and self.wish() == STOP:
                    model.train()
                    yield self._pause(so_far, stop=True)
        if self.divided is not None:
            self._run_along(model, idle)
            self.divided.reshard()
        # What is saved and averaged is what trains: some modules merge their weights in eval mode.
        model.train()
        return checked_results(self.task, self.processes.sum(totals))

    @torch.no_grad()
    def _run_along(self, model: nn.Module, passes: int) -> None:
        """Run a divided ``model`` on anything so often: others test more batches, and gather weights from all."""
        for _ in range(passes):
            inputs, targets = map(self.step.to_device, parts_of(next(iter(self.loaders.probe))))
            with self.step.autocast():
                self.step.call(model, inputs, targets)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on, between two updates: nested tensors and plain values.

        All processes call it together; the first one's is whole.
        """
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``, on any number of processes; all of them need the state.

        Raises whatever a state that is not of this recipe leads to; then the trainer is of no further use.
        """
        restore(self, state)
