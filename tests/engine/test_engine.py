"""The engine against a plain PyTorch loop, and what it assumes of DeepSpeed."""

import copy
import gc
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm_dist.engine import checks
from ddpm_dist.engine.checks import check
from ddpm_dist.engine.engine import Engine
from ddpm_dist.engine.world import World, gather_objects
from ddpm_dist.errors import ConfigError
from ddpm_dist.state.cut import cut_of
from ddpm_dist.training.ema import Ema
from tests.engine import worker_group as group

STAGES = (0, 1, 2, 3)
MODES = [(0, "fp32"), *((stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16"))]
STEPS = 10
LR = 1e-3
DECAY = 0.9


# What ranks do


def train(world: World, stage: int, precision: str, accumulation: int, steps: int = STEPS) -> dict[str, Any]:
    cfg = group.config(stage=stage, precision=precision)
    engine = group.build(world, cfg, accumulation)
    ema = Ema(engine.pieces(), cfg)
    start = group.whole(world, engine)
    norms, first_moment = [], {}
    for step in range(steps):
        group.backward(engine, step)
        norms.append(engine.step(LR).grad_norm)
        ema.update(step, group.BATCH)
        if step == 0:
            first_moment = group.whole(world, engine, "exp_avg")
    x, _, t = group.global_batch(99)
    with torch.no_grad():
        output = engine(x, t)
    return {
        "start": start,
        "norms": norms,
        "first_gradient": {name: moment / 0.1 for name, moment in first_moment.items()},
        "weights": group.whole(world, engine),
        "exp_avg_sq": group.whole(world, engine, "exp_avg_sq"),
        "ema": ema.gather(world, engine.shapes),
        "output": output,
        "scalars": engine.scalars(),
        "optimizer": type(engine._ds.optimizer).__name__,
        "addresses": gather_objects(world, [piece.address for piece in engine.pieces()]),
        "cut": [cut_of(stage, world.size, engine.shapes).pieces(rank) for rank in range(world.size)],
    }


def skip_a_step(world: World, stage: int, precision: str, poison: float) -> dict[str, Any]:
    """Three good steps, with and without a poisoned one among them."""
    found = {}
    for label, plan in {"clean": (0, 1, 2), "poisoned": (0, -1, 1, 2)}.items():
        engine = group.build(world, group.config(stage=stage, precision=precision), 2)
        reports = []
        for step in plan:
            before, scalars = group.tensors_of(engine), engine.scalars()
            if step < 0:
                group.backward(engine, 7, poison, poisoned_rank=world.size - 1)
                reports.append(engine.step(LR))
                after = group.tensors_of(engine)
                found["untouched"] = all(torch.equal(before[key], after[key]) for key in before)
                found["scalars_untouched"] = engine.scalars() == scalars
            else:
                group.backward(engine, step)
                reports.append(engine.step(LR))
        found[label] = group.tensors_of(engine)
        found[f"{label}_reports"] = reports
    return found


def rewrite_pieces(world: World, stage: int, precision: str) -> tuple[Tensor, Tensor]:
    """The network's output after its pieces were written, and that of a plain network with those weights."""
    engine = group.build(world, group.config(stage=stage, precision=precision))
    with torch.no_grad():
        for piece in engine.pieces():
            piece.weights.copy_(values_of(piece.name, piece.shape).view(-1)[piece.offset : piece.offset + piece.numel])
    engine.sync_weights()
    plain = group.TinyNet()
    plain.load_state_dict({name: values_of(name, p.shape) for name, p in plain.named_parameters()})
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    x, _, t = group.global_batch(0)
    with torch.no_grad():
        return engine(x, t), plain.to(dtype)(x.to(dtype), t).float()


def values_of(name: str, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
    return 0.2 * torch.randn(shape, generator=generator)


def accumulate(world: World, stage: int, accumulation: int) -> dict[str, Tensor]:
    """The gradient of one step in bf16, unclipped."""
    engine = group.build(world, group.config(stage=stage, precision="bf16", train={"grad_clip": 1e9}), accumulation)
    group.backward(engine, 0)
    engine.step(LR)
    return {name: moment / 0.1 for name, moment in group.whole(world, engine, "exp_avg").items()}


def clipped_norm(world: World, stage: int, clip: float) -> tuple[float, float]:
    """(norm of the gradient, norm of what Adam got) in one step."""
    engine = group.build(world, group.config(stage=stage, train={"grad_clip": clip}))
    group.backward(engine, 0)
    norm = engine.step(LR).grad_norm
    first = group.whole(world, engine, "exp_avg").values()
    return norm, float(torch.cat([moment.flatten() for moment in first]).norm()) / 0.1


# The references


def plain_loop(cuts: int) -> dict[str, Any]:
    """torch.optim.Adam in float32 on the global batch, cut in `cuts` parts; the average in float64."""
    network = group.TinyNet()
    adam = torch.optim.Adam(network.parameters(), lr=LR)
    average = {name: p.detach().double() for name, p in network.named_parameters()}
    norms, first = [], {}
    for step in range(STEPS):
        x, target, t = group.global_batch(step)
        adam.zero_grad()
        for part in torch.arange(group.BATCH).chunk(cuts):
            loss = (network(x[part], t[part]) - target[part]).square().mean() / cuts
            loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(network.parameters(), 1.0)))
        if step == 0:
            first = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        adam.step()
        average = {n: DECAY * average[n] + (1 - DECAY) * p.detach().double() for n, p in network.named_parameters()}
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    moments = {name: adam.state[p]["exp_avg_sq"].clone() for name, p in network.named_parameters()}
    return {"weights": weights, "exp_avg_sq": moments, "ema": average, "norms": norms, "first_gradient": first}


@pytest.fixture(scope="module")
def whole_batch() -> dict[str, Any]:
    return plain_loop(1)


@pytest.fixture(scope="module")
def two_halves() -> dict[str, Any]:
    return plain_loop(2)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative L2 over all parameters."""
    difference = torch.cat([(a[name].double() - b[name].double()).flatten() for name in b]).detach()
    return float(difference.norm() / torch.cat([b[name].double().flatten() for name in b]).detach().norm())


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_is_the_plain_loop(stage: int, whole_batch: dict[str, Any]) -> None:
    (ours,) = group.run_ranks(train, 1, stage, "fp32", 1)
    assert ours["norms"] == pytest.approx(whole_batch["norms"], rel=1e-6)
    for kind in ("first_gradient", "weights", "ema"):
        assert distance(ours[kind], whole_batch[kind]) < 1e-6, kind
    assert distance(ours["exp_avg_sq"], whole_batch["exp_avg_sq"]) < 4e-6, "twice the gradients' own difference"
    assert ours["scalars"]["optimizer_steps"] == STEPS


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("size", "accumulation"), [(2, 1), (2, 2), (1, 2)])
def test_cut_batches_are_the_plain_loop_up_to_summation_order(
    stage: int, size: int, accumulation: int, whole_batch: dict[str, Any], two_halves: dict[str, Any]
) -> None:
    ranks = group.run_ranks(train, size, stage, "fp32", accumulation)
    assert distance(ranks[0]["first_gradient"], whole_batch["first_gradient"]) < 1e-5
    for kind in ("weights", "ema"):
        own = distance(two_halves[kind], whole_batch[kind])
        assert distance(ranks[0][kind], whole_batch[kind]) <= 2 * own + 1e-7, kind
    for name, tensor in ranks[0]["weights"].items():
        assert all(torch.equal(tensor, rank["weights"][name]) for rank in ranks)


OPTIMIZERS = {
    (0, "fp32"): "Adam",
    (1, "fp32"): "DeepSpeedZeroOptimizer",
    (1, "bf16"): "BF16_Optimizer",
    (2, "fp32"): "DeepSpeedZeroOptimizer",
    (2, "bf16"): "DeepSpeedZeroOptimizer",
    (3, "fp32"): "DeepSpeedZeroOptimizer_Stage3",
    (3, "bf16"): "DeepSpeedZeroOptimizer_Stage3",
}


@pytest.fixture(scope="module", params=MODES, ids=lambda mode: f"zero{mode[0]}-{mode[1]}")
def trained(request: pytest.FixtureRequest) -> tuple[tuple[int, str], list[dict[str, Any]]]:
    """(mode, what two ranks found after three steps of two micro-batches)."""
    return request.param, group.run_ranks(train, 2, *request.param, 2, 3)


def test_pieces_partition_every_parameter(trained: Any) -> None:
    (mode, ranks) = trained
    assert ranks[0]["optimizer"] == OPTIMIZERS[mode], "the layouts know these classes of DeepSpeed's"
    for name, parameter in group.TinyNet().named_parameters():
        owned = torch.zeros(parameter.numel())
        for addresses in ranks[0]["addresses"]:
            for piece, offset, numel in addresses:
                owned[offset : offset + numel] += piece == name
        assert owned.eq(1).all(), name
    assert ranks[0]["addresses"] == ranks[0]["cut"], "by the rule that training states rest on"
    assert ranks[0]["norms"] == ranks[1]["norms"]


def test_masters_start_as_the_unrounded_weights(trained: Any) -> None:
    for rank in trained[1]:
        for name, parameter in group.TinyNet().named_parameters():
            assert torch.equal(rank["start"][name], parameter), name


def test_the_network_computes_with_the_rounded_masters(trained: Any) -> None:
    ((_, precision), ranks) = trained
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    network = group.TinyNet().to(dtype)
    network.load_state_dict({name: weights.to(dtype) for name, weights in ranks[0]["weights"].items()})
    x, _, t = group.global_batch(99)
    with torch.no_grad():
        expected = network(x.to(dtype), t).float()
    for rank in ranks:
        assert rank["output"].dtype == torch.float32
        assert torch.equal(rank["output"], expected)


@pytest.mark.parametrize(("stage", "precision"), MODES)
def test_writing_pieces_and_syncing_changes_what_the_network_computes(stage: int, precision: str) -> None:
    for ours, plain in group.run_ranks(rewrite_pieces, 2, stage, precision):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize(("stage", "precision"), MODES)
@pytest.mark.parametrize("poison", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.full)])
def test_a_gradient_that_is_not_finite_leaves_no_trace(stage: int, precision: str, poison: float) -> None:
    for rank in group.run_ranks(skip_a_step, 2, stage, precision, poison):
        skipped = rank["poisoned_reports"].pop(1)
        assert not skipped.applied
        assert skipped.grad_norm != skipped.grad_norm or skipped.grad_norm == float("inf")
        assert rank["untouched"]
        assert rank["scalars_untouched"]
        assert rank["poisoned_reports"] == rank["clean_reports"]
        assert all(torch.equal(rank["clean"][key], rank["poisoned"][key]) for key in rank["clean"])


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_bf16_gradients_are_accumulated_and_reduced_in_float32(stage: int, size: int) -> None:
    network = group.TinyNet().to(torch.bfloat16)
    x, target, t = group.global_batch(0)
    total = {name: torch.zeros(p.shape) for name, p in network.named_parameters()}
    rounded = copy.deepcopy(total)
    for i in range(group.BATCH):
        network.zero_grad()
        ((network(x[i : i + 1].bfloat16(), t[i : i + 1]).float() - target[i : i + 1]).square().mean() / 8).backward()
        for name, p in network.named_parameters():
            assert p.grad is not None
            total[name] += p.grad.float()
            rounded[name] = (rounded[name].bfloat16() + p.grad).float()
    ours = group.run_ranks(accumulate, size, stage, group.BATCH // size)[0]
    assert distance(rounded, total) > 1e-3, "the test could not tell"
    assert distance(ours, total) < 1e-6


def test_adamw_decays_the_weights_and_not_the_gradient() -> None:
    (decayed,) = group.run_ranks(adamw_step, 1)
    plain = group.TinyNet()
    adam = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.5)
    x, target, t = group.global_batch(0)
    (plain(x, t) - target).square().mean().backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    adam.step()
    assert distance(decayed, dict(plain.named_parameters())) < 1e-6


def adamw_step(world: World) -> dict[str, Tensor]:
    engine = group.build(world, group.config(train={"optimizer": "adamw", "weight_decay": 0.5}))
    group.backward(engine, 0)
    engine.step(0.1)
    return group.whole(world, engine)


def unet_norms(world: World, stage: int, precision: str, **model: Any) -> list[float]:
    """Gradient norms of three steps of the real network."""
    from ddpm_dist.snapshot import build

    model = {"channel_mult": [1, 2], "attention_resolutions": [4], "num_res_blocks": 1, "dropout": 0.1, **model}
    cfg = group.config(stage=stage, precision=precision, model=model)
    engine = Engine(build(cfg)[0].checkpoint(cfg.model.checkpoint_levels), cfg, world, group.BATCH // world.size, 1)
    norms = []
    for step in range(3):
        torch.manual_seed(step)
        group.backward(engine, step)
        norms.append(engine.step(LR).grad_norm)
    return norms


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_unet_trains_alike_at_every_stage(precision: str) -> None:
    """Its modules pass tensors that DeepSpeed's hooks can follow: stage 3 gathers weights around each of them."""
    stages = [stage for stage, p in MODES if p == precision]
    found = {stage: group.run_ranks(unet_norms, 1, stage, precision)[0] for stage in stages}
    found["recomputed"] = group.run_ranks(partial(unet_norms, checkpoint_levels=[0, 1]), 1, 3, precision)[0]
    for stage, norms in found.items():
        assert norms == pytest.approx(found[1], rel=1e-5 if precision == "fp32" else 1e-2), stage


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeedCPUAdam is C++, and there is no g++")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("stage", "precision"), MODES[1:])
def test_moments_on_the_host_give_the_same_steps(stage: int, precision: str) -> None:
    with_offload, without = group.run_ranks(offloaded, 1, stage, precision, timeout_s=800)[0]
    assert [report.applied for report in with_offload[0]] == [True, False, True, True]
    assert distance(with_offload[1], without[1]) < 1e-5


def offloaded(world: World, stage: int, precision: str) -> list[Any]:
    """Four steps of two micro-batches, the second poisoned: (reports, weights), with offload and without."""
    found = []
    for offload in (True, False):
        zero = {"offload_optimizer": offload}
        engine = group.build(world, group.config(stage=stage, precision=precision, zero=zero), 2)
        reports = []
        for step in range(4):
            group.backward(engine, step, float("nan") if step == 1 else 1.0)
            reports.append(engine.step(LR))
        found.append((reports, group.whole(world, engine)))
    return found


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (3, "fp32")])
def test_a_compiled_forward_gives_the_same_steps(stage: int, precision: str) -> None:
    plain = group.run_ranks(compiled_norms, 1, stage, precision, False)[0]
    compiled = group.run_ranks(compiled_norms, 1, stage, precision, True, timeout_s=800)[0]
    assert compiled == pytest.approx(plain, rel=1e-5 if precision == "fp32" else 1e-2)


