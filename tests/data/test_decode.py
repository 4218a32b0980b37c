"""Every image form to uint8 H×W×C, against Pillow and against plain formulas."""

import io

import numpy as np
import pytest
from PIL import Image

from ddpm_dist.data.decode import (
    BadSampleError,
    decode,
    decode_into,
    describe,
    encode_jpeg,
    encode_png,
    encode_raw,
    fit,
)
from tests.data.small_sets import random_images

RGB = random_images(1, 24)[0]
GREY = random_images(1, 24, 1)[0]


def smooth(size: int = 48) -> np.ndarray:
    """A picture that JPEG can hold."""
    y, x = np.mgrid[:size, :size] / size
    return (np.stack([x, y, (x + y) / 2], axis=-1) * 255).astype(np.uint8)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("pixels", [RGB, GREY], ids=["RGB", "grey"])
@pytest.mark.parametrize("encode", [encode_png, encode_raw])
def test_lossless_forms_come_back_as_they_were(pixels: np.ndarray, encode) -> None:  # type: ignore[no-untyped-def]
    assert np.array_equal(decode(encode(pixels)), pixels)


@pytest.mark.parametrize("form", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
def test_what_pillow_reads(form: str) -> None:
    image = Image.fromarray(smooth())
    data = saved(image, form, **({"lossless": True} if form == "WEBP" else {}))
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode(data, None, 3), wanted)
    assert describe(data) == (form.lower(), 48, 48)


def test_jpeg_is_near_pillow_and_grey_jpeg_is_grey() -> None:
    data = encode_jpeg(smooth(), 95)
    assert np.abs(decode(data).astype(int) - np.asarray(Image.open(io.BytesIO(data))).astype(int)).max() <= 2
    grey = encode_jpeg(smooth()[..., :1], 95)
    assert decode(grey).shape == (48, 48, 1)
    assert decode(grey, None, 3).shape == (48, 48, 3)
    luma = np.asarray(Image.open(io.BytesIO(data)).convert("L")).astype(int)
    assert np.abs(decode(data, None, 1)[..., 0].astype(int) - luma).max() <= 2


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("data", [encode_jpeg(smooth(), 95), encode_jpeg(smooth(64), 95), encode_png(smooth())])
def test_decoding_in_place_gives_the_same(data: bytes, channels: int) -> None:
    out = np.zeros((48, 48, channels), np.uint8)
    decode_into(data, out)
    assert np.array_equal(out, decode(data, 48, channels))
    with pytest.raises(BadSampleError):
        decode_into(data[:100], out)


def test_palettes_become_colours() -> None:
    image = Image.fromarray(smooth()).quantize(16)
    assert np.array_equal(decode(saved(image, "PNG")), np.asarray(image.convert("RGB")))


def test_transparency_is_composited_on_white() -> None:
    pixels = np.dstack([RGB, random_images(1, 24, 1, seed=5)[0]])
    alpha = pixels[..., 3:] / 255
    wanted = RGB * alpha + 255 * (1 - alpha)
    assert np.abs(decode(saved(Image.fromarray(pixels), "PNG")) - wanted).max() <= 1
    palette = Image.fromarray(np.zeros((4, 4), np.uint8), "P")
    palette.putpalette([10, 20, 30])
    assert (decode(saved(palette, "PNG", transparency=0)) == 255).all()
    keyed = saved(Image.fromarray(np.full((4, 4, 3), 7, np.uint8)), "PNG", transparency=(7, 7, 7))
    assert (decode(keyed) == 255).all()


def test_sixteen_bits_become_the_high_byte() -> None:
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    data = saved(Image.fromarray(values), "PNG")
    assert np.array_equal(decode(data), (values >> 8).astype(np.uint8)[..., None])
    assert decode(data, None, 3).shape == (8, 8, 3)


def test_cmyk_becomes_rgb() -> None:
    image = Image.fromarray(smooth()).convert("CMYK")
    data = saved(image, "JPEG", quality=95)
    assert np.abs(decode(data).astype(int) - smooth().astype(int)).mean() < 4


