"""Damage that a decoder of ours used to take for a picture, and oddities that it used to take for damage."""

import io
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from ddpm_dist.data.decode import BadSampleError, decode, decode_into, describe, encode_jpeg, encode_png
from ddpm_dist.data.strict import PNG, png_damage
from tests.data.small_sets import random_images

NOISE = random_images(1, 32)[0]
Y, X = np.mgrid[:32, :32] * 8
SMOOTH = np.stack([X, Y, (X + Y) // 2], axis=-1).astype(np.uint8)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    at, found = len(PNG), []
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def png_of(*parts: tuple[bytes, bytes]) -> bytes:
    return PNG + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def refused(data: bytes) -> bool:
    """By all of the ways in, or by none."""
    answers, out = [], np.empty((32, 32, 3), np.uint8)
    for read in (lambda: decode(data), lambda: decode(data, 32, 3), lambda: decode_into(data, out)):
        try:
            read()
            answers.append(False)
        except BadSampleError:
            answers.append(True)
    assert len(set(answers)) == 1
    return answers[0]


@pytest.mark.parametrize("pixels", [NOISE, SMOOTH, NOISE[..., :1]], ids=["noise", "smooth", "grey"])
def test_every_flipped_bit_of_a_png_is_refused(pixels: np.ndarray) -> None:
    data = encode_png(pixels)
    generator = np.random.default_rng(0)
    for at in [*range(64), *generator.integers(64, len(data), 300).tolist(), *range(len(data) - 16, len(data))]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(generator.integers(8))
        assert refused(bytes(flipped)), at
        with pytest.raises(BadSampleError):
            describe(bytes(flipped))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "I;16"])
def test_so_are_those_of_pngs_that_pillow_reads(mode: str) -> None:
    deep = Image.fromarray(NOISE[..., 0].astype(np.uint16) * 200)
    data = saved(deep if mode == "I;16" else Image.fromarray(NOISE).convert(mode), "PNG")
    assert not refused(data)
    for at in np.random.default_rng(0).integers(8, len(data), 60).tolist():
        flipped = bytearray(data)
        flipped[at] ^= 1
        assert refused(bytes(flipped)), at


def test_what_a_png_may_and_may_not_hold() -> None:
    head, body, end = chunks(encode_png(NOISE))
    text = (b"tEXt", b"Comment\0x")
    half = len(body[1]) // 2
    for whole in (
        png_of(head, text, body, end),
        png_of(head, body, text, end),
        png_of(head, (b"IDAT", body[1][:half]), (b"IDAT", body[1][half:]), end),
        png_of(head, body, end) + b"what follows the end",
        png_of(head, (b"zTXt", b"bomb\0\0" + zlib.compress(bytes(2**22))), body, end),
    ):
        assert np.array_equal(decode(whole), NOISE)
        assert describe(whole) == ("png", 32, 32)
    for damaged, message in (
        (png_of(head, body), r"its end \(IEND\) is missing"),
        (png_of(head, body, end)[:-5], "it ends within a chunk"),
        (png_of(head, (b"IDAT", body[1][:half]), end), "IDAT stream too short"),
        (png_of(head, (b"IDAT", body[1][half:]), (b"IDAT", body[1][:half]), end), "IDAT stream"),
        (
            png_of(head, text, body, end).replace(b"Comment", b"Commend"),
            "the chunk b'tEXt' at byte 33 differs",
        ),
        (png_of(head, body, text, end).replace(b"Comment", b"Commend"), "the chunk b'tEXt' at byte .* differs"),
        (png_of(body, head, end), "not with a whole IHDR"),
    ):
        with pytest.raises(BadSampleError, match=message) as error:
            decode(damaged)
        assert error.value.cause == "corrupt"


