"""How rank 0 hears that all ranks have written their files of a state, and what.

Each rank's background thread publishes a part when its own files are acknowledged; rank 0's waits until it has seen all
of them in the store, and then publishes the manifest. So no collective is called beside the training's (whose order
would have to be the same on every rank), a rank that dies leaves nobody waiting in one, and what the manifest promises
was seen in the store and not merely told. The first of each GROUP ranks puts the parts of its group together, so that
rank 0 waits for W / GROUP objects beside those of its own group.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from ddpm_dist import storage
from ddpm_dist.errors import NotFoundError, UnreachableError
from ddpm_dist.state import format as fmt

T = TypeVar("T")

GROUP = 128
WAITS = 32
"""Parts of other ranks that are waited for at once."""
PATIENCE_S = 120.0
"""How long an outage of the store may last in the middle of a save."""
PARTS_PATIENCE_S = 600.0
"""How long the parts of other ranks are waited for."""
NICENESS = 10
"""The background threads give way to the training where they share a core with it."""


def awaited(size: int) -> int:
    """Parts that rank 0 of so many waits for: those of its own group, and one for each other group."""
    return min(size, GROUP) - 1 + math.ceil(size / GROUP) - 1


def hand_in(url: str, rank: int, size: int, part: fmt.Part) -> list[fmt.Part] | None:
    """Publishes what this rank wrote of the state at a URL. On rank 0 it waits, and returns the parts of all ranks.

    UnreachableError if others haven't written theirs in PARTS_PATIENCE_S.
    """
    if rank % GROUP:
        storage.publish(_part_url(url, rank), fmt.encode_part(part), PATIENCE_S)
        return None
    members = range(rank + 1, min(rank + GROUP, size))
    parts = [part, *in_parallel(lambda r: fmt.decode_part(*_await(_part_url(url, r), r)), members, WAITS)]
    if rank:
        storage.publish(_group_url(url, rank), fmt.encode_parts(parts), PATIENCE_S)
        return None
    groups = range(GROUP, size, GROUP)
    for group in in_parallel(lambda r: fmt.decode_parts(*_await(_group_url(url, r), r)), groups, WAITS):
        parts += group
    return parts


def _await(url: str, rank: int) -> tuple[bytes, str]:
    """What a rank published there, as soon as it has, and the place for messages."""
    deadline = time.monotonic() + PARTS_PATIENCE_S
    pause = 0.02
    while True:
        try:
            return storage.read(url, PATIENCE_S), storage.redact(url)
        except NotFoundError:
            if time.monotonic() > deadline:
                raise UnreachableError(
                    f"rank {rank} has not written {storage.redact(url)} in {PARTS_PATIENCE_S:.0f} s"
                ) from None
        time.sleep(pause)
        pause = min(1.0, 1.5 * pause)


def _part_url(url: str, rank: int) -> str:
    return storage.join(url, f"part-{rank:05d}.json")


def _group_url(url: str, rank: int) -> str:
    return storage.join(url, f"parts-{rank:05d}.json")


def in_parallel(action: Callable[[int], T], items: Sequence[int], threads: int) -> list[T]:
    """[action(item) …] by a few threads; raises the first error. They are daemons: a process that is to end, ends."""
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    rest = iter(items)
    lock = threading.Lock()

    def work() -> None:
        give_way()
        while not errors:
            with lock:
                item = next(rest, None)
            if item is None:
                return
            try:
                results[item] = action(item)
            except BaseException as error:  # raised below, in the caller's thread
                errors.append(error)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(threads, len(items)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return [results[item] for item in items]


def give_way() -> None:
    """Lowers the calling thread's priority; on Linux a niceness belongs to the thread."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    except (AttributeError, OSError):
        pass
