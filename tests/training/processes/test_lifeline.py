"""Real processes that lose each other: killed, failed or ended, busy or not; each is told why within seconds."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from neq_cli.errors import TrainingError
from neq_cli.training.processes.joined import Processes, in_company
from neq_cli.training.processes.lifeline import Lifeline, open_lifeline

PROCESS = """
import os, signal, sys, threading, time
from pathlib import Path
from neq_cli.training.processes.lifeline import open_lifeline

rank, act = int(sys.argv[1]), sys.argv[2]

class Store:
    def set(self, key, value):
        Path(key + ".new").write_text(value)
        os.rename(key + ".new", key)
    def get(self, key):
        while not os.path.exists(key):
            time.sleep(0.01)
        return Path(key).read_text()

store = Store()
lifeline = open_lifeline(rank, store)
lifeline.patience = 0.3
lifeline.last_words = lambda reason: Path(f"words-{rank}").write_text(reason)
with lifeline.watched():
    store.set(f"here-{rank}", "")
    while not os.path.exists("go"):
        time.sleep(0.01)
    if act == "sleep":
        time.sleep(30)
    if act == "nap":
        time.sleep(1)
    if act == "notice":
        while lifeline.reason is None:
            time.sleep(0.01)
        raise SystemExit(7)
    if act == "save":
        with lifeline.saving:
            time.sleep(1.5)
            Path("saved").write_text("")
        time.sleep(30)
    if act == "raise":
        raise ValueError("no such luck")
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "leave a worker":
        if not os.fork():
            os.close(2)
            time.sleep(20)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
