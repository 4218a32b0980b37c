"""What runs in a Ray Train worker: it watches its rank, a process of its own, and starts it anew when the run goes on.

It imports neither torch nor DeepSpeed, so that Ray's part of a start is short, and its rank comes from the node's
standby, so that the rank's part is, too. Where there is no standby the rank is a plain subprocess, which is said.
"""

import contextlib
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.v2._internal.execution.context import TrainContext, get_train_context

from ddpm_dist import cli
from ddpm_dist.cluster import memory as memories, rank as ranks
from ddpm_dist.cluster.child import Request
from ddpm_dist.cluster.standby import Child, Standby, find, start_plain
from ddpm_dist.errors import ClusterError, DdpmDistError, HangError, PreemptedError, StandbyError

log = logging.getLogger(__name__)

PRELOAD = "ddpm_dist.preload:everything"
SILENCE, SILENCE_ALONE = 10.0, 2.0
"""Times cluster.hang_seconds: a rank that for so long doesn't even say that it lives is ended. It is stopped, or its
node swaps."""
POLL_S = 0.5
"""How often a supervisor looks whether its node was announced to go away."""


@dataclass(frozen=True)
class Order:
    """What the driver asks each supervisor to do."""

    payload: str
    """For `rank.run`."""
    environment: dict[str, str]
    """Beside the node's own: what must stand before torch is imported, and never a secret."""
    may_pass: tuple[type[DdpmDistError], ...]
    gpus: bool
    hang_s: float
    """cluster.hang_seconds."""
    agreement: Any
    """Handle of the actor."""
    memory: bool
    """Whether ranks leave copies of their states in memory of their supervisors."""


def supervise(order: Order) -> None:
    """One rank, through as many attempts as it takes. Raises what only Ray or the driver can answer."""
    cli.setup_logging()
    memory = memories.create() if order.memory else None
    if order.memory and memory is None:
        log.warning("checkpoint.memory_every_steps: has no effect, as this system has no memory without names (memfd)")
    try:
        _attempts(order, memory)
    finally:
        if memory is not None:
            os.close(memory)


def _attempts(order: Order, memory: int | None) -> None:
    context = get_train_context()
    group = _id_of(context.execution_context.synchronization_actor)
    here = context.distributed_context
    while True:
        port = _listening() if here.world_rank == 0 else None
        endpoint = (ray.util.get_node_ip_address(), port.getsockname()[1]) if port is not None else None
        held = [step for step, _ in memories.whole(memory).values()] if memory is not None else []
        joined = ray.get(order.agreement.join.remote(group, here.world_rank, here.world_size, endpoint, held))
        if joined is None:
            raise RuntimeError("another worker group has taken this one's place")
        time.sleep(joined["pause_s"])
        rank = _Rank(order, context, joined, port, memory)
        try:
            outcome = rank.watch()
        finally:
            rank.close()
        if outcome == "done":
            return
        if outcome == "preempted":
            raise rank.told.error or PreemptedError("a node is about to be taken away; the state is saved")


class _Bell:
    """Something to `select` on that another thread makes readable."""

    def __init__(self) -> None:
        self._ours, self._theirs = os.pipe()
        self._lock, self._closed = threading.Lock(), False

    def fileno(self) -> int:
        return self._ours

    def ring(self) -> None:
        with self._lock:
            if not self._closed:
                os.write(self._theirs, b"x")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            os.close(self._ours)
            os.close(self._theirs)


