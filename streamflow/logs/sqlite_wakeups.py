"""Wake-ups between processes that share a SQLite file: one datagram per commit to those who wait for just that.

Each listener binds a Unix datagram socket `<token>` in a private directory of the file and shows what it waits for by
symbolic links `<interest>.<token>` to it. Who has committed lists the links (cached while the directory's mtime stays)
and sends the interests that were written to the sockets behind them; those of dead processes refuse and are unlinked.

    <tempdir>/streamflow-<uid>/<16 hex of the file's identity>/{9f3c21aa, 258.9f3c21aa, 513.9f3c21aa}

Why there: a socket's path may have 108 bytes at most (104 on macOS), too few for a path beside any database. The
directory must be ours alone (owner checked, mode 0700). Where it is not, where processes have different TMPDIRs or
users, or where Unix sockets do not exist, nobody is woken and the poll for changes is all there is (`available` is
False, or a safety poll finds what no wake-up announced): slower, never wrong.
"""

from __future__ import annotations

import os
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

SOCKET_PATH_BYTES_MAX: Final = 100
"""Shortest limit of the systems we know (macOS: 104 with the closing zero), less a little."""

MTIME_STEP_NS: Final = 50_000_000
"""A directory's mtime may tick as coarsely as the kernel's timer: a listing of a directory that was changed more
recently than this is not kept."""

DRAIN_MAX: Final = 64
"""Datagrams read at once."""

BIND_TRIES: Final = 3
"""The last one to leave removes the directory, perhaps between our making it and binding in it."""

QUEUE_MAX: Final = 8
"""So many waiting datagrams mean that the queue (10 on old kernels) may have overflowed: assume that all rang."""


class Wakeups:
    """One listener and ringer. Not thread-safe: each thread has its own."""

    def __init__(self, identity: str) -> None:
        self._directory = _private_directory(identity)
        self._token = secrets.token_hex(4)
        self._interests: set[str] = set()
        self._socket: socket.socket | None = None
        self._sender: socket.socket | None = None
        self._others: dict[str, list[str]] = {}
        self._listed_mtime_ns = -1

    @property
    def available(self) -> bool:
        return self._directory is not None

    def listen(self) -> socket.socket | None:
        """The bound socket to wait on, None where there are no wake-ups."""
        tries = BIND_TRIES
        while self._socket is None and self._directory is not None:
            bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                bound.setblocking(False)
                self._directory.mkdir(mode=0o700, exist_ok=True)
                bound.bind(str(self._directory / self._token))
                self._socket = bound
            except OSError:
                bound.close()
                tries -= 1
                if not tries:
                    self._directory = None
        return self._socket

    def want(self, interest: str) -> None:
        """Be woken for `interest` from now on. Look at what it is about after this call, not before."""
        self._interests.add(interest)
        if self.listen() is not None:
            self._link(interest)

    def unwant(self, interest: str) -> None:
        self._interests.discard(interest)
        if self._directory is not None:
            with suppress(OSError):
                (self._directory / f"{interest}.{self._token}").unlink()

    def restore(self) -> None:
        """Make links again that somebody (a cleaner of the temporary directory) has removed."""
        if self._socket is None or self._directory is None:
            return
        if not (self._directory / self._token).exists():
            self._socket.close()
            self._socket = None
            self.listen()
        for interest in self._interests:
            self._link(interest)

    def _link(self, interest: str) -> None:
        assert self._directory is not None
        with suppress(OSError):
            (self._directory / f"{interest}.{self._token}").symlink_to(self._token)

    def ring(self, interests: Iterable[str]) -> None:
        """Wake every other listener that wants one of `interests`. Never blocks, never raises."""
        if self._directory is None or not (others := self._listing()):
            return
        rung: dict[str, list[str]] = {}
        for interest in interests:
            for token in others.get(interest, ()):
                rung.setdefault(token, []).append(interest)
        if not rung:
            return
        if self._sender is None:
            self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        for token, names in rung.items():
            self._send(self._sender, token, names)

    def _send(self, sender: socket.socket, token: str, names: list[str]) -> None:
        assert self._directory is not None
        try:
            sender.sendto(" ".join(names).encode(), socket.MSG_DONTWAIT, str(self._directory / token))
        except (ConnectionRefusedError, FileNotFoundError):
            # Its process is dead: sockets are closed by the kernel, but their files stay.
            links = [f"{interest}.{token}" for interest, tokens in self._others.items() if token in tokens]
            for name in (token, *links):
                with suppress(OSError):
                    (self._directory / name).unlink()
            self._listed_mtime_ns = -1
        except OSError:
            pass  # its queue is full, hence it will wake anyway; or it cannot be reached, and polls

    def _listing(self) -> dict[str, list[str]]:
        assert self._directory is not None
        try:
            mtime_ns = os.stat(self._directory).st_mtime_ns
            if mtime_ns != self._listed_mtime_ns:
                self._others = {}
                for name in os.listdir(self._directory):
                    interest, dot, token = name.partition(".")
                    if dot and token != self._token:
                        self._others.setdefault(interest, []).append(token)
                settled = time.time_ns() - mtime_ns > MTIME_STEP_NS
                self._listed_mtime_ns = mtime_ns if settled else -1
        except OSError:
            self._others, self._listed_mtime_ns = {}, -1
        return self._others

    def drain(self) -> set[str] | None:
        """The interests that were rung since the last call; None when it may be any of them."""
        rung: set[str] = set()
        count = 0
        if self._socket is not None:
            with suppress(BlockingIOError):
                while count < DRAIN_MAX:
                    rung.update(self._socket.recv(65536).decode().split())
                    count += 1
        return rung if count < QUEUE_MAX else None

    def close(self) -> None:
        """Remove the socket and the links. Idempotent."""
        for interest in list(self._interests):
            self.unwant(interest)
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            assert self._directory is not None
            with suppress(OSError):
                (self._directory / self._token).unlink()
            with suppress(OSError):
                self._directory.rmdir()  # succeeds for the last one only


def _private_directory(identity: str) -> Path | None:
    """The directory of the file with this identity, None when it cannot be had for us alone."""
    if not hasattr(socket, "AF_UNIX") or not hasattr(os, "getuid"):
        return None
    parent = Path(tempfile.gettempdir()) / f"streamflow-{os.getuid()}"
    directory = parent / identity[:16]
    if len(os.fsencode(directory)) + len("/01234567") > SOCKET_PATH_BYTES_MAX:
        return None
    try:
        parent.mkdir(mode=0o700, exist_ok=True)
        found = parent.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            return None
    except OSError:
        return None
    return directory
