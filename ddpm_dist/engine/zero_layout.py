"""Where DeepSpeed's optimizers keep the float32 masters and Adam's moments, stage by stage.

The pinned version has four optimizer classes, which differ in where the masters are, in how these reach the
weights that the network computes with, and in what becomes of a NaN. Each layout here answers the same three
questions; tests/engine/test_engine.py holds DeepSpeed to what they assume.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ddpm_dist.engine import flat
from ddpm_dist.engine.pieces import Piece, shares
from ddpm_dist.engine.start import MAX_BUCKET_ELEMENTS
from ddpm_dist.engine.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")


class Layout(Protocol):
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
        return [
            Piece(name, self._parameters[name].shape, offset, *self._views(name, offset, numel))
            for name, offset, numel in owned
        ]

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
        optimizer = ds.optimizer
        if hasattr(optimizer, "fp32_groups_gradients_flat"):
            flat.shorten_bf16(optimizer, MAX_BUCKET_ELEMENTS)
        elif not optimizer.cpu_offload:
            flat.shorten_zero(optimizer, MAX_BUCKET_ELEMENTS)

    def pieces(self) -> list[Piece]:
        (master,) = self._adam.param_groups[0]["params"]
        state = _prepare_state(self._adam, master)
        found = []
        for name, parameter in self._ds.module.named_parameters():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is None:
                continue  # owned by others
            at = mapping.hp_fragment_address
            views = [tensor.detach().narrow(0, at.start, at.numel) for tensor in (master, *(state[k] for k in MOMENTS))]
            found.append(Piece(name, parameter.shape, mapping.lp_fragment_address.start, *views))
        return found

    def sync(self) -> None:
        self._ds.optimizer.update_lp_params()

    def step(self, clip: float) -> float:
        norm = _deepspeed_step(self._ds)
        if not math.isfinite(norm):
            # With CPU offload and bf16, DeepSpeed would go on adding to the spoilt sums, and never step again.
            sums = getattr(self._ds.optimizer, "averaged_gradients", {})
            sums.update(dict.fromkeys(sums))
        return norm


class _Partitioned:
    """Stage 3: each parameter is cut into W parts of ⌈n/W⌉ elements, the last ones padded or empty."""

    def __init__(self, ds: Any, adam: torch.optim.Optimizer, world: World) -> None:
        self._ds, self._adam, self._world = ds, adam, world

    def pieces(self) -> list[Piece]:
        optimizer = self._ds.optimizer
        for master in optimizer.fp32_partitioned_groups_flat:
            _prepare_state(self._adam, master)
        found = []
        for name, parameter in self._ds.module.named_parameters():
            offset = self._world.rank * parameter.partition_numel()
            numel = min(parameter.partition_numel(), parameter.ds_numel - offset)
            if numel <= 0:
                continue
            group, start, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            master = optimizer.fp32_partitioned_groups_flat[group]
            state = self._adam.state[master]
            views = [tensor.detach().narrow(0, start, numel) for tensor in (master, *(state[k] for k in MOMENTS))]
            found.append(Piece(name, parameter.ds_shape, offset, *views))
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


LAYOUTS: dict[int, type[Layout]] = {0: _Replicated, 1: _Flat, 2: _Flat, 3: _Partitioned}


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
