"""Wide products of bfloat16 tensors against torch's own, in value and gradient; and the folded upsampling."""

import pytest
import torch
import torch.nn.functional as F

from ddpm_dist.models import arithmetic
from ddpm_dist.models.arithmetic import Conv2d, Linear, UpsamplingConv2d, attention
from tests.models.networks import distance, inputs, random_unet, randomize, tiny_config

BF16_ROUNDING = 2**-8
"""Relative size of one rounding of the largest value."""


@pytest.fixture(params=[True, False], ids=["wide", "native"])
def slow_bf16(request, monkeypatch):
    """The machine as one whose bfloat16 products are slow, and as one whose aren't."""
    monkeypatch.setattr(arithmetic, "SLOW_BF16", request.param)
    return request.param


def values_and_gradients(call, tensors):
    """Output and gradients of every tensor, for a fixed gradient of the output that bfloat16 holds exactly."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = call(*leaves)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    out.backward(gradient.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def check(module_call, reference_call, tensors, roundings=1):
    """bfloat16 results against those of torch in float64 on the same (bfloat16) values: some roundings apart."""
    low = [tensor.bfloat16() for tensor in tensors]
    ours = values_and_gradients(module_call, low)
    exact = values_and_gradients(reference_call, [tensor.double() for tensor in low])
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert mine.shape == theirs.shape
        assert distance(mine.double(), theirs) < roundings * BF16_ROUNDING


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 0), (1, 1, 0)])
def test_convolution(kernel, stride, padding, slow_bf16):
    conv = Conv2d(8, 12, kernel, stride, padding)
    torch.manual_seed(0)
    tensors = torch.randn(3, 8, 9, 9), torch.randn_like(conv.weight), torch.randn(12)
    ours = lambda x, w, b: torch.func.functional_call(conv, {"weight": w, "bias": b}, x)  # noqa: E731
    # Kernels for processors without bfloat16 instructions, which "native" takes there, round on their way, too.
    reference = lambda x, w, b: F.conv2d(x, w, b, stride, padding)  # noqa: E731
    check(ours, reference, tensors, roundings=1 if slow_bf16 else 3)


def test_a_batch_in_parts_is_the_batch(monkeypatch):
    """Widened one, two or all images at a time: the same output, and gradients up to the order of sums."""
    monkeypatch.setattr(arithmetic, "SLOW_BF16", True)
    conv, up = randomize(Conv2d(8, 4, 3, stride=2, padding=1)).bfloat16(), randomize(UpsamplingConv2d(4)).bfloat16()
    torch.manual_seed(0)
    x = torch.randn(5, 8, 6, 6).bfloat16()
    results = []
    for elements in (1, 2 * (8 * 36 + 4 * 9), 2**20):
        monkeypatch.setattr(arithmetic, "WIDE_ELEMENTS", elements)
        conv.zero_grad()
        up.zero_grad()
        results.append(values_and_gradients(lambda x: up(conv(x)), [x]))
        results[-1] += [conv.weight.grad, conv.bias.grad, up.weight.grad]
    for parts in results[:2]:
        assert torch.equal(parts[0], results[2][0])
        assert all(distance(a.float(), b.float()) < BF16_ROUNDING for a, b in zip(parts, results[2], strict=True))


def test_linear(slow_bf16):
    linear = Linear(8, 12)
    torch.manual_seed(0)
    tensors = torch.randn(3, 5, 8), torch.randn(12, 8), torch.randn(12)
    ours = lambda x, w, b: torch.func.functional_call(linear, {"weight": w, "bias": b}, x)  # noqa: E731
    check(ours, F.linear, tensors)


def test_attention(slow_bf16):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 2, 20, 8) for _ in range(3)]
    reference = lambda q, k, v: torch.softmax(q @ k.mT * 8**-0.5, dim=-1) @ v  # noqa: E731
    low = [tensor.bfloat16() for tensor in tensors]
    ours = values_and_gradients(attention, low)
    exact = values_and_gradients(reference, [tensor.double() for tensor in low])
    for mine, theirs in zip(ours, exact, strict=True):
        assert distance(mine.double(), theirs) < 3 * BF16_ROUNDING  # the output is rounded before the backward pass


def test_upsampling_is_nearest_neighbour_and_convolution():
    """In float64 the transposed convolution agrees to the last digits, with gradients."""
    conv = randomize(UpsamplingConv2d(6)).double()
    torch.manual_seed(0)
    tensors = torch.randn(2, 6, 5, 7).double(), conv.weight.detach(), conv.bias.detach()
    ours = lambda x, w, b: torch.func.functional_call(conv, {"weight": w, "bias": b}, x)  # noqa: E731
    reference = lambda x, w, b: F.conv2d(F.interpolate(x, scale_factor=2.0), w, b, padding=1)  # noqa: E731
    pairs = zip(values_and_gradients(ours, tensors), values_and_gradients(reference, tensors), strict=True)
    assert all(distance(mine, theirs) < 1e-13 for mine, theirs in pairs)


def test_upsampling_in_bf16(slow_bf16):
    conv = UpsamplingConv2d(6)
    torch.manual_seed(0)
    tensors = torch.randn(2, 6, 5, 5), torch.randn(6, 6, 3, 3), torch.randn(6)
    ours = lambda x, w, b: torch.func.functional_call(conv, {"weight": w, "bias": b}, x)  # noqa: E731
    reference = lambda x, w, b: F.conv2d(F.interpolate(x, scale_factor=2.0), w, b, padding=1)  # noqa: E731
    check(ours, reference, tensors, roundings=1 if slow_bf16 else 2)  # the native kernel is rounded when it is folded


def test_a_bf16_network_is_as_near_to_float32_either_way(monkeypatch):
    config = tiny_config()
    unet = random_unet(config).eval()
    x, t, _ = inputs(config, 2)
    exact = unet(x, t)
    errors = {}
    for slow in (True, False):
        monkeypatch.setattr(arithmetic, "SLOW_BF16", slow)
        low = random_unet(config).eval().bfloat16()(x, t)
        assert low.dtype == torch.bfloat16
        errors[slow] = distance(low.float(), exact)
    assert 0 < errors[True] < 0.03
    assert 0 < errors[False] < 0.03


@pytest.mark.parametrize(
    ("cpuinfo", "slow"),
    [
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx2 avx512f avx512_bf16\n\nvendor_id : x", True),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile\n", False),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", False),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2\n", True),
        ("CPU implementer\t: 0x41\nFeatures\t: fp asimd bf16\n", False),
        ("", False),
    ],
    ids=["xeon", "xeon-amx", "epyc", "old", "arm", "unknown"],
)
def test_the_choice_depends_on_the_kind_of_processor(cpuinfo, slow):
    assert arithmetic.bf16_products_are_slow(cpuinfo) == slow


def test_float32_is_left_alone(slow_bf16):
    assert not arithmetic.widens(torch.zeros(1))
    assert arithmetic.widens(torch.zeros(1, dtype=torch.bfloat16)) == slow_bf16
