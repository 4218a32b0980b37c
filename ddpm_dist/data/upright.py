"""Photos that lie on their side: cameras note which way is up (EXIF orientation) and don't turn the pixels."""

import io
import warnings

import numpy as np
from PIL import Image

from ddpm_dist.data.decode import Pixels

UPRIGHT = 1
_ORIENTATION_TAG = 0x112
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF")  # TIFF is turned by Pillow as it is read; the others have no EXIF
_MARKS = (b"Exif\0", b"EXIF", b"eXIf", b"Raw profile type", b"rientation", b"irot", b"imir")


def orientation(data: bytes) -> int:
    """EXIF's orientation of an image file, 1 to 8; 1, which is upright, where it has none that can be read."""
    if not any(mark in data for mark in _MARKS):
        return UPRIGHT
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                found = image.getexif().get(_ORIENTATION_TAG, UPRIGHT)
    except Exception:  # whether it is an image, the decoder says
        return UPRIGHT
    return found if found in range(1, 9) else UPRIGHT


def turn(pixels: Pixels, orientation: int) -> Pixels:
    """[H, W, C] as it was seen (EXIF 2.3, tag 274, Orientation)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
