"""States and the real engine: from any (stage, world) to any other, and through deaths bit for bit."""

import hashlib
import os
import signal
from typing import Any

import pytest
import torch

from ddpm_dist import storage
from ddpm_dist.engine.engine import Engine
from ddpm_dist.engine.world import World
from ddpm_dist.state.store import StateStore
from ddpm_dist.training.ema import Ema
from tests.engine import worker_group as group

SHAPES = [(stage, world) for stage in (0, 1, 2, 3) for world in (1, 2, 4)]
LR = 1e-3


def value(name: str, kind: str, offset: int, numel: int) -> torch.Tensor:
    """What stands in elements [offset, offset + numel) of a parameter: each element of each kind is different."""
    base = int(hashlib.sha256(f"{name} {kind}".encode()).hexdigest()[:4], 16)
    return (base + torch.arange(offset, offset + numel) / 4096).float()


def fields(engine: Engine, ema: Ema) -> list[tuple[str, str, int, torch.Tensor]]:
    found = []
    for i, piece in enumerate(engine.pieces()):
        kinds = {"weights": piece.weights, "exp_avg": piece.exp_avg, "exp_avg_sq": piece.exp_avg_sq}
        kinds |= {label: average[i] for label, average in ema.averages.items()}
        found += [(piece.name, kind, piece.offset, tensor) for kind, tensor in kinds.items()]
    return found


def write(world: World, url: str, stage: int) -> None:
    cfg = group.config(url, stage, ema={"power": [0.05]})
    engine = group.build(world, cfg)
    ema = Ema(engine.pieces(), cfg)
    for name, kind, offset, tensor in fields(engine, ema):
        tensor.copy_(value(name, kind, offset, tensor.numel()))
    engine.load_scalars({"optimizer_steps": 17, "loss_scaler": {}})
    store = StateStore(cfg, world)
    assert store.claim() is None
    store.save(17, engine, ema, {"step": 17})
    store.finish()


def read(world: World, urls: dict[Any, str], stage: int) -> dict[Any, Any]:
    """For each state: what differs from what was written, and the network's output."""
    x, _, t = group.global_batch(0)
    result = {}
    for key, url in urls.items():
        cfg = group.config(url, stage, ema={"power": [0.05]})
        engine = group.build(world, cfg)
        ema = Ema(engine.pieces(), cfg)
        store = StateStore(cfg, world)
        state = store.claim()
        assert state is not None
        meta = store.load(state, engine, ema)
        wrong = [
            f"{kind} of {name} from {offset}"
            for name, kind, offset, tensor in fields(engine, ema)
            if not torch.equal(tensor, value(name, kind, offset, tensor.numel()))
        ]
        with torch.no_grad():
            result[key] = (wrong, meta["step"], engine.scalars()["optimizer_steps"], engine(x, t))
        engine.close()
    return result


def check_reshape(tmp_path: Any, sources: list[tuple[int, int]], targets: list[tuple[int, int]]) -> None:
    for stage, size in sources:
        group.run_ranks(write, size, f"file://{tmp_path}/{stage}-{size}", stage)
    plain = group.TinyNet()
    plain.load_state_dict({n: value(n, "weights", 0, p.numel()).view(p.shape) for n, p in plain.named_parameters()})
    x, _, t = group.global_batch(0)
    with torch.no_grad():
        expected = plain(x, t)
    urls = {source: f"file://{tmp_path}/{source[0]}-{source[1]}" for source in sources}
    for stage, size in targets:
        for rank in group.run_ranks(read, size, urls, stage):
            for source, (wrong, step, optimizer_steps, output) in rank.items():
                assert (source, wrong) == (source, [])
                assert (step, optimizer_steps) == (17, 17)
                assert torch.equal(output, expected), source


def test_some_states_are_equal_element_by_element_at_other_stages_and_worlds(tmp_path: Any) -> None:
    check_reshape(tmp_path, [(0, 2), (1, 2), (3, 4)], [(3, 2), (1, 1), (0, 2), (2, 4)])


@pytest.mark.full
def test_each_stage_and_world_reads_the_states_of_each(tmp_path: Any) -> None:
    check_reshape(tmp_path, SHAPES, SHAPES)


# Through deaths


