"""The first contact with S3 after `preload`: no models are read any more, and nothing was remembered of the user."""

import os
import threading
from typing import Any

import botocore.loaders
import pytest

from ddpm_dist import storage
from ddpm_dist.errors import AccessError
from ddpm_dist.storage import sessions


def test_after_a_preload_the_first_contact_reads_no_models(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_spare", [])
    sessions._loader.cache_clear()
    threads = threading.active_count()
    storage.preload()
    assert threading.active_count() == threads, "who forks must have no threads"
    read: list[str] = []
    load = botocore.loaders.JSONFileLoader.load_file

    def recorded(self: Any, path: str) -> Any:
        read.append(path)
        return load(self, path)

    monkeypatch.setattr(botocore.loaders.JSONFileLoader, "load_file", recorded)
    storage.publish(f"{bucket_url}/a", b"x")
    assert storage.list_names(bucket_url) == ["a"]
    assert read == []
    storage.clear_instances()
    assert storage.read(f"{bucket_url}/a") == b"x"
    assert read == [], "nor does a second session"


def test_a_session_made_before_a_fork_takes_the_credentials_of_who_uses_it(
    bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "_spare", [])
    storage.preload()
    with monkeypatch.context() as other:
        other.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
        with pytest.raises(AccessError):
            storage.read(f"{bucket_url}/a")
    storage.clear_instances()
    storage.publish(f"{bucket_url}/a", b"x")


def test_a_fork_takes_no_session_that_its_parent_used(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = sessions.session()
    assert sessions.session() is ours
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert sessions.session() is not ours
    sessions.forget()
