"""Group norms of [B, C, H, W] with what goes around them: the time embedding before or behind, SiLU at the end.

On a GPU a norm with all of it is one operator (`kernels/normalisation.py`), in either memory layout; elsewhere it is
torch's operations. `device.fused` decides.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ddpm_dist import device as devices, kernels

CHANNELS_LAST = torch.channels_last


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] to the same shape."""
        return _fused(self, x, None, silu=False) if devices.fused(x.device) else super().forward(x)


class GroupNormSiLU(nn.GroupNorm):
    """GroupNorm, then SiLU. Autograd keeps the input alone: the normalised tensor, a third of what the network's
    backward pass would hold otherwise, is computed again in it, which costs about 1 % of a training step.
    """

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """x [B, C, H, W] to the same shape. embedding: [B, C] is added to x, in place; the halves of [B, 2C] scale
        (by 1 + itself) and shift what is normalised, before the SiLU (ADM, Dhariwal & Nichol 2021).
        """
        if devices.fused(x.device):
            return _fused(self, x, embedding, silu=True)
        if embedding is not None:
            embedding = embedding[:, :, None, None]
            if embedding.shape[1] > self.num_channels:
                scale, shift = embedding.chunk(2, dim=1)
                return F.silu(super().forward(x) * (1 + scale) + shift)
            x = x.add_(embedding)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # compilers fuse and recompute by themselves
            return _GroupNormSiLU.apply(x, self.num_groups, self.weight, self.bias, self.eps)
        return F.silu(super().forward(x))


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        normalised, mean, rstd = _normalise(x, groups, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        return F.silu(normalised)

    @staticmethod
    @once_differentiable  # kernels without derivatives of their own
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        x = _dense(x)
        normalised = _normalise(x, ctx.groups, weight, bias, ctx.eps)[0]
        gradient = torch.ops.aten.silu_backward(grads[0], normalised)
        found = torch.ops.aten.native_group_norm_backward(
            _dense(gradient), x, mean, rstd, weight, *_extent(x), ctx.groups, [True, True, True]
        )
        return found[0], None, found[1], found[2], None


def _normalise(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """GroupNorm of [B, C, H, W], and the mean and 1/σ of each of the B·groups groups."""
    x = _dense(x)
    found: tuple[Tensor, Tensor, Tensor] = torch.native_group_norm(x, weight, bias, *_extent(x), groups, eps)
    return found


def _dense(x: Tensor) -> Tensor:
    """In the layout that F.group_norm gives to its kernel: channels last stays on a CPU alone."""
    channels_last = x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)
    return x if channels_last else x.contiguous()


def _extent(x: Tensor) -> tuple[int, int, int]:
    """(B, C, H·W)."""
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


# The operator, of which autograd keeps the input, too


def _fused(norm: nn.GroupNorm, x: Tensor, embedding: Tensor | None, silu: bool) -> Tensor:
    y: Tensor = torch.ops.ddpm_dist.group_norm(
        _either(x), norm.weight, norm.bias, embedding, norm.num_groups, norm.eps, silu
    )[0]
    return y


def _either(x: Tensor) -> Tensor:
    """In one of the two layouts."""
    return x if x.is_contiguous(memory_format=CHANNELS_LAST) else x.contiguous()


torch.library.define(
    "ddpm_dist::group_norm",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? embedding, int groups, float eps, bool silu)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "ddpm_dist::group_norm_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor? embedding, Tensor mean, Tensor rstd, bool silu)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, embedding: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    given = None if embedding is None else embedding.contiguous()
    return kernels.group_norm(x, weight, bias, given, groups, eps, silu)


torch.library.impl("ddpm_dist::group_norm", "cuda", _forward)


@torch.library.register_fake("ddpm_dist::group_norm")
def _like(
    x: Tensor, weight: Tensor, bias: Tensor, embedding: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), mean, rstd


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, embedding: Tensor | None, mean: Tensor, rstd: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    layout = torch.contiguous_format if x.is_contiguous() else CHANNELS_LAST
    given = None if embedding is None else embedding.contiguous()
    grad = grad.contiguous(memory_format=layout)
    return kernels.group_norm_backward(grad, x, weight, bias, given, mean, rstd, silu)


torch.library.impl("ddpm_dist::group_norm_backward", "cuda", _backward)


@torch.library.register_fake("ddpm_dist::group_norm_backward")
def _backward_like(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, embedding: Tensor | None, mean: Tensor, rstd: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    of_embedding = x.new_empty(0) if embedding is None else embedding.new_empty(embedding.shape)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), of_embedding


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, embedding, _, _, silu = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, embedding, *output[1:])
    ctx.silu = silu


def _gradients(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: recomputed activations are there for one look
    found = torch.ops.ddpm_dist.group_norm_backward(grad, *saved, ctx.silu)
    return (*found[:3], None if saved[3] is None else found[3], None, None, None)


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("GroupNormSiLU is differentiable once (once_differentiable): its gradient has none")


torch.library.register_autograd("ddpm_dist::group_norm", _gradients, setup_context=_keep)
torch.library.register_autograd("ddpm_dist::group_norm_backward", _refuse)
