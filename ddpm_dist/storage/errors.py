"""What an exception of a storage back end means: a `StorageError` for the user, and whether waiting can help.

Known by provoking each of them: tests/storage/test_objects.py has a real server, and a proxy that misbehaves.
"""

import errno
import logging
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

from ddpm_dist.errors import (
    AccessError,
    DdpmDistError,
    NotFoundError,
    ShortReadError,
    StorageError,
    UnreachableError,
    without_url_secrets,
)
from ddpm_dist.storage import identity, remedies
from ddpm_dist.storage.remedies import causes

T = TypeVar("T")
log = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""Default time in which an outage of the store may end."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
WEB_PAGE = "a web page (HTML) answered, no S3; is the endpoint a console, or a login between here and there?"

_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
SHORTEST_SECRET = 6
"""A shorter value, as of an emulator's user "any", is part of ordinary words."""
_TRANSIENT_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "OperationAborted"}
"""Answers with a status below 500 that say that the way to the store failed, not the request."""
_TRANSIENT_STATUS = {408, 409, 425, 429}
_HOPELESS_STATUS = {501, 505, 511}
"""Answers with a status from 500 on that waiting doesn't change: not implemented, not this HTTP, log in first."""
_ACCESS_CODES = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "AuthorizationHeaderMalformed"}
_TRANSIENT_ERRNO = {
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.EINTR, errno.EIO, errno.EMFILE, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH,
    errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOTCONN, errno.EPIPE, errno.ESTALE, errno.ETIMEDOUT,
}  # fmt: skip
_TRANSIENT_TYPES = {
    "ConnectionError", "TimeoutError", "gaierror", "IncompleteRead", "IncompleteReadError", "ClientConnectionError",
    "ClientPayloadError", "ConnectionClosedError", "ReadTimeoutError", "ResponseStreamingError", "ResponseParserError",
    "FlexibleChecksumError", "ChecksumError", "HttpProcessingError", "ServiceRequestError", "ServiceResponseError",
    "TransportError", "ServerError",
}  # fmt: skip
"""Names, of their own or of a base, of exceptions by which fsspec's back ends say that a connection failed. What is
neither here nor an answer of a store is not waited for: nobody knows whether it can pass."""


def retry(action: Callable[[], T], url: str, patience_s: float = PATIENCE_S, level: int = logging.WARNING) -> T:
    """`action()`, again after transient errors until `patience_s` is over; raises a StorageError.

    Pauses double from 0.1 s to 5 s, with jitter, so that a thousand ranks don't come back as one. level: of the log's
    line for each attempt that failed.
    """
    began = time.monotonic()
    attempt = 0
    while True:
        try:
            return action()
        except DdpmDistError as error:
            if not isinstance(error, ShortReadError):
                raise
            failure: StorageError = error
        except Exception as error:  # fsspec's back ends raise what they like; classify() decides
            failure = classify(error, url)
            if not isinstance(failure, UnreachableError):
                raise failure from None
        pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt) * (0.5 + random.random() / 2)  # noqa: S311 - jitter
        attempt += 1
        waited = time.monotonic() - began
        if waited + pause > patience_s:
            tries = f"{attempt} attempt{'s' if attempt > 1 else ''} in {waited:.0f} s"
            raise type(failure)(f"{failure}; given up after {tries}") from None
        log.log(level, "storage: %s; attempt %d in %.1f s", failure, attempt + 1, pause)
        time.sleep(pause)


def classify(error: BaseException, url: str) -> StorageError:
    """The StorageError that says what an exception of a back end means; UnreachableError if waiting can help."""
    code, status = answer_of(error)
    found = _meaning(error, code, status, redact(url), redact(str(error)))
    found.status = status
    return found


def _meaning(error: BaseException, code: str, status: int | None, place: str, text: str) -> StorageError:
    if code == "NoSuchBucket":
        return NotFoundError(f"{place}: there is no bucket {_bucket(place)}; create it or correct the URL")
    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"{place}: not found")
    if is_web_page(error):
        return (UnreachableError if status in (500, 502, 503, 504) else AccessError)(f"{place}: {WEB_PAGE}{_at(place)}")
    known = remedies.known(error, code, text, place.startswith("s3://"))
    if known is not None:
        return AccessError(f"{place}: {known}")
    if isinstance(error, PermissionError) or status in (401, 403) or code in _ACCESS_CODES:
        return AccessError(f"{place}: access refused ({text.rstrip('.')}){_access_remedy(place)}")
    if status is not None:
        waits = status in _TRANSIENT_STATUS or code in _TRANSIENT_CODES or status >= 500
        hopeless = not waits or status in _HOPELESS_STATUS
        return (StorageError if hopeless else UnreachableError)(f"{place}: the store answered {status} {code}: {text}")
    if isinstance(error, ValueError) and str(error).startswith("Invalid endpoint"):
        return StorageError(
            f"AWS_ENDPOINT_URL: {redact(identity.endpoint() or '')!r} is no endpoint; write http://HOST:PORT or "
            "https://HOST"
        )
    if isinstance(error, TimeoutError):
        return UnreachableError(f"{place}: no answer from the store in time{_at(place)}")
    if _is_transient(error):
        reason = f"{type(error).__name__}: {text}"
        return UnreachableError(f"{place}: the store doesn't answer as it should ({reason}){_at(place)}")
    if isinstance(error, OSError) and error.errno is not None:
        return StorageError(f"{place}: {error.strerror or text}")
    return StorageError(f"{place}: {text or type(error).__name__}")


def _is_transient(error: BaseException) -> bool:
    """Whether some cause of an exception is a connection that failed."""
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in _TRANSIENT_ERRNO:
            return True
        if any(kind.__name__ in _TRANSIENT_TYPES for kind in type(cause).__mro__):
            return True
    return False


def answer_of(error: BaseException) -> tuple[str, int | None]:
    """(S3's error code, HTTP status) of the answer behind an exception of a back end; ("", None) without one."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict) and "Error" in response:
            return str(response["Error"].get("Code", "")), response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for name in ("status_code", "status", "code"):  # of Azure's, of aiohttp, of Google's
        status = getattr(error, name, None)
        if isinstance(status, int) and 400 <= status < 600:
            return "", status
    return "", None


def is_web_page(error: BaseException) -> bool:
    """Whether HTML came, where a store answers in XML: a login, a proxy's error, a console."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            return str(headers.get("content-type", "")).startswith("text/html")
    return False


def redact(text: str) -> str:
    """Text without user:password@, query strings of URLs, and values of secret environment variables."""
    text = without_url_secrets(text)
    for name in _SECRETS:
        value = os.environ.get(name)
        if value and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, f"${name}")
    return text


def _at(place: str) -> str:
    named = identity.endpoint() if place.startswith("s3://") else None
    return f"; AWS_ENDPOINT_URL is {redact(named)}" if named else ""


def _access_remedy(place: str) -> str:
    if not place.startswith("s3://"):
        return ""
    signed_by = identity.describe()
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        signed_by += "; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on this node, and what they may do"
    return f"; asked with {signed_by}"


def _bucket(place: str) -> str:
    return place.partition("://")[2].partition("/")[0]