def compiled_norms(world: World, stage: int, precision: str, compiled: bool) -> list[float]:
    engine = group.build(world, group.config(stage=stage, precision=precision, model={"compile": compiled}))
    norms = []
    for step in range(3):
        group.backward(engine, step)
        norms.append(engine.step(LR).grad_norm)
    return norms


def collections(world: World) -> tuple[list[int], int, int, int]:
    """(objects seen by each full collection while an engine was built; objects before; frozen before; after)."""
    gc.collect()
    before, frozen = len(gc.get_objects()), gc.get_freeze_count()
    seen = []

    def see(phase: str, about: dict[str, int]) -> None:
        if phase == "start" and about["generation"] == 2:
            seen.append(len(gc.get_objects()))

    gc.callbacks.append(see)
    group.build(world, group.config(stage=1, precision="bf16"))
    gc.callbacks.remove(see)
    return seen, before, frozen, gc.get_freeze_count()


def frozen_collections(world: World) -> tuple[list[int], int, int, int]:
    gc.freeze()
    return collections(world)


def test_deepspeed_collects_no_garbage_of_all_packages() -> None:
    """It collects before each of its memory figures: a second of a start, where all is imported."""
    seen, before, frozen, after = group.run_ranks(collections, 1)[0]
    assert seen, "it collects"
    assert max(seen) < before / 10
    assert (frozen, after) == (0, 0), "what is garbage later can be collected later"
    seen, _, frozen, after = group.run_ranks(frozen_collections, 1)[0]
    assert seen
    assert after >= frozen > 0, "what a process has set aside stays so"


