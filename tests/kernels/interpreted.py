"""The kernels through Triton's interpreter, on the CPU, beside torch. Run by `test_kernels.py`, in a process whose
environment says TRITON_INTERPRET=1 before Triton is imported."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_dist import kernels, rng

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPES = {
    "one part": (2, 24, 8, 8, 4),  # B, C, H, W, groups: 6 channels a group
    "several parts": (1, 16, 48, 40, 4),
    "the network's odd one": (2, 384, 4, 4, 32),
    "wide": (1, 512, 2, 2, 32),
    "one group": (2, 20, 4, 4, 1),
    "a channel a group": (2, 12, 4, 4, 12),
    "one pixel": (3, 16, 1, 1, 4),
}


@pytest.mark.parametrize("seed", [0, 0x299F31D0A4093822, 2**64 - 1])
@pytest.mark.parametrize("top", [0, 2 << 24 | 5, 255 << 24 | 2**24 - 1])
def test_words_are_the_cpus(seed: int, top: int) -> None:
    indices = torch.tensor([0, 1, 2**32 - 1, 2**32, 0x0123456789ABCDEF, 2**63 - 1])
    assert torch.equal(kernels.words(indices, seed, top, 12), rng.philox(seed, top >> 24, indices, 12, top & 0xFFFFFF))


@pytest.mark.parametrize("number", [1, 2, 7, 48, 1030])
def test_normals_are_the_cpus_within_one_unit_in_the_last_place(number: int) -> None:
    indices = torch.tensor([3, 2**40, 0])
    ours, eager = kernels.normal(indices, 7, 2 << 24 | 9, number), rng.normal(7, 2, indices, (number,), 9)
    apart = (ours.view(torch.int32).long() - eager.view(torch.int32).long()).abs()
    assert apart.max() <= 1
    assert (apart > 0).sum() <= 1, "about one in 10⁸ is expected"


def reference(x: Tensor, weight: Tensor, bias: Tensor, embedding: Tensor | None, groups: int, silu: bool) -> Tensor:
    scale, shift = 0.0, 0.0
    if embedding is not None and embedding.shape[1] == x.shape[1]:
        x = x + embedding[:, :, None, None]
    elif embedding is not None:
        scale, shift = embedding[:, :, None, None].chunk(2, dim=1)
    z = F.group_norm(x, groups, weight, bias, 1e-6) * (1 + scale) + shift
    return F.silu(z) if silu else z


CASES = list(itertools.product(SHAPES, LAYOUTS, (torch.float32, torch.bfloat16), (0, 1, 2), (True, False)))


@pytest.mark.parametrize(("name", "layout", "dtype", "embedded", "silu"), CASES)
def test_group_norm_is_torchs(name: str, layout: torch.memory_format, dtype: torch.dtype, embedded: int, silu: bool) -> None:
    """Against float64 from the same rounded inputs: within float32's rounding, or half a unit of bfloat16's."""
    b, c, h, w, groups = SHAPES[name]
    generator = torch.Generator().manual_seed(c + h)

    def drawn(*shape: int, shift: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator) + shift).to(dtype)

    x, grad = (drawn(b, c, h, w, shift=s).contiguous(memory_format=layout) for s in (3.0, 0.0))
    weight, bias = drawn(c, shift=1.0), drawn(c)
    embedding = drawn(b, embedded * c) if embedded else None
    given = [x, weight, bias, *([] if embedding is None else [embedding])]
    exact = [one.double().requires_grad_() for one in given]
    y = reference(*exact[:3], exact[3] if embedded else None, groups, silu)
    y.backward(grad.double())

    found, mean, rstd = kernels.group_norm(x, weight, bias, embedding, groups, 1e-6, silu)
    grads = kernels.group_norm_backward(grad, x, weight, bias, embedding, mean, rstd, silu)
    assert found.stride() == x.stride()
    assert grads[0].stride() == x.stride()
    assert grads[3].numel() == (0 if embedding is None else embedding.numel())
    relative = 2e-5 if dtype == torch.float32 else 2**-8
    for ours, wanted in zip((found, *grads), (y, *(one.grad for one in exact)), strict=False):
        assert wanted is not None
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), wanted, rtol=relative, atol=relative * max(1.0, wanted.abs().max().item()))
