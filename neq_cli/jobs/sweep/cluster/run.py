"""A sweep whose runs are jobs of a cluster: submits those that no job has, and shows all until they end or one leaves.

The sweep's lock is held while jobs are submitted only, so that any number of calls may look on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from neq_cli.errors import RunDirectoryError
from neq_cli.jobs.stop_requests import StopRequests
from neq_cli.jobs.sweep.cluster.jobs import ENDED, RUNS, SubmittedJob, check_cluster, submit
from neq_cli.jobs.sweep.cluster.options import SlurmOptions
from neq_cli.jobs.sweep.cluster.task import RunTask
from neq_cli.jobs.sweep.plan import PlannedRun, SweepPlan
from neq_cli.jobs.sweep.process import train_command
from neq_cli.jobs.sweep.run import Command, begin, raise_failures
from neq_cli.runs.store.paths import RunFiles
from neq_cli.runs.store.sweep_folder import SweepFiles
from neq_cli.runs.store.sweep_jobs import SweepJobs, read_jobs, write_jobs
from neq_cli.runs.store.untrusted import read_json
from neq_cli.runs.views.live.sweep_state import FAILED, FINISHED, PENDING, RUNNING, SweepState, SweptRun
from neq_cli.runs.views.live.sweep_view import SweepView
from neq_cli.text import counted, printable

SLURM = "slurm"
_POLL_SECONDS = 0.5


def submit_sweep(
    plan: SweepPlan,
    at_once: int | None,
    view: SweepView,
    options: SlurmOptions,
    cluster: str = SLURM,
    command: Command = train_command,
) -> Path:
    """Submit what is not finished and no job of, show it until it has ended, and return the folder of the runs.

    ``at_once`` bounds how many jobs of an array run at once, None leaves it to the cluster. Errors are those of
    ``run_sweep``; a signal leaves the jobs as they are, and Terminated says so.
    """
    check_cluster(cluster)
    parallel = at_once or max(len(plan.runs), 1)
    with StopRequests() as requests, view:
        lock = begin(plan)
        try:
            state = SweepState(
                plan.name, plan.files.root, plan.grid.keys, parallel, [one.run for one in plan.runs], time.monotonic()
            )
            view.begin(state)
            if lock.note:
                view.message(lock.note)
            sweep = _Submitted(plan, state, view, requests, options, cluster, command)
            sweep.take_up()
        finally:
            lock.release()
        sweep.follow()
    raise_failures(plan, state)
    return plan.files.runs


def refuse_jobs(plan: SweepPlan) -> None:
    """Raise RunDirectoryError where a run that is to be trained is a cluster's job that has not ended."""
    known = read_jobs(plan.files)
    if known is None:
        return
    unfinished = [one.point.name for one in plan.runs if one.run.state != FINISHED and one.point.name in known.jobs]
    jobs = {name: SubmittedJob(known.cluster, plan.files.jobs, known.jobs[name]) for name in unfinished}
    alive = [name for name, job in jobs.items() if job.standing() != ENDED]
    if known.submitting:
        raise RunDirectoryError(_interrupted(plan.files))
    if alive:
        which = f"{alive[0]} is job {jobs[alive[0]].identifier}"
        more = f", and {len(alive) - 1} more" if len(alive) > 1 else ""
        mend = f"look on with --launcher slurm, or end them with scancel {jobs[alive[0]].array}"
        raise RunDirectoryError(
            f"{printable(plan.files.root)}: submitted to {known.cluster}: {which}{more}; {mend}, or, if they are gone, "
            f"remove {printable(plan.files.jobs_record)}"
        )


def _interrupted(files: SweepFiles) -> str:
    mend = f"look for its jobs with squeue --me, end them, and remove {printable(files.jobs_record)}"
    return f"{printable(files.root)}: a call was killed while it submitted jobs; {mend}"


