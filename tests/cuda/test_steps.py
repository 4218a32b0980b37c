"""DeepSpeed's steps on a GPU: every stage and precision against a plain loop, and what becomes of a NaN."""

import copy
import math
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm_dist.config import Config
from ddpm_dist.engine.world import World
from tests.cuda.ranks import Ranks
from tests.cuda.small import Steps
from tests.engine import worker_group as group

LR, STEPS = 1e-3, 3
STAGES = [0, 1, 2, 3]
MODES = [(stage, p) for stage in STAGES for p in ("fp32", "bf16", "fp16") if stage or p == "fp32"]
NEAR = {"fp32": 2e-6, "bf16": 3e-2, "fp16": 4e-3}
"""Relative difference of a gradient from float32's, by the precision of the activations."""


def config(stage: int, precision: str, **sections: dict[str, Any]) -> Config:
    """fp16 is refused where no GPU is asked for."""
    return group.config(stage=stage, precision=precision, cluster={"gpus_per_worker": 1}, **sections)


def train(world: World, stage: int, precision: str, accumulation: int) -> dict[str, Any]:
    cfg = config(stage, precision, train={"grad_clip": 1e9})
    engine = group.build(world, cfg, accumulation)
    norms, first = [], {}
    applied = 0
    while applied < STEPS:
        group.backward(engine, applied)
        report = engine.step(LR)
        if report.applied:
            norms.append(report.grad_norm)
            first = first or {name: m / 0.1 for name, m in group.whole(world, engine, "exp_avg").items()}
            applied += 1
        else:
            assert precision == "fp16", "its scale begins too high"
    return {"norms": norms, "gradient": first, "weights": group.whole(world, engine), "scalars": engine.scalars()}


