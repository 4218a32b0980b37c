"""Training states between devices, and the copy of a state against the step that follows it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_dist.engine.world import World
from ddpm_dist.state import writer
from tests.cuda.ranks import Ranks
from tests.cuda.small import Steps


def save(world: World, url: str) -> dict[Any, Tensor]:
    steps = Steps(world, f"run.url={url}", "precision=bf16", "zero.stage=2")
    store = steps.store()
    state = store.claim()
    first = store.load(state, steps.engine, steps.ema)["step"] if state is not None else 0
    before = _tensors(steps)
    for step in range(first, first + 2):
        steps.one(step)
    store.save(first + 2, steps.engine, steps.ema, {"step": first + 2})
    store.finish()
    return {"read": before, "written": _tensors(steps)}


def _tensors(steps: Steps) -> dict[str, Tensor]:
    found = {}
    for i, piece in enumerate(steps.engine.pieces()):
        kinds = {"weights": piece.weights, "exp_avg": piece.exp_avg, "exp_avg_sq": piece.exp_avg_sq}
        kinds |= {label: average[i] for label, average in steps.ema.averages.items()}
        found |= {f"{piece.name} {kind}": tensor.cpu().clone() for kind, tensor in kinds.items()}
    return found


def test_states_go_from_cpu_to_gpu_and_back(alone: Ranks, tmp_path: Path) -> None:
    cpu, url = Ranks("cpu"), f"file://{tmp_path}/run"
    try:
        (first,) = cpu(save, url)
        (second,) = alone(save, url)
        (third,) = cpu(save, url)
    finally:
        cpu.close()
    for earlier, later in ((first, second), (second, third)):
        assert earlier["written"].keys() == later["read"].keys()
        assert all(torch.equal(earlier["written"][name], later["read"][name]) for name in later["read"])


def copied_against_a_step(world: World) -> tuple[bool, bool]:
    """(whether the copy is of the values before the next step; whether the host went on while the device worked)."""
    size, kinds = 1 << 20, ("weights", "exp_avg", "exp_avg_sq", "ema")
    source = {kind: [torch.full((size,), float(i), device=world.device)] for i, kind in enumerate(kinds)}
    on_cuda = world.device.type == "cuda"
    buffer = torch.empty(size * len(kinds), pin_memory=on_cuda)
    awake = None
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda._sleep(500_000_000)  # a step that is still at work, for some quarter of a second
        awake = torch.cuda.Event()
        awake.record()
    copied = writer._copy_to_host(buffer, source)
    for tensors in source.values():
        tensors[0].fill_(-1.0)  # the next step
    went_on = awake is None or not awake.query()
    copied()
    return all(bool((part == float(i)).all()) for i, part in enumerate(buffer.split(size))), went_on


def test_the_copy_of_a_state_is_of_before_the_next_step_and_waits_for_nothing(alone: Ranks) -> None:
    alone(copied_against_a_step)  # what is made at first use
    ((right, went_on),) = alone(copied_against_a_step)
    assert right
    assert went_on


def saved_beside_a_step(world: World, url: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a state holds that was saved while the next step was already computed, and what was there then."""
    steps = Steps(world, f"run.url={url}", "precision=bf16")
    store = steps.store()
    store.claim()
    for step in range(2):
        steps.one(step)
    expected = _tensors(steps)
    if world.device.type == "cuda":
        torch.cuda._sleep(500_000_000)
    store.save(2, steps.engine, steps.ema, {"step": 2})
    for step in range(2, 4):
        steps.one(step)
    store.finish()
    again = Steps(world, f"run.url={url}", "precision=bf16")
    second = again.store()
    state = second.claim()
    assert state is not None
    second.load(state, again.engine, again.ema)
    return _tensors(again), expected


def test_a_state_saved_beside_the_next_step_holds_what_was_there(alone: Ranks, tmp_path: Path) -> None:
    ((read, expected),) = alone(saved_beside_a_step, f"file://{tmp_path}/run")
    assert all(torch.equal(read[name], expected[name]) for name in expected)