def test_a_png_of_many_empty_chunks_takes_no_time() -> None:
    head, body, end = chunks(encode_png(NOISE))
    data = png_of(head, *[(b"tEXt", b"")] * 100_000, body, end)
    started = time.monotonic()
    assert png_damage(data) is None
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("progressive", [False, True])
def test_oddities_of_jpegs_that_every_reader_opens(progressive: bool) -> None:
    data = saved(Image.fromarray(SMOOTH), "JPEG", quality=95, progressive=progressive)
    scan, jfif = data.index(b"\xff\xda"), data.index(b"JFIF")
    padded = data[:-2] + bytes(50) + data[-2:]
    odd = [
        padded,
        data[:scan] + bytes(20) + data[scan:],
        data[: jfif + 5] + b"\x02\x01" + data[jfif + 7 :],
        padded[: jfif + 5] + b"\x07\x01" + padded[jfif + 7 :],
        data + b"what follows the end",
        data[:-2] + b"\xff" * 9 + data[-2:],
    ]
    for changed in odd:
        for wanted in (None, 3, 1):
            assert np.array_equal(decode(changed, None, wanted), decode(data, None, wanted))
        out = np.empty((32, 32, 3), np.uint8)
        decode_into(changed, out)
        pillow = np.asarray(Image.open(io.BytesIO(changed)).convert("RGB")).astype(int)
        assert np.abs(out.astype(int) - pillow).max() <= 2
        assert describe(changed) == ("jpeg", 32, 32)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_is_cut_stays_refused(progressive: bool) -> None:
    data = saved(Image.fromarray(NOISE), "JPEG", quality=95, progressive=progressive)
    for stop in (len(data) - 1, len(data) - 2, len(data) - 3, len(data) // 2, 300, 20):
        assert refused(data[:stop])
        assert refused(data[:stop] + bytes(50))
        assert refused(data[: stop - 2] + bytes(50))


def test_no_more_flipped_bits_of_a_jpeg_are_taken_than_by_the_strict_decoder() -> None:
    """Pillow takes all of these; a leftover before the end is often the only sign of damage."""
    import simplejpeg

    data = encode_jpeg(NOISE, 95)
    scan = data.index(b"\xff\xda") + 14
    generator = np.random.default_rng(0)
    strict = ours = 0
    for _ in range(400):
        flipped = bytearray(data)
        flipped[int(generator.integers(scan, len(data) - 2))] ^= 1 << int(generator.integers(8))
        try:
            simplejpeg.decode_jpeg(bytes(flipped))
        except ValueError:
            strict += 1
        ours += refused(bytes(flipped))
    assert ours == strict > 100


@pytest.mark.parametrize(
    ("form", "options"),
    [("AVIF", {"quality": 100}), ("JPEG", {"quality": 98}), ("WEBP", {"lossless": True}), ("MPO", {"quality": 98})],
)
def test_forms_and_their_names(form: str, options: dict[str, object]) -> None:
    data = saved(Image.fromarray(SMOOTH), form, **options)
    assert np.abs(decode(data, None, 3).astype(int) - SMOOTH).mean() < 8
    assert describe(data)[0] in (form.lower(), "jpeg")


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_it_is_the_first_frame(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    options = {"lossless": True} if form == "WEBP" else {}
    data = saved(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert np.abs(decode(data, None, 3).astype(int) - np.array([200, 0, 0])).max() <= 2


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_colour_profiles_are_not_applied(form: str) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    image = Image.fromarray(SMOOTH)
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(form, {})
    with_profile = saved(image, form, icc_profile=profile, **options)
    assert np.array_equal(decode(with_profile), decode(saved(image, form, **options)))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I;16"])
def test_modes_have_one_meaning_in_every_form(mode: str) -> None:
    """Grey and bilevel have one channel, all else three; transparency lies on white; 16 bits keep their high byte."""
    grey = mode in ("1", "L", "I;16")
    image = Image.fromarray(SMOOTH[..., 0].astype(np.uint16) * 257) if mode == "I;16" else None
    image = image or (Image.fromarray(SMOOTH).convert("LA" if mode == "LA" else mode))
    forms = {"PNG": mode not in ("CMYK", "YCbCr"), "TIFF": mode not in ("LA",), "JPEG": mode in ("L", "RGB", "CMYK")}
    for form in (form for form, possible in forms.items() if possible):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = saved(image, form, **({"quality": 98} if form == "JPEG" else {}))
        assert decode(data).shape == (32, 32, 1 if grey else 3)
        assert decode(data, 32, 3).shape == (32, 32, 3)
        assert describe(data)[1:] == (32, 32)
