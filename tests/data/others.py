"""Sets as they lie around in the world: tars by plain tarfile, images by plain Pillow."""

import io
import tarfile
from collections.abc import Iterable

import numpy as np
from PIL import Image

from ddpm_dist import storage


def image(seed: int = 0, form: str = "PNG", size: tuple[int, int] = (8, 8)) -> bytes:
    """An image file of random pixels; size: (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def tarred(members: Iterable[tuple[str, bytes]], **options: object) -> bytes:
    """A tar of (path, bytes)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", **options) as archive:  # type: ignore[call-overload]
        for path, data in members:
            info = tarfile.TarInfo(path)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def put(url: str, members: Iterable[tuple[str, bytes]], name: str = "0.tar") -> str:
    """Publishes a tar below a URL; returns the URL."""
    storage.publish(storage.join(url, name), tarred(members))
    return url


def with_size(data: bytes, header: int, size: int) -> bytes:
    """A tar whose header at a byte says another size, in base 256 if need be; its checksum is right."""
    changed = bytearray(data)
    octal = 0 <= size < 8**11
    changed[header + 124 : header + 136] = b"%011o\0" % size if octal else (size % (1 << 96)).to_bytes(12, "big")
    if size >= 8**11:
        changed[header + 124] |= 0x80
    block = changed[header : header + 512]
    changed[header + 148 : header + 156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    return bytes(changed)


def labelled(url: str, labels: list[bytes | None], name: str = "0.tar") -> str:
    """Publishes a tar of images with these bytes in their .cls, or without one; returns the URL."""
    put(
        url,
        [
            m
            for i, v in enumerate(labels)
            for m in (*([(f"{i}.cls", v)] if v is not None else []), (f"{i}.png", image(i)))
        ],
        name,
    )
    return url