def test_bilevel_becomes_black_and_white() -> None:
    data = saved(Image.fromarray(GREY[..., 0]).convert("1"), "PNG")
    assert set(np.unique(decode(data)).tolist()) == {0, 255}


def center_crop_arr(image: Image.Image, size: int) -> np.ndarray:
    """guided-diffusion's recipe (image_datasets.py), as published there."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)  # type: ignore[arg-type,attr-defined]
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)  # type: ignore[arg-type,attr-defined]
    arr = np.array(image)
    crop_y, crop_x = (arr.shape[0] - size) // 2, (arr.shape[1] - size) // 2
    return arr[crop_y : crop_y + size, crop_x : crop_x + size]


@pytest.mark.parametrize(
    ("height", "width", "size"), [(48, 48, 16), (100, 37, 16), (37, 100, 32), (9, 20, 16), (65, 64, 32)]
)
def test_fit_is_the_fields_recipe(height: int, width: int, size: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert np.array_equal(fit(pixels, size), center_crop_arr(Image.fromarray(pixels), size))
    assert fit(pixels[..., :1], size).shape == (size, size, 1)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "empty"),
        (b"no image at all", "not_an_image"),
        (encode_png(RGB)[:-40], "corrupt"),
        (encode_png(RGB)[:20], "corrupt"),
        (encode_jpeg(RGB, 90)[:200], "corrupt"),
        (encode_raw(RGB)[:-1], "corrupt"),
        (encode_raw(RGB.astype(np.float32)), "corrupt"),  # type: ignore[arg-type]
        (encode_raw(np.zeros((2, 2, 5), np.uint8)), "corrupt"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not_an_image"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\0IHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02" + b"\0" * 40, "too_large"),
    ],
)
def test_what_is_no_image_says_why(data: bytes, cause: str) -> None:
    with pytest.raises(BadSampleError) as error:
        decode(data, 8, 3)
    assert error.value.cause == cause


def test_messages_show_how_it_begins_and_no_address() -> None:
    for read in (decode, describe):
        with pytest.raises(BadSampleError, match=r"^not an image: it begins with b'this is a text f'$"):
            read(b"this is a text file that somebody named .png")
    with pytest.raises(BadSampleError, match=r"^not an image: a pointer of Git LFS; `git lfs pull` brings the file$"):
        decode(b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 7\n")
    with pytest.raises(BadSampleError, match=r"^corrupt: no header of an array: b\"{'descr': x"):
        decode(encode_raw(RGB).replace(b"'|u1'", b"x    "))


@pytest.mark.parametrize(("height", "width"), [(1, 2**20), (2**20, 1)])
def test_a_strip_is_not_unpacked_to_gigabytes(height: int, width: int) -> None:
    """A resize to 256 pixels would make 200 GB of a few kB."""
    for data in (
        encode_png(np.zeros((height, width, 1), np.uint8)),
        encode_raw(np.zeros((height, width, 1), np.uint8)),
    ):
        with pytest.raises(BadSampleError) as error:
            decode(data, 256, 3)
        assert error.value.cause == "too_large"


def test_encoders_are_deterministic() -> None:
    for encode in (encode_png, encode_raw, lambda p: encode_jpeg(p, 90)):
        assert encode(RGB) == encode(RGB.copy())


def test_what_is_beyond_eight_and_sixteen_bits_says_its_range() -> None:
    data = saved(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF")
    with pytest.raises(BadSampleError, match=r"float32 pixels from 0\.0 to 1\.0; whole numbers from 0 to 65535"):
        decode(data)


def test_sixteen_bits_of_a_tiff_that_would_be_black_are_refused() -> None:
    """Microscopes and converters write 8-bit values into 16; a picture that is all black is one."""
    values = np.arange(64, dtype=np.uint16).reshape(8, 8)
    with pytest.raises(BadSampleError, match=r"16-bit pixels up to 63 would be black; scale them to 0\.\.65535"):
        decode(saved(Image.fromarray(values), "TIFF"))
    assert not decode(saved(Image.fromarray(values), "PNG")).any()
    assert not decode(saved(Image.fromarray(values * 0), "TIFF")).any()
    assert np.array_equal(decode(saved(Image.fromarray(values * 1024), "TIFF"))[..., 0], values * 4)
