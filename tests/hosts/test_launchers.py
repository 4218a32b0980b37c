"""Both launchers on several hosts, by the commands of docs/cluster.md, end with the bytes of a run on one host."""

import shlex
from collections.abc import Mapping, Sequence

import pytest

from tests.hosts.cluster import Job, documented
from tests.hosts.conftest import BUCKET, Site
from tests.hosts.network import Host
from tests.integration import jobs

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(600)]
STEPS = 12
SETTINGS = [*jobs.SMALL, "cluster.workers=2", "cluster.gpus_per_worker=0", "precision=bf16", "zero.stage=1"]


def words(run: str) -> dict[str, str]:
    """What the commands of the page are given in the place of its own words."""
    return {"configs/cifar10.yaml": "configs/digits.yaml", "BUCKET/runs/first": f"{BUCKET}/{run}",
            "BUCKET/cifar10": f"{BUCKET}/data"}  # fmt: skip


def train_on_ray(site: Site, run: str, steps: int) -> str:
    return site.ray.submit({**words(run), "'[4,16]'": "2"}, [*SETTINGS, f"train.steps={steps}"]).finish()


class DeepSpeed:
    """DeepSpeed's launcher on a host, with the environment that the page asks for."""

    def __init__(self, site: Site) -> None:
        access = dict(site["head"].env)
        keys = {name: access.pop(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        self.secrets = list(keys.values())
        plain = "".join(f"{name}={value}\n" for name, value in {**access, "DS_ACCELERATOR": "cpu"}.items())
        credentials = "".join(f"{name.lower()} = {value}\n" for name, value in keys.items())
        for host in (site["head"], *site.workers):
            host.write(".deepspeed_env", plain)
            host.write(".aws/credentials", f"[default]\n{credentials}")
            host.write("hostfile", "".join(f"{worker.name} slots=1\n" for worker in site.workers))

    def start(self, host: Host, beginning: str, replaced: Mapping[str, str], overrides: Sequence[str]) -> Job:
        accelerator, command = documented("export DS_ACCELERATOR", {}), documented(beginning, replaced)
        return Job(host, f"{accelerator}; {command} {shlex.join([*SETTINGS, *overrides])}", host.disk / "deepspeed.log")


def test_ray_over_two_hosts_ends_with_the_bytes_of_one_host(site: Site, reference: str) -> None:
    text = train_on_ray(site, "ray", STEPS)
    assert f"finished at step {STEPS}" in text
    for worker in site.workers:
        assert f"ip={worker.address}" in text.partition("Started training worker group of size 2")[2]
    assert jobs.weights_sha256(f"s3://{BUCKET}/ray", STEPS) == reference


def test_a_hostfile_over_two_hosts_ends_with_the_bytes_of_one_host(site: Site, reference: str) -> None:
    launcher = DeepSpeed(site)
    hostfile = {**words("hostfile"), "HOSTFILE": "$HOME/hostfile"}
    text = launcher.start(
        site["head"], "deepspeed --hostfile HOSTFILE launch", hostfile, [f"train.steps={STEPS}"]
    ).finish()
    assert "worker-a: " in text
    assert "worker-b: " in text
    assert f"finished at step {STEPS}" in text
    assert not any(secret in text for secret in launcher.secrets)
    assert jobs.weights_sha256(f"s3://{BUCKET}/hostfile", STEPS) == reference


def test_begun_by_ray_and_continued_without_ssh_ends_with_the_same_bytes(site: Site, reference: str) -> None:
    train_on_ray(site, "mixed", STEPS // 2)
    launcher, first = DeepSpeed(site), site.workers[0]
    parts = [
        launcher.start(
            worker,
            "deepspeed --hostfile HOSTFILE --no_ssh",
            {**words("mixed"), "HOSTFILE": "$HOME/hostfile", "$RANK": str(rank), "NODE1_IP": first.address},
            [f"train.steps={STEPS}"],
        )
        for rank, worker in enumerate(site.workers)
    ]
    text = "".join(part.finish() for part in parts)
    assert f"continuing at step {STEPS // 2}" in text
    assert f"finished at step {STEPS}" in text
    assert jobs.weights_sha256(f"s3://{BUCKET}/mixed", STEPS) == reference


@pytest.fixture(scope="module")
def reference(site: Site) -> str:
    """SHA-256 of the weights that two processes on one host end with."""
    command = {**words("reference"), "--num_gpus 8": "--num_gpus 2"}
    text = DeepSpeed(site).start(site.workers[0], "deepspeed --num_gpus", command, [f"train.steps={STEPS}"]).finish()
    assert f"finished at step {STEPS}" in text
    return jobs.weights_sha256(f"s3://{BUCKET}/reference", STEPS)


@pytest.mark.parametrize("without", ["export RAY_AUTH_TOKEN_PATH=/nowhere", "export RAY_AUTH_MODE=disabled"])
def test_a_client_without_the_token_is_refused(site: Site, without: str) -> None:
    code, text = site["desk"].attempt(f"{site.ray.access}; {without}; ray job list")
    assert code != 0
    assert "token" in text.splitlines()[-1].lower()
    code, text = site["desk"].attempt(f"{site.ray.access}; ray job list")
    assert code == 0, text


def test_nobody_is_told_metrics(site: Site) -> None:
    """Ray gives them to whoever asks, without the token."""
    told = f"""from urllib.request import urlopen
for port in (44217, 44227):
    try: print(urlopen(f"http://{site["head"].address}:{{port}}/metrics", timeout=5).read())
    except OSError as error: print("closed:", error.reason.strerror)
"""
    assert site["desk"].run(f"python -c {shlex.quote(told)}").split("\n")[:2] == ["closed: Connection refused"] * 2