class _Rank:
    """A rank's process in one attempt. joined: what the agreement said; memory: descriptor of what outlives it."""

    def __init__(
        self,
        order: Order,
        context: TrainContext,
        joined: dict[str, Any],
        port: socket.socket | None,
        memory: int | None,
    ) -> None:
        self._order, self._context, self._number = order, context, joined["number"]
        self._here = context.distributed_context
        self._failed_at: float | None = joined["failed_at"]
        """When the attempt before was over."""
        self._words, theirs = socket.socketpair()
        self.told = ranks.Told()
        self._heard_at = time.monotonic()
        # The watchdogs of other ranks come first, if there are any: they show where each thread is.
        self._silence_s = order.hang_s * (SILENCE if self._here.world_size > 1 else SILENCE_ALONE)
        passed = {"words": theirs.fileno()}
        if port is not None:
            passed["port"] = port.fileno()
        if memory is not None:
            passed["memory"] = memory
        self._child = _start(self._request(joined, list(passed)), order, list(passed.values()))
        self._process = _process(self._child.pid)
        theirs.close()
        if port is not None:
            port.close()
        self._over = _Bell()
        order.agreement.watch.remote(self._number).future().add_done_callback(lambda _: self._over.ring())

    def watch(self) -> str:
        """Until the attempt is over: "done", "preempted" or "again"."""
        told_preemption = said = False
        while True:
            watched: list[Any] = [self._child, self._words, self._over]
            readable, _, _ = select.select(watched, [], [], POLL_S)
            if self._words in readable:
                self._hear()
            if not said and "first_step" in self.told.marks and self._failed_at is not None:
                said = True
                if self._here.world_rank == 0:
                    log.info("%s", cost(self._failed_at, self.told.marks))
            if self._over in readable:
                return "again"
            if self._child in readable:
                return self._ended(self._child.wait())
            if time.monotonic() - self._heard_at > self._silence_s:
                return self._failed(HangError(f"no sign of life for {self._silence_s:.0f} s"))
            if not told_preemption and self._context.preemption_context.preemption_info is not None:
                told_preemption = True
                with contextlib.suppress(OSError):  # a rank that has just died is found by the next look
                    self._words.sendall(b"p")

    def _hear(self) -> None:
        self._heard_at = time.monotonic()
        self.told.hear(self._words.recv(1 << 16))

    def close(self) -> None:
        """Returns when the process is gone: only then its GPU's memory is free, and nobody writes to its copies."""
        self._child.signal(signal.SIGKILL)
        try:
            self._child.wait(30)
        except TimeoutError:
            log.warning("rank %d's process %d doesn't end", self._here.world_rank, self._child.pid)
        self._child.close()
        if self._process is not None:  # a standby that is gone can't say when its children are, too
            select.select([self._process], [], [], 30)
            os.close(self._process)
        self._words.close()
        self._over.close()

    def _ended(self, code: int) -> str:
        """What follows from the end of the process."""
        self._words.setblocking(False)
        with contextlib.suppress(OSError):
            while data := self._words.recv(1 << 16):
                self.told.hear(data)
        error = self.told.error
        preempted = isinstance(error, PreemptedError)
        if code == 0 or preempted:
            finished = self._order.agreement.finished
            return str(ray.get(finished.remote(self._number, self._here.world_rank, preempted)))
        error = error or RuntimeError(_how(code))
        if isinstance(error, DdpmDistError) and not isinstance(error, self._order.may_pass):
            raise error
        return self._failed(error)

    def _failed(self, error: BaseException) -> str:
        """It ended, or is ended, in a way that may pass."""
        rank = self._here.world_rank
        log.warning("rank %d has failed: %s", rank, error)
        made_a_step = "first_step" in self.told.marks
        final = ray.get(self._order.agreement.failed.remote(self._number, rank, str(error), made_a_step))
        if final is not None:
            raise ClusterError(f"the training failed: {final}")
        return "again"

    def _request(self, joined: dict[str, Any], passed: list[str]) -> Request:
        here, (address, port) = self._here, joined["master"]
        environment = {
            **os.environ,
            **self._order.environment,
            "RANK": str(here.world_rank),
            "WORLD_SIZE": str(here.world_size),
            "LOCAL_RANK": str(here.local_rank),
            "LOCAL_WORLD_SIZE": str(here.local_world_size),
            "NODE_RANK": str(here.node_rank),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "MASTER_LISTEN_FD": "",
            ranks.FAILED_AT: "" if self._failed_at is None else str(self._failed_at),
            ranks.PASSED: " ".join(passed),
            ranks.AGREED: "" if joined["held"] is None else str(joined["held"]),
        }
        title = f"ddpm_dist rank {here.world_rank} of {here.world_size}"
        payload = self._order.payload
        return Request("ddpm_dist.cluster.rank:run", payload, environment, os.getcwd(), title, tuple(sys.path))


def warm(environment: dict[str, str], gpus: bool) -> None:
    """Starts this node's standby; to be run on each node early, beside the driver's checks."""
    try:
        _standby(environment, gpus)
    except StandbyError as error:
        log.warning("ranks start without a standby: %s", error)


def cost(failed_at: float, marks: dict[str, float]) -> str:
    """A line about where the seconds of a restart went."""
    spent = ranks.durations(failed_at, marks)
    parts = ", ".join(f"{part.replace('_', ' ')} {seconds:.2f}" for part, seconds in spent.items())
    return f"restarted in {max(0.0, marks['first_step'] - failed_at):.2f} s: {parts}"


def _start(request: Request, order: Order, descriptors: list[int]) -> Child:
    try:
        return _standby(order.environment, order.gpus).start(request, 1, 2, descriptors)
    except StandbyError as error:
        log.warning("the rank starts without a standby, which takes seconds: %s", error)
        return start_plain(request, 1, 2, descriptors)


def _standby(environment: dict[str, str], gpus: bool) -> Standby:
    """This node's, as ranks with this environment beside the node's own need it."""
    node: Any = ray._private.worker._global_node
    session = node.get_session_dir_path()
    raylet = int(os.environ.get("RAY_RAYLET_PID") or os.getppid())
    mine = {**os.environ, **environment}
    if gpus:
        mine.pop("CUDA_VISIBLE_DEVICES", None)  # it sees those of all ranks, and touches none
    # Of the node, not of the machine, which may have more than one of a cluster's nodes: it ends with its own.
    folder = os.path.join(session, f"standby-{ray.get_runtime_context().get_node_id()[:12]}")
    return find(folder, PRELOAD, raylet, environment=mine)


def _process(pid: int) -> int | None:
    """Descriptor of a process, readable when it has ended; None if it has, or before Linux 5.3."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _listening() -> socket.socket:
    """A port that nobody else can take before the group has met there."""
    family = socket.AF_INET6 if ":" in ray.util.get_node_ip_address() else socket.AF_INET
    port = socket.socket(family)
    port.bind((ray.util.get_node_ip_address(), 0))
    port.listen(1024)
    return port


def _id_of(actor: Any) -> str:
    return str(actor._actor_id.hex())


def _how(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    hint = " (by the kernel, if the node's memory was full)" if code == -signal.SIGKILL else ""
    return f"its process was ended by {signal.Signals(-code).name}{hint}"
