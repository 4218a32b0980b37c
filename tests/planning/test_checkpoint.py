"""States and intervals: closed forms, a search for the best, and a state that is really saved."""

import math
from pathlib import Path

import pytest
from scipy.optimize import minimize_scalar

from ddpm_dist import snapshot, storage
from ddpm_dist.engine import Engine, init_world
from ddpm_dist.planning.checkpoint import Saving, best_interval, daly, goodput, saving, state_bytes, young
from ddpm_dist.planning.failures import CONSTANTS, hours_between_failures
from ddpm_dist.recipe import load_config
from ddpm_dist.state import StateStore
from ddpm_dist.training.ema import Ema


@pytest.mark.parametrize("power", ["[]", "[0.05, 0.1]"])
def test_a_state_weighs_what_is_said(tmp_path: Path, power: str) -> None:
    """Its files, whole, are the formula's bytes; its tables come to less than a hundredth here."""
    urls = [f"run.url={(tmp_path / 'run').as_uri()}", "data.url=file:///data", f"ema.power={power}", "precision=fp32"]
    cfg = load_config("digits", [*urls, "zero.stage=0"])
    world = init_world()
    engine = Engine(snapshot.build(cfg)[0], cfg, world, 1, 1)
    store = StateStore(cfg, world)
    store.claim()
    store.save(1, engine, Ema(engine.pieces(), cfg), {"step": 1})
    store.finish()
    sizes = storage.list_objects(f"{cfg.run.url}/checkpoints")
    tensors = sum(size for name, size in sizes.items() if name.endswith(".f32"))
    parameters = sum(shape.numel() for shape in engine.shapes.values())
    assert tensors == state_bytes(parameters, 1 + len(cfg.ema.power))
    assert sum(sizes.values()) < 1.02 * tensors


def test_young_and_daly() -> None:
    assert young(10, 2000) == 200
    # Daly 2006: δ = 5 min, M = 24 h. sqrt(2 δ M) = 120 min; corrections by hand.
    half = 5 / (2 * 24 * 60)
    assert daly(5 * 60, 86400) / 60 == pytest.approx(120 * (1 + math.sqrt(half) / 3 + half / 9) - 5)
    assert daly(100, 40) == 40


@pytest.mark.parametrize(("stall", "mtbf"), [(0.01, 6480), (5, 6480), (60, 28440), (300, 86400)])
def test_dalys_interval_is_the_best_of_the_goodput(stall: float, mtbf: float) -> None:
    cost = Saving(stall, 0.0)
    best = minimize_scalar(
        lambda log: -goodput(math.exp(log), cost, 60, mtbf), bounds=(-5, 15), method="bounded", options={"xatol": 1e-9}
    )
    found = daly(stall, mtbf)
    assert goodput(found, cost, 60, mtbf) == pytest.approx(-best.fun, rel=2e-4)
    assert best_interval(Saving(stall, 1e5), mtbf, 1.0) == 1e5, "not before the last one is published"


def test_goodput_at_its_ends() -> None:
    quiet = Saving(1.0, 0.0)
    assert goodput(99, quiet, 60, 1e12) == pytest.approx(0.99)
    assert goodput(1e6, quiet, 60, 1000) == pytest.approx(0, abs=1e-9)
    assert goodput(1e6, Saving(0, 0), 0, 1.0) == 0.0
    # Without saves' cost: a first-order loss of (interval / 2 + restart + background) / M.
    assert 1 - goodput(100, Saving(0, 30), 60, 1e6) == pytest.approx((50 + 90) / 1e6, rel=1e-3)


def test_a_save_costs_what_its_bytes_take() -> None:
    cost = saving(10**9, 1, ranks=64, nodes=8, store=1e9, step_s=1.0, part_s=0.005)
    assert cost.background_s == pytest.approx(16e9 / 8 / 1e9 + 63 * 0.005)
    assert cost.stall_s == pytest.approx(0.021 + 16e9 / 64 / 20e9)
    many = saving(10**9, 1, ranks=16384, nodes=2048, store=1e9, step_s=1.0, part_s=0.005)
    assert many.background_s == pytest.approx(16e9 / 2048 / 1e9 + (127 + 127) * 0.005)


def test_hours_between_failures_go_through_the_published_points() -> None:
    assert hours_between_failures(1024) == pytest.approx(7.9)
    assert hours_between_failures(16384) == pytest.approx(1.8)
    assert hours_between_failures(64) == pytest.approx(7.9 * 16)
    assert 1.8 < hours_between_failures(4096) < 7.9
    assert hours_between_failures(32768) == pytest.approx(0.9)
    assert all(constant.source for constant in CONSTANTS.values())
