"""A host of an elastic run loses its power, or its network, and comes back: no batch is lost, doubled or changed."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from ddpm_dist import storage
from ddpm_dist.data.loader import Loader
from ddpm_dist.recipe import parse_config
from ddpm_dist.state.history import latest_step
from tests.hosts.cluster import Job
from tests.hosts.conftest import BUCKET, Site
from tests.hosts.network import Host
from tests.hosts.train_recorded import record_of
from tests.integration import jobs

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(600)]
STEPS = 80
STATE_EVERY = 3
CUT_S = 20.0


@dataclass
class Attempt:
    """One group of workers, as its ranks recorded it."""

    world: int
    began: float
    keys: dict[int, dict[int, list[str]]]
    """{step: {rank: keys}}."""

    @property
    def first(self) -> int:
        return min(self.keys)

    def global_batches(self) -> Iterator[tuple[int, list[str]]]:
        """(step, keys of all ranks in their order) of the steps that all ranks took."""
        for step, ranks in self.keys.items():
            if len(ranks) == self.world:
                yield step, [key for rank in range(self.world) for key in ranks[rank]]


class ElasticRun:
    """A training of one or two workers, submitted from the desk."""

    def __init__(self, site: Site, name: str) -> None:
        self.site, self.url = site, f"s3://{BUCKET}/{name}"
        self.job: Job = site.ray.submit(
            {"launch/train.py": "tests/hosts/train_recorded.py", "configs/cifar10.yaml": "configs/digits.yaml",
             "BUCKET/runs/first": f"{BUCKET}/{name}", "BUCKET/cifar10": f"{BUCKET}/data", "[4,16]": "[1,2]"},
            [*jobs.SMALL, "cluster.gpus_per_worker=0", f"train.steps={STEPS}", "precision=fp32",
             f"checkpoint.every_steps={STATE_EVERY}", "logging.every_steps=100", "ema.warmup=false"],
        )  # fmt: skip

    @property
    def newest_state(self) -> int:
        return latest_step(self.url) or 0

    def until_state(self, step: int) -> None:
        self.job.until(lambda: self.newest_state >= step)

    def until_attempt(self, number: int, world: int) -> int:
        """Waits until an attempt has begun, which has to have so many workers; the newest state before that."""
        states = [self.newest_state]

        def begun() -> bool:
            state, there = self.newest_state, len(self.attempts()) > number
            if not there:
                states.append(state)
            return there

        self.job.until(begun)
        assert self.attempts()[number].world == world
        return states[-1]

    def host_of(self, rank: int) -> Host:
        """Where a rank of the newest attempt runs."""
        found = [(entry["time"], host) for host in self.site.workers for entry in self._entries(host)
                 if entry["rank"] == rank]  # fmt: skip
        return max(found, key=lambda pair: pair[0])[1]

    def attempts(self) -> list[Attempt]:
        """In the order in which they began."""
        found: dict[str, Attempt] = {}
        for host in self.site.workers:
            for entry in self._entries(host):
                attempt = found.setdefault(entry["group"], Attempt(entry["world"], entry["time"], {}))
                attempt.began = min(attempt.began, entry["time"])
                attempt.keys.setdefault(entry["step"], {})[entry["rank"]] = entry["keys"]
        return sorted(found.values(), key=lambda attempt: attempt.began)

    def _entries(self, host: Host) -> list[dict]:
        record = record_of(self.url, host.home)
        return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


def check_end(run: ElasticRun) -> None:
    """The run ends well; each global batch of each attempt is the planned one, and none is missing."""
    text = run.job.finish()
    assert f"finished at step {STEPS}" in text
    assert "Started training worker group of size 1" in text
    assert text.count("Started training worker group of size 2") == 2
    plan = Loader(parse_config(storage.read(f"{run.url}/config.yaml").decode()), rank=0, world=1)
    planned = [batch.keys for batch, _ in zip(plan.batches(0), range(STEPS), strict=False)]
    plan.close()
    taken = set()
    for attempt in run.attempts():
        for step, keys in attempt.global_batches():
            assert keys == planned[step], f"step {step} of {attempt.world} workers"
            taken.add(step)
    assert taken == set(range(STEPS))


def test_a_host_loses_power_and_comes_back(site: Site) -> None:
    run = ElasticRun(site, "power")
    run.until_state(STATE_EVERY)
    victim = run.host_of(rank=1)
    victim.power_cut()
    saved = run.until_attempt(1, world=1)
    assert run.attempts()[1].first >= saved >= STATE_EVERY  # what was lost is what no state had
    run.until_state(saved + STATE_EVERY)  # it goes on with the other host

    victim.boot()
    site.ray.add(victim)
    saved = run.until_attempt(2, world=2)
    assert run.attempts()[2].first >= saved
    check_end(run)


def test_a_host_is_cut_off_for_a_while(site: Site) -> None:
    """The host of rank 0, which writes manifests and lease: behind the cut, it is a zombie that comes back."""
    run = ElasticRun(site, "cut")
    run.until_state(STATE_EVERY)
    victim = run.host_of(rank=0)
    victim.cut()
    time.sleep(CUT_S)
    victim.heal()
    saved = run.until_attempt(1, world=1)
    assert run.attempts()[1].first >= saved >= STATE_EVERY
    run.until_state(saved + STATE_EVERY)

    run.job.until(lambda: "raylet" not in victim.programs())  # Ray ends on a node that it has given up
    site.ray.add(victim)
    saved = run.until_attempt(2, world=2)
    assert run.attempts()[2].first >= saved
    check_end(run)
