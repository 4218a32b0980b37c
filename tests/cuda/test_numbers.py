"""Random numbers, norms, upsampling and attention on the device, against references on the CPU in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_dist import rng
from ddpm_dist.engine.world import World
from ddpm_dist.models.arithmetic import UpsamplingConv2d, attention
from ddpm_dist.models.norms import GroupNormSiLU
from tests.cuda.ranks import Ranks

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PRECISIONS = {"fp32": (torch.float32, 1e-5), "bf16": (torch.bfloat16, 8e-3)}
"""dtype, and the relative error that its rounding allows."""


def distance(found: Tensor, exact: Tensor) -> float:
    """Relative L2; NaN never passes a comparison with it."""
    return float((found.detach().cpu().double() - exact.double()).norm() / exact.double().norm())


def random_numbers(world: World, seed: int, step: int, indices: Tensor) -> dict[str, Tensor]:
    indices = indices.to(world.device)
    return {
        "words": rng.philox(seed, 3, indices, 37, step),
        "uniform": rng.uniform(seed, 3, indices, (5, 3), step),
        "normal": rng.normal(seed, 3, indices, (3, 17, 19), step),
        "integers": rng.integers(seed, 3, indices, 1000, step),
    }


def test_random_numbers_are_the_cpu_s(alone: Ranks) -> None:
    indices = torch.cat([torch.arange(513), torch.tensor([2**31 - 1, 2**32, 2**40 + 7])])
    cpu = World(0, 1, 0, torch.device("cpu"), "gloo")
    for seed, step in ((0, 0), (1234567890123456789, 2**24 - 1)):
        expected = random_numbers(cpu, seed, step, indices)
        (found,) = alone(random_numbers, seed, step, indices)
        for name in ("words", "uniform", "integers"):
            assert torch.equal(found[name], expected[name]), name
        # log and cos in float64 may differ in their last bits, so float32 in one rounding, and seldom.
        difference = (found["normal"] - expected["normal"]).abs()
        assert difference.max() <= 5e-7
        assert (difference > 0).float().mean() < 1e-3


def norm_silu(world: World, channels: int, groups: int, layout: str, precision: str, times: int) -> dict[str, float]:
    """Relative errors of GroupNorm + SiLU and its gradients. times: channels of the embedding over those of x: 0 is
    none, 1 is added before, 2 scales and shifts."""
    generator = torch.Generator().manual_seed(channels)
    dtype, _ = PRECISIONS[precision]
    module = GroupNormSiLU(groups, channels, 1e-6)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(channels, generator=generator))
    x, grad = (torch.randn(3, channels, 16, 16, generator=generator) for _ in range(2))
    module, x, grad = module.to(dtype), x.to(dtype), grad.to(dtype)
    temb = (0.5 * torch.randn(3, times * channels, generator=generator)).to(dtype) if times else None
    weight, bias, exact_x = (t.detach().double().requires_grad_() for t in (module.weight, module.bias, x))
    added = temb.double()[:, :, None, None] if temb is not None and times == 1 else 0.0
    exact = F.group_norm(exact_x + added, groups, weight, bias, 1e-6)
    if temb is not None and times == 2:
        scale, shift = temb.double()[:, :, None, None].chunk(2, dim=1)
        exact = exact * (1 + scale) + shift
    exact = F.silu(exact)
    exact.backward(grad.double())

    module.to(world.device)
    on = x.to(world.device).to(memory_format=LAYOUTS[layout]).requires_grad_()
    temb = None if temb is None else temb.to(world.device)
    found = module(on * 1, temb)  # which may be added to in place
    found.backward(grad.to(world.device).to(memory_format=LAYOUTS[layout]))
    with torch.no_grad():
        alone = module(on * 1, temb)
    errors = {"output": distance(found, exact.detach()), "without gradients": distance(alone, exact.detach())}
    pairs = ((on, exact_x), (module.weight, weight), (module.bias, bias))
    for name, (one, other) in zip(("x", "weight", "bias"), pairs, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        errors[f"gradient of {name}"] = distance(one.grad, other.grad)
    return errors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("channels", "groups", "times"), [(128, 32, 0), (384, 32, 0), (512, 32, 1), (256, 32, 2), (8, 4, 1)]
)
def test_group_norm_and_silu(alone: Ranks, channels: int, groups: int, times: int, layout: str, precision: str) -> None:
    (errors,) = alone(norm_silu, channels, groups, layout, precision, times)
    for name, error in errors.items():
        # torch's own operations round once more around the embedding
        assert error < PRECISIONS[precision][1] * (2 if times else 1), (name, error)


def upsampling(world: World, layout: str, precision: str) -> dict[str, float]:
    generator = torch.Generator().manual_seed(1)
    dtype, _ = PRECISIONS[precision]
    module = UpsamplingConv2d(64).to(dtype)
    x, grad = torch.randn(2, 64, 8, 8, generator=generator), torch.randn(2, 64, 16, 16, generator=generator)
    x, grad = x.to(dtype), grad.to(dtype)
    weight, bias, exact_x = (t.detach().double().requires_grad_() for t in (module.weight, module.bias, x))
    exact = torch.conv2d(F.interpolate(exact_x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    exact.backward(grad.double())
    module.to(world.device)
    on = x.to(world.device).to(memory_format=LAYOUTS[layout]).requires_grad_()
    found = module(on)
    found.backward(grad.to(world.device))
    errors = {"output": distance(found, exact.detach())}
    for name, one, other in (("x", on, exact_x), ("weight", module.weight, weight), ("bias", module.bias, bias)):
        assert one.grad is not None
        assert other.grad is not None
        errors[f"gradient of {name}"] = distance(one.grad, other.grad)
    return errors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_upsampling_and_convolution_in_one(alone: Ranks, layout: str, precision: str) -> None:
    (errors,) = alone(upsampling, layout, precision)
    for name, error in errors.items():
        assert error < 1.5 * PRECISIONS[precision][1], (name, error)


def heads(world: World, head_channels: int, precision: str) -> dict[str, float]:
    generator = torch.Generator().manual_seed(head_channels)
    dtype, _ = PRECISIONS[precision]
    parts: list[Any] = [torch.randn(2, 512 // head_channels, 256, head_channels, generator=generator) for _ in range(4)]
    q, k, v, grad = (part.to(dtype) for part in parts)
    exact_inputs = [one.double().requires_grad_() for one in (q, k, v)]
    exact = torch.softmax((exact_inputs[0] * head_channels**-0.5) @ exact_inputs[1].mT, dim=-1) @ exact_inputs[2]
    exact.backward(grad.double())
    on = [one.to(world.device).requires_grad_() for one in (q, k, v)]
    found = attention(*on)
    found.backward(grad.to(world.device))
    errors = {"output": distance(found, exact.detach())}
    for name, one, other in zip("qkv", on, exact_inputs, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        errors[f"gradient of {name}"] = distance(one.grad, other.grad)
    return errors


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("head_channels", [32, 64, 128, 256, 512])
def test_attention_with_heads_of(alone: Ranks, head_channels: int, precision: str) -> None:
    (errors,) = alone(heads, head_channels, precision)
    for name, error in errors.items():
        assert error < 2 * PRECISIONS[precision][1], (name, error)
