"""Processes in milliseconds instead of seconds: a standby has imported everything, and forks what is asked of it.

    standby = find(folder, "ddpm_dist.preload:everything", watch=pid_of_ray)
    child = standby.start(Request("module:function", …), stdout=1, stderr=2)
    child.wait()                     its exit code, as of a subprocess

There is one standby for each folder, user, executable, preload, working directory, version of the package's files, and
environment that is read at import; who asks first starts it. It never runs other code than its asker has. `start_plain`
gives the same child without a standby, in as many seconds as the imports take.
"""

import contextlib
import json
import os
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ddpm_dist.cluster.child import LINUX, Request
from ddpm_dist.cluster.standby_key import SET_FOR_IMPORT, key
from ddpm_dist.cluster.standby_locks import locked, runs
from ddpm_dist.errors import StandbyError

LENGTH = struct.Struct("!Q")
MOST_DESCRIPTORS = 32
IDLE_S = 900.0
START_S = 120.0
ANSWER_S = 10.0
"""A standby that doesn't answer in this time hangs (or the node does): it isn't asked again by this call."""


class Child(Protocol):
    """A process that runs a `Request`."""

    pid: int

    def fileno(self) -> int:
        """Readable, for `select`, when `wait` would return at once."""

    def wait(self, timeout_s: float | None = None) -> int:
        """The exit code, negative after a signal; TimeoutError if it isn't there in time."""

    def signal(self, number: int) -> None: ...

    def close(self) -> None:
        """SIGKILL, unless it has ended."""


class Standby:
    """A running standby. Nothing of it is held between two calls."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def start(self, request: Request, stdout: int, stderr: int, descriptors: Sequence[int] = ()) -> Child:
        """Forks a child, which ends when the result is closed or this process does; StandbyError where it can't.

        descriptors: given to the function, as other numbers.
        """
        body = request.encode()
        try:
            connection = _connect(self._place)
            connection.settimeout(ANSWER_S)
            socket.send_fds(connection, [LENGTH.pack(len(body))], [stdout, stderr, *descriptors])
            connection.sendall(body)
            words = _Words(connection)
            answer = words.next(ANSWER_S)
        except (OSError, ValueError) as error:
            raise StandbyError(f"the standby {self._place} doesn't fork: {error or type(error).__name__}") from None
        if answer is None or "pid" not in answer:
            connection.close()
            reason = (answer or {}).get("error", "it ended")
            raise StandbyError(f"the standby {self._place} doesn't fork: {reason}")
        return _Forked(answer["pid"], connection, words)


def find(
    folder: str | Path,
    preload: str,
    watch: int | None = None,
    idle_s: float = IDLE_S,
    patience_s: float = START_S,
    environment: Mapping[str, str] | None = None,
) -> Standby:
    """The standby of this environment, which is started where there is none; StandbyError with the reason otherwise.

    folder: for its socket, private to this user. preload: `module:function` that imports everything. watch: pid of the
    process that it ends with. idle_s: after so long without a child it ends. environment: that of the children, as far
    as it is read at import; by default this process's.
    """
    if not LINUX or not hasattr(os, "pidfd_open"):
        raise StandbyError("a standby needs Linux (fork, pidfd)")
    folder = private(Path(folder))
    environment = os.environ if environment is None else environment
    name = key(preload, environment)
    place = folder / name
    with locked(folder, patience_s):
        if not _serves(place, patience_s):
            _launch(folder, name, preload, watch, idle_s, patience_s, environment)
    return Standby(place)


def _serves(place: Path, patience_s: float) -> bool:
    """Whether one is there; one that is starting, as its asker was killed meanwhile, is waited for."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            _connect(place).close()
            return True
        except FileNotFoundError:
            pass
        except ConnectionRefusedError:  # it was killed
            place.unlink(missing_ok=True)
        except OSError as error:
            raise StandbyError(f"the standby {place} doesn't answer: {error}") from None
        if not runs(place):
            return False
        if time.monotonic() > deadline:
            raise StandbyError(f"the standby {place} has been starting for too long")
        time.sleep(0.05)


