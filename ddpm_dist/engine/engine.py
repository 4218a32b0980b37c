"""DeepSpeed adapter: ZeRO stages 0-3 with float32 masters, moments and gradient accumulation.

How DeepSpeed is started stands in `start.py`, what is assumed of its optimizer classes in `zero_layout.py`.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_dist import device as devices
from ddpm_dist.allocator import keep_freed_memory
from ddpm_dist.config import Config
from ddpm_dist.engine.checks import check
from ddpm_dist.engine.pieces import Piece
from ddpm_dist.engine.start import deepspeed_settings, initialize, load_deepspeed
from ddpm_dist.engine.world import World
from ddpm_dist.engine.zero_layout import LAYOUTS
from ddpm_dist.errors import ConfigError
from ddpm_dist.models import SLOW_BF16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOWEST_LOSS_SCALE = 1.0
"""fp16's factor of the loss is halved down to this."""


@dataclass(frozen=True)
class StepReport:
    """What became of an optimizer step."""

    applied: bool
    """False if the gradient wasn't finite: weights, moments and their step count are what they were."""
    grad_norm: float
    """L2 norm of the global batch's mean gradient before clipping; inf or nan if it wasn't finite."""
    loss_scale: float
    """Factor that this step's loss was multiplied with; 1 but for fp16."""


