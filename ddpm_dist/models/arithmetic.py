"""Products of bfloat16 tensors in the arithmetic that the processor is faster at.

Some processors have bfloat16 dot products at half the rate of their float32 multiply-adds: on a Xeon of the fifth
generation whose AMX is hidden by the hypervisor a convolution runs at 83 GFLOP/s a core in bfloat16 and at 150 in
float32. There, tensors stay bfloat16 (in memory, and for autograd) but are widened for the product and rounded
once after it, which is also what the bfloat16 instructions do, as they accumulate in float32.

Which way is taken depends on the kind of processor alone, never on a measurement, so that a run repeats its bits.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@cache
def bf16_products_are_slow() -> bool:
    """Whether this machine's bfloat16 dot products are slower than its float32 ones.

    True on x86 without bfloat16 instructions, and on Intel's with AVX512_BF16 but without AMX (2 cycles an
    instruction, 32 products each, where float32 does 2 x 16 a cycle); AMD's take 1 cycle.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return False
    facts = {key.strip(): value for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    fast = "amx_bf16" in flags or ("avx512_bf16" in flags and "AMD" in facts.get("vendor_id", ""))
    return "avx2" in flags and not fast


def widens(x: Tensor) -> bool:
    """Whether products of this tensor are computed in float32 although it is bfloat16."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and bf16_products_are_slow()


class Conv2d(nn.Conv2d):
    """nn.Conv2d, in the faster arithmetic."""

    def forward(self, x: Tensor) -> Tensor:
        if widens(x):
            return _WideConv2d.apply(x, self.weight, self.bias, self.stride, self.padding)
        return super().forward(x)


class Linear(nn.Linear):
    """nn.Linear, in the faster arithmetic."""

    def forward(self, x: Tensor) -> Tensor:
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
        rows = self.weight.transpose(0, 1).reshape(-1, 9).float()
        kernel = (rows @ _spread(x.device)).view(in_channels, out_channels, 4, 4)
        if widens(x):
            bias = None if self.bias is None else self.bias.float()
            return F.conv_transpose2d(x.float(), kernel, bias, stride=2, padding=1).to(x.dtype)
        return F.conv_transpose2d(x, kernel.to(x.dtype), self.bias, stride=2, padding=1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ · d^-0.5) v of [B, heads, N, d], in the faster arithmetic."""
    return _WideAttention.apply(q, k, v) if widens(q) else F.scaled_dot_product_attention(q, k, v)


@cache
def _spread(device: torch.device) -> Tensor:
    """[9, 16]: which of the 4×4 weights of the transposed convolution each of the 3×3 is added to.

    The weight a of a row meets, at output pixel p, the input pixel (p + a - 1) // 2; a transposed convolution with
    padding 1 brings the input pixel i to p = 2i + u - 1 by its weight u. So a adds to u = 2 - a and u = 3 - a.
    """
    row = torch.tensor([[0.0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])
    return torch.kron(row, row).to(device)


class _WideConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: Any, padding: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x.float(), weight.float(), bias.float(), stride, padding).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wide = torch.ops.aten.convolution_backward(
            grads[0].float(), x.float(), weight.float(), [weight.shape[0]], ctx.stride, ctx.padding, [1, 1],
            False, [0, 0], 1, ctx.needs_input_grad[:3],
        )  # fmt: skip
        return *(None if grad is None else grad.to(x.dtype) for grad in wide), None, None


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
