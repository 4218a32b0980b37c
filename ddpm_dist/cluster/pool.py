"""An elastic pool of Ray actors that do independent tasks: workers come and go, no task is lost or done by halves.

A worker is any callable made by a factory in the actor's own process. A task that raises is tried again
elsewhere; one whose worker vanished (killed, node lost, network cut) goes back to the queue. Tasks must be
idempotent: a worker that only seemed to be lost may still finish one.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from ddpm_dist.cluster.connect import connect_ray
from ddpm_dist.config import ClusterConfig
from ddpm_dist.errors import (
    ClusterError,
    DdpmDistError,
    ShortReadError,
    TaskFailedError,
    UnreachableError,
    WorkerRefusedError,
    last_line,
)

T = TypeVar("T", bound=Hashable)
log = logging.getLogger(__name__)

Worker = Callable[[Any], Any]

MAY_PASS = (UnreachableError, ShortReadError)
"""Errors of ours that another try may not meet; all others fail a task at once."""
MAX_ATTEMPTS = 3
"""Times that a task may raise before it is named as failed."""
MAX_LOSSES = 10
"""Times that a task's worker may vanish before the task itself is suspected."""
IN_FLIGHT = 2
"""Tasks at a worker: while it computes one, it stores the one before."""
HOPELESS = 3
"""Failed tasks without a single success after which the job stops."""
_POLL_S = 1.0
_SAY_S = 10.0


@dataclass(frozen=True)
class Done(Generic[T]):
    """A task's result."""

    task: T
    value: Any


@dataclass(frozen=True)
class Failed(Generic[T]):
    """A task that is given up, and why."""

    task: T
    error: DdpmDistError


@dataclass(eq=False)
class _Member:
    actor: Any
    number: int
    running: dict[Any, Any] = field(default_factory=dict)
    """{reference: task}."""


class _Host:
    """The actor: makes the worker once, and calls it for each task."""

    def __init__(self, factory: Callable[[], Worker]) -> None:
        self._factory = factory

    def ready(self) -> None:
        self._worker = self._factory()

    def run(self, task: Any) -> Any:
        return self._worker(task)


