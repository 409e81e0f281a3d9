"""One writer per run directory: real processes, kills, forks, and file systems without locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from neq_cli.errors import RunDirectoryError
from neq_cli.runs.store.lock import acquire
from neq_cli.runs.store.writer import RunWriter

HOLD = """
import os, sys, time
from pathlib import Path
from neq_cli.runs.store.writer import RunWriter
writer = RunWriter.reopen(Path(sys.argv[1]))
if len(sys.argv) > 2 and not os.fork():
    os.close(1)
    time.sleep(60)
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    RunWriter.create(tmp_path / "run", "seed: 1\n", {}).close()
    return tmp_path / "run"


class Holder:
    """Another process that holds the run directory."""

    def __init__(self, run: Path, *arguments: str) -> None:
        command = [sys.executable, "-c", HOLD, str(run), *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{self.process.pid}\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def holders() -> Iterator[list[Holder]]:
    started: list[Holder] = []
    yield started
    for holder in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(holder.process.pid, signal.SIGKILL)
        holder.process.communicate()


def test_the_second_process_is_refused_until_the_first_is_killed(run: Path, holders: list[Holder]) -> None:
    holders.append(Holder(run, "with a child"))  # which lives on, as a data loader's worker may for a while
    process = holders[0].process.pid
    with pytest.raises(RunDirectoryError) as caught:
        RunWriter.reopen(run)
    assert str(caught.value) == (
        f"{run}: being trained by process {process} on host {socket.gethostname()}; wait, stop it, or choose another "
        "with -o"
    )
    with pytest.raises(RunDirectoryError, match="being trained"):  # a refusal does not end the lock
        RunWriter.reopen(run)
    holders[0].kill()
    os.killpg(process, 0)  # the child is there
    RunWriter.reopen(run).close()


def test_one_process_has_it_once(run: Path, tmp_path: Path, holders: list[Holder]) -> None:
    (tmp_path / "link").symlink_to(run)
    first = RunWriter.reopen(run)
    for path in (run, tmp_path / "link"):
        with pytest.raises(RunDirectoryError, match=re.escape(f"{path}: being trained by this very process;")):
            RunWriter.reopen(path)
    # The refusals did not let go of it for others either: another process gets nothing.
    assert _elsewhere(run) == f"{run}: being trained by process {os.getpid()} on host {socket.gethostname()}"
    first.close()
    first.close()
    with RunWriter.reopen(run) as second:
        assert second.note is None
        assert "being trained" in _elsewhere(run)
    assert _elsewhere(run) == "got it"


def test_what_nothing_refers_to_is_not_held(run: Path) -> None:
    writer = RunWriter.reopen(run)
    del writer
    RunWriter.reopen(run).close()


def test_a_forked_child_neither_has_the_lock_nor_ends_it(run: Path) -> None:
    def child() -> str:
        try:
            RunWriter.reopen(run)
        except RunDirectoryError as error:
            writer.close()
            return str(error).partition(";")[0]
        return "got it"

    writer = RunWriter.reopen(run)
    refusal = f"{run}: being trained by process {os.getpid()} on host {socket.gethostname()}"
    assert _in_a_child(child) == refusal
    assert _elsewhere(run) == refusal
    writer.close()
    assert _in_a_child(child) == "got it"


def test_the_holder_is_named_only_where_the_file_reads_as_neq_writes_it(run: Path, holders: list[Holder]) -> None:
    holders.append(Holder(run))
    for content in (b"", b"\x1b[31mprocess 1 on host h", b"process 1 on host " + b"h" * 10_000, b"\xff" * 99):
        (run / ".lock").write_bytes(content)  # in this process, which holds nothing
        with pytest.raises(RunDirectoryError, match="being trained by another process; wait"):
            RunWriter.reopen(run)
    (run / ".lock").write_bytes("process 1 on host a\u202eb".encode())
    with pytest.raises(RunDirectoryError, match="process 1 on host a\N{REPLACEMENT CHARACTER}b;"):
        RunWriter.reopen(run)


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "socket"])
def test_a_lock_that_is_no_file_is_refused_and_not_written_through(run: Path, tmp_path: Path, kind: str) -> None:
    (run / ".lock").unlink()
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    if kind == "link":
        (run / ".lock").symlink_to(outside)
    elif kind == "fifo":
        os.mkfifo(run / ".lock")
    elif kind == "folder":
        (run / ".lock").mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.relpath(run / ".lock"))
    with pytest.raises(RunDirectoryError, match=r"\.lock: .*remove it") as caught:
        acquire(run / ".lock", run / "status.json")
    assert "\n" not in str(caught.value)
    assert outside.read_bytes() == b"mine"


