"""DeepSpeed adapter: ZeRO stages 0-3 with float32 masters, moments and gradient accumulation.

The only module that imports deepspeed. What it assumes of DeepSpeed's internals (the pinned version's
optimizer classes keep their masters in other places, and differ in what a NaN does) stands in the three
classes behind `_Layout`, and tests/distributed/test_engine.py holds it to that.
"""

import logging
import math
import os
import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ddpm_dist.config import Config
from ddpm_dist.distributed.pieces import Piece, shares
from ddpm_dist.distributed.world import World
from ddpm_dist.errors import ConfigError

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed

# Without this, DeepSpeed compiles a shared-memory extension for CPU collectives at the first start: a minute,
# a compiler, and a lock that a SIGKILL leaves behind (pytorch#189245). gloo does that work as well.
deepspeed.ops.__compatible_ops__ = {}
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor. is deprecated", category=FutureWarning)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOMENTS = ("exp_avg", "exp_avg_sq")
MAX_BUCKET_ELEMENTS = 1 << 25
"""Gradients reduced at once: 128 MiB in float32."""
PERSISTENT_ELEMENTS = 100_000
"""Under ZeRO-3, parameters up to this size stay whole on every rank."""


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
        self.world = world
        self.accumulation = accumulation
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
        self._ds = deepspeed.initialize(
            model=network,
            optimizer=self._adam,
            config=deepspeed_settings(cfg, world, micro_batch, accumulation, sum(numels.values())),
            dist_init_required=False,
        )[0]
        self._layout = _LAYOUTS[cfg.zero.stage](self._ds, self._adam, world)
        self._pieces = self._layout.pieces()
        if initial is not None:
            for piece in self._pieces:
                piece.weights.copy_(initial[piece.name][piece.offset : piece.offset + piece.numel])
        self.sync_weights()
        if cfg.model.compile:
            self._ds.compile()

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Network output [B, C or 2C, H, W] float32 for x [B, C, H, W], t [B], labels [B] int64 or None."""
        x = x.to(self._dtype)
        if self._channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        output: Tensor = self._ds(x, t, labels)
        return output.float()

    def train(self) -> None:
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
        for steps in self._adam_steps():
            steps.fill_(float(scalars["optimizer_steps"]))
        scaler = self._scaler()
        if scaler is not None:
            vars(scaler).update(scalars["loss_scaler"])

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the network, so that another engine may use it."""
        self._ds.destroy()

    def _adam_steps(self) -> list[Tensor]:
        return [state["step"] for state in self._adam.state.values()]

    def _scaler(self) -> Any | None:
        return self._ds.optimizer.loss_scaler if self._dtype == torch.float16 else None


_SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def check(cfg: Config, world: World) -> None:
    """Raises ConfigError for a combination that this machine or DeepSpeed can't do."""
    if cfg.precision == "fp16" and world.device.type != "cuda":
        raise ConfigError("precision: fp16 needs CUDA, and there is none here; use bf16")
    if cfg.zero.stage == 0 and cfg.precision != "fp32":
        raise ConfigError(f"zero.stage: 0 works in fp32 only, not in {cfg.precision}; use zero.stage: 1")
    if cfg.zero.offload_optimizer and cfg.zero.stage == 0:
        raise ConfigError("zero.offload_optimizer: needs zero.stage 1-3")


def deepspeed_settings(cfg: Config, world: World, micro_batch: int, accumulation: int, numel: int) -> dict[str, Any]:
    """DeepSpeed's own configuration, derived from ours. numel: trained elements of the network."""
    bucket = max(1, min(numel, MAX_BUCKET_ELEMENTS))
    settings: dict[str, Any] = {
        "train_batch_size": micro_batch * accumulation * world.size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "zero_allow_untested_optimizer": True,  # torch.optim.AdamW; DeepSpeed lists Adam alone
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": cfg.zero.stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": 2 * MAX_BUCKET_ELEMENTS,
            "overlap_comm": world.device.type == "cuda",
        },
    }
    if cfg.zero.stage == 3:
        settings["zero_optimization"] |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
        }
    if cfg.zero.stage > 0:
        settings["gradient_clipping"] = cfg.train.grad_clip
    if cfg.zero.offload_optimizer:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if cfg.precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    elif cfg.precision == "fp16":
        settings["fp16"] = {"enabled": True, "loss_scale": 0}  # 0: dynamic
    return settings


def _make_optimizer(network: nn.Module, cfg: Config, world: World) -> torch.optim.Optimizer:
    parameters = [p for p in network.parameters() if p.requires_grad]
    t = cfg.train
    if cfg.zero.offload_optimizer:
        return _make_cpu_adam(parameters, cfg)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[t.optimizer]
    return kind(parameters, lr=t.lr, betas=t.betas, eps=t.eps, weight_decay=t.weight_decay, fused=True)


def _make_cpu_adam(parameters: list[nn.Parameter], cfg: Config) -> torch.optim.Optimizer:
    t = cfg.train
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(
            parameters, lr=t.lr, betas=t.betas, eps=t.eps, weight_decay=t.weight_decay,
            adamw_mode=t.optimizer == "adamw",
        )  # fmt: skip
    except Exception as error:  # its build raises what the compiler's absence or message makes it raise
        raise ConfigError(
            f"zero.offload_optimizer: DeepSpeedCPUAdam can't be built on this node ({error}); install a C++ compiler "
            "(g++) and ninja on every node, or set zero.offload_optimizer=false"
        ) from None
    return optimizer


