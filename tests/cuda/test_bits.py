"""The same bits in two processes, and after a resume: the first promise of the whole system, on a GPU."""

from pathlib import Path

import pytest

from ddpm_dist import device as devices
from ddpm_dist.config import ClusterConfig
from ddpm_dist.engine.world import World
from tests.cuda.ranks import Ranks
from tests.cuda.small import Steps

RECIPES = {
    "attention and dropout": [],
    "classes": ["model.num_classes=3", "diffusion.label_dropout=0.2", "model.head_channels=32"],
    "resblocks and learned variance": [
        "model.resample=resblock", "model.scale_shift=true", "diffusion.variance=learned_range",
        "diffusion.loss=hybrid",
    ],
    "stratified": ["diffusion.t_sampling=stratified", "diffusion.prediction=v", "diffusion.weighting=min_snr"],
    "learned drawing": ["diffusion.t_sampling=loss_second_moment"],
    "channels_last": ["model.channels_last=true"],
    "checkpointed levels": ["model.checkpoint_levels=[0,1]", "zero.stage=3"],
    "sharded gradients": ["zero.stage=2"],
    "float32": ["precision=fp32", "zero.stage=0"],
}  # fmt: skip


def twenty(world: World, overrides: list[str], deterministic: bool = True) -> str:
    if world.device.type == "cuda":
        devices.set_up(world.device, ClusterConfig(gpus_per_worker=1, deterministic=deterministic, wait_seconds=0.1))
    precision = [] if any(o.startswith("precision") for o in overrides) else ["precision=bf16"]
    steps = Steps(world, *precision, *overrides)
    for step in range(20 if world.device.type == "cuda" else 2):
        steps.one(step)
    return steps.digest()


@pytest.mark.parametrize("recipe", RECIPES)
def test_twenty_steps_in_two_processes_give_the_same_bits(alone: Ranks, another: Ranks, recipe: str) -> None:
    (one,) = alone(twenty, RECIPES[recipe])
    (two,) = another(twenty, RECIPES[recipe])
    assert one == two


def test_without_determinism_it_runs_as_well(alone: Ranks, device: str) -> None:
    (one,) = alone(twenty, RECIPES["classes"], False)
    (two,) = alone(twenty, RECIPES["classes"], True)
    assert one
    assert two
    if device == "cpu":
        assert one == two


def resumed(world: World, url: str, overrides: list[str]) -> tuple[str, str]:
    """Digests after four steps: unbroken with a state at step 2, and gone on with from that state."""
    found = []
    for first in (0, 2):
        steps = Steps(world, f"run.url={url}", *overrides)
        store = steps.store()
        state = store.claim()
        assert (state is not None) == (first > 0)
        if state is not None:
            assert store.load(state, steps.engine, steps.ema)["step"] == first
        for step in range(first, 4):
            steps.one(step)
            if first == 0 and step == 1:
                store.save(2, steps.engine, steps.ema, {"step": 2})
        store.finish()
        found.append(steps.digest())
    return found[0], found[1]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "fp32"), (1, "bf16"), (1, "fp32"), (2, "bf16"), (3, "bf16"), (1, "fp16"), (3, "fp16")],
)
def test_a_resumed_run_is_the_unbroken_one(
    alone: Ranks, tmp_path: Path, stage: int, precision: str, compiled: bool
) -> None:
    overrides = [f"zero.stage={stage}", f"precision={precision}", "cluster.gpus_per_worker=1"]
    if compiled:  # a small one, as each shape costs the compiler seconds
        overrides += ["model.compile=true", "model.channel_mult=[1]", "model.attention_resolutions=[8]"]
    (found,) = alone(resumed, f"file://{tmp_path}/run", overrides)
    assert found[0] == found[1]
