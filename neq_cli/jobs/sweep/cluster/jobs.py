"""Jobs of a cluster: submitted as one array, and how they stand, which they tell by files and SLURM by its accounting.

submitit's local executor, whose jobs are processes of this machine, is what tests use in the place of SLURM.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neq_cli.errors import NeqError, TrainingError, one_line
from neq_cli.jobs.sweep.cluster.options import SlurmOptions
from neq_cli.jobs.sweep.cluster.task import RunTask
from neq_cli.runs.store.lock import is_alive
from neq_cli.text import printable

WAITS, RUNS, ENDED = "waits", "runs", "ended"
# SLURM's job states that nothing follows on. PREEMPTED is none of them: such a job may be queued again.
_LAST_STATES = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "REVOKED", "TIMEOUT",
)  # fmt: skip
_WAITING_STATES = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "CONFIGURING", "PREEMPTED")
_TIMEOUTS = 1000  # after how many ends of its time submitit queues a job no more


def submitit() -> Any:
    """Return the library submitit, quiet. NeqError where it is missing."""
    try:
        import submitit as library
    except ImportError as error:
        raise NeqError(f"--launcher slurm needs submitit ({one_line(error)}); pip install 'neq[slurm]'") from error
    logging.getLogger("submitit").setLevel(logging.CRITICAL)  # what it says would end up amid the overview
    return library


def check_cluster(cluster: str) -> None:
    """Raise NeqError where jobs cannot be submitted from here."""
    submitit()
    lacking = [command for command in ("sbatch", "srun", "sacct") if shutil.which(command) is None]
    if cluster == "slurm" and lacking:
        raise NeqError(f"--launcher slurm: no {lacking[0]} here; call it on a machine from which SLURM takes jobs")


class SubmittedJob:
    """A job, ``submitted`` by this process or known by its ``identifier`` alone."""

    def __init__(self, cluster: str, folder: Path, identifier: str, submitted: Any = None) -> None:
        self.identifier = identifier
        self._local = cluster == "local"
        kind = submitit().LocalJob if self._local else submitit().SlurmJob
        self._job = kind(folder=folder, job_id=identifier) if submitted is None else submitted
        self._owned = submitted is not None

    @property
    def array(self) -> str:
        """What `scancel` ends it by together with those submitted at once."""
        return self.identifier.partition("_")[0]

    def standing(self) -> str:
        """Return whether it WAITS, RUNS or has ENDED; RUNS once it has begun, also while it is queued again."""
        if self._job.paths.result_pickle.exists():  # submitit's, written at the end; what is in it is not read
            return ENDED
        if self._local:
            alive = not self._job.done() if self._owned else is_alive(int(self.identifier))
            return RUNS if alive else ENDED
        state = self.state
        if state in _LAST_STATES:
            return ENDED
        # The accounting is asked every ten minutes in the end; what a job has written shows at once that it has begun.
        begun = state not in (*_WAITING_STATES, "UNKNOWN") or self._job.paths.stdout.exists()
        return RUNS if begun else WAITS

    @property
    def state(self) -> str:
        """What the cluster calls its state, one word; submitit asks it now and then."""
        return (str(self._job.state).split() or ["UNKNOWN"])[0].rstrip("+")


def submit(
    cluster: str, folder: Path, name: str, tasks: Sequence[RunTask], at_once: int, options: SlurmOptions
) -> list[SubmittedJob]:
    """Submit ``tasks`` as one array of which ``at_once`` run at once. TrainingError where the cluster refuses."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            executor = submitit().AutoExecutor(folder, cluster=cluster, **{f"{cluster}_max_num_timeout": _TIMEOUTS})
            executor.update_parameters(
                name=f"neq-{name}",
                timeout_min=options.minutes,
                stderr_to_stdout=True,
                slurm_signal_delay_s=options.warning,
                slurm_array_parallelism=at_once,
                # Without it a job that is preempted or out of time ends for good where that is the cluster's way.
                slurm_additional_parameters={"requeue": True, **options.others},
            )
            jobs = executor.submit_array(list(tasks))
    except OSError as error:
        raise TrainingError(
            f"{printable(folder)}: {printable(error.strerror or error)}; nothing was submitted"
        ) from error
    except Exception as error:  # submitit's errors have no family of their own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = printable("; ".join(lines) or one_line(error), 300)
        raise TrainingError(f"{cluster} took no jobs: {reason}; see --slurm") from error
    return [SubmittedJob(cluster, folder, str(job.job_id), job) for job in jobs]
