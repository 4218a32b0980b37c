"""What S3's client reads before its first request (botocore's models of the service: 80 ms), read once.

A process that forks others calls `preload`; they find all of it in their memory. No connection, thread or credential is
made there: a session resolves those when it is first used, from the environment of the process that uses it.
"""

import os
from functools import cache
from typing import Any

_MODELS = ("service-2", "endpoint-rule-set-1", "paginators-1", "waiters-2")
_DATA = ("endpoints", "partitions", "sdk-default-configuration", "_retry")

_spare: list[Any] = []
"""A session that nobody has used yet."""
_sessions: dict[int, Any] = {}
"""The session of each process: what a parent resolved is not its child's."""


def session() -> Any:
    """This process's aiobotocore session; the same until `forget`."""
    found = _sessions.get(os.getpid())
    if found is None:
        found = _spare.pop() if _spare else _make()
        _sessions[os.getpid()] = found
    return found


def preload() -> None:
    """Makes the first contact of a process that is forked from this one cheaper."""
    import fsspec.implementations.chained  # noqa: F401 - what these import at their first use otherwise
    import s3fs  # noqa: F401

    for name in _MODELS:
        _loader().load_service_model("s3", name)
    for name in _DATA:
        _loader().load_data(name)
    if not _spare:
        _spare.append(_make())


def forget() -> None:
    """The environment's credentials are read anew."""
    _sessions.pop(os.getpid(), None)


def _make() -> Any:
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]

    made = AioSession()
    if made.get_config_variable("data_path") is None:  # else the user has models of their own
        made.register_component("data_loader", _loader())
    return made


@cache
def _loader() -> Any:
    """One for all sessions. What it gives out is not written to."""
    from botocore.loaders import JSONFileLoader, Loader

    files = JSONFileLoader()
    files.load_file = cache(files.load_file)
    return Loader(file_loader=files)
