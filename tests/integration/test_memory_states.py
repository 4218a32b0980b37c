"""Ranks that die and leave copies in memory: the bytes of an unbroken run, and no more steps lost than the key says.

The processes and their deaths are real; a test takes the place of the supervisors and holds the memory.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from ddpm_dist import storage
from ddpm_dist.cluster import memory as memories
from ddpm_dist.config import Config
from ddpm_dist.state import history
from ddpm_dist.training import run_folder
from ddpm_dist.training.entry import finished
from tests.integration import jobs, loop_ranks as loop
from tests.integration.loop_ranks import Faults

STEPS, EVERY = 8, 2


@pytest.fixture(scope="session")
def data_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = (tmp_path_factory.mktemp("digits") / "data").as_uri()
    jobs.make_digits(url)
    return url


class Holders:
    """The ranks' memory, and what all have in common."""

    def __init__(self, ranks: int) -> None:
        created = [memories.create() for _ in range(ranks)]
        self.descriptors = [one for one in created if one is not None]

    def faults(self, **faults: object) -> Faults:
        paths = tuple(f"/proc/{os.getpid()}/fd/{one}" for one in self.descriptors)
        return Faults(memory=paths, agreed=self.agreed(), **faults)  # type: ignore[arg-type]

    def agreed(self) -> int | None:
        held = [{step for step, _ in memories.whole(one).values()} for one in self.descriptors]
        return max(set.intersection(*held), default=None)

    def close(self) -> None:
        for one in self.descriptors:
            os.close(one)


@pytest.fixture
def holders() -> Iterator[list[Holders]]:
    made: list[Holders] = []
    yield made
    for one in made:
        one.close()


def cfg_of(run_url: str, data_url: str, *plan: str) -> Config:
    cfg = loop.config(run_url, data_url, f"train.steps={STEPS}", "checkpoint.every_steps=1000", *plan)
    finished(cfg, run_folder.new_token())
    return cfg


MODES = [
    (size, stage, precision)
    for size in (1, 2)
    for stage, precision in [(0, "fp32"), *((s, p) for s in (1, 2, 3) for p in ("fp32", "bf16"))]
]
DEATHS: list[tuple[dict[str, Any], set[int]]] = [
    ({"die": (0, 3, 0)}, {2}),
    ({"die_in_copy": (-1, 4, "half")}, {2}),
    ({"die_in_copy": (0, 6, "whole")}, {4}),
    ({"die_in_copy": (-1, 6, "committed")}, {4, 6}),
]
"""(how a rank dies: at backward pass 0 of step 3, in the copies of steps 4, 6 and 6; the step that all may have then:
its peer is ended at once, also in the middle of its copy)."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("mode", "deaths"),
    [((2, 1, "bf16"), DEATHS[1:2]), *(pytest.param(mode, DEATHS, marks=pytest.mark.full) for mode in MODES)],
    ids=lambda value: str(value) if isinstance(value, tuple) else str(len(value)),
)
def test_killed_in_a_step_in_a_copy_and_before_and_after_its_mark(
    mode: tuple[int, int, str], deaths: Any, data_url: str, bucket_url: str, holders: list[Holders]
) -> None:
    """The same attempt after attempt; the store gets what was whole, and is not read."""
    size, stage, precision = mode
    plan = (f"zero.stage={stage}", f"precision={precision}", f"cluster.workers={size}")
    run_url = f"{bucket_url}/run"
    cfg = cfg_of(run_url, data_url, *plan, f"checkpoint.memory_every_steps={EVERY}")
    memory = Holders(size)
    holders.append(memory)
    reached = 0
    for number, (death, agreed) in enumerate(deaths, 1):
        dying = {key: (value[0] % size, *value[1:]) for key, value in death.items()}
        assert None in loop.attempt(cfg, size, memory.faults(**dying)), f"{death}: a rank was killed"
        done = next(iter(death.values()))[1]
        newest = memory.agreed()
        assert newest in agreed
        assert done - newest <= EVERY, "no more steps are lost"
        states = [state for state in history.read(f"{run_url}/checkpoints")[1] if state.attempt == number]
        assert [state.step for state in states] in ([], [reached]), "what it went on from, if there was time for it"
        reached = newest
    end = loop.finish(cfg, size, memory.faults())
    assert end == loop.finish(loop.config(f"{bucket_url}/unbroken", data_url, *plan, f"train.steps={STEPS}"), size)


def test_the_store_is_not_read_where_memory_is_newer(data_url: str, bucket_url: str, holders: list[Holders]) -> None:
    """The state before is damaged in the store, which nobody notices."""
    cfg = cfg_of(f"{bucket_url}/run", data_url, "checkpoint.memory_every_steps=1", "checkpoint.every_steps=3",
                 "cluster.workers=1")  # fmt: skip
    memory = Holders(1)
    holders.append(memory)
    loop.attempt(cfg, 1, memory.faults(die=(0, 5, 0), die_after_state=3))
    (state,) = history.read(f"{cfg.run.url}/checkpoints")[1]
    assert state.step == 3
    assert memory.agreed() == 5
    storage.delete(f"{cfg.run.url}/checkpoints/{state}/00000-000.f32")
    end = loop.finish(cfg, 1, memory.faults())
    assert end == loop.finish(loop.config(f"{bucket_url}/unbroken", data_url, f"train.steps={STEPS}"), 1)