class ActorPool:
    """At most `workers[1]` actors, as many as there is room for; use as a context manager.

    Below workers[0] for longer than cluster.wait_seconds, the job ends with a ClusterError that says what is
    missing. The factory is called in each actor and must be picklable; so must tasks and results be.
    """

    def __init__(self, factory: Callable[[], Worker], workers: tuple[int, int], cluster: ClusterConfig) -> None:
        connect_ray()
        self._minimum, self._maximum = workers
        self._cluster = cluster
        self._host = ray.remote(_Host).options(
            num_cpus=cluster.cpus_per_worker,
            num_gpus=cluster.gpus_per_worker,
            max_concurrency=IN_FLIGHT,
            scheduling_strategy="SPREAD",
        )
        self._factory = ray.put(factory)
        self._starting: dict[Any, _Member] = {}
        self._members: list[_Member] = []
        self._started = 0
        self._enough_since = time.monotonic()
        self._said_at = time.monotonic()
        self._refused: list[str] = []
        self.losses = 0
        """Workers that vanished."""

    def __enter__(self) -> "ActorPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> int:
        """Workers that are there now."""
        return len(self._members)

    def map(self, tasks: Iterable[T]) -> Iterator[Done[T] | Failed[T]]:
        """Results in the order in which they come; each task exactly once, as Done or Failed."""
        queue = deque(tasks)
        attempts: dict[T, int] = {}
        losses: dict[T, int] = {}
        succeeded, failed = 0, 0
        while queue or any(member.running for member in self._members):
            self._start_workers(len(queue))
            self._hand_out(queue)
            for outcome in self._collect(queue, attempts, losses):
                succeeded += isinstance(outcome, Done)
                failed += isinstance(outcome, Failed)
                yield outcome
                if isinstance(outcome, Failed) and not succeeded and failed >= HOPELESS:
                    raise TaskFailedError(f"the first {failed} tasks all failed; the last one: {outcome.error}")
            self._check_workers(waiting=bool(queue))

    def close(self) -> None:
        """Ends all workers."""
        for member in [*self._members, *self._starting.values()]:
            ray.kill(member.actor)
        self._members, self._starting = [], {}

    def _start_workers(self, waiting: int) -> None:
        """Requests actors up to the maximum; Ray starts each one when there is room for it."""
        wanted = min(self._maximum, waiting + len(self._members))
        for _ in range(wanted - len(self._members) - len(self._starting)):
            member = _Member(self._host.remote(self._factory), self._started)
            self._started += 1
            self._starting[member.actor.ready.remote()] = member

    def _hand_out(self, queue: deque[T]) -> None:
        """One task to each worker before anyone gets a second one."""
        for depth in range(IN_FLIGHT):
            for member in self._members:
                if queue and len(member.running) <= depth:
                    task = queue.popleft()
                    member.running[member.actor.run.remote(task)] = task

    def _collect(self, queue: deque[T], attempts: dict[T, int], losses: dict[T, int]) -> Iterator[Done[T] | Failed[T]]:
        by_reference = {reference: member for member in self._members for reference in member.running}
        references = [*by_reference, *self._starting]
        if not references:
            time.sleep(_POLL_S)
            return
        ready, _ = ray.wait(references, num_returns=1, timeout=_POLL_S)
        for reference in ready:
            if reference in self._starting:
                self._welcome(reference)
                continue
            member = by_reference[reference]
            task = member.running[reference]
            try:
                value = ray.get(reference)
            except RayTaskError as error:
                del member.running[reference]
                cause = error.cause
                if isinstance(cause, WorkerRefusedError):
                    self._refuse(member, str(cause))
                    queue.extend(self._dismiss(member))
                    queue.append(task)
                    continue
                attempts[task] = attempts.get(task, 0) + 1
                own = isinstance(cause, DdpmDistError)
                if attempts[task] < MAX_ATTEMPTS and (not own or isinstance(cause, MAY_PASS)):
                    log.warning("%s failed, try %d of %d follows: %s", task, attempts[task] + 1, MAX_ATTEMPTS, cause)
                    queue.append(task)
                else:
                    yield Failed(task, cause if own else TaskFailedError(f"{type(cause).__name__}: {cause}"))
            except RayError as error:
                orphans = self._dismiss(member)
                self.losses += 1
                log.warning(
                    "worker %d is gone (%s); %d units go to others", member.number, type(error).__name__, len(orphans)
                )
                for orphan in orphans:
                    losses[orphan] = losses.get(orphan, 0) + 1
                    if losses[orphan] < MAX_LOSSES:
                        queue.appendleft(orphan)
                    else:
                        yield Failed(orphan, TaskFailedError(f"{MAX_LOSSES} workers vanished over it (out of memory?)"))
            else:
                del member.running[reference]
                yield Done(task, value)

    def _welcome(self, reference: Any) -> None:
        member = self._starting.pop(reference)
        try:
            ray.get(reference)
        except RayTaskError as error:
            ray.kill(member.actor)  # or it lives, with its share of a node, as long as the error's traceback does
            if isinstance(error.cause, DdpmDistError):
                raise error.cause from None
            raise
        except RayError as error:
            ray.kill(member.actor)
            self.losses += 1
            log.warning("worker %d did not start: %s", member.number, last_line(error))
            if self.losses > MAX_LOSSES and not self._members:
                raise ClusterError(f"no worker starts: {last_line(error)}") from None
            return
        self._members.append(member)

    def _dismiss(self, member: _Member) -> list[Any]:
        """Lets a worker go; returns the tasks that it still had."""
        self._members.remove(member)
        ray.kill(member.actor)
        return list(member.running.values())

    def _refuse(self, member: _Member, reason: str) -> None:
        log.warning("worker %d is refused: %s", member.number, reason)
        self._refused.append(reason)
        if not [m for m in self._members if m is not member] and len(self._refused) >= self._maximum + 2:
            raise WorkerRefusedError(f"every worker was refused; the last one: {reason}")

    def _check_workers(self, waiting: bool) -> None:
        """Says what it waits for; gives up after cluster.wait_seconds below the minimum."""
        now = time.monotonic()
        if len(self._members) >= self._minimum or not waiting:
            self._enough_since = self._said_at = now
            return
        missing = f"{len(self._members)} of at least {self._minimum} workers have started; {self._resources()}"
        if now - self._enough_since > self._cluster.wait_seconds:
            raise ClusterError(
                f"{missing}, after {self._cluster.wait_seconds:.0f} s of waiting; free or add nodes, ask for fewer "
                "workers (--workers), less for each (cluster.cpus_per_worker, cluster.gpus_per_worker), or, where "
                "workers have their share and start slowly, raise cluster.wait_seconds"
            )
        if now - self._said_at > _SAY_S:
            self._said_at = now
            log.info("waiting: %s", missing)

    def _resources(self) -> str:
        each = {"CPU": self._cluster.cpus_per_worker, "GPU": self._cluster.gpus_per_worker}
        try:
            there, free = ray.cluster_resources(), ray.available_resources()
        except (RayError, GetTimeoutError, ConnectionError):
            return "Ray doesn't answer"
        parts = [
            f"{a:g} {name} ({free.get(name, 0):g} free of {there.get(name, 0):g})" for name, a in each.items() if a
        ]
        return f"each needs {', '.join(parts)}"
