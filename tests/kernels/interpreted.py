"""The kernels through Triton's interpreter, on the CPU, beside torch. Run by `test_kernels.py`, in a process whose
environment says TRITON_INTERPRET=1 before Triton is imported."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_dist import device as devices, kernels, rng
from ddpm_dist.config import ModelConfig
from ddpm_dist.models import UNet, UNetConfig, norms

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
def test_group_norm_is_torchs(
    name: str, layout: torch.memory_format, dtype: torch.dtype, embedded: int, silu: bool
) -> None:
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
        torch.testing.assert_close(
            ours.double(), wanted, rtol=relative, atol=relative * max(1.0, wanted.abs().max().item())
        )


# The operators, as they are on CUDA


@pytest.fixture(scope="module", autouse=True)
def operators() -> None:
    """What is registered for CUDA, for the CPU as well: the interpreter takes its tensors."""
    for module, names in (
        (norms, {"group_norm": "_forward", "group_norm_backward": "_backward"}),
        (rng, {"normal": "_fused_normal", "words": "_fused_words"}),
    ):
        for operator, function in names.items():
            torch.library.impl(f"ddpm_dist::{operator}", "cpu")(getattr(module, function))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("embedded", [0, 1, 2])
def test_operators_are_what_torch_expects(layout: torch.memory_format, embedded: int) -> None:
    """Schema, fake tensors, autograd and tracing: what torch.compile rests on."""
    x = torch.randn(2, 8, 3, 3).contiguous(memory_format=layout).requires_grad_()
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    embedding = torch.randn(2, embedded * 8, requires_grad=True) if embedded else None
    torch.library.opcheck(torch.ops.ddpm_dist.group_norm, (x, weight, bias, embedding, 4, 1e-6, True))
    for name in ("words", "normal"):
        torch.library.opcheck(getattr(torch.ops.ddpm_dist, name), (torch.arange(3), -1, 2 << 24, 10))


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    return lambda on: monkeypatch.setattr(devices, "fused", lambda device: on)


def gradients(unet: UNet, layout: torch.memory_format) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 3, 8, 8, generator=generator).contiguous(memory_format=layout).requires_grad_()
    out = unet(x, torch.tensor([700]))
    out.square().mean().backward()
    found = [out.detach(), x.grad, *(p.grad for p in unet.parameters())]
    unet.zero_grad()
    return [one for one in found if one is not None]


@pytest.mark.parametrize(
    ("way", "layout", "scale_shift"),
    [("eager", torch.channels_last, False), ("traced", torch.channels_last, True), ("recomputed", LAYOUTS[0], False)],
)
def test_the_network_is_the_same_with_them(
    fused: Callable[[bool], None], layout: torch.memory_format, way: str, scale_shift: bool
) -> None:
    model = ModelConfig(
        channels=4,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(8,),
        norm_groups=2,
        scale_shift=scale_shift,
    )
    unet = UNet(UNetConfig.from_recipe(model, 8, 3, False)).initialize(0)
    generator = torch.Generator().manual_seed(2)
    for parameter in unet.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    fused(False)
    plain = gradients(unet, layout)
    fused(True)
    if way == "recomputed":
        unet.checkpoint([0])
    ours = gradients(torch.compile(unet, backend="aot_eager", fullgraph=True) if way == "traced" else unet, layout)
    assert len(ours) == len(plain)
    for found, wanted in zip(ours, plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * max(1.0, wanted.abs().max().item()))


def test_noise_by_the_operators_is_the_noise_of_the_cpu(fused: Callable[[bool], None]) -> None:
    indices = torch.tensor([5, 2**33])
    eager = (
        rng.normal(2**64 - 1, 2, indices, (3, 5), 9),
        rng.uniform(1, 3, indices, (7,)),
        rng.integers(4, 5, indices, 1000),
    )
    fused(True)
    ours = (
        rng.normal(2**64 - 1, 2, indices, (3, 5), 9),
        rng.uniform(1, 3, indices, (7,)),
        rng.integers(4, 5, indices, 1000),
    )
    torch.testing.assert_close(ours[0], eager[0], rtol=1.2e-7, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], eager[1:], strict=True))


def test_a_second_derivative_is_refused(fused: Callable[[bool], None]) -> None:
    fused(True)
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad((norms.GroupNormSiLU(2, 4)(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (gradient**2).sum().backward()