def test_a_hard_link_elsewhere_is_not_written_to(run: Path, tmp_path: Path) -> None:
    (run / ".lock").unlink()
    (tmp_path / "outside").write_bytes(b"mine")
    os.link(tmp_path / "outside", run / ".lock")
    with RunWriter.reopen(run):
        assert "being trained by another process" in _elsewhere(run)
    assert (tmp_path / "outside").read_bytes() == b"mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_one_line(run: Path) -> None:
    (run / ".lock").unlink()
    run.chmod(0o500)
    with pytest.raises(RunDirectoryError, match=r"cannot be written: Permission denied"):
        RunWriter.reopen(run)
    run.chmod(0o700)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_without_locks_the_status_is_asked(run: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def lockf(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = socket.gethostname()

    def status(**changes: Any) -> None:
        (run / "status.json").write_text(json.dumps({"state": "running", "pid": os.getppid(), "host": here, **changes}))

    status()
    with pytest.raises(
        RunDirectoryError, match=f"being trained by process {os.getppid()} on this host, as status.json"
    ):
        RunWriter.reopen(run)
    for changes in ({"pid": dead.pid}, {"pid": os.getpid()}, {"state": "failed"}, {"pid": "x"}, {"pid": -1}):
        status(**changes)
        with RunWriter.reopen(run) as writer:
            assert writer.note == (f"{run}: its file system has no locks; see to it that no other process trains it"), (
                changes
            )
            with pytest.raises(RunDirectoryError, match="this very process"):
                RunWriter.reopen(run)
    status(host="other\x1b[1m")
    with RunWriter.reopen(run) as writer:
        assert str(writer.note).endswith(
            "trains it; status.json has it running on host other\N{REPLACEMENT CHARACTER}[1m"
        )
    (run / "status.json").write_text("{")
    RunWriter.reopen(run).close()


def test_another_failure_of_the_lock_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "lockf", lockf)
        with pytest.raises(RunDirectoryError, match="cannot be locked: Input/output error; choose another with -o"):
            RunWriter.reopen(run)
    RunWriter.reopen(run).close()  # and nothing is held after it


def test_reading_the_run_in_the_same_process_does_not_end_the_lock(run: Path) -> None:
    from neq_cli.runs.store.run import read_run

    (run / "recipe.yaml").write_text("epochs: 1\n")
    with RunWriter.reopen(run):
        with pytest.raises(RunDirectoryError, match="no finished epoch"):
            read_run(run)
        assert "being trained" in _elsewhere(run)


def _in_a_child(function: Any) -> str:
    """Return what ``function`` returns in a forked child."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, function().encode())
        os._exit(0)
    os.close(writing)
    assert select.select([reading], [], [], 30)[0]
    said = os.read(reading, 4096).decode()
    os.close(reading)
    os.waitpid(child, 0)
    return said


def _elsewhere(run: Path) -> str:
    """Return what another process, started now, hears when it wants the run directory."""
    script = (
        "import sys; from pathlib import Path; from neq_cli.errors import NeqError\n"
        "from neq_cli.runs.store.writer import RunWriter\n"
        "try:\n    RunWriter.reopen(Path(sys.argv[1])); print('got it')\n"
        "except NeqError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(run)], capture_output=True, text=True, check=True)
    return done.stdout.strip().partition(";")[0]
