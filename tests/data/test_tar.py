"""The walk over a tar: whole, or refused; never a hang, a full memory, or an error of tarfile's."""

import io
import tarfile
import time

import numpy as np
import pytest
import webdataset
from hypothesis import given, strategies as st
from webdataset.tariterators import base_plus_ext

from ddpm_dist.data import tar
from ddpm_dist.errors import ShardError
from tests.data.others import image, tarred, with_size

NAMES = st.lists(st.sampled_from(["a", "ä", ".", "..", "/", "//", "jpg", "CLS", "__x__", "\n", " "]), max_size=8)
FIRST = 512 + 512 * -(-len(image()) // 512)


@pytest.mark.parametrize("size", [-512, -(2**62), 2**62, 2**80, 8**11 - 1])
@pytest.mark.parametrize("header", [0, FIRST])
def test_impossible_sizes_are_errors_at_once(size: int, header: int) -> None:
    data = with_size(tarred([("0.png", image()), ("1.png", image(1))]), header, size)
    with pytest.raises(ShardError, match=r"s\.tar: (altered|truncated|not a whole tar)"):
        tar.walk(data, "s.tar")


@pytest.mark.parametrize(
    "kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_SPARSE, b"q"]
)
@pytest.mark.parametrize("size", [-512, 2**40, 2**70])
def test_impossible_sizes_of_headers_that_tarfile_reads_itself(kind: bytes, size: int) -> None:
    info = tarfile.TarInfo("x")
    info.type = kind
    data = with_size(info.tobuf() + tarred([("0.png", image())]), 0, size)
    with pytest.raises(ShardError):
        tar.walk(data, "s.tar")


@pytest.mark.parametrize("value", ["-512", "9" * 30, "9" * 5000, "x", "1e9", "1.5"])
@pytest.mark.parametrize("field", ["size", "mtime", "uid", "GNU.sparse.size", "GNU.sparse.map", "GNU.sparse.realsize"])
def test_numbers_out_of_range_in_pax(field: str, value: str) -> None:
    data = tarred([("0.png", image()), ("1.png", image(1))], format=tarfile.PAX_FORMAT, pax_headers={field: value})
    info = tarfile.TarInfo("2.png")
    info.pax_headers = {field: value}
    local = info.create_pax_header(dict(info.get_info(), size=0), "utf-8")
    for altered in (data, local + data):
        try:
            assert len(tar.walk(altered, "s.tar")) in (2, 3)
        except ShardError:
            pass


def test_a_chain_of_headers_is_no_endless_recursion() -> None:
    info = tarfile.TarInfo("x")
    info.type = tarfile.XHDTYPE
    with pytest.raises(ShardError, match="not a whole tar"):
        tar.walk(info.tobuf() * 3000 + tarred([("0.png", image())]), "s.tar")


def test_names_that_are_not_utf8_are_named() -> None:
    data = bytearray(tarred([("na_ve.png", image())]))
    data[2] = 0xEF  # naïve in Latin-1
    with pytest.raises(ShardError, match=r"s\.tar: a file's name isn't UTF-8: b'na\\xefve\.png'"):
        tar.walk(with_size(bytes(data), 0, len(image())), "s.tar")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 7\n", "a pointer of Git LFS"),
        (b"\x1f\x8b" + bytes(2000), "compressed by gzip"),
        (b"PK\x03\x04" + bytes(2000), "a zip"),
        (b"<html>404</html>" * 100, "not a whole tar"),
        (bytes(1024), None),
    ],
)
def test_what_is_found_in_a_shards_place(data: bytes, message: str | None) -> None:
    if message is None:
        assert tar.walk(data, "s.tar") == []
        return
    with pytest.raises(ShardError, match=message):
        tar.walk(data, "s.tar")


FIELDS = [(0, 100), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)]
"""Name, size, type, target, magic, prefix: (first byte, bytes)."""
BYTES = [0, 32, 48, 76, 83, 120, 128, 255]


def with_checksum(data: bytearray, header: int) -> bytes:
    block = data[header : header + 512]
    data[header + 148 : header + 156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    return bytes(data)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_altered_behind_their_checksum(form: int) -> None:
    """Any header that tarfile believes is walked to the end or refused: no other error, no endless loop."""
    whole = tarred([(f"{'long' * 24}/{i:090d}.txt", b"x" * 700) for i in range(3)], format=form)
    headers = [at for at in range(0, len(whole) - 1024, 512) if whole[at + 257 : at + 262] == b"ustar"]
    generator = np.random.default_rng(form)
    started, answers = time.monotonic(), set()
    for _ in range(400):
        data, header = bytearray(whole), int(generator.choice(headers))
        for _ in range(int(generator.integers(1, 4))):
            field, length = FIELDS[int(generator.integers(6))]
            data[header + field + int(generator.integers(length))] = int(generator.choice(BYTES))
        try:
            tar.walk(with_checksum(data, header), "s.tar")
            answers.add("walked")
        except ShardError:
            answers.add("refused")
    assert answers == {"walked", "refused"}
    assert time.monotonic() - started < 60


@given(NAMES.map("".join))
def test_a_key_ends_where_webdataset_ends_it(path: str) -> None:
    key, extension = base_plus_ext(path)
    assert tar.KEYS[tar.FIRST_DOT](path) == (key, extension or "")


def test_shards_are_what_webdatasets_writer_writes() -> None:
    content = np.random.default_rng(0).bytes(70_000)
    keys = ["0", "a/b_1", "ä", "long/" + "x" * 300, "y" * 98]
    samples = [(key, {"png": content[: 700 * n], "cls": b"3", "json": b""}) for n, key in enumerate(keys, start=1)]
    theirs = io.BytesIO()
    with webdataset.TarWriter(theirs, encoder=False, mtime=0, user="", group="") as writer:
        for key, files in samples:
            writer.write({"__key__": key, **files})
    assert tar.write_tar(samples) == theirs.getvalue()
