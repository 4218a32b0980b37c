"""Byte ranges of objects by the shortest way.

A range through s3fs costs 2.6 ms of processor time, most of it in botocore's and aiohttp's layers: too much
beside images that decode in 0.02 ms. So an S3 object is signed once (by s3fs, which knows the credentials)
and its ranges are plain HTTP requests on kept connections: 0.35 ms. Whatever isn't the wanted answer, storage
is asked instead, which knows how to wait, to retry and to explain.
"""

import http.client
import logging
import os
import ssl
import threading
import time
import urllib.request
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from ddpm_dist import storage

log = logging.getLogger(__name__)

SIGNED_FOR_S = 900
RENEWED_AFTER_S = 600
SIGNATURES_KEPT = 4096
CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class _Signed:
    url: SplitResult
    until: float


class RangeReader:
    """Reads ranges of objects; many threads may use it, each has connections of its own."""

    def __init__(self) -> None:
        self._signed: dict[str, _Signed] = {}
        self._local = threading.local()

    def read(self, url: str, start: int, length: int) -> tuple[bytes, int | None]:
        """Exactly `length` > 0 bytes from `start`, and the size of the object if the answer said it.

        Raises storage's errors.
        """
        if url.startswith("s3://"):
            try:
                signed = self._signature(url)
                if signed is not None:
                    return self._get(signed.url, start, length)
            except (OSError, http.client.HTTPException) as error:
                self._close(url)
                log.debug("data: plain read of %s: %s", storage.redact(url), error)
        return storage.read_range(url, start, length), None

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

    def _get(self, url: SplitResult, start: int, length: int) -> tuple[bytes, int | None]:
        connection = self._connection(url)
        connection.request("GET", f"{url.path}?{url.query}", headers={"Range": f"bytes={start}-{start + length - 1}"})
        with connection.getresponse() as answer:
            if answer.status != http.client.PARTIAL_CONTENT:
                answer.read(CHUNK_BYTES)
                raise http.client.HTTPException(f"status {answer.status}")
            data = answer.read()
        if len(data) != length:
            raise http.client.IncompleteRead(data, length - len(data))
        _, _, total = answer.headers.get("Content-Range", "").rpartition("/")
        return data, int(total) if total.isdigit() else None

    def _connection(self, url: SplitResult) -> http.client.HTTPConnection:
        connections: dict[str, http.client.HTTPConnection] = self._local.__dict__.setdefault("connections", {})
        connection = connections.get(url.netloc)
        if connection is None:
            host, timeout = url.hostname or "", storage.READ_TIMEOUT_S
            if url.scheme == "https":
                context = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE") or None)
                connection = http.client.HTTPSConnection(host, url.port, timeout=timeout, context=context)
            else:
                connection = http.client.HTTPConnection(host, url.port, timeout=timeout)
            connections[url.netloc] = connection
        return connection

    def _close(self, url: str) -> None:
        """After a failure nothing of it is used again."""
        self._signed.pop(url, None)
        for connection in self._local.__dict__.pop("connections", {}).values():
            connection.close()


def _has_proxy(url: SplitResult) -> bool:
    proxies = urllib.request.getproxies_environment()
    return url.scheme in proxies and not urllib.request.proxy_bypass(url.hostname or "")
