"""GroupNorm with what goes around it in a residual block (time embedding, SiLU), forward and backward.

For images in either memory layout, contiguous or channels last, any number of channels and groups. Sums are float32, in
an order that depends on shapes alone, without atomics: the same bits each time. A program reads some pixels of some
groups. Where an image has more pixels than a program reads, one launch sums and another one applies; small images
take one launch.

With x̂ = (x + added - mean) / σ per group, z = a x̂ + d per channel and y = z or silu(z): the gradient of x is
(a z' - mean(a z') - x̂ mean(a z' x̂)) / σ, where z' is that of z and the means are over a group.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
"""Elements that a program holds at once."""
SHARE = 32768
"""Elements that it reads, up to the number of parts below."""
MOST_PARTS = 32
WARPS = 8
BOTH, SUM, APPLY = 0, 1, 2
"""Phases of a launch."""
NONE, ADDED, SCALE_SHIFT = 0, 1, 2
"""What the embedding is."""


@triton.jit
def _channels(e, w, b, image, C, G, CG: tl.constexpr, CG2: tl.constexpr, GB: tl.constexpr, HOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of this program's groups: (channels, their mask, added, 1 + scale, a, d), all [GB, CG2]."""
    g, inner = tl.program_id(1) * GB + tl.arange(0, GB), tl.arange(0, CG2)
    c = g[:, None] * CG + inner[None, :]
    there = (g[:, None] < G) & (inner[None, :] < CG)
    weight = tl.load(w + c, there, 0.0).to(tl.float32)
    bias = tl.load(b + c, there, 0.0).to(tl.float32)
    added, scale = tl.zeros_like(weight), tl.zeros_like(weight) + 1.0
    if HOW == 1:
        added = tl.load(e + image * C + c, there, 0.0).to(tl.float32)
    if HOW == 2:
        scale = 1.0 + tl.load(e + image * 2 * C + c, there, 0.0).to(tl.float32)
        bias = bias * scale + tl.load(e + image * 2 * C + C + c, there, 0.0).to(tl.float32)
        weight = weight * scale
    return c, there, added, scale, weight, bias


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x, w, b, e, y, means, rstds, sums, eps, C, HW, G, share, parts, pixel, channel,
    CG: tl.constexpr, CG2: tl.constexpr, GB: tl.constexpr, PB: tl.constexpr, HOW: tl.constexpr, SILU: tl.constexpr,
    PHASE: tl.constexpr,
):  # fmt: skip
    """sums: [B, parts, 2, G], mean and sum of squared differences from it, of each part of the pixels."""
    image, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    g = tl.program_id(1) * GB + tl.arange(0, GB)
    c, there, added, _, a, d = _channels(e, w, b, image, C, G, CG, CG2, GB, HOW)
    x, y = x + image * C * HW, y + image * C * HW
    low, high = part * share, tl.minimum((part + 1) * share, HW)
    mean, m2, count = tl.zeros([GB], tl.float32), tl.zeros([GB], tl.float32), 0.0
    if PHASE != 2:
        for start in range(low, high, PB):
            p = start + tl.arange(0, PB)
            mask = (p < high)[:, None, None] & there[None, :, :]
            at = p[:, None, None] * pixel + c[None, :, :] * channel
            v = tl.load(x + at, mask, 0.0).to(tl.float32) + added[None, :, :]
            n = (tl.minimum(high - start, PB) * CG).to(tl.float32)
            v = tl.where(mask, v, 0.0)
            here = tl.sum(tl.sum(v, 2), 0) / n
            off = tl.where(mask, v - here[None, :, None], 0.0)
            apart = here - mean
            m2 += tl.sum(tl.sum(off * off, 2), 0) + apart * apart * (count * n / (count + n))
            mean += apart * (n / (count + n))
            count += n
    if PHASE == 1:
        at = sums + (image * parts + part) * 2 * G + g
        tl.store(at, mean, g < G)
        tl.store(at + G, m2, g < G)
    if PHASE == 2:
        for other in range(parts):
            at = sums + (image * parts + other) * 2 * G + g
            n = ((tl.minimum((other + 1) * share, HW) - other * share) * CG).to(tl.float32)
            apart = tl.load(at, g < G, 0.0) - mean
            m2 += tl.load(at + G, g < G, 0.0) + apart * apart * (count * n / (count + n))
            mean += apart * (n / (count + n))
            count += n
    if PHASE != 1:
        rstd = 1.0 / tl.sqrt_rn(m2 / count + eps)
        if part == 0:
            tl.store(means + image * G + g, mean, g < G)
            tl.store(rstds + image * G + g, rstd, g < G)
        for start in range(low, high, PB):
            p = start + tl.arange(0, PB)
            mask = (p < high)[:, None, None] & there[None, :, :]
            at = p[:, None, None] * pixel + c[None, :, :] * channel
            v = tl.load(x + at, mask, 0.0).to(tl.float32) + added[None, :, :]
            z = (v - mean[None, :, None]) * rstd[None, :, None] * a[None, :, :] + d[None, :, :]
            if SILU:
                z = z * tl.sigmoid(z)
            tl.store(y + at, z.to(y.dtype.element_ty), mask)


