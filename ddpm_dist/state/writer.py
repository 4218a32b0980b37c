"""Writing a training state in the background: from host copies straight to the store, the manifest last.

How the ranks agree that all files are there, without a collective beside the training's, stands in parts.py.
"""

import hashlib
import logging
import queue
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_dist import storage
from ddpm_dist.engine import Address, bytes_of
from ddpm_dist.errors import ShortReadError, UnreachableError
from ddpm_dist.state import format as fmt, parts
from ddpm_dist.state.copies import Copies, Copy, Description
from ddpm_dist.state.cut import Cut
from ddpm_dist.state.parts import PATIENCE_S, give_way, in_parallel

log = logging.getLogger(__name__)

UPLOADS = 4
"""Files of a rank in flight at once."""


def _nothing() -> None:
    """The end of a copy that is over already."""


@dataclass
class Job:
    """A state on its way: what rank 0 must know beside the bytes is in `manifest`."""

    id: fmt.StateId
    copy: Copy
    part: fmt.Part
    shapes: dict[str, list[int]]
    scalars: dict[str, Any]
    meta: dict[str, Any]
    cut: Cut | None
    """The rule by which the ranks' pieces follow, if it may stand for them."""
    began: float
    copied: Callable[[], None] = _nothing
    """Waits for the end of the copy."""
    released: bool = False


