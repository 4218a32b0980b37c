"""Failures as events: beside the closed form, by hand, and the targets that we hold ourselves to."""

from dataclasses import replace

import pytest

from ddpm_dist.planning import Setting, card_named, count, plan_of, scenario_of, simulate
from ddpm_dist.planning.checkpoint import Saving, goodput
from ddpm_dist.planning.failures import values
from ddpm_dist.planning.simulation import Scenario
from ddpm_dist.recipe import load_config

PROCESSES_ONLY = {"process_share": 1.0, "per_doubling": 0.0, "process_restart": 60.0}


@pytest.mark.parametrize("interval", [60.0, 600.0, 3000.0])
def test_it_agrees_with_dalys_closed_form(interval: float) -> None:
    cost = Saving(2.0, 30.0)
    scenario = Scenario(64, 8, 64, interval, cost, 0.0, 7200.0, values(**PROCESSES_ONLY))
    expected = goodput(interval, cost, 60.0, 7200.0)
    assert simulate(scenario, days=2000, seed=1).goodput == pytest.approx(expected, rel=0.01)


def test_the_same_seed_is_the_same_month_and_another_is_another() -> None:
    scenario = Scenario(64, 8, 64, 600.0, Saving(2.0, 30.0), 10.0, 7200.0)
    assert simulate(scenario, 30, seed=3) == simulate(scenario, 30, seed=3)
    assert simulate(scenario, 30, seed=3) != simulate(scenario, 30, seed=4)


def test_the_shares_are_the_whole_time() -> None:
    for changed in ({}, {"spares": 0.0}, {"spares": 0.0, "process_share": 0.0, "repair": 86400.0}):
        found = simulate(Scenario(64, 8, 64, 300.0, Saving(2.0, 30.0), 10.0, 3600.0, values(**changed)), 60, seed=5)
        whole = found.goodput + found.saving + found.lost + found.restarting + found.slower
        assert whole == pytest.approx(1.0, abs=2e-3)


def test_without_spares_the_run_goes_on_with_as_many_as_divide_the_batch() -> None:
    """Every failure takes a node for ever: 8 nodes, a batch of 8, one GPU a node. 7, 6 and 5 don't divide 8: half."""
    gone = {"spares": 0.0, "process_share": 0.0, "repair": 1e12, "per_doubling": 0.0}
    scenario = Scenario(8, 8, 8, 1.0, Saving(0.0, 0.0), 0.0, 1e6, values(**gone))
    found = simulate(scenario, days=60, seed=0)
    assert found.failures >= 2
    assert 0.25 < found.slower / (found.slower + found.goodput) <= 0.5


def test_all_nodes_gone_is_waiting_not_an_error() -> None:
    scenario = Scenario(
        1, 1, 1, 10.0, Saving(0.0, 0.0), 0.0, 100.0, values(spares=0.0, process_share=0.0, repair=1000.0)
    )
    found = simulate(scenario, days=5, seed=0)
    assert found.goodput == pytest.approx(0.08, abs=0.03)
    assert found.restarting > 0.8


TARGETS = [(64, 7.9 * 16, 0.99), (1024, 7.9, 0.97), (16384, 1.8, 0.95)]
"""(GPUs, hours between failures, least goodput)."""


@pytest.mark.parametrize(("gpus", "hours", "least"), TARGETS)
def test_the_targets_hold_with_our_constants(gpus: int, hours: float, least: float) -> None:
    """LSUN at 256 pixels, 4 images a GPU, 50 GB/s between nodes and 1 GB/s to the store, at the best interval."""
    batch = f"train.global_batch={4 * gpus}"
    cfg = load_config("lsun256", ["run.url=file:///r", "data.url=file:///d", batch, f"cluster.workers={gpus}"])
    plan = plan_of(cfg, Setting(gpus, gpus // 8, card_named("h100"), 50e9), 1e9, hours, count(cfg))
    assert plan.best_goodput >= least
    scenario = scenario_of(plan, plan.best_s, {})
    assert min(simulate(scenario, 30, seed).goodput for seed in range(3)) >= least
    worse = simulate(replace(scenario, mtbf_s=scenario.mtbf_s / 4), 30, 0).goodput
    assert worse < simulate(scenario, 30, 0).goodput