def test_what_a_machine_can_not_do_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = World(0, 1, 0, torch.device("cpu"), "gloo")
    cfg = group.config(stage=1)
    with pytest.raises(ConfigError, match=r"precision: fp16 needs CUDA.*bf16"):
        check(cfg.model_copy(update={"precision": "fp16"}), cpu)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"model.compile: torch.compile needs a C\+\+ compiler.*and g\+\+ is not"):
        check(group.config(model={"compile": True}), cpu)


def test_what_a_gpu_node_lacks_is_said_where_it_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpus = World(0, 4, 0, torch.device("cuda", 0), "nccl")
    compiled = group.config(model={"compile": True})
    monkeypatch.setattr("ddpm_dist.device.why_no_triton", lambda: "Triton needs a C compiler")
    with pytest.raises(ConfigError, match=r"model\.compile: Triton needs a C compiler.*model\.compile=false"):
        check(compiled, gpus)

    monkeypatch.setattr(checks, "SHM", tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=2**26, free=2**25))
    said = str(checks._about_shm(4))
    assert "32 of 64 MiB free" in said
    assert "--shm-size=8g" in said
    assert checks._about_shm(1) is None, "one process has nobody to share with"
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=2**34, free=2**34))
    assert checks._about_shm(4) is None

    monkeypatch.setattr(checks, "INFINIBAND", tmp_path)
    monkeypatch.setattr("resource.getrlimit", lambda which: (2**16, 2**16))
    assert checks._about_memlock(True) is None, "no InfiniBand here"
    (tmp_path / "mlx5_0").mkdir()
    assert "64 KiB of memory here (ulimit -l)" in str(checks._about_memlock(True))
    assert checks._about_memlock(False) is None


@pytest.mark.parametrize("stage", STAGES)
def test_clipping_is_to_the_recipes_norm_and_no_other(stage: int) -> None:
    """DeepSpeed has one of its own by default."""
    for clip in (0.5, 4.0, 1e9):
        ((norm, applied),) = group.run_ranks(clipped_norm, 1, stage, clip)
        assert norm > 4
        assert applied == pytest.approx(min(norm, clip), rel=1e-5)
