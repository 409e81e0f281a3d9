"""Tells the trackers of a run what happens in it; one that fails is told no more, in a line, and training goes on."""

from __future__ import annotations

import io
import logging
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from types import TracebackType

from neq_cli.complaints import complain
from neq_cli.errors import NeqError, RunDirectoryError, TrainingError, one_line
from neq_cli.events import EpochRecord, Record, RunStarted
from neq_cli.jobs.tracking import Ended, TrackedRun, Tracker
from neq_cli.jobs.tracking.ids import Kept, read_ids, write_ids
from neq_cli.jobs.tracking.numbers import EpochNumbers, numbers_again, numbers_of
from neq_cli.jobs.tracking.of_mlflow import MLflowTracker
from neq_cli.jobs.tracking.of_tensorboard import TensorBoardTracker
from neq_cli.jobs.tracking.of_trackio import TrackioTracker
from neq_cli.jobs.tracking.of_wandb import WandbTracker
from neq_cli.jobs.tracking.pictures import WITHOUT, can_draw, report_pictures
from neq_cli.runs.store.disk import check_own, check_writable
from neq_cli.runs.store.paths import recipe_folder
from neq_cli.runs.store.run import Run, read_run
from neq_cli.runs.store.untrusted import read_yaml
from neq_cli.runs.store.writer import RunWriter
from neq_cli.text import printable

TRACKERS: dict[str, Callable[[], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "mlflow": MLflowTracker,
    "trackio": TrackioTracker,
}
"""By their names in recipes."""


class Tracking:
    """Takes the records of a run between ``__enter__`` and ``__exit__``, as displays do, and tells the trackers.

    Enter it before what writes how the run ended, so that this is known when it is left. ``writer`` is None in all but
    the first of several processes, where nothing is told.
    """

    def __init__(self, trackers: Sequence[str], writer: RunWriter | None) -> None:
        self.writer = writer
        self._names = tuple(dict.fromkeys(trackers)) if writer is not None else ()
        self._trackers: dict[str, Tracker] = {}  # those that have not failed
        self._kept: dict[str, Kept] = {}
        self._has: dict[str, int] = {}  # the last epoch that each has

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.writer is None or not self._trackers:
            return
        state, reason = self.writer.ended
        pictures = self._pictures(self.writer) if state == "finished" else {}
        for name, tracker in list(self._trackers.items()):
            with self._told(name, at_end=True):
                tracker.end(Ended(state, reason, self.writer.epoch, pictures))
        self._trackers.clear()

    def show(self, record: Record) -> None:
        """Tell the trackers of a run's beginning and of each finished epoch; of nothing else."""
        if self.writer is None or not self._names:
            return
        if isinstance(record, RunStarted):
            self._begin(self.writer, record)
        elif isinstance(record, EpochRecord):
            numbers = None
            for name in list(self._trackers):
                if record.epoch > self._has[name]:
                    with self._told(name):
                        numbers = numbers or numbers_of(record)
                        self._tell(name, numbers)
            self._keep()

    def _begin(self, writer: RunWriter, started: RunStarted) -> None:
        folder, ids = writer.files.tracking_folder, writer.files.tracking_ids
        try:
            check_own(folder, folder=True)
            folder.mkdir(exist_ok=True)
            check_writable(folder)
            self._kept = read_ids(ids)
            run = read_run(writer.path) if writer.epoch else None
            recipe, yaml = read_yaml(writer.files.recipe), writer.files.recipe.read_text()
        except (OSError, RunDirectoryError) as error:
            self._say(f"track: nothing is told to {', '.join(self._names)}: {_reason(error)}")
            return
        said: list[str] = []
        for name in self._names:
            kept = self._kept.get(name)
            tracked = TrackedRun(
                path=writer.path,
                folder=folder / name,
                project=recipe_folder(started.recipe_name).name,
                metric=started.metric,
                recipe=recipe,
                recipe_yaml=yaml,
                notes=started.notes,
                epoch=writer.epoch,
                identity=kept.identity if kept is not None else secrets.token_hex(8),
                is_known=kept is not None,
                told=kept.epoch if kept is not None else 0,
                say=said.append,  # what is said inside ``_told`` is not heard
            )
            self._trackers[name] = TRACKERS[name]()
            with self._told(name):
                self._has[name] = self._trackers[name].begin(tracked)
                self._kept[name] = Kept(self._trackers[name].identity, self._has[name])
        for text in said:
            self._say(text)
        self._keep()
        if run is not None:
            self._catch_up(run)

    def _catch_up(self, run: Run) -> None:
        """Tell what trackers have missed: added only now, failed before, or begun anew as W&B is."""
        for epoch in range(min(self._has.values(), default=0) + 1, run.epochs + 1):
            for name in [name for name in self._trackers if self._has[name] < epoch]:
                with self._told(name):
                    self._tell(name, numbers_again(run, epoch))
        self._keep()

    def _tell(self, name: str, numbers: EpochNumbers) -> None:
        self._trackers[name].epoch(numbers)
        self._has[name] = numbers.epoch
        self._kept[name] = Kept(self._kept[name].identity, numbers.epoch)

    def _keep(self) -> None:
        """Write down what each tracker has been told: after it has, so that a kill in between tells it once more."""
        if self.writer is None or not self._trackers:
            return
        try:
            write_ids(self.writer.files.tracking_ids, self._kept)
        except OSError as error:
            self._say(f"track: nothing more is told to {', '.join(self._trackers)}: {_reason(error)}")
            self._trackers.clear()

    def _pictures(self, writer: RunWriter) -> dict[str, bytes]:
        if not can_draw():
            self._say(WITHOUT)
            return {}
        try:
            return report_pictures(read_run(writer.path))
        except (NeqError, OSError, ValueError) as error:
            self._say(f"no pictures of the report for the trackers: {_reason(error)}")
            return {}

    @contextmanager
    def _told(self, name: str, *, at_end: bool = False) -> Iterator[None]:
        """Inside, a tracker is told something: without words of its library's, and at its own risk."""
        try:
            with _quietly():
                yield
        except Exception as error:
            self._trackers.pop(name, None)
            what = "it has not been told the end" if at_end else "it is told no more; --resume would go on with it"
            self._say(f"track: {name} failed ({_reason(error)}); {what}")

    def _say(self, text: str) -> None:
        """Warn the user, and note it in the run directory."""
        complain(f"warning: {text}")
        if self.writer is not None:
            with suppress(TrainingError):  # a full disk ends the training elsewhere, or not at all
                self.writer.write_note(text)


@contextmanager
def _quietly() -> Iterator[None]:
    """Leave what libraries say of themselves out of the screen and of the results."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _reason(error: BaseException) -> str:
    """Return what is wrong in one line that does no harm to a terminal."""
    if isinstance(error, NeqError):
        return printable(" ".join(str(error).split()), 300)
    if isinstance(error, OSError) and error.strerror:
        return printable(f"{error.filename}: {error.strerror}" if error.filename else error.strerror, 300)
    return printable(one_line(error), 300)
