"""What the fast decoders don't look at, or look at too closely: the checksums of a PNG, the oddities of a JPEG.

pyspng checks neither CRC-32 nor Adler-32, so a flipped bit gives wrong pixels in silence. Each byte of a PNG but those
of its signature is under the CRC of a chunk; the Adler-32 is of the same bytes inflated, and to check it as well would
be to inflate them twice. A JPEG has no checksum: that all of its bytes are used up without a warning is the only sign
that it is whole, and hundreds of flipped bits show by nothing else. So a warning that is harmless is one that is gone,
by simplejpeg's strict judgement, once the oddity behind it is taken out.
"""

import re
import struct
from zlib import crc32

LFS_POINTER = b"version https://git-lfs.github.com/"
"""What stands in a file's place where Git LFS hasn't brought it."""
PNG = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_length_and_kind, _number = struct.Struct(">I4s").unpack_from, struct.Struct(">I").unpack_from
JPEG_ODDITIES = 4
"""Most oddities that are taken out of one file."""
_EXTRANEOUS = re.compile(r"([0-9]+) extraneous bytes before marker 0x([0-9a-f]{2})")


def png_damage(data: bytes) -> str | None:
    """What is wrong with the chunks of a PNG, up to its end (IEND; other bytes may follow); None for a whole one.

    Ancillary chunks are held to it as well: tRNS changes pixels, and readers differ in what they do with the others.
    """
    view, size, at = memoryview(data), len(data), len(PNG)
    while at + len(_PNG_END) <= size:
        length, kind = _length_and_kind(data, at)
        if not length and data.startswith(_PNG_END, at):
            return None
        stop = at + 8 + length
        if stop + 4 > size:
            break
        if crc32(view[at + 4 : stop]) != _number(data, stop)[0]:
            return f"the chunk {kind!r} at byte {at} differs from its CRC"
        at = stop + 4
    return f"it ends within a chunk that begins at byte {at}" if at < size else "its end (IEND) is missing"


def without_oddity(data: bytes, warning: str) -> bytes | None:
    """A JPEG without the harmless oddity that libjpeg warns of; None if it is damage, or nothing that is known.

    Harmless are zeros before a marker that ends or precedes the picture's data, and unknown revisions of JFIF.
    """
    found = _EXTRANEOUS.search(warning)
    if found and not 0xD0 <= int(found[2], 16) <= 0xD7:
        marker = b"\xff" + bytes.fromhex(found[2])
        end = data.find(bytes(int(found[1])) + marker) + int(found[1])
        if end >= int(found[1]):
            return data[:end].rstrip(b"\0") + data[end:]
    if "JFIF revision" in warning:
        at = data.find(b"JFIF\0")
        if at >= 0:
            return data[: at + 5] + b"\1\1" + data[at + 7 :]
    return None
