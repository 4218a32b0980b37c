"""What tests of evaluations share."""

from pathlib import Path

import pytest

from ddpm_dist.config import ClusterConfig
from ddpm_dist.evaluation import follow as following
from ddpm_dist.evaluation.order import Order
from tests.evaluation.tiny import PIXEL, evaluate, make_set, pictures, publish_snapshot, run_config


@pytest.fixture
def sets(tmp_path: Path) -> tuple[str, str]:
    """(samples, data) without a manifest: 3-channel pixels when evaluated."""
    return make_set(f"file://{tmp_path}/samples", pictures(130, 1)), make_set(
        f"file://{tmp_path}/data", pictures(201, 2)
    )


@pytest.fixture
def followed(sets: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """(configuration, order, function that follows and returns the steps it evaluated) of a run with 20 and 30."""
    run, evaluated = f"file://{tmp_path}/run", list[int]()
    cfg = run_config(run, sets[1])
    for step in (20, 30):
        publish_snapshot(run, step)

    def in_process(one: Order, workers: tuple[int, int], cluster: ClusterConfig) -> dict[str, object]:
        found = evaluate(one)
        evaluated.append(int(str(one.snapshot)[-9:]))
        return found

    def follow(order: Order, quiet_s: float = 60) -> list[int]:
        evaluated.clear()
        following.follow(cfg, order, (1, 2), poll_s=0.01, quiet_s=quiet_s)
        return list(evaluated)

    monkeypatch.setattr(following.job, "run", in_process)
    return cfg, Order(data=sets[1], metrics=PIXEL, num_samples=16, sampling=cfg.sampling), follow
