"""Stands in for sbatch, srun, sacct, scontrol and scancel where there is no SLURM: enough of each for submitit.

Called by the command's name. It keeps its books in the folder of its own file: `ID_INDEX.state` and so on.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

BOOKS = Path(__file__).parent
KILL_WAIT = 30.0  # seconds; as long as SLURM's own


def sbatch(script: str) -> None:
    """Take a script and run it, as often as its array says, in a process that outlives this one."""
    identifier = str(1000 + len(list(BOOKS.glob("*.sh"))))
    copy = BOOKS / f"{identifier}.sh"
    copy.write_text(Path(script).read_text())
    print(f"Submitted batch job {identifier}")
    subprocess.Popen(
        [sys.executable, __file__, "controller", identifier],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def controller(identifier: str) -> None:
    """Run the jobs of an array, so many at once; one that asked for it is queued again."""
    script = (BOOKS / f"{identifier}.sh").read_text()
    array = re.search(r"--array=0-(\d+)%(\d+)", script)
    names = [f"{identifier}_{index}" for index in range(int(array[1]) + 1)] if array else [identifier]
    at_once = int(array[2]) if array else 1
    for name in names:
        put(name, "PENDING")
    running: dict[str, subprocess.Popen[bytes]] = {}
    while names or running:
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                again = BOOKS / f"{name}.requeue"
                if again.exists():
                    again.unlink()
                    put(name, "PENDING")
                    names.append(name)
                elif state(name) == "RUNNING":
                    put(name, "FAILED" if process.returncode else "COMPLETED")
        while names and len(running) < at_once:
            name = names.pop(0)
            if state(name) == "PENDING":
                running[name] = start(identifier, name)
        if len(running) > most(identifier):
            (BOOKS / f"{identifier}.most").write_text(str(len(running)))
        time.sleep(0.05)


def start(identifier: str, name: str) -> subprocess.Popen[bytes]:
    job = {"SLURM_JOB_ID": name.replace("_", "9"), "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_PROCID": "0"}
    if "_" in name:
        job |= {"SLURM_ARRAY_JOB_ID": identifier, "SLURM_ARRAY_TASK_ID": name.partition("_")[2]}
    put(name, "RUNNING")
    process = subprocess.Popen(["bash", BOOKS / f"{identifier}.sh"], env={**os.environ, **job}, start_new_session=True)
    (BOOKS / f"{name}.pid").write_text(str(process.pid))
    return process


def srun(*arguments: str) -> None:
    """Become the command, whose output is appended to the file named."""
    output, given = "", list(arguments)
    while given[0].startswith("--"):
        option = given.pop(0)
        if option == "--output":
            output = given.pop(0)
    job, index = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_TASK_ID", "")
    array = os.environ.get("SLURM_ARRAY_JOB_ID", "")
    for mark, text in (("%A", array), ("%a", index), ("%j", job), ("%t", "0")):
        output = output.replace(mark, text)
    opened = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    os.execvp(given[0], given)


def sacct(*arguments: str) -> None:
    """Tell the states of arrays, as `--parsable2` has them."""
    print("JobID|State|NodeList")
    for identifier in (value for option, value in itertools.pairwise(arguments) if option == "-j"):
        for path in sorted(BOOKS.glob(f"{identifier}*.state")):
            print(f"{path.stem}|{state(path.stem)}|here")


def scontrol(what: str, name: str) -> None:
    assert what == "requeue"
    assert "#SBATCH --requeue\n" in (BOOKS / f"{name.partition('_')[0]}.sh").read_text()
    (BOOKS / f"{name}.requeue").touch()


def scancel(identifier: str) -> None:
    """SIGTERM to all of a job's processes, SIGKILL a while later."""
    for path in BOOKS.glob(f"{identifier}*.state"):
        running = state(path.stem) == "RUNNING"
        put(path.stem, "CANCELLED by 0")
        if running:
            _signal(path.stem, signal.SIGTERM)
            subprocess.Popen([sys.executable, __file__, "kill_later", path.stem], start_new_session=True)


def kill_later(name: str) -> None:
    time.sleep(KILL_WAIT)
    _signal(name, signal.SIGKILL)


def _signal(name: str, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(int((BOOKS / f"{name}.pid").read_text()), number)


def put(name: str, text: str) -> None:
    (BOOKS / f".{name}").write_text(text)
    (BOOKS / f".{name}").rename(BOOKS / f"{name}.state")


def state(name: str) -> str:
    return (BOOKS / f"{name}.state").read_text()


def most(identifier: str) -> int:
    path = BOOKS / f"{identifier}.most"
    return int(path.read_text()) if path.exists() else 0


if __name__ == "__main__":
    called = Path(sys.argv[0]).name
    arguments = sys.argv[1:]
    if called == Path(__file__).name:
        called, *arguments = arguments
    globals()[called](*arguments)
