"""Steps of a recipe with and without frozen neurons, measured by turns in one process, beside plain PyTorch's."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, cast

import torch

from neq_cli import __version__
from neq_cli.errors import FreezingError
from neq_cli.freed_memory import keep_freed_memory
from neq_cli.freezing import Freezer
from neq_cli.freezing.backward.dispatch import Dispatch
from neq_cli.freezing.backward.sliced import BackwardMode
from neq_cli.recipe import Recipe
from neq_cli.training.bench.frozen_sets import Rig, flops_ratio, kernels, make_arms
from neq_cli.training.bench.noise import find_data
from neq_cli.training.bench.options import BenchOptions
from neq_cli.training.bench.samples import LayerUse, Measurement, Subject, measurements, together
from neq_cli.training.bench.timed_step import TimedStep
from neq_cli.training.data.parts import Data
from neq_cli.training.errors import of_the_recipe
from neq_cli.training.machine.device import describe_device, resolve_device
from neq_cli.training.machine.full_memory import full_memory_named
from neq_cli.training.machine.paired_ratio import paired_ratio

Show = Callable[[int, int, str], None]
"""Called with the visits done, all of them, and what comes next."""

_WARMING = 2
"""Steps before the first look at an arm: kernels are chosen in the first one."""
_SETTLING = 1
"""Untimed steps of every later visit: the first one after the sets changed pays what an epoch pays once."""
_VISIT_SECONDS = 0.2
"""Short steps are repeated for so long in every visit, but not more often than this."""
_MOST_REPEATS = 20
_PLAIN_EVERY = 5
"""Arms between two visits to the plain step: what else the machine does shall touch both alike."""
_FORMAT_ROUNDS = 6


@full_memory_named("neq bench")
def bench(recipe: Recipe, options: BenchOptions, show: Show = lambda done, visits, what: None) -> dict[str, Any]:
    """Measure ``recipe``'s training step and return what `neq bench --json` prints, but for the recipe's name.

    Raises NeqError where model, data and recipe do not fit, or the device's memory is full.
    """
    device = resolve_device(recipe.device)
    if device.type == "cpu":
        keep_freed_memory()  # as training does, and for plain PyTorch too
    show(0, 1, "building")
    try:
        data, synthetic = find_data(recipe)
        formats = time_formats(recipe, device, data, show) if recipe.channels_last == "auto" else {}
        pairs = zip(formats.get(True, ()), formats.get(False, ()), strict=True)
        ratio = paired_ratio([last / plain for last, plain in pairs]) if formats else None
        # In a near tie contiguous, as training decides.
        channels_last = bool(recipe.channels_last) if ratio is None else ratio.high < 1

        def make_step() -> TimedStep:
            return TimedStep(recipe, device, data, channels_last=channels_last)

        measured = Bench(device, make_step, options, show).run()
    except FreezingError as error:
        raise of_the_recipe(error) from error
    return {
        "model": recipe.model.name or recipe.model.entrypoint,
        "data": data.name,
        "synthetic_data": synthetic,
        "batch_size": recipe.batch_size,
        "image_shape": None if data.image_shape is None else list(data.image_shape),
        "optimizer": recipe.optimizer.name,
        "precision": recipe.precision,
        "compile": recipe.compile,
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "neq": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "torchvision")},
        },
        "channels_last": channels_last,
        "channels_last_ms": statistics.median(formats[True]) if formats else None,
        "contiguous_ms": statistics.median(formats[False]) if formats else None,
        "channels_last_ratio_interval": None if ratio is None else [ratio.low, ratio.high],
        "channels_last_ratio_confidence": None if ratio is None else ratio.confidence,
        **measured,
    }


def time_formats(recipe: Recipe, device: torch.device, data: Data, show: Show) -> dict[bool, list[float]]:
    """Return the plain step's median milliseconds of every round, by whether weights and images are channels_last."""
    step = TimedStep(recipe, device, data)
    milliseconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(_FORMAT_ROUNDS):
        for place, channels_last in enumerate((False, True) if number % 2 else (True, False)):
            show(2 * number + place, 2 * _FORMAT_ROUNDS, "memory formats of the dense step")
            step.lay_out(channels_last=channels_last)
            for _ in range(_SETTLING if number else _WARMING):
                warm = step.run().read()
            found = [sum(step.run().read().values()) for _ in range(repeats(warm))]
            milliseconds[channels_last].append(1e3 * statistics.median(found))
    return milliseconds


def repeats(step: Mapping[str, float]) -> int:
    """Return how many steps make a visit, where one takes these seconds by part."""
    return max(1, min(_MOST_REPEATS, int(_VISIT_SECONDS / sum(step.values()))))