class StateWriter:
    """Two host copies and one background thread on each rank.

    published: called on rank 0's background thread after each manifest. may_publish: called there before it,
    raises if the run has another owner by now.
    """

    def __init__(
        self,
        folder_url: str,
        rank: int,
        size: int,
        published: Callable[[fmt.StateId], None],
        may_publish: Callable[[], None],
    ) -> None:
        self._folder, self._rank, self._size = folder_url, rank, size
        self._published, self._may_publish = published, may_publish
        self.copies = Copies()
        self._jobs: queue.Queue[Job] = queue.Queue()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self.last_seconds = 0.0
        """From the call of `save` to the manifest (rank 0) or the part (others), of the last state written."""
        self.failed = 0
        """States that could not be written because the store didn't answer; the training went on."""

    def prepare(self, numel: int, like: Tensor) -> None:
        """Makes room for the copies, of so many elements, in the background: the first touch of their pages is slow."""

        def make() -> None:
            give_way()
            self.copies.touch(numel, like)

        threading.Thread(target=make, name="state-buffers", daemon=True).start()

    def save(
        self,
        id: fmt.StateId,
        tensors: dict[str, Sequence[Tensor]],
        pieces: list[Address],
        shapes: dict[str, list[int]],
        scalars: dict[str, Any],
        meta: dict[str, Any],
        cut: Cut | None = None,
    ) -> None:
        """Copies the tensors (kind -> 1-D float32, aligned with `pieces`) and returns; the rest is background.

        Waits only if earlier states are still on their way. Raises what the background met before. cut: may say in the
        place of lists of pieces what the ranks own, where it says it right.
        """
        self.poll()
        began = time.perf_counter()
        copy, copied = self._copy(id.step, tensors, scalars, meta)
        part = fmt.Part(pieces, list(tensors), [])
        self.publish(Job(id, copy, part, shapes, scalars, meta, cut, began, copied))

    def keep(
        self, step: int, tensors: dict[str, Sequence[Tensor]], scalars: dict[str, Any], meta: dict[str, Any]
    ) -> None:
        """Copies the tensors into memory that outlives this process, and no further."""
        self.poll()
        copy, _ = self._copy(step, tensors, scalars, meta)
        self.copies.release(copy)

    def publish(self, job: Job) -> None:
        """Writes a copy to the store, in the background, and releases it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="state-writer", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def poll(self) -> None:
        """Raises what a save in the background met, unless it was an outage of the store (`failed` counts those)."""
        if self._failure is not None:
            raise self._failure

    def wait(self) -> None:
        """Until all states are written; raises what they met, an outage in the last one included."""
        failed = self.failed
        self._jobs.join()
        self.poll()
        if self.failed > failed:
            raise UnreachableError(f"{storage.redact(self._folder)}: the last state could not be written; see the log")

    def _copy(
        self, step: int, tensors: dict[str, Sequence[Tensor]], scalars: dict[str, Any], meta: dict[str, Any]
    ) -> tuple[Copy, Callable[[], None]]:
        """(copy, what waits for its end). Where it outlives this process it is whole then, whoever waits."""
        flat = [tensor for kind in tensors.values() for tensor in kind]
        copy = self.copies.take(sum(tensor.numel() for tensor in flat), flat[0] if flat else torch.empty(0))
        assert copy.tensor is not None
        copied = _copy_to_host(copy.tensor, flat)
        if self.copies.outlive:
            text = Description(self.copies.layout, scalars, meta).encode()
            if copied is None:
                self.copies.commit(copy, step, text)
            else:
                self.copies.hold(copy)
                threading.Thread(target=self._commit, args=(copied, copy, step, text), daemon=True).start()
        return copy, copied or _nothing

    def _commit(self, copied: Callable[[], None], copy: Copy, step: int, text: bytes) -> None:
        copied()
        self.copies.commit(copy, step, text)
        self.copies.release(copy)

    def _work(self) -> None:
        give_way()
        while True:
            job = self._jobs.get()
            try:
                self._write(job)
                self.last_seconds = time.perf_counter() - job.began
            except (UnreachableError, ShortReadError) as error:
                self.failed += 1
                log.error("state %s was not saved, the training goes on: %s", job.id, error)
            except BaseException as error:  # handed to the training thread by poll()
                self._failure = error
            finally:
                self._release(job)
                self._jobs.task_done()

    def _release(self, job: Job) -> None:
        if not job.released:
            job.released = True
            self.copies.release(job.copy)

    def _write(self, job: Job) -> None:
        assert job.copy.tensor is not None
        job.copied()
        url = storage.join(self._folder, str(job.id))
        data = bytes_of(job.copy.tensor)
        starts = range(0, len(data), fmt.FILE_BYTES)
        files = in_parallel(
            lambda start: self._upload(url, data[start : start + fmt.FILE_BYTES], start), starts, UPLOADS
        )
        ruled = job.cut is not None and job.cut.pieces(self._rank) == job.part.pieces
        part = fmt.Part(None if ruled else job.part.pieces, job.part.kinds, files)
        self._release(job)
        written = parts.hand_in(url, self._rank, self._size, part)
        if written is None:
            return
        manifest = _manifest(job, written)
        fmt.check_complete(manifest, str(job.id))
        self._may_publish()
        storage.publish(storage.join(url, fmt.MANIFEST), fmt.encode_manifest(manifest), PATIENCE_S)
        self._published(job.id)

    def _upload(self, url: str, content: memoryview, start: int) -> fmt.File:
        name = f"{self._rank:05d}-{start // fmt.FILE_BYTES:03d}.f32"
        storage.publish(storage.join(url, name), content, PATIENCE_S)
        crc32 = [zlib.crc32(content[i : i + fmt.BLOCK_BYTES]) for i in range(0, len(content), fmt.BLOCK_BYTES)]
        return fmt.File(name, len(content), hashlib.sha256(content).hexdigest(), crc32)


@torch.no_grad()
def _copy_to_host(buffer: Tensor, tensors: Sequence[Tensor]) -> Callable[[], None] | None:
    """Starts the copy, in order with the work on the device; the result waits for its end, None: it is over."""
    start = 0
    for tensor in tensors:
        buffer[start : start + tensor.numel()].copy_(tensor, non_blocking=True)
        start += tensor.numel()
    if not any(tensor.is_cuda for tensor in tensors):
        return None
    done = torch.cuda.Event()
    done.record()
    return done.synchronize


def _manifest(job: Job, parts: list[fmt.Part]) -> fmt.Manifest:
    """By the rule of the cut if all parts follow it, else with the pieces of each."""
    cut = job.cut
    if cut is not None and any(part.pieces is not None for part in parts):
        parts = [
            fmt.Part(cut.pieces(rank) if part.pieces is None else part.pieces, part.kinds, part.files)
            for rank, part in enumerate(parts)
        ]
        cut = None
    return fmt.Manifest(job.id, job.shapes, parts, job.scalars, job.meta, fmt.FILE_BYTES, fmt.BLOCK_BYTES, cut)