@triton.jit
def _z_gradient(x, dy, at, mask, added, mean, rstd, a, d, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """(x̂, gradient of z) of a tile [PB, GB, CG2], 0 outside."""
    v = tl.load(x + at, mask, 0.0).to(tl.float32) + added[None, :, :]
    normalised = tl.where(mask, (v - mean[None, :, None]) * rstd[None, :, None], 0.0)
    grad = tl.load(dy + at, mask, 0.0).to(tl.float32)
    if SILU:
        z = normalised * a[None, :, :] + d[None, :, :]
        s = tl.sigmoid(z)
        grad = grad * s * (1.0 + z * (1.0 - s))
    return normalised, grad


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    x, w, b, e, dy, dx, de, means, rstds, sums, totals, C, HW, G, share, parts, pixel, channel,
    CG: tl.constexpr, CG2: tl.constexpr, GB: tl.constexpr, PB: tl.constexpr, HOW: tl.constexpr, SILU: tl.constexpr,
    PHASE: tl.constexpr,
):  # fmt: skip
    """sums: [B, parts, 3, C], of z', z' x̂ and x̂ over each part of the pixels. totals: [B, 2, C], what each image adds
    to the gradients of weight and bias."""
    image, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    g = tl.program_id(1) * GB + tl.arange(0, GB)
    c, there, added, scale, a, d = _channels(e, w, b, image, C, G, CG, CG2, GB, HOW)
    mean = tl.load(means + image * G + g, g < G, 0.0)
    rstd = tl.load(rstds + image * G + g, g < G, 0.0)
    x, dy, dx = x + image * C * HW, dy + image * C * HW, dx + image * C * HW
    low, high = part * share, tl.minimum((part + 1) * share, HW)
    s1, s2, s3 = tl.zeros([GB, CG2], tl.float32), tl.zeros([GB, CG2], tl.float32), tl.zeros([GB, CG2], tl.float32)
    if PHASE != 2:
        for start in range(low, high, PB):
            p = start + tl.arange(0, PB)
            mask = (p < high)[:, None, None] & there[None, :, :]
            at = p[:, None, None] * pixel + c[None, :, :] * channel
            normalised, grad = _z_gradient(x, dy, at, mask, added, mean, rstd, a, d, SILU)
            s1 += tl.sum(grad, 0)
            s2 += tl.sum(grad * normalised, 0)
            s3 += tl.sum(normalised, 0)
    if PHASE == 1:
        at = sums + (image * parts + part) * 3 * C + c
        tl.store(at, s1, there)
        tl.store(at + C, s2, there)
        tl.store(at + 2 * C, s3, there)
    if PHASE == 2:
        for other in range(parts):
            at = sums + (image * parts + other) * 3 * C + c
            s1 += tl.load(at, there, 0.0)
            s2 += tl.load(at + C, there, 0.0)
            s3 += tl.load(at + 2 * C, there, 0.0)
    if PHASE != 1:
        elements = HW * CG * 1.0
        flat, along = tl.sum(a * s1, 1) / elements, tl.sum(a * s2, 1) / elements
        if part == 0:
            tl.store(totals + image * 2 * C + c, scale * s2, there)
            tl.store(totals + image * 2 * C + C + c, scale * s1, there)
            if HOW == 1:
                added_grad = rstd[:, None] * (a * s1 - flat[:, None] * (HW * 1.0) - along[:, None] * s3)
                tl.store(de + image * C + c, added_grad.to(de.dtype.element_ty), there)
            if HOW == 2:
                weight = tl.load(w + c, there, 0.0).to(tl.float32)
                bias = tl.load(b + c, there, 0.0).to(tl.float32)
                tl.store(de + image * 2 * C + c, (weight * s2 + bias * s1).to(de.dtype.element_ty), there)
                tl.store(de + image * 2 * C + C + c, s1.to(de.dtype.element_ty), there)
        for start in range(low, high, PB):
            p = start + tl.arange(0, PB)
            mask = (p < high)[:, None, None] & there[None, :, :]
            at = p[:, None, None] * pixel + c[None, :, :] * channel
            normalised, grad = _z_gradient(x, dy, at, mask, added, mean, rstd, a, d, SILU)
            found = grad * a[None, :, :] - flat[None, :, None] - normalised * along[None, :, None]
            tl.store(dx + at, (found * rstd[None, :, None]).to(dx.dtype.element_ty), mask)