class Engine:
    """The network under training on this rank: forward in compute precision, backward, step.

    micro_batch: images of one forward pass. accumulation: backward passes in a step. The weights are those
    of `network` as it is given, in float32 also where the forward pass runs in bf16 or fp16.
    """

    def __init__(self, network: nn.Module, cfg: Config, world: World, micro_batch: int, accumulation: int) -> None:
        check(cfg, world)
        if world.device.type == "cpu":
            keep_freed_memory()
        self.world = world
        self.accumulation = accumulation
        self._micro_batch = micro_batch
        self.shapes = {name: p.shape for name, p in network.named_parameters() if p.requires_grad}
        """Shape of every trained parameter, in the network's order."""
        self._clip = cfg.train.grad_clip
        self._dtype = DTYPES[cfg.precision]
        self._channels_last = cfg.model.channels_last
        self._pending = 0
        numels = {name: shape.numel() for name, shape in self.shapes.items()}
        initial = None
        if self._dtype != torch.float32:
            # DeepSpeed casts the network before it copies the masters from it: they would start rounded.
            initial = {name: p.detach().to("cpu", copy=True).view(-1) for name, p in network.named_parameters()}
        self._adam = _make_optimizer(network, cfg, world)
        settings = deepspeed_settings(cfg, world, micro_batch, accumulation, sum(numels.values()))
        self._ds = initialize(network, self._adam, settings, world)
        self._layout = LAYOUTS[cfg.zero.stage](self._ds, self._adam, world)
        self._pieces = self._layout.pieces()
        if (scaler := self._scaler()) is not None:
            # DeepSpeed would end the process there with a bare Exception; whoever counts skipped steps decides.
            scaler.min_scale, scaler.raise_error_at_min_scale = LOWEST_LOSS_SCALE, False
        if initial is not None:
            for piece in self._pieces:
                piece.weights.copy_(initial[piece.name][piece.offset : piece.offset + piece.numel])
        self.sync_weights()
        self._compiled = cfg.model.compile
        if self._compiled:
            self._ds.compile()

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Network output [B, C or 2C, H, W] float32 for x [B, C, H, W], t [B], labels [B] int64 or None."""
        x = x.to(self._dtype)
        if self._channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        output: Tensor = self._ds(x, t, labels)
        return output.float()

    def train(self) -> None:
        """Training mode: dropout is on."""
        self._ds.train()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, dropout is off, and nothing is compiled for shapes that are seen only now and then; no gradients."""
        self._ds.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if self._compiled else contextlib.nullcontext():
            yield
        self._ds.train()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of one micro-batch's mean loss, a scalar, to this step's."""
        assert self._pending < self.accumulation, "more backward passes than the step has micro-batches"
        self._pending += 1
        self._ds.backward(loss)
        if self._pending < self.accumulation:
            self._ds.step()  # not yet a step: it counts DeepSpeed's micro-batches

    def step(self, lr: float) -> StepReport:
        """Clips the gradient of the global batch to train.grad_clip, and applies it if it is finite."""
        assert self._pending == self.accumulation, "fewer backward passes than the step has micro-batches"
        self._pending = 0
        for group in self._adam.param_groups:
            group["lr"] = lr
        loss_scale = self.loss_scale
        grad_norm = self._layout.step(self._clip)
        return StepReport(math.isfinite(grad_norm), grad_norm, loss_scale)

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before the backward pass: fp16's, else 1."""
        scaler = self._scaler()
        return float(scaler.cur_scale) if scaler is not None else 1.0

    def pieces(self) -> list[Piece]:
        """Live float32 views of the masters and moments that this rank owns; over all ranks, all of them."""
        return self._pieces

    @torch.no_grad()
    def sync_weights(self) -> None:
        """Makes the network compute with the pieces, after they were written in place; a collective."""
        self._layout.sync()

    def scalars(self) -> dict[str, Any]:
        """What belongs to the optimizer beside the pieces, as JSON; the same on every rank."""
        scaler = self._scaler()
        state = {k: v for k, v in vars(scaler).items() if k in _SCALER_KEYS} if scaler is not None else {}
        return {"optimizer_steps": int(self._adam_steps()[0]), "loss_scaler": state}

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        """Takes what `scalars` gave: the optimizer's steps and fp16's loss scale."""
        for steps in self._adam_steps():
            steps.fill_(float(scalars["optimizer_steps"]))
        scaler = self._scaler()
        if scaler is not None:
            vars(scaler).update(scalars["loss_scaler"])

    def fingerprint(self) -> dict[str, Any]:
        """What the bits of a step depend on beside configuration and data."""
        return {
            "world_size": self.world.size,
            "micro_batch": self._micro_batch,
            "accumulation": self.accumulation,
            "zero_stage": self._ds.zero_optimization_stage(),
            "device": devices.name(self.world.device),
            **devices.fingerprint(self.world.device),
            "threads": torch.get_num_threads(),
            "widens_bf16": SLOW_BF16,
            "torch": torch.__version__,
            "deepspeed": load_deepspeed().__version__,
        }

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the network, so that another engine may use it."""
        self._ds.destroy()

    def _adam_steps(self) -> list[Tensor]:
        return [state["step"] for state in self._adam.state.values()]

    def _scaler(self) -> Any | None:
        return self._ds.optimizer.loss_scaler if self._dtype == torch.float16 else None


_SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _make_optimizer(network: nn.Module, cfg: Config, world: World) -> torch.optim.Optimizer:
    parameters = [p for p in network.parameters() if p.requires_grad]
    t = cfg.train
    if cfg.zero.offload_optimizer:
        return _make_cpu_adam(parameters, cfg)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[t.optimizer]
    return kind(parameters, lr=t.lr, betas=t.betas, eps=t.eps, weight_decay=t.weight_decay, fused=True)


def _make_cpu_adam(parameters: list[nn.Parameter], cfg: Config) -> torch.optim.Optimizer:
    """DeepSpeed's Adam for masters in host memory; its C++ is compiled at first use.

    It keeps powers of the betas by repeated multiplication, and computes them anew after a resume: with it, and
    only with it, a resumed run can differ from an unbroken one in the last bits.
    """
    t = cfg.train
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(
            parameters, lr=t.lr, betas=t.betas, eps=t.eps, weight_decay=t.weight_decay,
            adamw_mode=t.optimizer == "adamw",
        )  # fmt: skip
    except Exception as error:  # its build raises what the compiler's absence or message makes it raise
        raise ConfigError(
            "zero.offload_optimizer: DeepSpeedCPUAdam can't be built on this node "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); install a C++ compiler (g++) and ninja on "
            "every node, or set zero.offload_optimizer=false"
        ) from None
    return optimizer
