"""Products of bfloat16 tensors in the arithmetic that the processor is faster at.

Some processors have bfloat16 dot products at half the rate of their float32 multiply-adds: on a Xeon of the fifth
generation whose AMX is hidden by the hypervisor a convolution runs at 83 GFLOP/s a core in bfloat16 and at 150 in
float32. There, tensors stay bfloat16 (in memory, and for autograd) but are widened for the product and rounded
once after it, which is also what the bfloat16 instructions do, as they accumulate in float32.

Which way is taken depends on the kind of processor alone, never on a measurement, so that a run repeats its bits.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDE_ELEMENTS = 2**20
"""Elements that are widened at once, 4 MB in float32: all of a batch at 8², four images of 128 channels at 32²."""

WHOLE_ATTENTION = 1024
"""Pixels up to which a bfloat16 attention holds all its weights at once on a CPU: torch's flash attention takes twice
the time there at 256 pixels, three times at 64, and as much at 1,024."""


def bf16_products_are_slow(cpuinfo: str) -> bool:
    """Whether a processor's bfloat16 dot products are slower than its float32 ones; `cpuinfo` is /proc/cpuinfo.

    True on x86 without bfloat16 instructions, and on Intel's with AVX512_BF16 but without AMX (2 cycles an
    instruction of 32 products, where float32 does 2 of 16 a cycle); AMD's take 1 cycle.
    """
    lines = cpuinfo.partition("\n\n")[0].splitlines()
    facts = {key.strip(): value for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    fast = "amx_bf16" in flags or ("avx512_bf16" in flags and "AMD" in facts.get("vendor_id", ""))
    return "avx2" in flags and not fast


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return ""


SLOW_BF16 = bf16_products_are_slow(_cpuinfo())
"""Of this machine."""


def widens(x: Tensor) -> bool:
    """Whether products of this tensor, of any shape, are computed in float32 although it is bfloat16."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and SLOW_BF16


class Conv2d(nn.Conv2d):
    """nn.Conv2d, in the faster arithmetic."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] to [B, C', H', W'], in x's dtype."""
        if widens(x):
            return _WideConvolution.apply(x, self.weight, self.bias, self.stride, self.padding, False)
        return super().forward(x)


class Linear(nn.Linear):
    """nn.Linear, in the faster arithmetic."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] to [..., C'], in x's dtype."""
        if widens(x):
            return _WideLinear.apply(x, self.weight, self.bias)
        return super().forward(x)


class UpsamplingConv2d(nn.Conv2d):
    """Nearest neighbour ×2 followed by a 3×3 convolution, as one transposed convolution with 4/9 of the products.

    Each pixel that the convolution sees is one of a 2×2 block of equals, so the weights that fall on a block can
    be added first: 3 rows of weights become 4 of a transposed convolution with stride 2, and so the columns.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        out_channels, in_channels = self.weight.shape[:2]
        exact = torch.promote_types(x.dtype, torch.float32)
        rows = self.weight.transpose(0, 1).reshape(-1, 9).to(exact)
        kernel = (rows @ _spread(exact, x.device)).view(in_channels, out_channels, 4, 4)
        if widens(x):
            return _WideConvolution.apply(x, kernel, self.bias, (2, 2), (1, 1), True)
        return F.conv_transpose2d(x, kernel.to(x.dtype), self.bias, stride=2, padding=1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ · d^-0.5) v of [B, heads, N, d], in the faster arithmetic."""
    if widens(q):
        return _WideAttention.apply(q, k, v)
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[2] <= WHOLE_ATTENTION:
        return torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def _spread(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[9, 16]: which of the 4×4 weights of the transposed convolution each of the 3×3 is added to.

    The weight a of a row meets, at output pixel p, the input pixel (p + a - 1) // 2; a transposed convolution with
    padding 1 brings the input pixel i to p = 2i + u - 1 by its weight u. So a adds to u = 2 - a and u = 3 - a.
    """
    weights = torch.eye(3, dtype=dtype, device=device).flip(0)
    row = F.pad(weights, (0, 1)) + F.pad(weights, (1, 0))
    return torch.kron(row, row)


class _WideConvolution(torch.autograd.Function):
    """A few images at a time, so that their float32 copies stay in the cache and take little memory."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: Any, padding: Any, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding, [1, 1], transposed, [0, 0], 1
        wide = weight.float(), bias.float()
        parts = x.split(_images_at_once(x, len(bias), stride, transposed))
        return _cat([torch.ops.aten.convolution(part.float(), *wide, *ctx.geometry).to(x.dtype) for part in parts])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, weight), stride, transposed = ctx.saved_tensors, ctx.geometry[0], ctx.geometry[3]
        wide, biases = weight.float(), [grads[0].shape[1]]
        at_once = _images_at_once(x, grads[0].shape[1], stride, transposed)
        x_grads: list[Tensor] = []
        weight_grad, bias_grad = torch.zeros_like(wide), torch.zeros(biases)
        for part, grad in zip(x.split(at_once), grads[0].split(at_once), strict=True):
            x_grad, *summands = torch.ops.aten.convolution_backward(
                grad.float(), part.float(), wide, biases, *ctx.geometry, (ctx.needs_input_grad[0], True, True)
            )
            if x_grad is not None:
                x_grads.append(x_grad.to(x.dtype))
            weight_grad.add_(summands[0])
            bias_grad.add_(summands[1])
        return _cat(x_grads) if x_grads else None, weight_grad.to(weight.dtype), bias_grad.to(x.dtype), None, None, None


def _images_at_once(x: Tensor, out_channels: int, stride: Sequence[int], transposed: bool) -> int:
    """Images whose input and output have at most WIDE_ELEMENTS elements; at least one."""
    pixels = x.shape[2] * x.shape[3]
    out_pixels = pixels * stride[0] * stride[1] if transposed else pixels // (stride[0] * stride[1])
    return max(1, WIDE_ELEMENTS // (x.shape[1] * pixels + out_channels * out_pixels))


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float(), bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad = grads[0].float()
        rows = grad.flatten(0, -2)
        return (
            (grad @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None,
            (rows.T @ x.float().flatten(0, -2)).to(x.dtype) if ctx.needs_input_grad[1] else None,
            rows.sum(0).to(x.dtype) if ctx.needs_input_grad[2] else None,
        )


class _WideAttention(torch.autograd.Function):
    """Flash attention's two kernels for the CPU, which F.scaled_dot_product_attention calls as well."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q.float(), k.float(), v.float())
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, logsumexp = ctx.saved_tensors
        wide = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grads[0].float(), q.float(), k.float(), v.float(), out.float(), logsumexp, 0.0, False
        )
        return tuple(grad.to(q.dtype) for grad in wide)
