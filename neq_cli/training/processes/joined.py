"""The processes that train one model together, as torchrun starts them: who this one is, what they tell each other."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from neq_cli.complaints import keep_company
from neq_cli.errors import NeqError, Terminated, TrainingError, described, one_line
from neq_cli.freezing.backward.dispatch import KernelChoice, read_choice
from neq_cli.freezing.processes.agreement import overwrite_from_first
from neq_cli.training.processes.lifeline import Lifeline, open_lifeline
from neq_cli.training.processes.meeting import met, without_stdout

_FAILURE = "failure"
_LETTING_GO = 0.1
_PATIENCE = 1.0
"""Seconds in which the process that failed first gets to say why, after the others lost it."""


@dataclass(frozen=True)
class Processes:
    """This process among all that train together; by default it is alone, and every method does next to nothing."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # on this machine
    local_count: int = 1
    store: Store | None = None
    lifeline: Lifeline | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that decides and writes."""
        return self.rank == 0

    @property
    def group(self) -> distributed.ProcessGroup | None:
        """The group of all, None where this process is alone."""
        return distributed.group.WORLD if self.count > 1 else None

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up ``tensor`` over all processes, in place; returns it."""
        if self.count > 1:
            distributed.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """Return the largest of all processes' numbers; every process waits for the others."""
        if self.count == 1:
            return number
        told = torch.tensor(number)
        distributed.all_reduce(told, distributed.ReduceOp.MAX)
        return int(told)

    def shared(self, value: Any) -> Any:
        """Return the first process's ``value``; the others' are not looked at."""
        if self.count == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def gathered(self, value: Any) -> list[Any]:
        """Return all processes' values by rank in the first process, and [] in the others."""
        if self.count == 1:
            return [value]
        values: list[Any] | None = [None] * self.count if self.first else None
        distributed.gather_object(value, values, dst=0)
        return values or []

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite ``tensors`` with the first process's."""
        if self.group is not None:
            overwrite_from_first(tensors, self.group)

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.largest(0)

    def tell_failure(self, message: str) -> None:
        """Tell the other processes, and torchrun, why this one ends; the first to fail is heard."""
        if self.count == 1:
            return
        _write_error_file(message)
        if self.store is not None:
            try:
                self.store.compare_set(_FAILURE, "", f"{self.rank} {message}")
            except RuntimeError:  # the store has ended with the first process
                return

    def others_failure(self) -> str | None:
        """Return why another process ended before this one lost it: "process 3: ..."; None where none says so."""
        deadline = time.monotonic() + _PATIENCE
        while self.count > 1 and time.monotonic() < deadline:
            if self.lifeline is not None and self.lifeline.reason is not None:
                return self.lifeline.reason
            try:
                if self.store is not None and self.store.check([_FAILURE]):
                    rank, _, message = self.store.get(_FAILURE).decode().partition(" ")
                    return None if int(rank) == self.rank else f"process {rank}: {message}"
            except RuntimeError:  # the store has ended with the first process, of which the lifeline tells
                pass
            time.sleep(0.05)
        return None

    def may_be_loss(self, error: BaseException) -> bool:
        """Whether ``error`` may come of a process that is lost, and is no user's own that speaks of a connection."""
        if self.count == 1:
            return False
        if self.lifeline is not None and self.lifeline.reason is not None:
            return not isinstance(error, NeqError)  # whatever it is that a broken group led to
        backends = isinstance(error, RuntimeError) and any(name in str(error).lower() for name in ("gloo/", "nccl"))
        return backends or isinstance(error, distributed.DistError)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, a process that is lost ends this one within seconds, whatever either is doing."""
        if self.lifeline is None:
            yield
            return
        self.last_words(lambda reason: None)
        with self.lifeline.watched():
            yield

    def last_words(self, say: Callable[[str], object]) -> None:
        """Have ``say`` called with the reason where this process is ended because it lost another one."""
        if self.lifeline is not None:

            def words(reason: str) -> None:
                _write_error_file(reason)
                say(reason)

            self.lifeline.last_words = words

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Inside, a process that is lost does not end this one: what is being written is to be whole."""
        with nullcontext() if self.lifeline is None else self.lifeline.saving:
            yield

    def kernel(self, kind: str, timing: Callable[[], KernelChoice]) -> KernelChoice:
        """Return the kernel that the first process times for a kind of call; the others wait for it.

        Through the store: in a backward pass, gradients are under way between the processes.
        """
        if self.store is None or self.count == 1:
            return timing()
        key = f"kernel/{kind}"
        if self.first:
            choice = timing()
            self.store.set(key, json.dumps(asdict(choice)))
            return choice
        return read_choice(json.loads(self.store.get(key)))

    def linger(self) -> None:
        """Stay, before ending in a failure, for as long as the others need this process to find out why they do.

        Only where this one keeps the store that all read, which torchrun keeps itself.
        """
        if self.count > 1 and self.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(_PATIENCE)

    def leave(self) -> None:
        """End the group of all while Python still runs, when all has gone well.

        A thread of gloo's that drops a tensor once the interpreter ends would end the process by SIGABRT. Such threads
        end with the group, unless C++ still holds it: then they have a moment to let go.
        """
        if self.count > 1 and distributed.is_initialized():
            gc.collect()
            distributed.destroy_process_group()
            time.sleep(_LETTING_GO)

    def say_once(self, message: str) -> bool:
        """Whether this process is the first to have this message: the one that prints it."""
        if self.store is None or self.count == 1:
            return True
        try:
            return bool(self.store.add(f"message/{message}", 1) == 1)
        except RuntimeError:
            return True


