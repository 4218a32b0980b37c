"""Fixtures of the tests on several hosts: they run, or they fail; they are never skipped."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from ddpm_dist import storage
from tests.hosts.cluster import RayHosts, start_store
from tests.hosts.network import Host, Network, missing
from tests.integration import jobs

BUCKET = "ddpm"
CANT_RUN = 3
"""Exit code of pytest where hosts can't be made."""


@dataclass
class Site:
    """A head, two workers, the store, and a desk from which jobs are submitted."""

    network: Network
    ray: RayHosts
    data_url: str

    def __getitem__(self, name: str) -> Host:
        return self.network.hosts[name]

    @property
    def workers(self) -> tuple[Host, Host]:
        return self["worker-a"], self["worker-b"]


def need_hosts() -> None:
    """Ends the tests, with an exit code that isn't 0, where hosts can't be made."""
    lacking = missing()
    if lacking:
        pytest.exit(f"*** THE TESTS ON SEVERAL HOSTS CAN'T RUN HERE: missing {', '.join(lacking)} ***", CANT_RUN)


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    """The hosts with everything running and the digits in the bucket; this process's AWS_* lead to it."""
    need_hosts()
    with pytest.MonkeyPatch.context() as patch, Network(("head", "worker-a", "worker-b", "store", "desk")) as network:
        hosts = network.hosts
        access = start_store(hosts["store"])
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in access.items():
            patch.setenv(name, value)
        storage.clear_instances()
        for name in ("head", "worker-a", "worker-b"):
            hosts[name].env = access
        data_url = f"s3://{BUCKET}/data"
        jobs.make_digits(data_url)
        ray = RayHosts(network, hosts["head"], (hosts["worker-a"], hosts["worker-b"]), hosts["desk"])
        yield Site(network, ray, data_url)
        storage.clear_instances()
