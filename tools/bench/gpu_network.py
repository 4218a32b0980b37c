"""The sides of training in tools/bench/gpu.py: our steps, the same as one graph, and diffusers' network.

All train the CIFAR-10 network without dropout on images in memory, in bf16 with float32 masters: noise, forward, loss,
backward, clipping, Adam, average.

  ours …       the package's own step and engine (ZeRO-1), as a recipe with these keys trains
  one graph    our network in a plain loop that is recorded once as a CUDA graph: what launches cost, at most
  diffusers    UNet2DModel: as its unconditional example trains it, or as well as it can: compiled, channels last,
               fused Adam, averages in one call, cuDNN's own choice of kernels
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_dist import rng, snapshot
from ddpm_dist.config import Config
from ddpm_dist.diffusion import QUARTILES, GaussianDiffusion, bins_of
from ddpm_dist.engine import Engine, init_world
from ddpm_dist.recipe import load_config
from ddpm_dist.training.control import Control
from ddpm_dist.training.ema import Ema
from ddpm_dist.training.metrics import PhaseClock
from ddpm_dist.training.step import BatchPlan, to_model_range, training_step
from tools.bench.gpu_sides import Setting

LR, DECAY, CLIP = 2e-4, 0.9999, 1.0
SMALL = (
    "data.image_size=8", "model.channels=32", "model.channel_mult=[1,2]", "model.num_res_blocks=1",
    "model.attention_resolutions=[4]",
)  # fmt: skip


def recipe(setting: Setting, batch: int, *overrides: str, name: str = "cifar10") -> Config:
    """The recipe without dropout, of one process and so many images, on the setting's device."""
    gpus = 1 if setting.on_cuda else 0
    common = [
        "run.url=memory://bench", "data.url=memory://none", "model.dropout=0.0", "precision=bf16",
        f"train.global_batch={batch}", f"train.max_micro_batch={batch}", "train.warmup_steps=0", "cluster.workers=1",
        f"cluster.gpus_per_worker={gpus}", "cluster.wait_seconds=1",
    ]  # fmt: skip
    return load_config(f"configs/{name}.yaml", [*common, *(SMALL if setting.small else ()), *overrides])


class Ours:
    """Training steps as the loop makes them, on images in memory."""

    def __init__(self, setting: Setting, batch: int, *overrides: str) -> None:
        torch._dynamo.config.automatic_dynamic_shapes = False
        self.cfg = recipe(setting, batch, *overrides)
        self.world = init_world(self.cfg.cluster)
        network, self.diffusion = snapshot.build(self.cfg)
        self.plan = BatchPlan.of(batch, 1, self.cfg.train.max_micro_batch)
        self.engine = Engine(network, self.cfg, self.world, self.plan.micro_batch, self.plan.accumulation)
        self.engine.train()
        self.ema = Ema(self.engine.pieces(), self.cfg)
        self.control, self.clock = Control(self.world), PhaseClock(on_cuda=setting.on_cuda)
        self.images = images(setting, batch)
        self.done = 0

    def step(self) -> None:
        result = training_step(
            self.engine, self.diffusion, self.images, None, self.done, self.cfg, self.world, self.plan, self.clock
        )
        if result.report.applied:
            self.ema.update(self.done, self.cfg.train.global_batch)
        self.control.hear()
        self.control.tell(
            result.loss, bins_of(self.diffusion, self.cfg.diffusion, result.t, QUARTILES), 0, False, False
        )
        self.done += 1


