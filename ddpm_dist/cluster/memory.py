"""Memory that outlives the rank that writes it: a memfd of its supervisor, which each of its ranks gets by descriptor.

    | a page: size, heads of the slots, note | slot 0: data, text | slot 1: data, text |

A slot holds data, and a text about them, under a number (a step). Its mark is written last and taken away first, so it
is whole or counts for nothing, wherever its writer died. There is no name of it in any filesystem: nothing can stay
behind, and no size of /dev/shm bounds it. What is in it is not known here.
"""

import mmap
import os
import struct
import zlib
from collections.abc import Iterator

SLOTS = 2
PAGE = 4096
TEXT_BYTES = 64 << 20
"""Most bytes of a slot's text. Pages that nobody has written cost nothing."""
_DATA_BYTES = struct.Struct("<Q")
_HEAD = struct.Struct("<QQI")
"""Number, bytes of the text and CRC-32 of the text; then follows the CRC-32 of these."""
_CRC = struct.Struct("<I")
_NOTE, _NOTE_BYTES = 1024, 2048
_WHOLE = b"\x01"


def create() -> int | None:
    """A descriptor of new memory, with nothing in it; None where there is no memfd (it is Linux's)."""
    return os.memfd_create("ddpm_dist states") if hasattr(os, "memfd_create") else None


def whole(descriptor: int) -> dict[int, tuple[int, bytes]]:
    """Slot -> (number, text), of those that are whole. Nobody may write meanwhile."""
    return dict(_whole(descriptor))


def _whole(descriptor: int) -> Iterator[tuple[int, tuple[int, bytes]]]:
    page = os.pread(descriptor, PAGE, 0)
    if len(page) < PAGE:
        return
    (data_bytes,) = _DATA_BYTES.unpack_from(page)
    for slot in range(SLOTS):
        at = _head(slot)
        if page[at : at + 1] != _WHOLE:
            continue
        head = page[at + 1 : at + 1 + _HEAD.size]
        number, length, crc = _HEAD.unpack(head)
        if _CRC.unpack_from(page, at + 1 + _HEAD.size) != (zlib.crc32(head),) or length > TEXT_BYTES:
            continue
        text = os.pread(descriptor, length, _data(slot, data_bytes) + data_bytes)
        if zlib.crc32(text) == crc:
            yield slot, (number, text)


class Memory:
    """A rank's side. agreed: the number of what all ranks hold whole and may go on from; None: nothing."""

    def __init__(self, descriptor: int, agreed: int | None) -> None:
        self._descriptor, self.agreed = descriptor, agreed
        self._map: mmap.mmap | None = None

    @property
    def held_bytes(self) -> int:
        """That it takes now."""
        return 512 * os.fstat(self._descriptor).st_blocks

    def open(self, size: int) -> list[memoryview]:
        """The data of both slots, `size` bytes each; what is whole there stays, unless it was of another size."""
        size = -(-size // PAGE) * PAGE
        found = os.pread(self._descriptor, _DATA_BYTES.size, 0)
        if len(found) < _DATA_BYTES.size or _DATA_BYTES.unpack(found)[0] != size:
            for slot in range(SLOTS):
                os.pwrite(self._descriptor, b"\x00", _head(slot))
            os.ftruncate(self._descriptor, PAGE)
            os.pwrite(self._descriptor, _DATA_BYTES.pack(size), 0)
        os.ftruncate(self._descriptor, _data(SLOTS, size))
        self._map = mmap.mmap(self._descriptor, _data(SLOTS, size))
        view = memoryview(self._map)
        self._texts = [_data(slot, size) + size for slot in range(SLOTS)]
        return [view[_data(slot, size) : _data(slot, size) + size] for slot in range(SLOTS)]

    def drop(self) -> None:
        """Gives all of it back but the note."""
        os.ftruncate(self._descriptor, PAGE)
        os.pwrite(self._descriptor, bytes(_NOTE), 0)

    def whole(self) -> dict[int, tuple[int, bytes]]:
        """Slot -> (number, text), of those that are whole."""
        return whole(self._descriptor)

    def begin(self, slot: int) -> None:
        """What is in it counts no longer, as it is about to be overwritten."""
        assert self._map is not None
        self._map[_head(slot)] = 0

    def commit(self, slot: int, number: int, text: bytes) -> None:
        """Its data are written; text: at most TEXT_BYTES."""
        assert self._map is not None
        assert len(text) <= TEXT_BYTES
        self._map[self._texts[slot] : self._texts[slot] + len(text)] = text
        head, at = _HEAD.pack(number, len(text), zlib.crc32(text)), _head(slot)
        self._map[at + 1 : at + 1 + len(head) + _CRC.size] = head + _CRC.pack(zlib.crc32(head))
        self._map[at] = _WHOLE[0]

    @property
    def note(self) -> bytes:
        """A few words beside the slots, which stay whatever becomes of these; none where they were cut off."""
        found = os.pread(self._descriptor, _NOTE_BYTES, _NOTE)
        if len(found) < 2 * _CRC.size:
            return b""
        (length,), (crc,) = _CRC.unpack_from(found), _CRC.unpack_from(found, _CRC.size)
        text = found[2 * _CRC.size : 2 * _CRC.size + length]
        return text if len(text) == length and zlib.crc32(text) == crc else b""

    @note.setter
    def note(self, text: bytes) -> None:
        """text: at most 2040 bytes."""
        assert len(text) <= _NOTE_BYTES - 2 * _CRC.size
        os.pwrite(self._descriptor, _CRC.pack(len(text)) + _CRC.pack(zlib.crc32(text)) + text, _NOTE)


def _head(slot: int) -> int:
    """Where a slot's mark and head are."""
    return 64 * (slot + 1)


def _data(slot: int, data_bytes: int) -> int:
    """Where a slot's data begin."""
    return PAGE + slot * (data_bytes + TEXT_BYTES)
