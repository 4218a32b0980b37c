"""Loader processes: each owns a part of a rank's places and works as a rank within the rank.

Which samples a process reads follows from its places alone, so batches don't depend on the number of
processes or on their speed. Images come back through a ring of shared memory.
"""

import logging
import multiprocessing
import os
import signal
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from ddpm_dist.config import DataConfig
from ddpm_dist.data.buffers import Buffers, SharedBytes
from ddpm_dist.data.decode import Pixels
from ddpm_dist.data.fetch import ShardReader
from ddpm_dist.data.order import Order, share_of
from ddpm_dist.data.stream import Part, parts
from ddpm_dist.errors import DdpmDistError, LoaderProcessError

log = logging.getLogger(__name__)

SLOTS = 3
"""Batches that a worker may be ahead."""
CHECK_PARENT_S = 5.0


def worker_parts(
    order: Order, readers: Sequence[ShardReader], places: tuple[int, int], start_step: int, data: DataConfig
) -> Iterator[Part]:
    """As `stream.parts`, decoded by `data.workers` processes."""
    count = places[1] - places[0]
    number = min(data.workers, count)
    shares = [share_of(worker, number, count) for worker in range(number)]
    workers = [
        _Worker(order, readers, (places[0] + low, places[0] + high), start_step, data, number) for low, high in shares
    ]
    buffers = Buffers((count, data.image_size, data.image_size, data.channels))
    try:
        while True:
            images = buffers.take()
            found = [worker.take(images[low:high]) for worker, (low, high) in zip(workers, shares, strict=True)]
            bad: Counter[str] = Counter()
            for part in found:
                bad.update(part.bad)
            yield Part(
                found[0].step,
                images,
                np.concatenate([part.labels for part in found]),
                [key for part in found for key in part.keys],
                np.concatenate([part.ids for part in found]),
                np.concatenate([part.epochs for part in found]),
                dict(bad),
            )
    finally:
        for worker in workers:
            worker.close()


class _Worker:
    """The parent's side of one process."""

    def __init__(
        self,
        order: Order,
        readers: Sequence[ShardReader],
        places: tuple[int, int],
        start_step: int,
        data: DataConfig,
        number: int,
    ) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks and CUDA's state
        shape = (SLOTS, places[1] - places[0], data.image_size, data.image_size, data.channels)
        memory = SharedBytes(int(np.prod(shape)))
        self._ring = np.frombuffer(memory.view, np.uint8).reshape(shape)
        self._free = context.Semaphore(SLOTS)
        self._results, theirs = context.Pipe(duplex=False)
        self._taken = 0
        settings = {
            "size": data.image_size,
            "channels": data.channels,
            "threads": max(1, data.read_ahead // number),
            "budget": data.buffer_bytes // number,
        }
        reader_arguments = [(reader.index, reader.first_id, reader.cache) for reader in readers]
        self._process = context.Process(
            target=_work,
            args=(order.arguments, reader_arguments, places, start_step, settings, memory, shape, self._free, theirs),
            daemon=True,
            name="data-worker",
        )
        self._process.start()
        theirs.close()

    def take(self, images: Pixels) -> Part:
        """The worker's part of the next batch; its images are copied to `images`."""
        try:
            part: Part | DdpmDistError | str = self._results.recv()
        except EOFError:
            self._process.join()
            raise LoaderProcessError(
                f"a loader process ended with exit code {self._process.exitcode} (-9: killed, often for lack of "
                f"memory); fewer data.workers or less data.buffer_bytes need less"
            ) from None
        if isinstance(part, DdpmDistError):
            raise part
        if isinstance(part, str):
            raise RuntimeError(f"in a loader process:\n{part}")
        images[:] = self._ring[self._taken % SLOTS]
        self._taken += 1
        self._free.release()
        return part

    def close(self) -> None:
        self._process.kill()  # it ignores SIGTERM, and holds nothing that another end would save
        self._process.join()
        self._results.close()


def _work(
    order_arguments: dict[str, Any],
    reader_arguments: Sequence[tuple[Any, ...]],
    places: tuple[int, int],
    start_step: int,
    settings: dict[str, int],
    memory: SharedBytes,
    shape: tuple[int, ...],
    free: Any,
    results: Connection,
) -> None:
    """The process: decodes its places of every batch into the ring, at most SLOTS ahead."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it ends this process
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to a whole job, it means: finish the step, save, leave
    parent = os.getppid()
    ring = np.frombuffer(memory.view, np.uint8).reshape(shape)
    readers = [ShardReader(*arguments) for arguments in reader_arguments]
    try:
        for number, part in enumerate(parts(Order(**order_arguments), readers, places, start_step, **settings)):
            while not free.acquire(timeout=CHECK_PARENT_S):
                if os.getppid() != parent:
                    return
            ring[number % SLOTS] = part.images
            results.send(Part(part.step, part.images[:0], part.labels, part.keys, part.ids, part.epochs, part.bad))
    except DdpmDistError as error:
        results.send(error)
    except (BrokenPipeError, ConnectionError):
        return
    except BaseException:
        results.send(traceback.format_exc())