class Bench:
    """Three training steps with a model each: the plain one, and one for each mode, whose frozen sets change."""

    def __init__(
        self, device: torch.device, make_step: Callable[[], TimedStep], options: BenchOptions, show: Show
    ) -> None:
        self.device = device
        self.options = options
        self.show = show
        if device.type == "cuda":
            make_step().run().read()  # takes what no model gives back, such as cuBLAS's workspaces: no rig's to hold
        self.plain_rig = Rig(device, make_step, None, Dispatch())
        recipe = self.plain_rig.step.recipe
        dispatch = Dispatch(fixed=recipe.deterministic)
        self.rigs = {mode: Rig(device, make_step, cast(BackwardMode, mode), dispatch) for mode in options.modes}
        freezer = next(rig.freezer for rig in self.rigs.values())
        assert freezer is not None
        self.anatomy = freezer.anatomy
        arms = make_arms(self.anatomy, options, recipe.seed)
        self.plain = [Subject(None)]
        self.subjects: list[Subject] = []
        self.order = [self.plain[0]]  # the visits of a round
        for first in range(0, len(arms), _PLAIN_EVERY):
            self.plain.append(Subject(None))
            beside = (self.plain[-2], self.plain[-1])
            group = [Subject(arm, beside=beside) for arm in arms[first : first + _PLAIN_EVERY]]
            self.subjects += group
            self.order += [*group, self.plain[-1]]

    def run(self) -> dict[str, Any]:
        """Look at every arm once, then measure them round by round; returns the report's second half."""
        once, rounds = [self.plain[0], *self.subjects], self.options.rounds
        visits = len(once) + rounds * len(self.order)
        warm = []
        for number, subject in enumerate(once):
            self.show(number, visits, f"warm-up: {subject.label}")
            warm.append(self._look(subject))
        steps_per_visit = repeats(warm[0])
        for number in range(rounds):
            for place, subject in enumerate(self.order, len(once) + number * len(self.order)):
                self.show(place, visits, f"round {number + 1} of {rounds}: {subject.label}")
                self._measure(subject, steps_per_visit)
        self.show(visits, visits, "done")
        plain = together(self.plain)
        found = [one for subject in self.subjects for one in measurements(subject, plain)]
        return {
            "rounds": rounds,
            "steps_per_round": steps_per_visit,
            "neurons": sum(layer.neurons for layer in self.anatomy.neurons.layers.values()),
            "dense": {
                **plain.times(),
                "saved_for_backward_bytes": plain.saved_for_backward,
                "peak_memory_bytes": plain.peak_memory,
            },
            "measurements": [asdict(one) for one in sorted(found, key=self._place)],
        }

    def _place(self, one: Measurement) -> tuple[int, int, int]:
        options = self.options
        by_mode, by_order = options.modes.index(one.backward), options.orders.index(one.order)
        return by_mode, by_order, options.fractions.index(one.frozen_fraction)

    def _rig(self, subject: Subject) -> Rig:
        return self.plain_rig if subject.arm is None else self.rigs[subject.arm.mode]

    def _look(self, subject: Subject) -> dict[str, float]:
        """Warm up, and find what does not change from step to step; returns the seconds of a step by part."""
        rig = self._rig(subject)
        with rig.in_force(subject.arm):
            for _ in range(_WARMING):
                warm = rig.step.run().read()
            subject.saved_for_backward = rig.step.saved_for_backward()
            if rig.freezer is not None:
                subject.flops_ratio = flops_ratio(rig.freezer)
                subject.layers = tuple(_layer_uses(rig.freezer))
        return warm

    def _measure(self, subject: Subject, steps: int) -> None:
        rig = self._rig(subject)
        with rig.in_force(subject.arm):
            for _ in range(_SETTLING):
                rig.step.run().read()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            # Read at the end: a GPU is not to run dry between steps.
            watches = [rig.step.run() for _ in range(steps)]
            subject.visits.append([watch.read() for watch in watches])
            if self.device.type == "cuda":
                others = sum(other.resident for other in (self.plain_rig, *self.rigs.values()) if other is not rig)
                subject.peak_memory = max(
                    subject.peak_memory or 0, torch.cuda.max_memory_allocated(self.device) - others
                )


def _layer_uses(freezer: Freezer) -> Iterator[LayerUse]:
    for name, used in kernels(freezer).items():
        layer = freezer.layers[name]
        frozen = layer.neurons - int(freezer.trainable[name].sum())
        yield LayerUse(name, layer.kind, layer.neurons, frozen, used.kernel, used.rows_computed, used.reason)
