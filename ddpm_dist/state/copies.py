"""The two copies of a rank's state that a writer works from, in host memory; and which of them may be overwritten.

They lie in this process's memory, or in one that outlives it (`Memory`). There a copy that is whole can be gone on from
when the process is dead, so the newest one stays until the next is whole.
"""

import json
import logging
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ddpm_dist.engine import Address

log = logging.getLogger(__name__)

COPIES = 2


class Memory(Protocol):
    """What outlives this process: data in slots, each under a step and with a text, and a note."""

    agreed: int | None
    """Step whose copy every rank has; None: there is none."""
    note: bytes

    @property
    def held_bytes(self) -> int: ...
    def open(self, size: int) -> list[memoryview]: ...
    def drop(self) -> None: ...
    def whole(self) -> dict[int, tuple[int, bytes]]: ...
    def begin(self, slot: int) -> None: ...
    def commit(self, slot: int, number: int, text: bytes) -> None: ...


@dataclass
class Copy:
    """One of both. tensor: 1-D float32 on the CPU, all that a rank saves end to end."""

    number: int
    tensor: Tensor | None = None
    users: int = 0
    """Who still fills it or reads it."""
    touching: bool = False
    """Whether its pages are just written to for the first time."""
    touched: bool = False


@dataclass(frozen=True)
class Description:
    """What a copy in memory says of itself, beside its tensors."""

    layout: int
    """`layout` of its pieces and kinds."""
    scalars: dict[str, Any]
    meta: dict[str, Any]

    def encode(self) -> bytes:
        return json.dumps(vars(self), separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def decode(cls, text: bytes) -> "Description":
        return cls(**json.loads(text))


def layout(pieces: Sequence[Address], kinds: Sequence[str]) -> int:
    """Checksum of what lies where in a copy."""
    return zlib.crc32(json.dumps([list(pieces), list(kinds)]).encode())


class Copies:
    """Both copies; a thread-safe account of who uses them."""

    def __init__(self) -> None:
        self._memory: Memory | None = None
        self._all = [Copy(number) for number in range(COPIES)]
        self._newest: Copy | None = None
        """The newest whole one in memory that outlives this process."""
        self._changed = threading.Condition()
        self.layout = 0
        """`layout` of what they hold, where they outlive this process."""

    @property
    def outlive(self) -> bool:
        return self._memory is not None

    def move_into(self, memory: Memory, numel: int, like: Tensor | None, keep: int | None) -> tuple[Copy, bytes] | None:
        """From now on they lie there, `numel` elements each; the one of step `keep` with its text, if it is there.

        All other contents are forgotten: they are not what this process goes on from.
        """
        for copy, data in zip(self._all, memory.open(4 * numel), strict=True):
            copy.tensor = torch.frombuffer(data, dtype=torch.float32)[:numel] if numel else torch.empty(0)
            if like is not None and like.is_cuda:
                _pin(copy.tensor)
            copy.touched = memory.held_bytes >= 4 * COPIES * numel  # by an attempt before
        self._memory, found = memory, None
        for slot, (step, text) in memory.whole().items():
            if step == keep and found is None:
                found = self._all[slot], text
                self._newest, found[0].touched = found[0], True
            else:
                memory.begin(slot)
        return found

    def forget(self) -> None:
        """None is to be gone on from."""
        assert self._memory is not None
        for copy in self._all:
            self._memory.begin(copy.number)
        with self._changed:
            self._newest = None

    def touch(self, numel: int, like: Tensor) -> None:
        """Writes to all pages of those that nobody has written to: the first time is slow."""
        for copy in self._all:
            with self._changed:
                if copy.touched:
                    continue
                copy.touching = copy.touched = True
            copy.tensor = _fit(copy.tensor, numel, like).zero_()
            with self._changed:
                copy.touching = False
                self._changed.notify_all()

    def take(self, numel: int, like: Tensor) -> Copy:
        """One to fill, which is in use until it is released. Waits while there is none."""
        with self._changed:
            if self._free() is None:
                log.warning("states are still being written; the training waits for the store")
            self._changed.wait_for(lambda: (copy := self._free()) is not None and not copy.touching)
            copy = self._free()
            assert copy is not None
            copy.users, copy.touched = 1, True
        if self._memory is not None:
            self._memory.begin(copy.number)
        copy.tensor = _fit(copy.tensor, numel, like)
        return copy

    def hold(self, copy: Copy) -> None:
        """One more uses it."""
        with self._changed:
            copy.users += 1

    def release(self, copy: Copy) -> None:
        with self._changed:
            copy.users -= 1
            self._changed.notify_all()

    def commit(self, copy: Copy, step: int, text: bytes) -> None:
        """It is whole; where it outlives this process, it is now the newest."""
        if self._memory is None:
            return
        self._memory.commit(copy.number, step, text)
        with self._changed:
            self._newest = copy
            self._changed.notify_all()

    def room_after(self, copying: bool) -> bool:
        """Whether one can be taken at once, or could if (`copying`) one were taken and whole before."""
        with self._changed:
            if not copying:
                return self._free() is not None
            return self._newest is None or not self._newest.users

    def _free(self) -> Copy | None:
        """One that nobody uses, which may be being touched still: that is over soon."""
        free = [copy for copy in self._all if not copy.users and copy is not self._newest]
        return min(free, key=lambda copy: copy.touching, default=None)


def _fit(buffer: Tensor | None, numel: int, like: Tensor) -> Tensor:
    """A host buffer for so many elements, pinned if they come from a GPU; the one that is there, if it fits."""
    if buffer is None or buffer.numel() != numel:
        buffer = torch.empty(numel, dtype=torch.float32, pin_memory=like.is_cuda)
    return buffer


def _pin(tensor: Tensor) -> None:
    """So that copies from a GPU needn't wait; without it they are right, and slower."""
    code = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), 4 * tensor.numel(), 0)
    if int(code):
        log.warning("states in memory can't be pinned (CUDA error %d): their copies hold up the step", int(code))