class Plain:
    """A plain loop around a network: bf16 weights, float32 masters, fused Adam, averages in one call."""

    def __init__(
        self, setting: Setting, batch: int, network: nn.Module, channels_last: bool, fused: bool = True
    ) -> None:
        self.device = torch.device(setting.device)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.network = network.to(self.device, torch.bfloat16, memory_format=layout)  # type: ignore[call-overload]
        self.weights = list(self.network.parameters())
        self.masters = [nn.Parameter(weight.detach().float()) for weight in self.weights]
        self.averages = [master.detach().clone() for master in self.masters]
        self.fused = fused
        capturable = setting.on_cuda and fused
        self.adam = torch.optim.Adam(self.masters, lr=LR, fused=fused, capturable=capturable)
        _, process = snapshot.build(recipe(setting, batch))
        assert isinstance(process, GaussianDiffusion)
        self.diffusion = process
        for name in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"):
            setattr(self, name, torch.tensor(self.diffusion_weights(name), dtype=torch.float32, device=self.device))
        self.layout = layout
        self.images = images(setting, batch).to(self.device)

    def diffusion_weights(self, name: str) -> Any:
        cumulative = self.diffusion.alphas_cumprod
        return cumulative**0.5 if name == "sqrt_alphas_cumprod" else (1 - cumulative) ** 0.5

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        found: Tensor = self.network(x, t)
        return found

    def step(self) -> None:
        x_start = to_model_range(self.images)
        t = torch.randint(len(self.diffusion.alphas_cumprod), (len(x_start),), device=self.device)
        eps = torch.randn_like(x_start)
        signal, noise = (
            getattr(self, name)[t][:, None, None, None]
            for name in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
        )
        x_t = (signal * x_start + noise * eps).to(torch.bfloat16).contiguous(memory_format=self.layout)
        F.mse_loss(self.forward(x_t, t).float(), eps).backward()
        self.update()

    @torch.no_grad()
    def update(self) -> None:
        for master, weight in zip(self.masters, self.weights, strict=True):
            assert weight.grad is not None, "a backward pass went before"
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP, foreach=True)
        self.adam.step()
        if self.fused:
            torch._foreach_lerp_(self.averages, [*self.masters], 1 - DECAY)
            torch._foreach_copy_([*self.weights], [*self.masters])
        else:
            for average, master, weight in zip(self.averages, self.masters, self.weights, strict=True):
                average.lerp_(master, 1 - DECAY)
                weight.copy_(master)
        self.adam.zero_grad()


class OneGraph(Plain):
    """Our network in the plain loop, the whole step recorded as one CUDA graph; on a CPU the loop as it is."""

    def __init__(self, setting: Setting, batch: int, channels_last: bool) -> None:
        network, _ = snapshot.build(recipe(setting, batch))
        super().__init__(setting, batch, network, channels_last)
        self._graph: Any = None
        if setting.on_cuda:
            self._record()

    def _record(self) -> None:
        plain = super().step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                plain()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plain()
        self._graph = graph

    def step(self) -> None:
        if self._graph is None:
            super().step()
        else:
            self._graph.replay()


class Diffusers(Plain):
    """diffusers' UNet2DModel with the same weights."""

    def __init__(self, setting: Setting, batch: int, best: bool) -> None:
        from diffusers import UNet2DModel

        torch._dynamo.config.automatic_dynamic_shapes = False
        torch.backends.cudnn.benchmark = best
        ours, _ = snapshot.build(recipe(setting, batch))
        told = ours.config.to_diffusers()
        told.pop("_class_name")
        network = UNet2DModel(**told)
        network.load_state_dict(ours.state_dict())
        super().__init__(setting, batch, network, channels_last=best, fused=best)
        if best:
            self.network.compile()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        found: Tensor = self.network(x, t).sample
        return found


def images(setting: Setting, batch: int) -> Tensor:
    """[B, 3, H, W] uint8, pinned for a GPU."""
    numel = 3 * setting.size**2
    words = rng.philox(0, 1, torch.arange(batch), numel)[:, :numel]
    found = words.remainder(256).to(torch.uint8).view(batch, 3, setting.size, setting.size)
    return found.pin_memory() if setting.on_cuda else found


def has_diffusers() -> bool:
    """Whether the peer is there; a bare machine may lack it."""
    import importlib.util

    return importlib.util.find_spec("diffusers") is not None
