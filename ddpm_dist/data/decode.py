"""Image files to the form that the network sees: uint8, H×W×C, one size, grey or RGB.

8-bit PNG by pyspng, JPEG by simplejpeg, `.npy` as it lies, everything else by Pillow. Palettes and CMYK
become RGB, 16 bits become 8 (the high byte), transparency is composited on white; of an animation it is the
first frame; colour profiles are not applied. Damage is refused where the file can show it (`strict.py`).
"""

import io
import struct
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import numpy as np
import pyspng
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from ddpm_dist.data.strict import JPEG_ODDITIES, LFS_POINTER, PNG, png_damage, without_oddity

Pixels = NDArray[np.uint8]

MAX_PIXELS = 2**26
"""Larger images are refused before they are unpacked (a few kB of PNG can hold gigabytes)."""
NO_BYTES = "a file of no bytes, or a sample without an image"
CAUSES = ("empty", "not_an_image", "too_large", "corrupt")

_IHDR = struct.Struct(">IIBB")
_JPEG = b"\xff\xd8\xff"
_JPEG_SPACES = ("RGB", "YCbCr", "Gray")
_NPY = b"\x93NUMPY"
# What Pillow may open; formats that run other programs or scripts (EPS) stay out.
_PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "AVIF")
Image.MAX_IMAGE_PIXELS = None  # MAX_PIXELS is checked here, with an error instead of a warning


class BadSampleError(Exception):
    """A sample that can't be decoded; `cause` is one of CAUSES, by which the loader counts it."""

    def __init__(self, cause: str, detail: str = "") -> None:
        what = cause.replace("_", " ")
        super().__init__(f"{what}: {detail}" if detail else what)
        self.cause = cause


def decode(data: bytes, size: int | None = None, channels: int | None = None) -> Pixels:
    """[H, W, C] uint8 of an image file; raises BadSampleError.

    size: height and width in pixels that are wanted, by `fit`; none: as it is.
    channels: 1 or 3; none: 1 for grey images, else 3.
    """
    if not data:
        raise BadSampleError("empty", NO_BYTES)
    try:
        pixels = _decoder(data)(data, size, channels)
    except BadSampleError:
        raise
    except Exception as error:  # three C libraries and Pillow's plugins raise what they like
        raise BadSampleError("corrupt", f"{type(error).__name__}: {error}") from None
    pixels = _with_channels(pixels, channels)
    if size is not None and pixels.shape[:2] != (size, size):
        pixels = fit(pixels, size)
    return pixels


def decode_into(data: bytes, out: Pixels) -> None:
    """As `decode`, to a contiguous [size, size, 1 or 3] uint8 array; raises BadSampleError and then leaves rubbish.

    A JPEG of that size is unpacked in place, which saves a fifth of its time at 256 pixels.
    """
    size, _, channels = out.shape
    if data.startswith(_JPEG):
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            if height == width == size and colorspace in _JPEG_SPACES:
                simplejpeg.decode_jpeg(data, colorspace="GRAY" if channels == 1 else "RGB", buffer=out)
                return
        except ValueError:
            pass  # `decode` says whether that is damage
    out[...] = decode(data, size, channels)


def describe(data: bytes) -> tuple[str, int, int]:
    """(format, height, width) from the head of an image file, nothing unpacked; raises BadSampleError."""
    if not data:
        raise BadSampleError("empty", NO_BYTES)
    try:
        if data.startswith(_NPY):
            shape = _npy_shape(data)[0]
            return "npy", shape[0], shape[1]
        if data.startswith(PNG):
            _check_chunks(data)
            width, height, *_ = _png_head(data)
            return "png", height, width
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
            return str(image.format).lower(), image.height, image.width
    except BadSampleError:
        raise
    except Exception:
        raise _not_an_image(data) from None


def fit(pixels: Pixels, size: int) -> Pixels:
    """Resized and centre-cropped to [size, size, C], as in guided-diffusion's `center_crop_arr`.

    The shorter side is halved by averages while it is at least 2·size, then resized bicubically to size.
    BadSampleError for a strip so narrow that this would unpack more than MAX_PIXELS.
    """
    channels = pixels.shape[2]
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    _check_pixels(height, width)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    fitted = np.asarray(image.crop((left, top, left + size, top + size)))
    return fitted.reshape(size, size, channels)


def encode_png(pixels: Pixels) -> bytes:
    """PNG of [H, W, 1 or 3] uint8; the same pixels give the same bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def encode_jpeg(pixels: Pixels, quality: int) -> bytes:
    """JPEG of [H, W, 1 or 3] uint8, without chroma subsampling."""
    colorspace, subsampling = ("GRAY", "Gray") if pixels.shape[2] == 1 else ("RGB", "444")
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, colorspace, subsampling))


def encode_raw(pixels: Pixels) -> bytes:
    """`.npy` of [H, W, C] uint8."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(pixels), allow_pickle=False)
    return buffer.getvalue()


def _decoder(data: bytes) -> Callable[[bytes, int | None, int | None], Pixels]:
    if data.startswith(_JPEG):
        return _jpeg
    if data.startswith(PNG):
        return _png
    if data.startswith(_NPY):
        return _npy
    return _pillow


