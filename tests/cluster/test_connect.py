"""The way into a Ray that isn't there, isn't Ray, or refuses: a message within seconds."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import ray

from ddpm_dist.cluster import connect
from ddpm_dist.errors import ClusterError
from tools.local.s3_server import free_port


def refusal(address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(connect, "KNOCK_S", 0.5)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # as another file's test may have left it
    began = time.monotonic()
    with pytest.raises(ClusterError) as caught:
        connect.connect_ray()
    assert time.monotonic() - began < 20
    return str(caught.value)


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    assert f"nobody listens at {address} (Connection refused)" in refusal(address, monkeypatch)
    assert "nobody listens at no-such-host.invalid:6379" in refusal("no-such-host.invalid:6379", monkeypatch)


@pytest.fixture
def dashboard() -> Iterator[str]:
    """HOST:PORT of a web server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[assignment]
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_the_dashboards_address_is_told_from_rays(dashboard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"a web server answers at {dashboard}" in refusal(dashboard, monkeypatch)
    assert "RAY_API_SERVER_ADDRESS" in refusal(f"http://{dashboard}", monkeypatch)


def test_who_listens_and_refuses_is_not_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the head does for a wrong token; Ray's own exception says only that it failed."""

    def refuse(**_: Any) -> None:
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t0ken" * 8)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        message = refusal(f"127.0.0.1:{server.getsockname()[1]}", monkeypatch)
    assert "refuses this process: its token (RAY_AUTH_TOKEN) or its version" in message
    assert "t0ken" not in message


def test_the_folder_of_another_user_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(**_: Any) -> None:
        raise PermissionError(13, "Permission denied", "/tmp/ray/session")

    monkeypatch.setattr(ray, "init", deny)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match=r"/tmp/ray/session belongs to another user .*RAY_TMPDIR"):
        connect.connect_ray()
