"""How many operations a training step starts: on a GPU each one costs some microseconds of the host.

Counted by PyTorch's dispatcher on the CIFAR-10 network's structure with fewer channels: the number doesn't depend on
them. Views are left out. The choices are those of CUDA: our operators stand for the kernels that they launch there
(KERNELS), and compute by torch here. The budgets are what a step has; they may fall.
"""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_dist import device as devices, snapshot
from ddpm_dist.engine.engine import Engine
from ddpm_dist.engine.world import World
from ddpm_dist.models import arithmetic
from ddpm_dist.recipe import load_config
from ddpm_dist.training.ema import Ema
from ddpm_dist.training.metrics import PhaseClock
from ddpm_dist.training.step import BatchPlan, training_step
from tests.engine.worker_group import run_ranks

VIEWS = {
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select",
    "narrow", "split", "unbind", "detach", "alias", "as_strided", "empty", "empty_like", "empty_strided",
    "split_with_sizes",
    "_local_scalar_dense", "lift_fresh", "chunk", "unfold", "new_empty_strided", "new_empty",
}  # fmt: skip

KERNELS = {
    "normal": 1,
    "words": 1,
    "group_norm": 2,  # one launch sums, one applies; up to 256 pixels of 128 channels (all levels but the first): 1
    "group_norm_backward": 3,  # the same, and the weights' gradients; at the smaller levels 2
}
"""The most that an operator of `ddpm_dist::` launches."""


def norm(x: Tensor, weight: Tensor, bias: Tensor, embedding: Tensor | None, groups: int, eps: float, silu: bool) -> Any:
    """`ddpm_dist::group_norm` of torch's operations, for the paper's network."""
    x = x if embedding is None else x + embedding[:, :, None, None]
    y, mean, rstd = torch.native_group_norm(x, weight, bias, *x.shape[:2], x.shape[2] * x.shape[3], groups, eps)
    return F.silu(y) if silu else y.clone(), mean.float(), rstd.float()


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, embedding: Tensor | None, mean: Tensor, rstd: Tensor,
    silu: bool,
) -> Any:  # fmt: skip
    shifted = x if embedding is None else x + embedding[:, :, None, None]
    extent = (*x.shape[:2], x.shape[2] * x.shape[3], mean.shape[1])
    if silu:
        grad = torch.ops.aten.silu_backward(grad, torch.native_group_norm(shifted, weight, bias, *extent, 1e-6)[0])
    mean, rstd = mean.to(x.dtype), rstd.to(x.dtype)
    found = torch.ops.aten.native_group_norm_backward(grad, shifted, mean, rstd, weight, *extent, [True] * 3)
    return (*found, x.new_empty(0) if embedding is None else found[0].sum((2, 3)))


def choose_as_on_cuda() -> None:
    """For the rest of this process."""
    devices.fused = lambda device: True
    torch.library.impl("ddpm_dist::group_norm", "cpu", norm)
    torch.library.impl("ddpm_dist::group_norm_backward", "cpu", norm_backward)
    torch.library.impl("ddpm_dist::normal", "cpu", lambda indices, seed, top, number: torch.randn(len(indices), number))
    torch.library.impl(
        "ddpm_dist::words", "cpu", lambda indices, seed, top, number: torch.randint(2**32, (len(indices), number))
    )


class Counting(TorchDispatchMode):
    """Counts what is dispatched below it, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count(world: World, stage: int, precision: str) -> dict[str, int]:
    overrides = [
        "run.url=memory://x", "data.url=memory://y", "model.channels=32", f"zero.stage={stage}",
        f"precision={precision}",
        "train.global_batch=1", "cluster.workers=1", "cluster.gpus_per_worker=0",
    ]  # fmt: skip
    arithmetic.SLOW_BF16 = False  # this process ends with the count
    choose_as_on_cuda()
    cfg = load_config("configs/cifar10.yaml", overrides)
    network, diffusion = snapshot.build(cfg)
    engine = Engine(network, cfg, world, 1, 1)
    engine.train()
    ema = Ema(engine.pieces(), cfg)
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    plan = BatchPlan.of(1, 1, 1)
    for step in range(2):  # the first one makes what later ones have
        with Counting() as counting:
            training_step(engine, diffusion, images, None, step, cfg, world, plan, PhaseClock())
            ema.update(step, 1)
    return {name: number * KERNELS.get(name, 1) for name, number in counting.found.items() if name not in VIEWS}


@pytest.mark.parametrize(
    ("stage", "precision", "budget"),
    [(1, "bf16", 1000), (2, "bf16", 1020), (1, "fp32", 1600), (0, "fp32", 1950), (3, "bf16", 2400)],
)
def test_a_step_starts_no_more_than_so_many(stage: int, precision: str, budget: int) -> None:
    (found,) = run_ranks(count, 1, stage, precision)
    most = Counter(found).most_common(12)
    assert sum(found.values()) <= budget, f"{sum(found.values())} operations: {most}"
    print(stage, precision, sum(found.values()), most)
