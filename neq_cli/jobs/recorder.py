"""A run directory written from any training loop, for `neq inspect`, `compare` and `report` to read like any other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from neq_cli.errors import FreezingError
from neq_cli.events import ENERGY_COLUMNS, EpochRecord, RunResumed, RunStarted
from neq_cli.jobs.recorded_recipe import check_same_run, recorded_recipe
from neq_cli.jobs.recording import environment_of, keep_kernel_choices, status_of
from neq_cli.jobs.time_shares import MUCH_PROBING, TimeShare
from neq_cli.jobs.told_columns import ToldColumns
from neq_cli.jobs.tracking.libraries import trackers_problem
from neq_cli.jobs.tracking.teller import Tracking
from neq_cli.runs.store.disk import writing
from neq_cli.runs.store.run import past_epochs, read_run
from neq_cli.runs.store.writer import RunWriter
from neq_cli.runs.views.live.progress import Mode, Progress, Silent, choose_progress
from neq_cli.text import counted

if TYPE_CHECKING:
    from neq_cli.freezing import Freezer
    from neq_cli.training.machine.energy.measured import Energy

_LESS = "call freezer.step() less often, or give the Freezer fewer inputs to probe with"


class Recorder:
    """Writes the run directory of a training loop of one's own, for ``neq inspect``, ``compare`` and ``report``.

    Make it once the Freezer stands and use it as a context manager, whose end tells how the run ended; call ``epoch``
    after every ``freezer.step()``. ``name``, ``seed`` and ``settings`` (plain values, nested as one likes) are what
    runs are told apart by: those that differ in ``seed`` alone are one configuration. ``metric``: the column that tells
    how good the model is, ``lower_is_better`` where it is an error. ``epochs``: how many are planned, if that is known.

    ``resume=True`` goes on in a directory that the loop recorded before, once the Freezer has the state it saved
    (``load_state_dict``): what was recorded after that is removed. ``progress``: "rich", "plain" or "auto" as in
    `neq train`, which need ``epochs``. ``track``: trackers as in a recipe, ["tensorboard"]. ``energy`` and
    ``grams_per_kwh`` are a recipe's: the joules of every epoch; of several processes all then make a Recorder and call
    ``epoch``, which adds theirs up. One process at a time writes a directory; of several that train together, the first
    does.

    Raises FreezingError for what is wrong in a call, RunDirectoryError for what is wrong on the disk.
    """

    def __init__(
        self,
        freezer: Freezer,
        run_directory: str | Path,
        *,
        name: str,
        metric: str,
        seed: int | None = None,
        settings: Mapping[str, Any] | None = None,
        lower_is_better: bool = False,
        epochs: int | None = None,
        resume: bool = False,
        progress: Mode = "off",
        track: Sequence[str] = (),
        energy: bool = False,
        grams_per_kwh: float | None = None,
    ) -> None:
        from neq_cli.freezing.processes.counting import process_number

        if progress != "off" and epochs is None:
            raise FreezingError(f"Recorder: progress {progress!r} tells how long the rest will take; give epochs too")
        if (problem := trackers_problem(track)) is not None:
            raise FreezingError(f"Recorder: track: {problem}")
        self.freezer = freezer
        self.metric = metric
        self.path = Path(run_directory)
        self.writer: RunWriter | None = None
        self.progress: Progress = Silent()
        self.tracking = Tracking((), None)
        self._columns = ToldColumns(metric)
        self._recorded = 0  # epochs
        self._probing = TimeShare("probe_seconds", MUCH_PROBING, "probing", _LESS)
        self._stack = ExitStack()
        self._energy = _energy_of(freezer, grams_per_kwh, asked=energy)
        self._stack.callback(self._energy.close)
        if process_number() == 0:
            notes = self._energy.notes
            started = _started(freezer, name, metric, epochs, notes, lower_is_better=lower_is_better)
            yaml = recorded_recipe(freezer, name, seed, epochs, settings or {})
            try:
                self._open(yaml, started, resume=resume, progress=progress, track=track)
            except BaseException:
                self._stack.close()
                raise
        self._energy.begin()
        self._since = time.perf_counter()

    def epoch(self, **columns: float) -> None:
        """Record the epoch that ``freezer.step()`` has just ended, with numbers that go into metrics.csv by name.

        The same ones every time; what is left out, or NaN, is an empty cell.
        """
        passed = self.freezer.passed
        joules = self._energy.lap()  # of all processes
        if self.writer is None:
            return
        if passed is None or passed.epoch != self._recorded + 1:
            recorded = counted(self._recorded, "epoch") + (" is" if self._recorded == 1 else " are")
            raise FreezingError(
                f"Recorder.epoch: {recorded} recorded and the Freezer has seen {self.freezer.epoch}; "
                "call it once after every freezer.step()"
            )
        from neq_cli.training.loop.epoch_record import layer_states, what_trained

        now = time.perf_counter()
        layers = layer_states(self.freezer, passed)
        metrics = {
            **self._columns.row(columns, passed.epoch),
            **what_trained(layers, passed),
            "epoch_seconds": now - self._since,
            "probe_seconds": passed.probe_seconds,
            **self._energy.row(joules),
        }
        record = EpochRecord(passed.epoch, {"epoch": passed.epoch, **metrics}, layers)
        self.writer.write_epoch(record)
        self._recorded, self._since = passed.epoch, now
        self.progress.show(record)
        self.tracking.show(record)
        for note in (self._probing.note(record.metrics), self._energy.failure_note(f"epoch {passed.epoch}")):
            if note is not None:
                self.progress.message(note)
                self.writer.write_note(note)

    def note(self, text: str) -> None:
        """Add a line to what the run says of itself."""
        if self.writer is not None:
            self.writer.write_note(text)

    def close(self) -> None:
        """End the run as finished."""
        self.__exit__(None, None, None)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.freezer.dispatch.on_choice = None
        self._stack.__exit__(kind, error, traceback)
        self.writer = None

    def _open(
        self, recipe_yaml: str, started: RunStarted, *, resume: bool, progress: Mode, track: Sequence[str]
    ) -> None:
        from neq_cli.freezing.probe import device_of
        from neq_cli.freezing.processes.counting import process_count

        environment = environment_of(self.freezer, device_of(self.freezer.model), process_count())
        environment |= self._energy.environment
        epoch = self.freezer.epoch
        seen = counted(epoch, "epoch")
        if resume:
            writer = self._stack.enter_context(RunWriter.reopen(self.path))
            if writer.is_new and epoch:
                raise FreezingError(
                    f"Recorder: {self.path}: nothing is recorded there, and the Freezer has seen {seen}; give "
                    "the directory that its earlier epochs are in"
                )
            self._check_energy(epoch)
            if not writer.is_new and not epoch:
                check_same_run(self.path, recipe_yaml, started.metric)
            with writing(self.path):
                writer.rewind(epoch, recipe_yaml if writer.is_new else None, environment)
        elif epoch:
            raise FreezingError(
                f"Recorder: the Freezer has seen {seen} recorded nowhere; make the Recorder before the first step(), "
                "or give resume=True and the directory of what it has seen"
            )
        else:
            writer = self._stack.enter_context(RunWriter.create(self.path, recipe_yaml, environment))
        self.tracking = self._stack.enter_context(Tracking(track, writer))  # is left when it is known how it ended
        self._stack.enter_context(status_of(writer))
        writer.write_started(started)
        keep_kernel_choices(self.freezer, writer)
        self.writer, self._recorded = writer, epoch
        self.progress = self._stack.enter_context(choose_progress(progress))
        self.progress.show(started)
        if epoch:
            past = past_epochs(read_run(self.path))
            self._columns = ToldColumns(self.metric, tuple(past[-1].metrics))
            for record in past:
                self._probing.note(record.metrics)
            self.progress.show(RunResumed(tuple(past)))
        self.tracking.show(started)

    def _check_energy(self, epoch: int) -> None:
        """Raise FreezingError where earlier epochs have no column of what is measured now."""
        lacking = [column for column in self._energy.columns if epoch and column not in read_run(self.path).rows[0]]
        if lacking:
            key = "energy" if lacking[0] == ENERGY_COLUMNS[0] else "grams_per_kwh"
            raise FreezingError(
                f"Recorder: {key}: {self.path} was begun without it, and its table keeps its columns; leave it out, or "
                "record in another directory"
            )


def _energy_of(freezer: Freezer, grams_per_kwh: float | None, *, asked: bool) -> Energy:
    """Return what the processes of a loop of one's own take; FreezingError where nothing here measures it."""
    from neq_cli.freezing.probe import device_of
    from neq_cli.freezing.processes.counting import process_count, process_number
    from neq_cli.training.machine.energy.measured import Energy, measured
    from neq_cli.training.machine.energy.meter import EnergyError
    from neq_cli.training.processes.joined import Processes

    if not asked:
        return Energy()
    try:
        return measured(device_of(freezer.model), Processes(process_number(), process_count()), grams_per_kwh)
    except EnergyError as error:
        raise FreezingError(f"Recorder: energy: {error}") from error


def _started(
    freezer: Freezer,
    name: str,
    metric: str,
    epochs: int | None,
    energy_notes: Sequence[str],
    *,
    lower_is_better: bool,
) -> RunStarted:
    from neq_cli.freezing.probe import device_of
    from neq_cli.freezing.processes.counting import process_count
    from neq_cli.training.machine.device import describe_device
    from neq_cli.training.policies import describe_policy, section_of

    section = section_of(freezer.policy)
    return RunStarted(
        recipe_name=name,
        description=type(freezer.model).__name__,
        policy=type(freezer.policy).__name__ if section is None else describe_policy(section),
        device=describe_device(device_of(freezer.model), process_count()),
        epochs=epochs or 0,
        steps_per_epoch=0,
        metric=metric,
        layers={layer.name: layer.neurons for layer in freezer.layers.values()},
        notes=(*freezer.notes, *energy_notes, f"coverage: {freezer.coverage()}"),
        epsilon=getattr(freezer.policy, "epsilon", None),
        lower_is_better=lower_is_better,
    )
