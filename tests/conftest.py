"""Fixtures of all tests: a real S3 server on loopback, and a fresh folder in its bucket."""

import importlib.util
import os
import signal
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # before torch is imported: the same sums on any number of cores

# How long an example takes is no property of the code, least of all on a busy machine.
hypothesis.settings.register_profile("without_deadline", deadline=None)
hypothesis.settings.load_profile("without_deadline")

# What tests start is to hear Ctrl-C also where a shell in the background had these tests ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    from tests.faulty_proxy import FaultyProxy
    from tools.local.s3_server import S3Server

# Servers and Ray are imported by whoever asks for them: the tests on a GPU run where there is neither.
if importlib.util.find_spec("ray") and importlib.util.find_spec("botocore"):
    from tests.ray_local import ray_cluster as ray_cluster, ray_nodes as ray_nodes


def pytest_configure(config: pytest.Config) -> None:
    """Tests compute on the CPU, also on a machine with GPUs, but for those that ask for one."""
    asked = "cuda" in str(config.getoption("-m")).replace("not cuda", "").split()
    if not asked or config.getoption("--device", "cuda") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"], os.environ["DS_ACCELERATOR"] = "", "cpu"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `-n auto`; each has a store and perhaps a Ray of its own."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 4)


@pytest.fixture(scope="session")
def s3_server() -> "Iterator[S3Server]":
    """A SeaweedFS with credentials of its own; `.kill()` and `.restart()` as a test likes, running again at its end."""
    from tools.local.s3_server import S3Server

    with S3Server() as server:
        yield server


@pytest.fixture
def bucket_url(s3_server: "S3Server", monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fresh `s3://bucket/prefix`, with the server's AWS_* in os.environ for this process and its children."""
    from ddpm_dist import storage

    if not s3_server.running:
        s3_server.restart()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    storage.clear_instances()
    yield f"s3://{s3_server.bucket}/{uuid.uuid4().hex[:12]}"
    storage.clear_instances()


@pytest.fixture
def faulty_proxy(s3_server: "S3Server", bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> "Iterator[FaultyProxy]":
    """A proxy before the S3 server, already this process's AWS_ENDPOINT_URL; faultless until told otherwise."""
    from ddpm_dist import storage
    from tests.faulty_proxy import FaultyProxy

    with FaultyProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        storage.clear_instances()
        yield proxy