def plain() -> dict[str, Any]:
    """torch.optim.Adam in float32 on the CPU."""
    network = group.TinyNet()
    adam = torch.optim.Adam(network.parameters(), lr=LR)
    norms, first = [], {}
    for step in range(STEPS):
        x, target, t = group.global_batch(step)
        adam.zero_grad()
        (network(x, t) - target).square().mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(network.parameters(), 1e9)))
        first = first or {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        adam.step()
    return {"norms": norms, "gradient": first, "weights": dict(network.named_parameters())}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative L2 over all parameters."""
    difference = torch.cat([(a[name].double() - b[name].double()).flatten() for name in b]).detach()
    return float(difference.norm() / torch.cat([b[name].double().flatten() for name in b]).detach().norm())


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(("stage", "precision"), MODES)
def test_steps_are_those_of_a_plain_loop(alone: Ranks, stage: int, precision: str, accumulation: int) -> None:
    (found,) = alone(train, stage, precision, accumulation)
    expected = plain()
    near = NEAR[precision]
    assert found["norms"] == pytest.approx(expected["norms"], rel=2 * near)
    assert distance(found["gradient"], expected["gradient"]) < near
    start = dict(group.TinyNet().named_parameters())
    moved = {name: found["weights"][name] - start[name] for name in start}
    wanted = {name: expected["weights"][name] - start[name] for name in start}
    # Adam's first steps are of the gradient's sign: a tiny one that turns moves its weight by a whole step.
    assert distance(moved, wanted) < {"fp32": 0.02, "bf16": 0.6, "fp16": 0.2}[precision]
    assert found["scalars"]["optimizer_steps"] == STEPS


def skip_a_step(world: World, stage: int, precision: str, poison: float) -> dict[str, Any]:
    """Good steps, with and without a poisoned one among them."""
    found: dict[str, Any] = {}
    for label, plan in {"clean": (0, 1), "poisoned": (0, -1, 1)}.items():
        engine = group.build(world, config(stage, precision), 2)
        if precision == "fp16":  # a scale that fits, so that nothing else is left out
            vars(engine._scaler()).update({"cur_scale": 8.0})
        reports = []
        for step in plan:
            before = group.tensors_of(engine)
            group.backward(engine, step % 7, poison if step < 0 else 1.0)
            reports.append(engine.step(LR))
            if step < 0:
                after = group.tensors_of(engine)
                found["untouched"] = all(torch.equal(before[key], after[key]) for key in before)
                if precision == "fp16":
                    vars(engine._scaler()).update({"cur_scale": 8.0})
        found[label], found[f"{label}_reports"] = group.tensors_of(engine), reports
    return found


@pytest.mark.parametrize(("stage", "precision"), MODES)
def test_a_gradient_that_is_not_finite_leaves_no_trace(alone: Ranks, stage: int, precision: str) -> None:
    (found,) = alone(skip_a_step, stage, precision, math.nan)
    skipped = found["poisoned_reports"].pop(1)
    assert not skipped.applied
    assert not math.isfinite(skipped.grad_norm)
    assert found["untouched"]
    assert [r.grad_norm for r in found["poisoned_reports"]] == [r.grad_norm for r in found["clean_reports"]]
    assert all(torch.equal(found["clean"][key], found["poisoned"][key]) for key in found["clean"])


def offloaded(world: World, stage: int) -> list[float]:
    cfg = config(stage, "bf16", zero={"offload_optimizer": True})
    engine = group.build(world, cfg)
    assert all(piece.weights.device.type == "cpu" for piece in engine.pieces())
    reports = []
    for step in range(3):
        group.backward(engine, step, math.nan if step == 1 else 1.0)
        reports.append(engine.step(LR).grad_norm)
    return reports


@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeedCPUAdam is C++, and there is no g++")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_moments_in_host_memory(alone: Ranks, stage: int) -> None:
    (norms,) = alone(offloaded, stage)
    assert [math.isfinite(norm) for norm in norms] == [True, False, True]


def scaler(world: World, stage: int) -> dict[str, Any]:
    """fp16's scale through a resume: after the same steps, the same as without."""
    engines = [group.build(world, config(stage, "fp16")) for _ in range(2)]
    for step in range(4):
        group.backward(engines[0], step)
        engines[0].step(LR)
    with torch.no_grad():
        for ours, theirs in zip(engines[1].pieces(), engines[0].pieces(), strict=True):
            for kind in ("weights", "exp_avg", "exp_avg_sq"):
                getattr(ours, kind).copy_(getattr(theirs, kind))
    engines[1].load_scalars(copy.deepcopy(engines[0].scalars()))
    engines[1].sync_weights()
    for engine in engines:
        for step in range(4, 9):
            group.backward(engine, step, math.nan if step == 6 else 1.0)
            engine.step(LR)
    return {"scalars": [engine.scalars() for engine in engines], "tensors": [group.tensors_of(e) for e in engines]}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_s_scale_goes_on_through_a_resume(alone: Ranks, stage: int) -> None:
    (found,) = alone(scaler, stage)
    assert found["scalars"][0] == found["scalars"][1]
    assert found["scalars"][0]["loss_scaler"]["last_overflow_iter"] >= 6, "a step was left out behind the resume"
    one, other = found["tensors"]
    assert all(torch.equal(one[key], other[key]) for key in one)


def waits(world: World, stage: int, precision: str) -> list[str]:
    """Where a step waits for its device, by torch's own watch; the norm's decision apart."""
    import traceback
    import warnings

    steps = Steps(world, f"zero.stage={stage}", f"precision={precision}", "diffusion.t_sampling=stratified")
    for step in range(2):
        steps.one(step)
    if world.device.type != "cuda":
        return []
    found: list[str] = []

    def note(*arguments: Any, **_: Any) -> None:
        frames = [f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in traceback.extract_stack()[:-1]]
        found.append(" < ".join(reversed(frames[-6:])))

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            steps.one(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return found


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_a_step_waits_for_its_device_once(alone: Ranks, stage: int, precision: str) -> None:
    (found,) = alone(waits, stage, precision)
    assert len(found) <= 1, "\n".join(found)


def at_the_lowest_scale(world: World, stage: int) -> list[tuple[bool, float]]:
    """(applied, scale) of steps whose gradient is never finite, from a scale that can't be halved on."""
    engine = group.build(world, config(stage, "fp16"))
    vars(engine._scaler()).update({"cur_scale": 2.0, "cur_hysteresis": 1})
    found = []
    for step in range(3):
        group.backward(engine, step, math.nan)
        report = engine.step(LR)
        found.append((report.applied, report.loss_scale))
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_s_lowest_scale_ends_no_process(alone: Ranks, stage: int) -> None:
    (found,) = alone(at_the_lowest_scale, stage)
    assert found == [(False, 2.0), (False, 1.0), (False, 1.0)]
