"""What a rank's process does before it calls its function: forked from a standby, or started as a plain program.

Both ways lead to `run`, so that a rank can't tell them apart but by the seconds.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
LINUX = sys.platform == "linux"


@dataclass(frozen=True)
class Request:
    """A call of `function(payload, descriptors)` in a process of its own."""

    function: str
    """`module:name`."""
    payload: str
    """Handed over as it is; the function knows what it means."""
    environment: dict[str, str]
    """All of it: nothing of the standby's stays."""
    directory: str
    title: str
    """As it stands in the list of processes."""
    path: tuple[str, ...] = ()
    """`sys.path` of the asker: where the function's module is. Relative ones are meant from where the asker is."""

    def __post_init__(self) -> None:
        path = (os.path.abspath(entry) if os.path.isdir(entry or ".") else entry for entry in self.path)
        object.__setattr__(self, "path", tuple(path))

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> "Request":
        values: dict[str, Any] = json.loads(data)
        return cls(**{**values, "path": tuple(values["path"])})


def become(request: Request, keep: Sequence[int], parent: int) -> None:
    """Makes of a fork what a new process would be, and has it end with its parent.

    No descriptors but 0 to 2 and `keep`; its own environment, session, title and random numbers.
    """
    if LINUX:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it died before prctl could know it
    os.setsid()
    close_all_but({0, 1, 2, *keep})
    usual_signals()
    os.environ.clear()
    os.environ.update(request.environment)
    set_title(request.title)
    if "numpy" in sys.modules:
        # Equal in all children otherwise. `random` reseeds itself; torch begins as in each new process.
        sys.modules["numpy"].random.seed()


def run(request: Request, descriptors: Sequence[int]) -> int:
    """Calls the function and returns the exit code; a traceback goes to stderr, as in a program."""
    os.chdir(request.directory)
    sys.path[:] = request.path or sys.path
    sys.argv[1:] = []
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        module, _, name = request.function.partition(":")
        code = getattr(importlib.import_module(module), name)(request.payload, list(descriptors))
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    if isinstance(code, str):
        print(code, file=sys.stderr, flush=True)
    return code if isinstance(code, int) else int(code is not None)


def usual_signals() -> None:
    """As Python begins, whatever the standby or who started Ray (`nohup`) ignores."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def close_all_but(keep: set[int]) -> None:
    """One connection forgotten in a child would hide its other end's death from the standby."""
    found = os.listdir("/proc/self/fd") if LINUX else [str(number) for number in range(1024)]
    for descriptor in {int(name) for name in found} - keep:
        try:
            os.close(descriptor)
        except OSError:
            pass


def set_title(title: str) -> None:
    """Writes a title over the process's arguments, which are those of the standby; shorter than these it must be."""
    if not LINUX:
        return
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return
    start, end = int(fields[45]), int(fields[46])  # proc(5): arg_start is field 48, and ")" ends field 2
    text = title.encode()[: max(0, end - start - 1)]
    if start and end > start:
        ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def main() -> None:
    """A plain program: the request comes on stdin, the descriptors are named as arguments."""
    descriptors = [int(number) for number in sys.argv[2:]]
    if LINUX:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        os._exit(1)
    usual_signals()
    request = Request.decode(sys.stdin.buffer.read())
    os._exit(run(request, descriptors))


if __name__ == "__main__":
    main()
