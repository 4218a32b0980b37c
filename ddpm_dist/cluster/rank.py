"""A rank's own side of its supervisor: what it tells it, and what it hears. Imports neither Ray nor torch.

Without a supervisor (DeepSpeed's launcher, tests) nothing is told, and nothing is heard.
"""

import base64
import json
import os
import pickle
import socket
import threading
import time
import traceback
from dataclasses import dataclass

from ddpm_dist import cli
from ddpm_dist.errors import DdpmDistError

_supervisor: socket.socket | None = None
_preempted = False


@dataclass(frozen=True)
class Told:
    """What a rank has told its supervisor so far."""

    marks: dict[str, float]
    """Part of its start -> Unix time at which it was done."""
    error: BaseException | None


def run(payload: str, descriptors: list[int]) -> int:
    """The function of a rank's process. payload: JSON of {"worker": pickle in base64, "arguments"}; descriptors: of the
    supervisor's socket and, for rank 0, of the port at which the group meets."""
    global _supervisor
    _supervisor = socket.socket(fileno=descriptors[0])
    if len(descriptors) > 1:
        os.environ["MASTER_LISTEN_FD"] = str(descriptors[1])
    threading.Thread(target=_listen, args=(_supervisor,), name="supervisor", daemon=True).start()
    cli.setup_logging()
    tell("start")
    order = json.loads(payload)
    try:
        pickle.loads(base64.b64decode(order["worker"]))(order["arguments"])  # noqa: S301 - of this user's own driver
    except DdpmDistError as error:
        _send({"error": base64.b64encode(pickle.dumps(error)).decode()})
        return 1
    except BaseException as error:
        traceback.print_exc()
        _send({"error": base64.b64encode(pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))).decode()})
        return 1
    return 0


def tell(part: str) -> None:
    """A part of the start is done."""
    _send({"mark": part, "at": time.time()})


def preemption_announced() -> bool:
    """Whether Ray has told this rank's supervisor that a node of the run is about to be taken away."""
    return _preempted


def heard(lines: bytes) -> Told:
    """What all that a rank has sent means; an unfinished last line is nothing."""
    marks: dict[str, float] = {}
    error: BaseException | None = None
    for line in lines.split(b"\n")[:-1]:
        word = json.loads(line)
        if "mark" in word:
            marks.setdefault(word["mark"], word["at"])
        else:
            error = pickle.loads(base64.b64decode(word["error"]))  # noqa: S301 - of this supervisor's own rank
    return Told(marks, error)


def _send(word: dict[str, object]) -> None:
    if _supervisor is None:
        return
    try:
        _supervisor.sendall(json.dumps(word).encode() + b"\n")
    except OSError:  # it is gone, and this process is about to be
        pass


def _listen(supervisor: socket.socket) -> None:
    global _preempted
    while True:
        try:
            data = supervisor.recv(64)
        except OSError:
            return
        if not data:
            return
        _preempted = _preempted or b"p" in data