@triton.jit
def _weights(totals, dw, db, images, C, CB: tl.constexpr, IB: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of `totals` over the images."""
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    weight, bias = tl.zeros([CB], tl.float32), tl.zeros([CB], tl.float32)
    for start in range(0, images, IB):
        image = start + tl.arange(0, IB)
        at = totals + image[:, None] * 2 * C + c[None, :]
        mask = (image < images)[:, None] & (c < C)[None, :]
        weight += tl.sum(tl.load(at, mask, 0.0), 0)
        bias += tl.sum(tl.load(at + C, mask, 0.0), 0)
    tl.store(dw + c, weight.to(dw.dtype.element_ty), c < C)
    tl.store(db + c, bias.to(db.dtype.element_ty), c < C)


@dataclass(frozen=True)
class _Plan:
    """How the elements of x [B, C, H, W] are dealt to programs."""

    images: int
    sizes: tuple[int, ...]
    """C, HW, groups, pixels and number of the parts, strides of a pixel and of a channel."""
    tile: dict[str, int]

    @classmethod
    def of(cls, x: Tensor, groups: int) -> "_Plan":
        images, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
        of_group = channels // groups
        padded = triton.next_power_of_2(of_group)
        by_pixel = x.is_contiguous()  # neighbours in memory are pixels, not channels
        at_once = 1 if by_pixel else min(triton.next_power_of_2(groups), max(1, 128 // padded))
        rows = min(max(1, TILE // (at_once * padded)), triton.next_power_of_2(pixels))
        share = max(rows, SHARE // (at_once * padded), triton.cdiv(triton.cdiv(pixels, MOST_PARTS), rows) * rows)
        strides = (1, pixels) if by_pixel else (channels, 1)
        sizes = (channels, pixels, groups, share, triton.cdiv(pixels, share), *strides)
        return cls(images, sizes, {"CG": of_group, "CG2": padded, "GB": at_once, "PB": rows})

    @property
    def parts(self) -> int:
        """Programs that share the pixels of an image."""
        return self.sizes[4]

    def launch(self, kernel: Any, x: Tensor, *arguments: Any, **constants: Any) -> None:
        grid = (self.images * self.parts, triton.cdiv(self.sizes[2], self.tile["GB"]))
        with torch.cuda.device_of(x):
            for phase in (BOTH,) if self.parts == 1 else (SUM, APPLY):
                kernel[grid](x, *arguments, *self.sizes, **self.tile, **constants, PHASE=phase, num_warps=WARPS)


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, embedding: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y like x, mean and 1/σ [B, groups] float32) for x [B, C, H, W], contiguous or channels last.

    embedding: [B, C] is added to x; the halves of [B, 2C] scale by 1 + and shift what is normalised.
    """
    plan, y = _Plan.of(x, groups), torch.empty_like(x)
    mean, rstd = (torch.empty(x.shape[0], groups, dtype=torch.float32, device=x.device) for _ in range(2))
    sums = torch.empty(x.shape[0], plan.parts, 2, groups, dtype=torch.float32, device=x.device)
    given = x if embedding is None else embedding
    plan.launch(
        _forward, x, weight, bias, given, y, mean, rstd, sums, eps, HOW=_how(x, embedding), SILU=silu
    )  # fmt: skip
    return y, mean, rstd


def group_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, embedding: Tensor | None, mean: Tensor, rstd: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and embedding (empty without one), from that of y, in x's layout."""
    groups, channels = mean.shape[1], x.shape[1]
    plan, dx = _Plan.of(x, groups), torch.empty_like(x)
    sums = torch.empty(x.shape[0], plan.parts, 3, channels, dtype=torch.float32, device=x.device)
    totals = torch.empty(x.shape[0], 2, channels, dtype=torch.float32, device=x.device)
    given = x if embedding is None else embedding
    de = x.new_empty(0) if embedding is None else torch.empty_like(embedding)
    plan.launch(
        _backward, x, weight, bias, given, grad, dx, de, mean, rstd, sums, totals, HOW=_how(x, embedding), SILU=silu
    )  # fmt: skip
    dw, db = torch.empty_like(weight), torch.empty_like(bias)
    with torch.cuda.device_of(x):
        _weights[(triton.cdiv(channels, 64),)](totals, dw, db, x.shape[0], channels, CB=64, IB=32)
    return dx, dw, db, de


def _how(x: Tensor, embedding: Tensor | None) -> int:
    if embedding is None:
        return NONE
    return ADDED if embedding.shape[1] == x.shape[1] else SCALE_SHIFT