def train(world: World, url: str, stage: int, precision: str, accumulation: int, steps: int, die: Any) -> str | None:
    """Trains to `steps`, saving at every second; hash of all that was trained. die: (when, at which number)."""
    cfg = group.config(url, stage, precision, checkpoint={"keep_last": 2})
    engine = group.build(world, cfg, accumulation)
    ema = Ema(engine.pieces(), cfg)
    store = StateStore(cfg, world)
    if die is not None and die[0] == "write" and world.rank == world.size - 1:
        die_at_write(die[1])
    state = store.claim()
    first = store.load(state, engine, ema)["step"] if state is not None else 0
    for step in range(first, steps):
        if die is not None and die == ("step", step):
            os.kill(os.getpid(), signal.SIGKILL)
        group.backward(engine, step, poison=float("nan") if step == 3 else 1.0)
        if engine.step(LR).applied:
            ema.update(step, group.BATCH)
        if step % 2 == 1 or step == steps - 1:
            store.save(step + 1, engine, ema, {"step": step + 1})
    store.finish()
    digest = hashlib.sha256()
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        for name, tensor in group.whole(world, engine, kind).items():
            digest.update(name.encode() + tensor.numpy().tobytes())
    for tensor in ema.gather(world, engine.shapes).values():
        digest.update(tensor.numpy().tobytes())
    return f"{digest.hexdigest()} {engine.scalars()}"


def die_at_write(number: int) -> None:
    """SIGKILL in the middle of this process's write of that number to the store."""
    publish = storage.publish
    done = [0]

    def dying(*arguments: Any) -> None:
        done[0] += 1
        if done[0] == number + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        publish(*arguments)

    storage.publish = dying  # type: ignore[assignment]


ALL_MODES = [
    (stage, precision, accumulation)
    for stage, precision in [(0, "fp32"), *((s, p) for s in (1, 2, 3) for p in ("fp32", "bf16"))]
    for accumulation in (1, 2)
]
QUICK_MODES = [(0, "fp32", 1), (1, "bf16", 2), (3, "bf16", 1)]


@pytest.mark.parametrize(
    "mode", [mode if mode in QUICK_MODES else pytest.param(mode, marks=pytest.mark.full) for mode in ALL_MODES], ids=str
)
def test_a_run_that_is_killed_ends_with_the_bytes_of_one_that_is_not(mode: Any, tmp_path: Any) -> None:
    unbroken = group.run_ranks(train, 2, f"file://{tmp_path}/unbroken", *mode, 7, None)
    url = f"file://{tmp_path}/killed"
    for die in [("step", 3), ("step", 6)]:
        assert None in group.start_ranks(train, 2, url, *mode, 7, die), "one rank was killed"
    assert group.run_ranks(train, 2, url, *mode, 7, None) == unbroken


@pytest.mark.full
@pytest.mark.parametrize("write_number", range(8))
def test_a_process_killed_in_the_middle_of_any_write_loses_nothing(write_number: int, tmp_path: Any) -> None:
    mode = (1, "bf16", 1)
    unbroken = group.run_ranks(train, 2, f"file://{tmp_path}/unbroken", *mode, 7, None)
    url = f"file://{tmp_path}/killed"
    group.start_ranks(train, 2, url, *mode, 7, ("write", write_number))
    assert group.run_ranks(train, 2, url, *mode, 7, None) == unbroken


@pytest.mark.full
def test_two_one_four_two_ranks_stay_within_rounding(tmp_path: Any) -> None:
    """float32 without dropout, elastic: 2 -> 1 -> 4 -> 2 ranks, against an unbroken run of 2."""
    url = f"file://{tmp_path}/elastic"
    for size, steps in [(2, 2), (1, 4), (4, 6), (2, 8)]:
        elastic = group.run_ranks(weights_after, size, url, steps)[0]
    steady = group.run_ranks(weights_after, 2, f"file://{tmp_path}/steady", 8)[0]
    halves = group.run_ranks(weights_after, 1, f"file://{tmp_path}/halves", 8)[0]
    own = max(float((halves[name] - steady[name]).abs().max()) for name in steady)
    assert 0 < max(float((elastic[name] - steady[name]).abs().max()) for name in steady) <= 4 * own + 1e-6


def weights_after(world: World, url: str, steps: int) -> dict[str, torch.Tensor]:
    cfg = group.config(url, 1)
    engine = group.build(world, cfg)
    ema = Ema(engine.pieces(), cfg)
    store = StateStore(cfg, world)
    state = store.claim()
    first = store.load(state, engine, ema)["step"] if state is not None else 0
    for step in range(first, steps):
        group.backward(engine, step)
        engine.step(LR)
    store.save(steps, engine, ema, {"step": steps})
    store.finish()
    return group.whole(world, engine)
