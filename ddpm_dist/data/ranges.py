"""Objects and byte ranges of them by the shortest way.

A range through s3fs costs 2.6 ms of processor time, most of it in botocore's and aiohttp's layers: too much
beside images that decode in 0.02 ms. So an S3 object is signed once, and its ranges are plain HTTP requests on
kept connections. http.client needs 0.35 ms for one, half of it to
parse headers as if they were mail; the few lines at the end of this module need less. Whatever isn't the wanted
answer, storage is asked instead, which knows how to wait, to retry and to explain.
"""

import hashlib
import logging
import os
import socket
import ssl
import threading
import time
import urllib.request
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

from ddpm_dist import storage

log = logging.getLogger(__name__)

SIGNED_FOR_S = 900
RENEWED_AFTER_S = 600
SIGNATURES_KEPT = 4096
MAX_HEAD_BYTES = 2**16


@dataclass(frozen=True)
class _Signed:
    url: SplitResult
    until: float


class RangeReader:
    """Reads ranges of objects; many threads may use it, each has connections of its own."""

    def __init__(self) -> None:
        self._signed: dict[str, _Signed] = {}
        self._local = threading.local()

    def read(self, url: str, start: int, length: int) -> tuple[bytes | bytearray, int | None]:
        """Exactly `length` > 0 bytes from `start`, and the size of the object if the answer said it.

        Raises storage's errors.
        """
        found = self._read_plainly(url, start, length)
        return (storage.read_range(url, start, length), None) if found is None else found

    def read_whole(self, url: str) -> bytes | bytearray:
        """All of an object; raises storage's errors."""
        found = self._read_plainly(url, 0, None)
        return storage.read(url) if found is None else found[0]

    def close(self) -> None:
        """Ends this thread's connections."""
        for connection in self._local.__dict__.pop("connections", {}).values():
            connection.close()

    def _read_plainly(self, url: str, start: int, length: int | None) -> tuple[bytearray, int] | None:
        """None where storage has to see to it."""
        if url.startswith("s3://"):
            try:
                signed = self._signature(url)
                if signed is not None:
                    return self._get(signed.url, start, length)
            except OSError as error:  # time-outs and TLS's errors are among them
                self._signed.pop(url, None)  # after a failure nothing of it is used again
                self.close()
                log.debug("data: plain read of %s: %s", storage.redact(url), error)
        return None

    def _signature(self, url: str) -> _Signed | None:
        signed = self._signed.get(url)
        if signed is None or time.monotonic() > signed.until:
            text = storage.signed_url(url, SIGNED_FOR_S)
            if text is None:
                return None
            parts = urlsplit(text)
            if _has_proxy(parts):
                return None
            if len(self._signed) >= SIGNATURES_KEPT:
                self._signed.clear()
            signed = self._signed[url] = _Signed(parts, time.monotonic() + RENEWED_AFTER_S)
        return signed

    def _get(self, url: SplitResult, start: int, length: int | None) -> tuple[bytearray, int]:
        connections: dict[str, _Connection] = self._local.__dict__.setdefault("connections", {})
        connection = connections.get(url.netloc)
        if connection is None:
            connection = connections[url.netloc] = _Connection(url)
        return connection.get(f"{url.path}?{url.query}", start, length)


def _has_proxy(url: SplitResult) -> bool:
    proxies = urllib.request.getproxies_environment()
    return url.scheme in proxies and not urllib.request.proxy_bypass(url.hostname or "")


class _Connection:
    """A kept HTTP/1.1 connection that understands one answer: all the bytes that were asked for. Else an OSError."""

    def __init__(self, url: SplitResult) -> None:
        self._host = url.netloc
        port = url.port or (443 if url.scheme == "https" else 80)
        self._socket = socket.create_connection((url.hostname or "", port), storage.CONNECT_TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(storage.READ_TIMEOUT_S)
        if url.scheme == "https":
            context = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE") or None)
            self._socket = context.wrap_socket(self._socket, server_hostname=url.hostname)

    def get(self, target: str, start: int, length: int | None) -> tuple[bytearray, int]:
        """The bytes (length None: all from 0), and the size of the whole object."""
        wanted = "" if length is None else f"Range: bytes={start}-{start + length - 1}\r\n"
        self._socket.sendall(f"GET {target} HTTP/1.1\r\nHost: {self._host}\r\n{wanted}\r\n".encode())
        received = b""
        while (end := received.find(b"\r\n\r\n")) < 0:
            piece = self._socket.recv(MAX_HEAD_BYTES)
            if not piece or len(received) > MAX_HEAD_BYTES:
                raise ConnectionError("no whole head of an answer")
            received += piece
        head = _read_head(received[:end], start, length)
        body = bytearray(head.length)
        view = memoryview(body)
        have = len(received) - end - 4
        if have > head.length:
            raise ConnectionError("more bytes than were asked for")
        view[:have] = received[end + 4 :]
        while have < head.length:
            count = self._socket.recv_into(view[have:])
            if not count:
                raise ConnectionError(f"{have} of {head.length} bytes")
            have += count
        if length is None and hashlib.md5(body, usedforsecurity=False).hexdigest() != head.etag:
            raise ConnectionError("the bytes are not the tag's")  # or the tag is of another kind: storage decides
        return body, head.total

    def close(self) -> None:
        self._socket.close()


class _Head(NamedTuple):
    length: int
    """Of the body."""
    total: int
    """Bytes of the object."""
    etag: str
    """MD5 of the object, unless it was uploaded in parts or is encrypted."""


def _read_head(head: bytes, start: int, length: int | None) -> _Head:
    """ConnectionError unless it announces exactly what was asked for."""
    first, *lines = head.decode("latin-1").split("\r\n")
    try:
        status = int(first.split(" ")[1])
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        found, etag = int(fields["content-length"]), fields.get("etag", "").strip('"')
        if length is None and status == 200:
            return _Head(found, found, etag)
        if status == 206:
            span, _, total = fields["content-range"].removeprefix("bytes ").partition("/")
            if found == length and span == f"{start}-{start + length - 1}":
                return _Head(found, int(total), etag)
    except (ValueError, KeyError, IndexError):
        pass
    raise ConnectionError(f"not an answer to the request: {first[:80]!r}")
