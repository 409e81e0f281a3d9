"""Runs a sweep from its plan to its end: a queue of runs, so many processes at once, and one signal for all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from neq_cli.errors import RunDirectoryError, Terminated, TrainingError
from neq_cli.jobs.stop_requests import StopRequests
from neq_cli.jobs.sweep.plan import PlannedRun, SweepPlan, folded
from neq_cli.jobs.sweep.process import Job, cores, cuda_devices, shared_environment, train_command
from neq_cli.runs.store.lock import Lock
from neq_cli.runs.store.sweep_folder import SweepRecord, open_sweep
from neq_cli.runs.views.live.sweep_state import FAILED, FINISHED, STOPPED, SweepState, SweptRun
from neq_cli.runs.views.live.sweep_view import SweepView
from neq_cli.text import counted

_POLL_SECONDS = 0.1
_LEAVING_SECONDS = 1.0
Command = Callable[[str, Sequence[str], Path], Sequence[str]]


def run_sweep(plan: SweepPlan, jobs: int, view: SweepView, command: Command = train_command) -> Path:
    """Train what is not finished, ``jobs`` runs at once, and return the folder that holds the run directories.

    ``command`` gives what trains a run, from the recipe, its overrides and the run directory. Raises TrainingError
    with one line for every run that failed, once the others have ended; Terminated where a signal asked to stop, once
    all runs have saved and ended, or with a second one at once.
    """
    lock = begin(plan)
    try:
        state = SweepState(
            plan.name, plan.files.root, plan.grid.keys, jobs, [one.run for one in plan.runs], time.monotonic()
        )
        with StopRequests() as requests, view:
            view.begin(state)
            if lock.note:
                view.message(lock.note)
            Sweep(plan, state, view, requests, command).follow()
    finally:
        lock.release()
    raise_failures(plan, state)
    return plan.files.runs


def begin(plan: SweepPlan) -> Lock:
    """Take the folder for this process alone, until the lock is released; RunDirectoryError where it is taken."""
    axes = {axis.key: axis.texts for axis in plan.grid.axes}
    return open_sweep(
        plan.files.root, SweepRecord(plan.name, axes, {one.point.name: one.point.overrides for one in plan.runs})
    )


def raise_failures(plan: SweepPlan, state: SweepState) -> None:
    """Raise TrainingError with a line for every run that failed, where one did."""
    failed = [(run.name, [run.reason]) for run in state.runs if run.state == FAILED]
    if failed:
        count = f"{len(failed)} of {counted(len(state.runs), 'run')} failed"
        raise TrainingError("\n".join([*folded(failed, len(state.runs)), f"{count}; logs in {plan.files.logs}"]))


class Sweep:
    """Starts processes while there are runs to train, and follows them to their end."""

    def __init__(
        self, plan: SweepPlan, state: SweepState, view: SweepView, requests: StopRequests, command: Command
    ) -> None:
        self.plan = plan
        self.state = state
        self.view = view
        self.requests = requests
        self.command = command
        self.queue = [run for run in plan.runs if run.run.state != FINISHED]
        self.running: list[Job] = []
        self.told = False  # the processes, to stop
        on_cuda = any(run.loaded.recipe.device in ("auto", "cuda") for run in self.queue)
        self.gpus = cuda_devices(os.environ) if on_cuda and state.jobs > 1 else []

    def follow(self) -> None:
        """Return when all have ended; see ``run_sweep``."""
        try:
            while self._goes_on():
                self._start_what_can()
                self._end_those_that_have()
                for job in self.running:
                    job.run.look(time.monotonic())
                self.view.show(time.monotonic())
                time.sleep(_POLL_SECONDS)
        except (KeyboardInterrupt, Terminated):
            self._leave_at_once()
            raise
        finally:
            for job in self.running:
                job.close()
            self.state.ended = time.monotonic()
        if self.requests.received and (self.queue or self.state.count(STOPPED)):
            self.view.message("saved; the same command goes on from here")
            raise self.requests.error()

    def _leave_at_once(self) -> None:
        """Pass a second signal on as SIGINT; once more after a second, as two in quick succession may arrive as one."""
        for _ in range(2):
            for job in self.running:
                job.send("SIGINT")
            end = time.monotonic() + _LEAVING_SECONDS
            while any(job.poll() is None for job in self.running) and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)

    def _goes_on(self) -> bool:
        if self.requests.received and not self.told:
            self.told = True
            for job in self.running:
                job.send(self.requests.received)
            if self.running:
                self.view.message(f"{self.requests.received}: {len(self.running)} running, which save and end")
        return bool(self.running or (self.queue and not self.requests.received))

    def _start_what_can(self) -> None:
        for planned in list(self.queue):
            if len(self.running) == self.state.jobs or self.requests.received:
                return
            before = planned.after
            if before is None or before.state == FINISHED:
                self.queue.remove(planned)
                self.start(planned)
            elif before.state == FAILED:
                self.queue.remove(planned)
                planned.run.end(FAILED, f"not trained: {before.name}, which it matches, failed", time.monotonic())
                self.view.changed(planned.run, time.monotonic())

    def start(self, planned: PlannedRun) -> None:
        """Start the process of a run."""
        run, jobs = planned.run, self.state.jobs
        slot = min(set(range(jobs)) - {job.slot for job in self.running})
        command = self.command(self.plan.reference, planned.point.overrides, run.path)
        changes = self._environment(slot, planned)
        run.start(time.monotonic())
        try:
            self.running.append(Job(run, slot, command, self.plan.files.log(run.name), changes))
        except (TrainingError, RunDirectoryError) as error:
            run.end(FAILED, str(error), time.monotonic())
        self.view.changed(run, time.monotonic())

    def ended(self, run: SweptRun) -> None:
        """Take note of a run that has ended, which is of interest to a search."""

    def _environment(self, slot: int, planned: PlannedRun) -> Mapping[str, str]:
        device = planned.loaded.recipe.device
        return shared_environment(slot, self.state.jobs, device, os.environ, cores(), self.gpus)

    def _end_those_that_have(self) -> None:
        for job in list(self.running):
            code = job.poll()
            if code is None:
                continue
            self.running.remove(job)
            state, reason = FINISHED, ""
            if code and self.told and not job.said_failed():
                state = STOPPED
            elif code:
                state, reason = FAILED, job.failure()
            job.close()
            job.run.end(state, reason, time.monotonic())
            self.ended(job.run)
            self.view.changed(job.run, time.monotonic())
