"""The store behind a URL: one fsspec filesystem, with its connections, per process and protocol.

Credentials and the endpoint come from the environment of the process, and never show in an error.
"""

import os
import re
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from ddpm_dist.errors import StorageError
from ddpm_dist.packages import absent
from ddpm_dist.storage import identity, sessions, signing
from ddpm_dist.storage.errors import classify, redact

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20
"""Longest silence of a store in the middle of an answer."""
CONNECTIONS = 32

_held: dict[int, dict[int, Any]] = {}
"""Filesystems by the process that made them. fsspec forgets its own after a fork, and a child that then collects its
parent's closes the sockets and the epoll that both share: the parent's next read would wait for its time-out."""


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec filesystem, path in it) of a URL; one filesystem, with its connections, per process and protocol."""
    protocol, colon, rest = url.partition("://")
    if not colon or (protocol == "file" and not rest.startswith("/")):
        local = Path(rest if colon else url).absolute()
        raise StorageError(f"{redact(url)}: not an absolute URL; write file://{local} or s3://bucket/folder")
    if protocol in ("s3a", "s3n"):
        raise StorageError(f"{redact(url)}: {protocol} is Hadoop's name for it; write s3://BUCKET/FOLDER")
    if protocol == "s3" and not re.fullmatch(r"[A-Za-z0-9][\w.:-]{1,254}(/.*)?", rest, re.DOTALL):
        raise StorageError(f"{redact(url)}: names no bucket; write s3://BUCKET/FOLDER")
    options = _s3_options() if protocol == "s3" else {}
    try:
        if protocol == "s3":
            options["session"] = sessions.session()
        fs, path = url_to_fs(url, **options)
    except ImportError as error:
        raise StorageError(f"{redact(url)}: {absent(error) or absent(error.__cause__) or error}") from None
    except (ValueError, OSError) as error:
        raise StorageError(f"{redact(url)}: {error}; write s3://BUCKET/FOLDER or file:///FOLDER") from None
    except Exception as error:  # botocore's, about the user's AWS configuration
        raise classify(error, url) from None
    if protocol == "s3":
        fs.retries = 1  # one layer retries: ours, which knows the patience and says what it does
        _held.setdefault(os.getpid(), {})[id(fs)] = fs
    return fs, path


def _s3_options() -> dict[str, Any]:
    endpoint = identity.endpoint()
    if endpoint is not None and "@" in endpoint:
        raise StorageError(
            "AWS_ENDPOINT_URL: holds user:password@; give them as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and "
            "write http://HOST:PORT or https://HOST"
        )
    return {
        "use_listings_cache": False,
        "endpoint_url": endpoint,
        "config_kwargs": {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "max_pool_connections": CONNECTIONS,
            "retries": {"max_attempts": 0},
        },
    }


def is_local(fs: Any) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, (tuple, list)) else (fs.protocol,))


def is_s3(fs: Any) -> bool:
    return "s3" in (fs.protocol if isinstance(fs.protocol, (tuple, list)) else (fs.protocol,))


def clear_instances() -> None:
    """Forgets cached filesystems, after a change of endpoint or credentials in this process."""
    _held.pop(os.getpid(), None)
    signing.forget()
    sessions.forget()
    for cls in list(fsspec.registry.values()):
        cls.clear_instance_cache()
