"""A rank's own side of its supervisor: what it tells it, and what it hears. Imports neither Ray nor torch.

Without a supervisor (DeepSpeed's launcher, tests) nothing is told, and nothing is heard.
"""

import base64
import contextlib
import json
import os
import pickle
import select
import socket
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field

from ddpm_dist import cli
from ddpm_dist.cluster.memory import Memory
from ddpm_dist.errors import DdpmDistError

BEAT_S = 2.0
"""How often a rank says that it lives."""
FAILED_AT = "DDPM_FAILED_AT"
"""In a rank's environment: Unix time at which the attempt before was over, if there was one."""
PASSED = "DDPM_PASSED"
"""... what its descriptors are of, in their order: `words`; `port`, for rank 0; `memory` that outlives it."""
AGREED = "DDPM_AGREED"
"""... step whose copy in memory every rank has, if there is one."""
PARTS = {
    "start": "infrastructure_recovery_from_disruption",
    "group": "group",
    "engine": "training_prep",
    "state": "unproductive_checkpoint_restore_time",
    "first_batch": "data_loading_sync",
    "first_step": "program_startup",
}
"""Parts of a start in their order -> names in TensorBoard: those of badput in ml-goodput-measurement, where one fits.
`start` ends when the rank's process is there."""

_supervisor: socket.socket | None = None
_memory: Memory | None = None
_preempted = False
_sending = threading.Lock()
_told: dict[str, float] = {}


@dataclass
class Told:
    """What a rank has told its supervisor so far."""

    marks: dict[str, float] = field(default_factory=dict)
    """Part of its start -> Unix time at which it was done."""
    error: BaseException | None = None
    rest: bytes = b""

    def hear(self, data: bytes) -> None:
        """More bytes of what it says; an unfinished last line waits for its end."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            word = json.loads(line)
            if "mark" in word:
                self.marks.setdefault(word["mark"], word["at"])
            elif "error" in word:
                self.error = pickle.loads(base64.b64decode(word["error"]))  # noqa: S301 - of this supervisor's own rank


def run(payload: str, descriptors: list[int]) -> int:
    """The function of a rank's process. payload: JSON of {"worker": pickle in base64, "arguments"}; descriptors: as
    `PASSED` says."""
    global _memory, _supervisor
    passed = dict(zip(os.environ[PASSED].split(), descriptors, strict=True))
    _supervisor = socket.socket(fileno=passed["words"])
    if "port" in passed:
        os.environ["MASTER_LISTEN_FD"] = str(passed["port"])
    if "memory" in passed:
        agreed = os.environ[AGREED]
        _memory = Memory(passed["memory"], int(agreed) if agreed else None)
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


def tell(part: str) -> bool:
    """A part of the start is done; whether it is told for the first time, as it counts but once."""
    if part in _told:
        return False
    _told[part] = time.time()
    _send({"mark": part, "at": _told[part]})
    return True


def restart_parts() -> dict[str, float]:
    """Seconds from the end of the attempt before to the first step of this one, by part and in all; empty without one.

    The names are TensorBoard's (`PARTS`).
    """
    before = os.environ.get(FAILED_AT)
    if not before:
        return {}
    failed_at = float(before)
    spent = durations(failed_at, _told)
    return {
        "restart/seconds": max(0.0, max(_told.values()) - failed_at),
        **{f"restart/{PARTS[part]}": seconds for part, seconds in spent.items()},
    }


def durations(failed_at: float, marks: Mapping[str, float]) -> dict[str, float]:
    """Part -> seconds that it took, of those that are done. failed_at: Unix time at which the first one began."""
    found, before = {}, failed_at
    for part in PARTS:
        if part in marks:
            found[part] = max(0.0, marks[part] - before)  # clocks of two nodes may differ
            before = marks[part]
    return found


def lasting_memory() -> Memory | None:
    """Memory that outlives this rank, for copies of its state; None without a supervisor that has it."""
    return _memory


def preemption_announced() -> bool:
    """Whether Ray has told this rank's supervisor that a node of the run is about to be taken away."""
    return _preempted


def _send(word: dict[str, object]) -> None:
    if _supervisor is None:
        return
    with _sending, contextlib.suppress(OSError):  # it is gone, and this process is about to be
        _supervisor.sendall(json.dumps(word).encode() + b"\n")


def _listen(supervisor: socket.socket) -> None:
    """Hears and says that this process lives, as long as its threads run at all."""
    global _preempted
    while True:
        try:
            readable, _, _ = select.select([supervisor], [], [], BEAT_S)
            data = supervisor.recv(64) if readable else None
        except OSError:
            return
        if data == b"":
            return
        _preempted = _preempted or b"p" in (data or b"")
        _send({"alive": True})
