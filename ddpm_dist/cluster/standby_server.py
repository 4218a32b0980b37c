"""The standby itself: a process that has imported everything and forks what is asked of it.

`python -m ddpm_dist.cluster.standby_server …`, started by `standby.find`. It has one thread, or it serves nothing: a
fork copies the locks that other threads hold. It never touches CUDA or a store, whose state a fork can't share.

Each connection asks for one child, and is its lease on life: its end means SIGKILL to the child. The standby ends with
the process that it watches (its node's Ray), or after a time without children.
"""

import argparse
import contextlib
import fcntl
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ddpm_dist.cluster import child
from ddpm_dist.cluster.child import Request
from ddpm_dist.cluster.standby import LENGTH, MOST_DESCRIPTORS, peer_uid
from ddpm_dist.cluster.standby_locks import RUNNING

REQUEST_S = 5.0
"""An asker that doesn't finish its request in this time is left."""
POLL_S = 1.0


@dataclass
class _Forked:
    pid: int
    process: int
    """Its pidfd."""
    connection: socket.socket | None
    """None once the asker has left."""


class Server:
    """The loop. place: of the listening socket, which is bound already."""

    def __init__(self, listening: socket.socket, place: str, watched: int | None, idle_s: float) -> None:
        self._listening, self.place, self._idle_s = listening, place, idle_s
        self._selector = selectors.DefaultSelector()
        self._selector.register(listening, selectors.EVENT_READ, "asker")
        if watched is not None:
            self._selector.register(watched, selectors.EVENT_READ, "watched")
        self._children: list[_Forked] = []
        self._busy_at = time.monotonic()

    def serve(self) -> None:
        """Until the watched process ends, or nobody has wanted anything, or could have, for a while."""
        while self._children or (time.monotonic() - self._busy_at < self._idle_s and os.path.exists(self.place)):
            for key, _ in self._selector.select(POLL_S):
                if key.data == "watched":
                    self._end_all()
                    return
                if key.data == "asker":
                    self._accept()
                elif key.fd == key.data.process:
                    self._bury(key.data)
                else:
                    self._hear(key.data)
            if self._children:
                self._busy_at = time.monotonic()

    def _accept(self) -> None:
        connection, _ = self._listening.accept()
        self._busy_at = time.monotonic()
        descriptors: list[int] = []
        try:
            connection.settimeout(REQUEST_S)
            if peer_uid(connection) != os.getuid():
                connection.close()
                return
            request = _receive(connection, descriptors)
            self._fork(connection, request, descriptors)
        except (OSError, ValueError, KeyError, TypeError) as error:
            with contextlib.suppress(OSError):
                _say(connection, error=f"{type(error).__name__}: {error}")
            connection.close()
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _fork(self, connection: socket.socket, request: Request, descriptors: Sequence[int]) -> None:
        """descriptors: of stdout, of stderr, and those for the function."""
        if threads() > 1:
            raise ValueError("the standby has got threads")
        me = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(descriptors[0], 1)
                os.dup2(descriptors[1], 2)
                child.become(request, descriptors[2:], me)
                code = child.run(request, descriptors[2:])
            except BaseException:
                code = 1
            os._exit(code)
        forked = _Forked(pid, os.pidfd_open(pid), connection)
        self._children.append(forked)
        self._selector.register(forked.process, selectors.EVENT_READ, forked)
        self._selector.register(connection, selectors.EVENT_READ, forked)
        with contextlib.suppress(OSError):
            _say(connection, pid=pid)

    def _hear(self, forked: _Forked) -> None:
        """Signals, a byte each; the end of the connection is SIGKILL."""
        connection = forked.connection
        if connection is None:
            return
        try:
            numbers = connection.recv(64)
        except OSError:
            numbers = b""
        if not numbers:
            self._leave(forked)
        for number in numbers or [int(signal.SIGKILL)]:
            with contextlib.suppress(ProcessLookupError, OSError):
                signal.pidfd_send_signal(forked.process, number)

    def _bury(self, forked: _Forked) -> None:
        _, status = os.waitpid(forked.pid, 0)
        self._selector.unregister(forked.process)
        os.close(forked.process)
        self._children.remove(forked)
        if forked.connection is not None:
            with contextlib.suppress(OSError):
                _say(forked.connection, code=os.waitstatus_to_exitcode(status))
        self._leave(forked)

    def _leave(self, forked: _Forked) -> None:
        if forked.connection is not None:
            self._selector.unregister(forked.connection)
            forked.connection.close()
            forked.connection = None

    def _end_all(self) -> None:
        for forked in self._children:
            signal.pidfd_send_signal(forked.process, signal.SIGKILL)
        for forked in list(self._children):
            self._bury(forked)