def private(folder: Path) -> Path:
    """The folder, made where there is none; StandbyError if others than this user may write there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise StandbyError(f"{folder}: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise StandbyError(f"{folder}: is not a folder of this user alone (mode 0700); remove it")
    return folder


def start_plain(request: Request, stdout: int, stderr: int, descriptors: Sequence[int] = ()) -> Child:
    """The same child, as a new interpreter that imports for itself."""
    environment = {**request.environment, "PYTHONPATH": os.pathsep.join(request.path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "ddpm_dist.cluster.child", str(os.getpid()), *map(str, descriptors)],
        stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, pass_fds=descriptors, env=environment,
        cwd=request.directory, start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # its exit code tells
        process.stdin.write(request.encode())
        process.stdin.close()
    return _Plain(process)


class _Forked:
    """The asker's side of a child of a standby."""

    def __init__(self, pid: int, connection: socket.socket, words: "_Words") -> None:
        self.pid, self._connection, self._words = pid, connection, words
        self._code: int | None = None

    def fileno(self) -> int:
        return self._connection.fileno()

    def wait(self, timeout_s: float | None = None) -> int:
        if self._code is None:
            try:
                answer = self._words.next(timeout_s)
            except ConnectionError:
                answer = None
            # A standby that was killed took its children along.
            self._code = -int(signal.SIGKILL) if answer is None else int(answer["code"])
        return self._code

    def signal(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self._connection.sendall(bytes([number]))

    def close(self) -> None:
        self._connection.close()


class _Plain:
    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.pid, self._process = process.pid, process
        self._watch = os.pidfd_open(process.pid) if hasattr(os, "pidfd_open") else -1

    def fileno(self) -> int:
        return self._watch

    def wait(self, timeout_s: float | None = None) -> int:
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._watch >= 0:
            os.close(self._watch)
            self._watch = -1


class _Words:
    """Lines of JSON from a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._rest = connection, b""

    def next(self, timeout_s: float | None) -> dict[str, Any] | None:
        """None at the end of the connection; TimeoutError."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._connection], [], [], left)[0]:
                raise TimeoutError("no answer")
            data = self._connection.recv(1 << 12)
            if not data:
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        words: dict[str, Any] = json.loads(line)
        return words


def peer_uid(connection: socket.socket) -> int:
    """User of the process at the other end of a Unix socket."""
    size = struct.calcsize("3i")
    return int(struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[1])


def _connect(place: Path) -> socket.socket:
    """By way of a descriptor of the folder, as names of sockets may have 108 bytes only."""
    folder = os.open(place.parent, os.O_PATH | os.O_DIRECTORY)
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(ANSWER_S)
        connection.connect(f"/proc/self/fd/{folder}/{place.name}")
        if peer_uid(connection) != os.getuid():
            raise OSError(f"user {peer_uid(connection)} listens there")
    except BaseException:
        connection.close()
        raise
    finally:
        os.close(folder)
    return connection


def _launch(
    folder: Path,
    name: str,
    preload: str,
    watch: int | None,
    idle_s: float,
    patience_s: float,
    environment: Mapping[str, str],
) -> None:
    """Starts it and waits until it is ready; StandbyError with its own words if it isn't."""
    command = [sys.executable, "-m", "ddpm_dist.cluster.standby_server", "--folder", str(folder), "--name", name]
    command += ["--preload", preload, "--idle", str(idle_s)]
    command += ["--watch", str(watch)] if watch is not None else []
    mine = {n: v for n, v in environment.items() if not n.startswith("AWS_")}  # it needs no secrets, so it has none
    environment = {**mine, **SET_FOR_IMPORT, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    words, deadline = b"", time.monotonic() + patience_s
    with process.stdout as out:
        while select.select([out], [], [], max(0.0, deadline - time.monotonic()))[0]:
            data = os.read(out.fileno(), 1 << 12)
            words += data
            if not data:
                break
        else:
            words = words or f"it is not ready after {patience_s:.0f} s".encode()
    process.wait()  # of the program that left it behind
    said = words.decode(errors="replace").strip()
    if said != "ready":
        raise StandbyError(f"no standby: {said or 'it ended before it was ready'}")
