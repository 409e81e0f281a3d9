"""Follows a session while it trains, and has it recorded: epochs, checkpoints, and that it stops where it was asked."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neq_cli.errors import RunDirectoryError
from neq_cli.events import EPOCH, EpochRecord, Pause, Preparing, StepProgress
from neq_cli.jobs import checkpoints
from neq_cli.jobs.recording import environment_of, keep_kernel_choices
from neq_cli.jobs.stop_requests import StopRequests
from neq_cli.jobs.time_shares import MUCH_PROBING, MUCH_WAITING, TimeShare
from neq_cli.jobs.tracking.teller import Tracking
from neq_cli.recipe.load import dump_portable, dump_recipe
from neq_cli.recipe.shipped import python_files
from neq_cli.runs.store.content import weights_metadata
from neq_cli.runs.store.disk import atomic_write, writing
from neq_cli.runs.store.paths import default_run_directory
from neq_cli.runs.store.writer import RunWriter
from neq_cli.runs.views.live.progress import Progress
from neq_cli.text import counted

if TYPE_CHECKING:
    from neq_cli.training.session import Session


def is_better(score: float, best: float | None, *, lower: bool) -> bool:
    """Whether ``score`` is better than the ``best`` so far, None for none; NaN, which was not measured, never is."""
    if math.isnan(score):
        return False
    return best is None or (score < best if lower else score > best)


def create_directory(chosen: Path | None, name: str, session: Session) -> RunWriter:
    """Make the run directory of ``session``: ``chosen``, or one named after the recipe, the time and the seed."""
    recipe, environment = dump_recipe(session.recipe), about(session)
    if chosen is not None:
        return RunWriter.create(chosen, recipe, environment)
    attempts = 10
    while True:
        attempts -= 1
        try:
            path = default_run_directory(name, session.recipe.seed, datetime.now())
            return RunWriter.create(path, recipe, environment)
        except RunDirectoryError:
            # Another run that began in the same second may have taken the name.
            if not attempts:
                raise


def about(session: Session) -> dict[str, Any]:
    """Return what environment.json says of the session: machine, versions, data and processes."""
    trainer = session.trainer
    matched = {} if session.matched_flops is None else {"matched_flops": session.matched_flops}
    found = {"found": list(session.found)} if session.found else {}
    said = environment_of(trainer.freezer, trainer.device, trainer.processes.count)
    return {**said, "data": dict(session.data_content), **found, **matched, **trainer.energy.environment}


def write_beginning(writer: RunWriter, session: Session, directory: Path) -> None:
    """Write what is known before the first step: the Python files that the recipe names, and the notes."""
    for source in python_files(session.recipe, directory):
        writer.write_source(source.name, source.read_bytes())
    writer.write_started(session.started)


class Follower:
    """Follows a session to its end. ``writer`` is None in all but the first of several processes.

    ``past`` are the epochs of earlier calls, and ``best`` is the best score of those, None where there is none.
    ``command`` has the words of a command line that, with the run directory behind it, goes on. All processes follow
    together.
    """

    def __init__(
        self,
        session: Session,
        writer: RunWriter | None,
        progress: Progress,
        requests: StopRequests,
        past: Sequence[EpochRecord] = (),
        best: float | None = None,
        tracking: Tracking | None = None,
        command: Sequence[str] = (),
    ) -> None:
        self.session = session
        self.trainer = session.trainer
        self.writer = writer
        self.progress = progress
        self.requests = requests
        self.best = best
        self.command = command
        self.tracking = tracking or Tracking((), None)
        self.saved = time.monotonic()
        self.unit = session.started.unit  # what its records are of
        self.timed = 0.0  # seconds that went into timing kernels
        self.time_shares = _time_shares(session, [record.metrics for record in past])
        self.trainer.wish = self._wish

    def follow(self) -> None:
        """Train to the end. Raises Terminated where a signal asked to stop, once all is saved."""
        if self.writer is not None:
            keep_kernel_choices(self.trainer.freezer, self.writer)
        dispatch = self.trainer.freezer.dispatch
        dispatch.on_timing = lambda: self.progress.show(Preparing("timing kernels", len(dispatch.choices)))
        for record in self.trainer.run():
            # Nothing is lost while the first images are waited for, which may take minutes.
            self.requests.set_at_once(isinstance(record, StepProgress) and record.phase == "load")
            if isinstance(record, Pause):
                self._pause(record)
                continue
            if isinstance(record, EpochRecord):
                self._write_epoch(record)
                self._say_what_took(record)
                for share in self.time_shares:
                    self._say(share.note(record.metrics))
                self._say(self.trainer.energy.failure_note(f"{self.unit} {record.epoch}"))
            self.progress.show(record)
            self.tracking.show(record)
            if isinstance(record, EpochRecord):
                self._stop_if_asked(record)
        if self.trainer.passes < self.session.recipe.epochs:
            self._say_why_it_ended()
        _save_weights(self.session, self.writer)

    def _say_why_it_ended(self) -> None:
        stood = counted(self.session.recipe.stop_when_frozen or 0, self.unit)
        note = (
            f"stop_when_frozen: all that may freeze has stood still for {stood}; "
            f"ended after {self.unit} {self.trainer.epoch} of {self.trainer.planned}"
        )
        self._say(note)

    def _say(self, note: str | None) -> None:
        """Tell the user, and whoever looks at the run later; None is nothing."""
        if note is None:
            return
        self.progress.message(note)
        if self.writer is not None:
            self.writer.write_note(note)

    def _say_what_took(self, record: EpochRecord) -> None:
        """Say what the epoch took that others need not, where it was much."""
        startup, timed = self.trainer.startup, self.trainer.freezer.dispatch.seconds
        startup.add("timing kernels", timed - self.timed)
        self.timed = timed
        took = startup.summary()
        if took:
            self.progress.message(f"{self.unit} {record.epoch} spent {took} on what others need not")

    def _wish(self) -> int:
        from neq_cli.training.loop.trainer import GO_ON, SAVE, STOP

        if self.requests.received is not None:
            return STOP
        # The first process's clock decides.
        due = time.monotonic() - self.saved >= 60 * self.session.recipe.checkpoint_minutes
        return SAVE if due and self.trainer.processes.first else GO_ON

    def _pause(self, record: Pause) -> None:
        if record.stop:
            self.progress.message(
                f"{self.requests.received or 'stop'}: saving {self.unit} {record.epoch}, step {record.step}"
            )
        self._save()
        if record.stop:
            self._stop()

    def _write_epoch(self, record: EpochRecord) -> None:
        if self.writer is not None:
            self.writer.write_epoch(record)
        score = record.metrics[self.session.started.metric]
        improved = is_better(score, self.best, lower=self.session.started.lower_is_better)
        self.best = score if improved else self.best
        # The last file of an epoch is the last checkpoint: with it, the epoch need not be trained again.
        self._save(best=improved)

    def _stop_if_asked(self, record: EpochRecord) -> None:
        """Stop between two epochs; a run that is trained to its end goes on to it."""
        stop = self.trainer.processes.largest(int(self.requests.received is not None))
        if stop and not self.trainer.ended:
            self._stop()

    def _stop(self) -> None:
        if self.writer is None:
            raise self.requests.error()
        if not self.command:
            raise self.requests.error(f"saved; the same command with --resume -o {self.writer.path} goes on")
        raise self.requests.error("saved", (*self.command, str(self.writer.path)))

    def _save(self, *, best: bool = False) -> None:
        checkpoints.save(self.trainer, self.writer, best=best)
        self.saved = time.monotonic()


def _time_shares(session: Session, past: Sequence[Mapping[str, float | int]]) -> tuple[TimeShare, ...]:
    """Return what is told where it takes much of the time, with what would help."""
    from neq_cli.training.machine.limits import usable_cores

    data = session.recipe.data
    fewer = "lower data.probe_size"
    fewer = fewer if session.started.unit == EPOCH else f"raise probe_every, or {fewer}"
    faster = "augment less"
    loaders = session.trainer.loaders
    if loaders.place == "none" or loaders.streamed:
        cores = usable_cores()
        faster = (
            f"raise data.workers ({cores} cores here)"
            if data.workers < cores
            else "keep the set on disk (data.kwargs.streaming=false), or store smaller images"
            if loaders.streamed
            else "keep decoded images (data.cache), or use smaller ones"
        )
    return (
        TimeShare("probe_seconds", MUCH_PROBING, "probing", fewer, past),
        TimeShare("data_wait_seconds", MUCH_WAITING, "waiting for data", faster, past),
    )


def _save_weights(session: Session, writer: RunWriter | None) -> None:
    from neq_cli.training.loop.checkpoint import save_weights

    weights = session.trainer.whole_weights()
    if writer is None:
        return
    told = weights_metadata(session.started.recipe_name, dump_portable(session.recipe), session.data_content)
    metadata = {**told, "epoch": str(session.trainer.epoch)}
    with writing(writer.weights_path):
        atomic_write(writer.weights_path, lambda path: save_weights(weights, path, metadata))
