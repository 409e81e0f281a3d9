"""jobs.json in the folder of a sweep: which run is which job of a cluster, as of the last time each was submitted."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from neq_cli.errors import RunDirectoryError
from neq_cli.runs.store.disk import atomic_write, check_own, writing
from neq_cli.runs.store.sweep_folder import SweepFiles
from neq_cli.runs.store.untrusted import damaged, read_json
from neq_cli.text import printable

SCHEMA = 1
_JOB = re.compile(r"[0-9]{1,12}(_[0-9]{1,6})?")  # of an array: its id, and which of its jobs


@dataclass(frozen=True)
class SweepJobs:
    """The jobs of a sweep: a job's id by the name of its run, all of one cluster."""

    cluster: str
    jobs: Mapping[str, str] = field(default_factory=dict)
    submitting: bool = False  # jobs are being submitted whose ids are not known yet


def read_jobs(files: SweepFiles) -> SweepJobs | None:
    """Return what jobs.json says, None where no run was submitted. RunDirectoryError where it cannot be gone by."""
    path = files.jobs_record
    try:
        check_own(files.jobs, folder=True)
        check_own(path)
        if not path.exists():
            return None
    except OSError as error:
        raise RunDirectoryError(f"{printable(path)}: cannot be read: {printable(error.strerror or error)}") from error
    content = read_json(path)
    if content.get("schema") != SCHEMA:
        raise damaged(path, f"schema: not {SCHEMA}")
    cluster, jobs, submitting = (content.get(key) for key in ("cluster", "jobs", "submitting"))
    if cluster not in ("slurm", "local"):
        raise damaged(path, "cluster: not slurm")
    if not isinstance(jobs, dict) or not all(isinstance(job, str) and _JOB.fullmatch(job) for job in jobs.values()):
        raise damaged(path, "jobs: not a mapping of names to ids of jobs")
    return SweepJobs(str(cluster), jobs, submitting is True)


def write_jobs(files: SweepFiles, jobs: SweepJobs) -> None:
    """Write jobs.json; the caller holds the sweep's lock. RunDirectoryError where the disk refuses."""
    content = {"schema": SCHEMA, "cluster": jobs.cluster, "jobs": dict(jobs.jobs), "submitting": jobs.submitting}
    with writing(files.root, "choose another with -o"):
        atomic_write(files.jobs_record, (json.dumps(content, indent=2) + "\n").encode())