def _png(data: bytes, size: int | None, channels: int | None) -> Pixels:
    width, height, depth, colour = _png_head(data)
    _check_pixels(height, width)
    _check_chunks(data)
    # tRNS gives transparency to the types without alpha; it stands before the first IDAT.
    if depth != 8 or colour not in (0, 2) or b"tRNS" in data[33 : data.find(b"IDAT")]:
        return _pillow(data, size, channels)
    pixels = cast(Pixels, pyspng.load(data))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _png_head(data: bytes) -> tuple[int, int, int, int]:
    """(width, height, bit depth, colour type: 0 grey, 2 RGB, 3 palette, 4 and 6 with alpha) of a PNG."""
    if data[12:16] != b"IHDR" or len(data) < 26:
        raise BadSampleError("corrupt", f"it begins with the chunk {data[12:16]!r} and not with a whole IHDR")
    return _IHDR.unpack_from(data, 16)


def _check_chunks(data: bytes) -> None:
    damage = png_damage(data)
    if damage:
        raise BadSampleError("corrupt", damage)


def _jpeg(data: bytes, size: int | None, channels: int | None) -> Pixels:
    for _ in range(JPEG_ODDITIES):
        try:
            return _strict_jpeg(data, size, channels)
        except ValueError as error:
            mended = without_oddity(data, str(error))
            if mended is None:
                raise
            data = mended
    return _strict_jpeg(data, size, channels)


def _strict_jpeg(data: bytes, size: int | None, channels: int | None) -> Pixels:
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    _check_pixels(height, width)
    if colorspace not in _JPEG_SPACES:
        return _pillow(data, size, channels)
    grey = channels == 1 or (channels is None and colorspace == "Gray")
    return cast(Pixels, simplejpeg.decode_jpeg(data, colorspace="GRAY" if grey else "RGB"))


def _npy(data: bytes, size: int | None, channels: int | None) -> Pixels:
    shape, start = _npy_shape(data)
    _check_pixels(shape[0], shape[1])
    return np.frombuffer(data, np.uint8, shape[0] * shape[1] * shape[2], start).reshape(shape)


def _pillow(data: bytes, size: int | None, channels: int | None) -> Pixels:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image: Any = Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS)
        except Exception:
            raise _not_an_image(data) from None
        _check_pixels(image.height, image.width)
        image.load()
        if image.mode.startswith("I") or image.mode == "F":
            return _high_byte(np.asarray(image), str(image.format))[..., None]
        if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            background = Image.new("RGBA", image.size, "white")
            background.alpha_composite(image)
            image = background.convert("RGB")
        elif image.mode in ("1", "L"):
            return np.asarray(image.convert("L"))[..., None]
        return np.asarray(image.convert("RGB"))


def _not_an_image(data: bytes) -> BadSampleError:
    if data.startswith(LFS_POINTER):
        return BadSampleError("not_an_image", "a pointer of Git LFS; `git lfs pull` brings the file")
    # Pillow's own message names an object in memory.
    return BadSampleError("not_an_image", f"it begins with {data[:16]!r}")


def _high_byte(values: NDArray[Any], form: str) -> Pixels:
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        span = f"from {values.min()} to {values.max()}"
        raise BadSampleError("corrupt", f"{values.dtype} pixels {span}; whole numbers from 0 to 65535 are wanted")
    if form == "TIFF" and 0 < values.max() < 256:  # a PNG's 16 bits mean 0..65535, a TIFF's are what its maker liked
        raise BadSampleError("corrupt", f"16-bit pixels up to {values.max()} would be black; scale them to 0..65535")
    return (values.astype(np.uint32) >> 8).astype(np.uint8)


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise BadSampleError("too_large", f"{height}×{width} pixels, at most {MAX_PIXELS} are unpacked")
    if height < 1 or width < 1:
        raise BadSampleError("corrupt", f"{height}×{width} pixels")


def _npy_shape(data: bytes) -> tuple[tuple[int, int, int], int]:
    length = int.from_bytes(data[8:10], "little")
    return _parse_npy_header(data[:8], data[10 : 10 + length]), 10 + length


@lru_cache(maxsize=64)
def _parse_npy_header(magic: bytes, header: bytes) -> tuple[int, int, int]:
    stream = io.BytesIO(magic + len(header).to_bytes(2, "little") + header)
    try:
        np.lib.format.read_magic(stream)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception:  # numpy parses it as Python, and names objects in memory
        raise BadSampleError("corrupt", f"no header of an array: {header[:40]!r}") from None
    if dtype != np.uint8 or fortran or len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3)):
        order = " in Fortran's order" if fortran else ""
        raise BadSampleError("corrupt", f"array of {dtype} {shape}{order}; [height, width, 1 or 3] of uint8 is wanted")
    return (shape[0], shape[1], shape[2] if len(shape) == 3 else 1)


def _with_channels(pixels: Pixels, channels: int | None) -> Pixels:
    have = pixels.shape[2]
    if channels is None or have == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
