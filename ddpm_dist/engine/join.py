"""Joining the process group, and saying who is missing while one waits."""

import logging
import os
import platform
import time
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from ddpm_dist.engine import launchers
from ddpm_dist.errors import ClusterError

log = logging.getLogger(__name__)

SAY_S = 30.0
NAMED = 8
"""Most missing ranks that a message lists."""


def join(backend: str, rank: int, size: int, timeout_s: float) -> None:
    """Makes the process group of MASTER_ADDR and MASTER_PORT, for all ranks alike; ClusterError after `timeout_s`.

    Who waits says within SAY_S seconds, and again, for whom and where.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    deadline = time.monotonic() + timeout_s
    store = _store(rank, size, place, deadline)
    store.set(f"here/{rank}", platform.node())
    if rank == 0:
        _await_all(store, size, place, deadline)
    dist.init_process_group(
        backend,
        store=PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )


def _store(rank: int, size: int, place: str, deadline: float) -> Store:
    """The store that rank 0 keeps (or torchrun's agent, for it)."""
    host, _, port = place.rpartition(":")
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # A supervisor gives rank 0 the port itself, open, so that nobody else can have taken it meanwhile.
    listening = os.environ.get("MASTER_LISTEN_FD") if rank == 0 else None
    while True:
        try:
            store = TCPStore(
                host, int(port), size, rank == 0 and not by_agent, timedelta(seconds=SAY_S), wait_for_workers=False,
                multi_tenant=True, master_listen_fd=int(listening) if listening else None,
            )  # fmt: skip
            store.set_timeout(timedelta(seconds=max(1.0, deadline - time.monotonic())))
            return PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        except (dist.DistError, OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            if rank == 0 and not by_agent:
                raise ClusterError(
                    f"MASTER_PORT: {place} can't be listened at: {reason}; if another run has it, set MASTER_PORT to a "
                    "free one, the same for all"
                ) from None
            if time.monotonic() > deadline:
                raise ClusterError(f"rank 0 doesn't answer at {place} (MASTER_ADDR, MASTER_PORT): {reason}") from None
            log.warning("rank %d waits for rank 0 at %s, which doesn't answer; %s", rank, place, launchers.said())


def _await_all(store: Store, size: int, place: str, deadline: float) -> None:
    missing = list(range(size))
    say_at, pause = time.monotonic() + SAY_S, 0.01
    while missing:
        missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
        now = time.monotonic()
        if missing and now > min(say_at, deadline):
            names = ", ".join(map(str, missing[:NAMED])) + (", …" if len(missing) > NAMED else "")
            text = (
                f"{len(missing)} of {size} processes haven't come to {place} yet: rank {names}. The environment here "
                f"says {launchers.said()}; to train alone, unset these"
            )
            if now > deadline:
                raise ClusterError(text)
            log.warning("%s", text)
            say_at = now + SAY_S
        if missing:
            time.sleep(pause)
            pause = min(0.5, 1.5 * pause)