class Agreement:
    """The largest wish of all processes, one step late, so that no step waits for it."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._told: Tensor | None = None
        self._work: Any = None

    def of(self, wish: int) -> int:
        """Tell the others this step's wish, from 0 up, and return what all came to in the step before."""
        if self.processes.count == 1:
            return wish
        agreed = self.finish()
        self._told = torch.tensor(wish)
        self._work = distributed.all_reduce(self._told, distributed.ReduceOp.MAX, async_op=True)
        return agreed

    def finish(self) -> int:
        """Return what all came to in the step before; 0 where none was."""
        if self._work is None or self._told is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._told)


_alone = Processes()
_joined: Processes | None = None


def started_by_torchrun() -> bool:
    """Whether torchrun, or something that sets the same variables, started this as one of several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def restarted() -> bool:
    """Whether torchrun started these processes anew after some of them had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def joined() -> Processes:
    """Return who this process is; alone where it has not joined others."""
    return _joined or _alone


def join() -> Processes:
    """Join the processes that torchrun started; returns at once where this one is alone or has joined before.

    Raises TrainingError where they do not find each other.
    """
    global _joined
    if _joined is not None or not started_by_torchrun():
        return joined()
    cuda = torch.cuda.is_available()
    try:
        store, rank, count = next(rendezvous("env://", timeout=timedelta(minutes=10)))
        store = PrefixStore(met(store, rank, count), store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        with without_stdout():
            distributed.init_process_group(backend, store=store, rank=rank, world_size=count)
        own = PrefixStore("neq", store)
        lifeline = open_lifeline(rank, own)
        if cuda:
            # NCCL, where it sees the loss too, ends the process itself, with a trace of its own.
            lifeline.patience = 0.3
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        local_count = int(os.environ.get("LOCAL_WORLD_SIZE", count))
        _joined = Processes(rank, count, local_rank, local_count, own, lifeline)
        keep_company(_joined)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        mend = "start them with torchrun"
        if "EADDRINUSE" in reason:
            mend = "another program has MASTER_PORT; give torchrun another --master-port"
        raise TrainingError(f"processes did not find each other: {reason}; {mend}") from error
    return _joined


@contextmanager
def in_company(processes: Processes) -> Iterator[None]:
    """Tell the others why this process ends, and, where it ends because it lost another one, raise that one's reason.

    What is raised instead is a TrainingError, the same in all processes that it leaves behind.
    """
    if processes.count == 1:
        yield
        return
    try:
        yield
    except (KeyboardInterrupt, Terminated):
        raise
    except BaseException as error:
        # A lost connection says nothing about why: the process at its other end may have.
        reason = processes.others_failure() if processes.may_be_loss(error) else None
        if reason is not None:
            raise TrainingError(reason) from error
        if processes.may_be_loss(error):
            apart = TrainingError(f"the processes lost touch: {one_line(error)}; --resume goes on")
            processes.tell_failure(str(apart))
            raise apart from error
        processes.tell_failure(described(error))
        raise


def _write_error_file(message: str) -> None:
    """Give torchrun, whose summary quotes this file, the line that the user sees."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        try:
            with open(path, "w") as file:  # noqa: PTH123 - torchrun's own path, as it is
                json.dump({"message": {"message": message, "extraInfo": extra}}, file)
        except OSError:
            return