"""

Acts = Callable[..., list[tuple[int, str]]]


class Store(dict[str, str]):
    """A store within one process."""

    set = dict.__setitem__
    get = dict.__getitem__  # type: ignore[assignment]


@pytest.fixture
def acted(tmp_path: Path) -> Iterator[Acts]:
    """``acted("sleep", "kill")``: exit code and stderr of each process, all of them within 6 seconds."""
    started: list[subprocess.Popen[str]] = []

    def act(*acts: str) -> list[tuple[int, str]]:
        path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": path}
        for rank, what in enumerate(acts):
            command = [sys.executable, "-c", PROCESS, str(rank), what]
            started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stderr=subprocess.PIPE))
        until(lambda: all((tmp_path / f"here-{rank}").exists() for rank in range(len(acts))), 30)
        time.sleep(0.3)  # in which they connect
        (tmp_path / "go").write_text("")
        return [(process.wait(6), process.stderr.read() if process.stderr else "") for process in started]

    yield act
    for process in started:
        process.kill()
        process.wait()


def until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lost(rank: int) -> str:
    return f"lost process {rank}, which was killed, or whose machine is gone; --resume goes on\n"


def test_a_killed_process_ends_all_others_whatever_they_do(acted: Acts, tmp_path: Path) -> None:
    first, killed, other = acted("sleep", "kill", "sleep")
    assert killed[0] == -signal.SIGKILL
    assert first == (1, lost(1))
    assert other == (1, "")  # one says it
    assert [(tmp_path / f"words-{rank}").read_text() + "\n" for rank in (0, 2)] == [lost(1)] * 2


def test_the_first_process_is_missed_by_all(acted: Acts) -> None:
    assert acted("kill", "sleep", "sleep") == [(-signal.SIGKILL, ""), (1, lost(0)), (1, lost(0))]


@pytest.mark.parametrize("rank", [0, 1])
def test_workers_that_outlive_a_process_hide_nothing(acted: Acts, rank: int) -> None:
    acts = ["sleep", "sleep"]
    acts[rank] = "leave a worker"
    assert acted(*acts)[1 - rank] == (1, lost(rank))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_is_told_with_its_reason(acted: Acts, rank: int) -> None:
    acts = ["sleep", "sleep"]
    acts[rank] = "raise"
    code, said = acted(*acts)[1 - rank]
    assert code == 1
    if rank == 1:
        assert said == "process 1: ValueError: no such luck\n"


def test_a_process_that_ends_well_is_not_missed(acted: Acts) -> None:
    assert acted("nap", "end", "nap") == [(0, "")] * 3


def test_the_first_process_may_end_well_before_the_others(acted: Acts) -> None:
    assert acted("end", "nap") == [(0, "")] * 2


def test_a_process_that_notices_by_itself_ends_its_own_way(acted: Acts, tmp_path: Path) -> None:
    assert acted("notice", "kill")[0] == (7, "")
    assert not (tmp_path / "words-0").exists()


def test_what_is_being_written_is_finished(acted: Acts, tmp_path: Path) -> None:
    assert acted("save", "kill")[0] == (1, lost(1))
    assert (tmp_path / "saved").exists()


def test_strangers_are_not_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    store = Store()
    first = open_lifeline(0, store)  # type: ignore[arg-type]
    _, port, word = json.loads(store["lifeline"])
    with first.watched():
        for said in (b"", b"\x00\xff\n", b"lost everything\n", b"failed x\n", word.encode() + b" minus one\n"):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(said)
        with socket.create_connection(("127.0.0.1", port)) as endless:
            for _ in range(40):
                try:
                    endless.sendall(b"x" * (1 << 16))
                except OSError:
                    break
        time.sleep(0.2)
        assert first.reason is None


@pytest.mark.parametrize(("together", "door"), [("2", "127.0.0.1"), ("1", "")])
def test_on_one_machine_nobody_else_is_let_in(monkeypatch: pytest.MonkeyPatch, together: str, door: str) -> None:
    for name, value in (("MASTER_ADDR", "far.away"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", together)):
        monkeypatch.setenv(name, value)
    store = Store()
    first = open_lifeline(0, store)  # type: ignore[arg-type]
    assert first._listener is not None
    address = first._listener.getsockname()[0]
    assert address == door if door else address in ("::", "0.0.0.0")
    assert json.loads(store["lifeline"])[0] == (door or "far.away")
    with first.watched():
        pass


def test_connections_are_kept_alive_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    # So that a machine which is gone is noticed after 5 + 3 * 2 seconds, though it closes nothing.
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    store = Store()
    first, other = (open_lifeline(rank, store) for rank in (0, 1))  # type: ignore[arg-type]
    leave = threading.Event()

    def follow() -> None:
        with other.watched():
            leave.wait(10)

    thread = threading.Thread(target=follow)
    thread.start()
    with first.watched():
        until(lambda: bool(first._peers and other._peers and first._peers[0].rank == 1), 5)
        for end in (first, other):
            connection = end._peers[0].connection
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if sys.platform == "linux":
                options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
                assert [connection.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [5, 2, 3]
        leave.set()
        thread.join()
    assert (first.reason, other.reason) == (None, None)


def test_a_first_process_out_of_reach_is_said_and_no_loss(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    store = Store()
    first = open_lifeline(0, store)  # type: ignore[arg-type]
    with first.watched():
        pass  # its door is closed
    other = open_lifeline(1, store)  # type: ignore[arg-type]
    with other.watched():
        time.sleep(0.2)
    assert other.reason is None
    assert capsys.readouterr().err.startswith("warning: process 1 cannot reach process 0 at 127.0.0.1:")


@pytest.mark.parametrize("message", ["connection to the database refused", "the socket is dirty", "timed out"])
def test_an_error_of_the_users_own_is_no_loss(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    told: list[str] = []
    monkeypatch.setattr(Processes, "tell_failure", lambda self, said: told.append(said))
    with pytest.raises(RuntimeError, match=message), in_company(Processes(count=2)):
        raise RuntimeError(message)
    assert told == [f"RuntimeError: {message}"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"), "RuntimeError: [gloo/transport"),
        (torch.distributed.DistNetworkError("The client socket has timed out"), "DistNetworkError: The client socket"),
    ],
)
def test_a_broken_group_is_named_as_such(error: Exception, said: str) -> None:
    with pytest.raises(TrainingError) as caught, in_company(Processes(count=2)):
        raise error
    assert str(caught.value).startswith(f"the processes lost touch: {said}")
    lifeline = Lifeline(1, ("", 0), "", None)
    lifeline.reason = lost(2).strip()
    for other in (error, OSError("anything"), AttributeError("x")):
        with pytest.raises(TrainingError, match=r"^lost process 2"), in_company(Processes(count=3, lifeline=lifeline)):
            raise other
    with pytest.raises(TrainingError, match=r"^its own$"), in_company(Processes(count=3, lifeline=lifeline)):
        raise TrainingError("its own")
