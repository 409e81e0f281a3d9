"""Batches read by worker processes, which need no global random state and whose errors and deaths end them at once.

The workers are PyTorch's own ``DataLoader``'s. Its loader that can be resumed (torchdata's) is not needed: by seed and
epoch alone any batch of an epoch can be asked for, on another number of workers, too (``sampling``).
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset

from neq_cli.errors import TrainingError
from neq_cli.training.errors import DataError

# What a death, or a lack of something that workers need, looks like in torch's and the system's words.
_REASONS = (
    (
        ("Bus error", "out of shared memory", "No space left on device"),
        "shared memory is full for the processes that load images; give the machine or container more of it "
        "(docker run --shm-size), lower data.workers or batch_size, or use data.cache=memory",
    ),
    (
        ("Too many open files", "items of ancdata"),
        "too many files are open for the processes that load images; raise `ulimit -n`, or lower data.workers",
    ),
    (
        ("is killed by signal", "exited unexpectedly"),
        "a process that loads images ended (killed, perhaps for memory); "
        "lower data.workers or batch_size, or use data.cache=none",
    ),
    (
        ("annot allocate memory", "can't allocate memory", "Resource temporarily unavailable", "Caught MemoryError"),
        "not enough memory for the processes that load images; "
        "lower data.workers or batch_size, or use data.cache=none",
    ),
)


class Batches(DataLoader[Any]):
    """A DataLoader of (images [batch, channels, height, width], labels [batch]) whose workers' errors end at once.

    Raises DataError, one line, where a worker raises it, and TrainingError where one is killed or lacks memory, files
    or room to hand over batches.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        workers: list[BaseProcess] = []
        try:
            yield from self._awaited(workers)
        except GeneratorExit:  # a pass that is left: the workers stay for the next
            raise
        except BaseException as error:
            _end(workers)  # torch would wait five seconds for each that is busy, or waits for a dead one's lock
            self._iterator = None
            message = self._line(error)
            if message is None:
                raise
            kind = DataError if isinstance(error, DataError) else TrainingError
            error.__traceback__ = None  # it holds the workers, and with them what torch does when they are let go
        else:
            return
        raise kind(message)

    def _line(self, error: BaseException) -> str | None:
        """Return what to say of an error that is no mistake of the program's."""
        if isinstance(error, DataError):
            return str(error)
        if not self.num_workers or not isinstance(error, Exception):
            return None
        # A worker may be gone while it hands a batch over, before torch can know.
        text = "exited unexpectedly" if isinstance(error, ConnectionError | EOFError) else str(error)
        return next((reason for marks, reason in _REASONS if any(mark in text for mark in marks)), None)

    def _awaited(self, workers: list[BaseProcess]) -> Iterator[Any]:
        """Yield the batches, the caller's turn left out of what ``_deaths`` watches; tell which workers read them."""
        with _deaths, _held_back(), _without_advice():
            batches = super().__iter__()
        _deaths.take_over()
        workers += getattr(batches, "_workers", [])
        for worker in workers:
            # They ignore SIGTERM, by which torch ends one that is still busy when all are to end.
            worker.terminate = worker.kill  # type: ignore[method-assign]
            _started.add(worker)
        while True:
            with _deaths:
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


class _Deaths:
    """Holds back the error that torch raises when a worker dies until the program waits for a batch: while entered.

    torch raises it wherever the main thread is, were it in the middle of writing a file.
    """

    def __init__(self) -> None:
        self._torch_handler: Any = None
        self._waiting = False
        self._missed = False

    def take_over(self) -> None:
        """Stand between the signal and torch's handler, which the first workers to be started set for good."""
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
            return  # nor does torch set one
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and getattr(handler, "__module__", "").startswith("torch."):
            self._torch_handler = handler
            signal.signal(signal.SIGCHLD, self._child_ended)

    def _child_ended(self, number: int, frame: FrameType | None) -> None:
        if self._waiting:
            self._torch_handler(number, frame)
        else:
            self._missed = True

    def __enter__(self) -> None:
        self._waiting = True
        if self._missed:
            self._missed = False
            try:
                self._torch_handler(signal.SIGCHLD, None)
            except BaseException:
                self._waiting = False
                raise

    def __exit__(self, *_: object) -> None:
        self._waiting = False


_deaths = _Deaths()
_started: WeakSet[BaseProcess] = WeakSet()
os.register_at_fork(after_in_child=_started.clear)  # another process's workers are not its own to end


def _end(workers: list[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(1)  # one that was waited for is no death that torch would report, to whoever reads next


@atexit.register
def _end_all() -> None:
    """End workers that are stuck: ``multiprocessing`` would wait for them."""
    _end([worker for worker in _started if worker.is_alive()])


_LEFT_TO_MAIN = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@contextmanager
def _held_back() -> Iterator[None]:
    """Let signals to the program wait while workers start, which inherit that, until they ignore them.

    A worker that has only just been forked has the program's handlers, and would end by them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_MAIN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Leave out what torch says of the number of workers, which is the recipe's decision, also with fewer CPUs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*worker processes in total")
        yield


def _prepare_worker(_: int) -> None:
    """Leave it to the main process what a signal to all of them means, and end when it does, however it ends.

    What users' own code prints goes to stderr, as in the main process, also where workers are not forked from it.
    """
    sys.stdout = sys.stderr
    sys.excepthook = _say_unless_left
    for number in _LEFT_TO_MAIN:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _LEFT_TO_MAIN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _say_unless_left(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Show an exception, but for those of the thread that hands batches over: the main process may have hung up on it,
    since another worker died."""
    if threading.current_thread() is threading.main_thread() or not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)  # torch's own watch looks every five seconds, and only while there is nothing to read


def in_batches(images: Dataset[Any], batch_size: int, workers: int, seed: int, **options: Any) -> Batches:
    """Return ``images``, whatever they yield, in batches read by ``workers`` processes that stay for the next pass."""
    sampled, chosen = options.get("sampler"), options.get("batch_sampler")
    batches = -(-len(images if sampled is None else sampled) // batch_size)  # type: ignore[arg-type]
    if chosen is not None:  # the batches themselves, as lists of positions
        batches, batch_size = len(chosen), 1
    workers = min(workers, batches)
    with _without_advice():
        return Batches(
            images,
            batch_size,
            num_workers=workers,
            worker_init_fn=_prepare_worker,
            # Workers seed torch, random and NumPy from this; without it passes would draw from the global generator.
            generator=torch.Generator().manual_seed(seed),
            **{"persistent_workers": workers > 0, **options},
        )