def _receive(connection: socket.socket, descriptors: list[int]) -> Request:
    """The request; its descriptors are added to the list as soon as they are there, so that none is lost."""
    data, received, _, _ = socket.recv_fds(connection, 1 << 16, MOST_DESCRIPTORS)
    descriptors += received
    if len(data) < LENGTH.size:
        raise ValueError("an unfinished request")
    (length,) = LENGTH.unpack_from(data)
    body = bytearray(data[LENGTH.size :])
    while len(body) < length:
        more = connection.recv(1 << 16)
        if not more:
            raise ValueError("an unfinished request")
        body += more
    connection.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        if not connection.recv(1, socket.MSG_PEEK):
            raise ValueError("the asker has left")  # it waited in vain while this process was stopped
    if len(descriptors) < 2:
        raise ValueError("a request without stdout and stderr")
    connection.setblocking(True)
    return Request.decode(bytes(body))


def _say(connection: socket.socket, **words: object) -> None:
    connection.sendall(json.dumps(words).encode() + b"\n")


def threads() -> int:
    """Of this process, those of C libraries included."""
    return len(os.listdir("/proc/self/task"))


def prepare(preload: str) -> str | None:
    """Imports everything; the reason why this process can't be forked, if there is one."""
    module, _, name = preload.partition(":")
    getattr(importlib.import_module(module), name)()
    found = threads()
    if found > 1:
        return f"it has {found} threads after its imports"
    gc.collect()
    gc.freeze()
    return None


def main(argv: Sequence[str] | None = None) -> None:
    """Says `ready` or why not on stdout, once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--preload", required=True)
    parser.add_argument("--idle", type=float, required=True)
    parser.add_argument("--watch", type=int)
    args = parser.parse_args(argv)
    if os.fork():
        os._exit(0)
    os.setsid()  # the child of nobody: a worker's end, or Ray's, doesn't end it
    status = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)
    try:
        server = _open(args)
    except BaseException as error:  # the asker shows it: this process has no other way to say anything
        _answer(status, str(error) or type(error).__name__)
        return
    _answer(status, "ready")
    try:
        server.serve()
    finally:
        for name in (server.place, f"{server.place}{RUNNING}"):
            with contextlib.suppress(OSError):
                os.unlink(name)
    os._exit(0)


def _answer(status: int, word: str) -> None:
    """To the asker, if it still lives: another one may need what it has started."""
    with contextlib.suppress(OSError):
        os.write(status, word.encode() + b"\n")
    os.close(status)


def _open(args: argparse.Namespace) -> Server:
    """The server, whose socket appears in the folder under its name when all else is ready."""
    os.chdir(args.folder)  # names of sockets may have 108 bytes
    lock = os.open(f"{args.name}{RUNNING}", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    watched = os.pidfd_open(args.watch) if args.watch is not None else None
    reason = prepare(args.preload)
    if reason is not None:
        raise RuntimeError(reason)
    os.chdir(args.folder)
    listening = socket.socket(socket.AF_UNIX)
    unready = f"{args.name}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(unready)
    listening.bind(unready)
    listening.listen(64)
    os.rename(unready, args.name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child.set_title(f"ddpm_dist standby {args.folder}/{args.name}")
    return Server(listening, os.path.join(args.folder, args.name), watched, args.idle)


if __name__ == "__main__":
    main(sys.argv[1:])