class _Layout(Protocol):
    """Where one kind of DeepSpeed optimizer keeps masters and moments, and how it steps."""

    def __init__(self, ds: Any, adam: torch.optim.Optimizer, world: World) -> None: ...

    def pieces(self) -> list[Piece]:
        """This rank's, with moments that exist from the start."""

    def sync(self) -> None:
        """Masters to the weights that the network computes with, on all ranks."""

    def step(self, clip: float) -> float:
        """The gradient's norm before clipping; the step is applied only where that is finite."""


class _Replicated:
    """Stage 0: everything everywhere in float32. A rank owns an equal share, as under ZeRO-1."""

    def __init__(self, ds: Any, adam: torch.optim.Optimizer, world: World) -> None:
        self._ds, self._adam, self._world = ds, adam, world
        self._parameters = dict(ds.module.named_parameters())

    def pieces(self) -> list[Piece]:
        numels = {name: p.numel() for name, p in self._parameters.items()}
        for parameter in self._parameters.values():
            _prepare_state(self._adam, parameter)
        owned = shares(numels, self._world.rank, self._world.size)
        return [Piece(name, offset, *self._views(name, offset, numel)) for name, offset, numel in owned]

    def _views(self, name: str, offset: int, numel: int) -> list[Tensor]:
        parameter = self._parameters[name]
        state = self._adam.state[parameter]
        whole = [parameter.detach(), *(state[key] for key in MOMENTS)]
        return [tensor.view(-1)[offset : offset + numel] for tensor in whole]

    def sync(self) -> None:
        """Each owner's share of weights and moments to all, as every rank steps with all of them."""
        numels = {name: p.numel() for name, p in self._parameters.items()}
        for owner in range(self._world.size if self._world.size > 1 else 0):
            for name, offset, numel in shares(numels, owner, self._world.size):
                for view in self._views(name, offset, numel):
                    torch.distributed.broadcast(view, src=owner)

    def step(self, clip: float) -> float:
        """DeepSpeed would apply a NaN here, so the norm is looked at before its step."""
        norm = float(nn.utils.clip_grad_norm_(self._parameters.values(), clip))
        if math.isfinite(norm):
            self._ds.step()
        else:
            self._ds.zero_grad()
            self._ds.micro_steps += 1
        return norm


class _Flat:
    """Stages 1 and 2: the parameters, end to end, are cut into one flat master per rank.

    DeepSpeedZeroOptimizer and, for stage 1 in bf16, BF16_Optimizer. Both hand that flat tensor to Adam as
    its only parameter, and note in `parameter._hp_mapping` which part of the parameter it holds, and where.
    """

    def __init__(self, ds: Any, adam: torch.optim.Optimizer, world: World) -> None:
        self._ds, self._adam = ds, adam

    def pieces(self) -> list[Piece]:
        (flat,) = self._adam.param_groups[0]["params"]
        state = _prepare_state(self._adam, flat)
        found = []
        for name, parameter in self._ds.module.named_parameters():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is None:
                continue  # owned by others
            at = mapping.hp_fragment_address
            views = [tensor.detach().narrow(0, at.start, at.numel) for tensor in (flat, *(state[k] for k in MOMENTS))]
            found.append(Piece(name, mapping.lp_fragment_address.start, *views))
        return found

    def sync(self) -> None:
        self._ds.optimizer.update_lp_params()

    def step(self, clip: float) -> float:
        return _deepspeed_step(self._ds)


class _Partitioned:
    """Stage 3: each parameter is cut into W parts of ⌈n/W⌉ elements, the last ones padded or empty."""

    def __init__(self, ds: Any, adam: torch.optim.Optimizer, world: World) -> None:
        self._ds, self._adam, self._world = ds, adam, world

    def pieces(self) -> list[Piece]:
        optimizer = self._ds.optimizer
        for flat in optimizer.fp32_partitioned_groups_flat:
            _prepare_state(self._adam, flat)
        found = []
        for name, parameter in self._ds.module.named_parameters():
            offset = self._world.rank * parameter.partition_numel()
            numel = min(parameter.partition_numel(), parameter.ds_numel - offset)
            if numel <= 0:
                continue
            group, start, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            flat = optimizer.fp32_partitioned_groups_flat[group]
            state = self._adam.state[flat]
            views = [tensor.detach().narrow(0, start, numel) for tensor in (flat, *(state[k] for k in MOMENTS))]
            found.append(Piece(name, offset, *views))
        return found

    def sync(self) -> None:
        """As at the end of DeepSpeed's own step."""
        optimizer = self._ds.optimizer
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def step(self, clip: float) -> float:
        return _deepspeed_step(self._ds)


_LAYOUTS: dict[int, type[_Layout]] = {0: _Replicated, 1: _Flat, 2: _Flat, 3: _Partitioned}


def _deepspeed_step(ds: Any) -> float:
    """DeepSpeed's step; it clips, and leaves out a step whose norm isn't finite, which it then reports as inf."""
    ds.step()
    norm = float(ds.get_global_grad_norm())
    applied = bool(ds.was_step_applied())
    assert applied == math.isfinite(norm), f"DeepSpeed reports norm {norm} and applied={applied}"
    return norm


def _prepare_state(adam: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Adam's state as its own first step would make it, so that it can be loaded into before there was one."""
    if not adam.state[parameter]:
        fused = bool(adam.defaults.get("fused"))
        steps = torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu")
        adam.state[parameter] = {"step": steps, **{key: torch.zeros_like(parameter.detach()) for key in MOMENTS}}
    return adam.state[parameter]
