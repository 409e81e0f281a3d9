"""Connections between the first process and each other one, over which all notice at once that one is lost.

A killed process' connections are closed by its machine, and those of a machine that is gone by the keepalive of the
kernels, whatever the processes are busy with. NCCL, gloo and the store notice much later, or only when they time out.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neq_cli.errors import Terminated, described

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_KEY = "lifeline"
_LONGEST = 1 << 16  # bytes of a message
_CONNECTING = 20.0
_IDLE, _BETWEEN, _COUNT = 5, 2, 3  # seconds and probes: a machine that is gone is noticed after 11 seconds
_SAVING = 600.0
"""Seconds that a checkpoint which is being written when a process is lost has to be finished in."""

_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _forget_in_child() -> None:
    """A forked worker must not hold open what is to close when its parent is killed."""
    for one in list(_sockets):
        one.close()


os.register_at_fork(after_in_child=_forget_in_child)


def lost(rank: int) -> str:
    """Return what is said of a process that ended without a word."""
    return f"lost process {rank}, which was killed, or whose machine is gone; --resume goes on"


@dataclass
class _Peer:
    """Another process; ``rank`` is None until it has said who it is."""

    connection: socket.socket
    rank: int | None = None
    heard: bytes = b""

    def lines(self) -> list[str] | None:
        """Return what it says, line by line; None where it is gone."""
        try:
            more = self.connection.recv(_LONGEST)
        except OSError:
            return None
        self.heard += more
        *whole, self.heard = self.heard.split(b"\n")
        return [line.decode(errors="replace") for line in whole] if more and len(self.heard) < _LONGEST else None

    def say(self, text: str) -> None:
        """Send a line, as far as it can be sent."""
        with suppress(OSError):
            self.connection.sendall(" ".join(text.split()).encode()[: _LONGEST - 1] + b"\n")


class Lifeline:
    """What this process hears of the others: ``reason`` says why one is lost, None while none is.

    Where the thread that trains does not end by itself within ``patience`` seconds of a loss, the process is ended from
    here, with exit code 1, after ``last_words`` was called with the reason.
    """

    def __init__(self, rank: int, address: tuple[str, int], word: str, listener: socket.socket | None) -> None:
        """Use ``open_lifeline``."""
        self.rank = rank
        self.reason: str | None = None
        self.patience = 5.0
        self.last_words: Callable[[str], None] = lambda reason: None
        self.saving = threading.Lock()  # held while what is written must not be cut off
        self._address, self._word, self._listener = address, word, listener
        self._peers: list[_Peer] = []
        self._over = threading.Event()
        self._woken, self._wake = socket.socketpair()
        _sockets.update((self._woken, self._wake))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, a lost process ends this one; the others are told how this one leaves."""
        watching = threading.Thread(target=self._first if self.rank == 0 else self._other, daemon=True)
        watching.start()
        word = "bye"
        try:
            yield
        except (KeyboardInterrupt, Terminated):  # which the others get or agree on too
            raise
        except BaseException as error:
            word = "bye" if self.reason else f"failed {described(error)}"
            raise
        finally:
            self._over.set()
            for peer in list(self._peers):
                peer.say(word)
            self._wake.close()
            watching.join(1.0)
            for peer in list(self._peers):
                peer.connection.close()
            if self._listener is not None:
                self._listener.close()

    def _first(self) -> None:
        assert self._listener is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while not self._over.is_set():
                for key, _ in selector.select():
                    if key.fileobj is self._listener:
                        with suppress(OSError):
                            connection, _ = self._listener.accept()
                            peer = self._met(connection)
                            selector.register(connection, selectors.EVENT_READ, peer)
                    elif isinstance(key.data, _Peer) and not self._over.is_set() and not self._hear(key.data):
                        selector.unregister(key.fileobj)
                        key.data.connection.close()
                        self._peers.remove(key.data)

    def _other(self) -> None:
        try:
            peer = self._met(socket.create_connection(self._address, _CONNECTING))
        except OSError as error:
            where = f"{self._address[0]}:{self._address[1]}"
            print(
                f"warning: process {self.rank} cannot reach process 0 at {where} ({error.strerror or error}); "
                "a process that is lost may be noticed late",
                file=sys.stderr,
            )
            return
        peer.rank = 0
        peer.connection.settimeout(None)
        peer.say(f"{self._word} {self.rank}")
        with selectors.DefaultSelector() as selector:
            for one in (peer.connection, self._woken):
                selector.register(one, selectors.EVENT_READ)
            while not self._over.is_set():
                selector.select()
                if not self._over.is_set() and not self._hear(peer):
                    return

    def _met(self, connection: socket.socket) -> _Peer:
        _keep_alive(connection)
        _sockets.add(connection)
        self._peers.append(_Peer(connection))
        return self._peers[-1]

    def _hear(self, peer: _Peer) -> bool:
        """Take in what a process says, or that it is gone; returns whether there is more to be heard from it."""
        lines = peer.lines()
        for line in lines or ():
            kind, _, text = line.partition(" ")
            if peer.rank is None:
                if kind != self._word or not text.isdecimal():
                    return False  # a stranger
                peer.rank = int(text)
            elif kind == "bye":
                return False
            elif kind == "failed":
                self._notice(peer, f"process {peer.rank}: {text}")
            elif kind == "lost":
                self._notice(peer, text)
        if lines is None and peer.rank is not None:
            self._notice(peer, lost(peer.rank))
        return lines is not None

    def _notice(self, peer: _Peer, reason: str) -> None:
        """Pass it on, and end this process unless it does so by itself."""
        self.reason = self.reason or reason
        for other in self._peers:
            if other is not peer:
                other.say(f"lost {reason}")
        if self._over.wait(self.patience):
            return
        self.saving.acquire(timeout=_SAVING)
        if self._over.is_set():
            return
        with suppress(Exception):
            self.last_words(reason)
        if self.rank == 0 or (peer.rank == 0 and reason == lost(0)):  # else the first process says it
            print(reason, file=sys.stderr, flush=True)
        os._exit(1)


def open_lifeline(rank: int, store: Store) -> Lifeline:
    """Return this process' end; all processes call it. The first one listens from now on."""
    listener = None
    if rank == 0:
        # Where all are on one machine, nobody else is let in.
        here = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE", "")
        host = "127.0.0.1" if here else os.environ.get("MASTER_ADDR", "localhost")
        listener = _listening("127.0.0.1" if here else "")
        _sockets.add(listener)
        store.set(_KEY, json.dumps([host, listener.getsockname()[1], secrets.token_hex(16)]))
    host, port, word = json.loads(store.get(_KEY))
    return Lifeline(rank, (host, port), word, listener)


def _listening(host: str) -> socket.socket:
    if not host and socket.has_dualstack_ipv6():
        with suppress(OSError):  # a kernel without
            return socket.create_server((host, 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server((host, 0), backlog=1024)


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))  # Linux, macOS
    for option, value in (
        (idle, _IDLE),
        (getattr(socket, "TCP_KEEPINTVL", None), _BETWEEN),
        (getattr(socket, "TCP_KEEPCNT", None), _COUNT),
    ):
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