class _Submitted:
    """Follows jobs, and submits runs once those that they match have finished."""

    def __init__(
        self,
        plan: SweepPlan,
        state: SweepState,
        view: SweepView,
        requests: StopRequests,
        options: SlurmOptions,
        cluster: str,
        command: Command,
    ) -> None:
        self.plan = plan
        self.state = state
        self.view = view
        self.requests = requests
        self.options = options
        self.cluster = cluster
        self.command = command
        self.waiting = [one for one in plan.runs if one.run.state != FINISHED]
        self.jobs: dict[str, SubmittedJob] = {}  # that have not ended, by the names of their runs

    def take_up(self) -> None:
        """Follow the jobs there are, and submit those runs that can begin; the sweep's lock is held."""
        known = read_jobs(self.plan.files) or SweepJobs(self.cluster)
        if known.submitting:
            raise RunDirectoryError(_interrupted(self.plan.files))
        found: dict[str, SubmittedJob] = {}
        for planned in list(self.waiting):
            name = planned.point.name
            if name not in known.jobs:
                continue
            job = SubmittedJob(known.cluster, self.plan.files.jobs, known.jobs[name])
            if job.standing() != ENDED:
                self.waiting.remove(planned)
                found[name] = job
        if found:
            self.jobs.update(found)
            self.view.message(f"{_jobs(found)} submitted before: {_arrays(found)}")
        able = [one for one in self.waiting if one.after is None or one.after.state == FINISHED]
        if able and not self.requests.received:
            self._submit(able, known.jobs)

    def follow(self) -> None:
        """Return when all jobs have ended and no run waits; Terminated where a signal came before."""
        try:
            while (self.jobs or self.waiting) and not self.requests.received:
                for planned in self.plan.runs:
                    if planned.point.name in self.jobs:
                        self._look(planned.run)
                self._go_on_with_those_that_waited()
                self.view.show(time.monotonic())
                time.sleep(_POLL_SECONDS)
        finally:
            self.state.ended = time.monotonic()
        if self.requests.received and (self.jobs or self.waiting):
            raise self.requests.error(self._left_behind())

    def _submit(self, able: Sequence[PlannedRun], known: Mapping[str, str]) -> None:
        files = self.plan.files
        write_jobs(files, SweepJobs(self.cluster, known, submitting=True))
        jobs: list[SubmittedJob] = []
        try:
            tasks = [self._task(one) for one in able]
            jobs = submit(self.cluster, files.jobs, self.plan.name, tasks, self.state.jobs, self.options)
        finally:
            submitted = {one.point.name: job for one, job in zip(able, jobs, strict=False)}
            ids = {name: job.identifier for name, job in submitted.items()}
            write_jobs(files, SweepJobs(self.cluster, {**known, **ids}))
        self.waiting = [one for one in self.waiting if one not in able]
        self.jobs.update(submitted)
        self.view.message(f"{_jobs(submitted)} submitted: {_arrays(submitted)}")

    def _task(self, planned: PlannedRun) -> RunTask:
        run, files = planned.run, self.plan.files
        command = tuple(self.command(self.plan.reference, planned.point.overrides, run.path))
        return RunTask(run.name, run.path, command, files.log(run.name), files.outcome(run.name))

    def _look(self, run: SweptRun) -> None:
        now = time.monotonic()
        job = self.jobs[run.name]
        standing = job.standing()
        if standing == ENDED:
            del self.jobs[run.name]
            reason = self._failure(run, job)
            run.end(FAILED if reason else FINISHED, reason, now)
            self.view.changed(run, now)
            return
        said = _status(run)
        if standing == RUNS and said == "running" and run.state != RUNNING:
            run.start(now)
            self.view.changed(run, now)
        elif (
            run.state == RUNNING and said == "interrupted"
        ):  # it has saved; where it says anything else, it is about to end
            run.state = PENDING
            self.view.changed(run, now)
        run.look(now)

    def _go_on_with_those_that_waited(self) -> None:
        for planned in list(self.waiting):
            before = planned.after
            if before is not None and before.state == FAILED:
                self.waiting.remove(planned)
                planned.run.end(FAILED, f"not trained: {before.name}, which it matches, failed", time.monotonic())
                self.view.changed(planned.run, time.monotonic())
        if any(one.after is None or one.after.state == FINISHED for one in self.waiting):
            try:
                lock = begin(self.plan)
            except RunDirectoryError as error:  # another call submits, perhaps these: looked at next time
                if str(error) != self.state.message:
                    self.view.message(str(error))
                    self.state.message = str(error)
                return
            try:
                self.take_up()
            finally:
                lock.release()

    def _failure(self, run: SweptRun, job: SubmittedJob) -> str:
        """Return why the run failed, an empty text where its job says that it did not."""
        with contextlib.suppress(RunDirectoryError):
            said = read_json(self.plan.files.outcome(run.name))
            if said.get("job") == job.identifier:
                return printable(said.get("reason") or "no reason given", 500) if said.get("failed") else ""
        return f"job {job.identifier} has ended without it, {printable(job.state, 40)}; the next call goes on with it"

    def _left_behind(self) -> str:
        said = []
        if self.jobs:
            go, end = ("goes", "it") if len(self.jobs) == 1 else ("go", "them")
            cancel = f"scancel {_arrays(self.jobs)} ends {end}"
            said.append(f"{_jobs(self.jobs)} {go} on; the same command shows {end} again, {cancel}")
        if self.waiting:
            wait = f"{counted(len(self.waiting), 'run')} wait{'s' if len(self.waiting) == 1 else ''}"
            said.append(f"{wait} for others, which the same command submits then")
        return "; ".join(said)


def _jobs(jobs: Mapping[str, SubmittedJob]) -> str:
    return counted(len(jobs), "job")


def _arrays(jobs: Mapping[str, SubmittedJob]) -> str:
    return " ".join(dict.fromkeys(job.array for job in jobs.values()))


def _status(run: SweptRun) -> object:
    try:
        return read_json(RunFiles(run.path).status).get("state")
    except RunDirectoryError:
        return None
