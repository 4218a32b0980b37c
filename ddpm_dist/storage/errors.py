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

T = TypeVar("T")
log = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""Default time in which an outage of the store may end."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0

_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
SHORTEST_SECRET = 6
"""A shorter value, as of an emulator's user "any", is part of ordinary words."""
_HOPELESS_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.EFBIG}
_TRANSIENT_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "OperationAborted"}
"""Answers with a status below 500 that say that the way to the store failed, not the request."""
_TRANSIENT_STATUS = {408, 409, 425, 429}
_ACCESS_CODES = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "AuthorizationHeaderMalformed"}


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
    place, text = redact(url), redact(str(error))
    code, status = answer_of(error)
    if code == "NoSuchBucket":
        return NotFoundError(f"{place}: there is no bucket {_bucket(place)}; create it or correct the URL")
    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"{place}: not found")
    if code == "RequestTimeTooSkewed":
        return AccessError(f"{place}: access refused: this node's clock differs too much from the store's; set it")
    if isinstance(error, PermissionError) or status in (401, 403) or code in _ACCESS_CODES or _lacks_credentials(error):
        return AccessError(f"{place}: access refused ({text.rstrip('.')}){_access_remedy(place)}")
    if status is not None and status < 500 and status not in _TRANSIENT_STATUS and code not in _TRANSIENT_CODES:
        return StorageError(f"{place}: the store answered {status} {code}: {text}")
    if status is not None:
        return UnreachableError(f"{place}: the store answered {status} {code}: {text}")
    if isinstance(error, ValueError) and str(error).startswith("Invalid endpoint"):
        return StorageError(f"AWS_ENDPOINT_URL: {_endpoint()!r} is no endpoint; write http://HOST:PORT or https://HOST")
    if isinstance(error, (IsADirectoryError, NotADirectoryError, FileExistsError, ValueError, TypeError)):
        return StorageError(f"{place}: {text or type(error).__name__}")
    if isinstance(error, OSError) and error.errno in _HOPELESS_ERRNO:
        return StorageError(f"{place}: {error.strerror or text}")
    if type(error).__name__ in ("ParamValidationError", "ProfileNotFound", "InvalidEndpointConfigurationError"):
        return StorageError(f"{place}: {text}")
    at = f"; AWS_ENDPOINT_URL is {_endpoint()}" if _endpoint() and place.startswith("s3://") else ""
    if isinstance(error, TimeoutError):
        return UnreachableError(f"{place}: no answer from the store in time{at}")
    return UnreachableError(f"{place}: the store doesn't answer as it should ({type(error).__name__}: {text}){at}")


def answer_of(error: BaseException) -> tuple[str, int | None]:
    """(S3's error code, HTTP status) of the answer behind an exception of s3fs or botocore; ("", None) without one."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict) and "Error" in response:
            return str(response["Error"].get("Code", "")), response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return "", None


def redact(text: str) -> str:
    """Text without user:password@, query strings of URLs, and values of secret environment variables."""
    text = without_url_secrets(text)
    for name in _SECRETS:
        value = os.environ.get(name)
        if value and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, f"${name}")
    return text


def _endpoint() -> str:
    return redact(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")


def _lacks_credentials(error: BaseException) -> bool:
    return "Credential" in type(error).__name__ or type(error).__name__ in (
        "TokenRetrievalError",
        "UnauthorizedSSOTokenError",
    )


def _access_remedy(place: str) -> str:
    if not place.startswith("s3://"):
        return ""
    missing = [name for name in _SECRETS[:2] if not os.environ.get(name)]
    if missing:
        return f"; {' and '.join(missing)} not set on this node"
    return "; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on this node, and what they may do"


def _bucket(place: str) -> str:
    return place.partition("://")[2].partition("/")[0]
