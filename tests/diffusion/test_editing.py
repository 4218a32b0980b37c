"""Interpolation, variations and inpainting."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import RePaintScheduler

from ddpm_dist import rng
from ddpm_dist.config import SamplingConfig
from ddpm_dist.diffusion.editing import _repaint_plan, inpaint, interpolate, variations
from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.diffusion.samplers import sample
from ddpm_dist.diffusion.schedules import make_betas
from ddpm_dist.errors import ConfigError, SamplingError
from ddpm_dist.rng import Purpose

SHAPE = (1, 6, 6)
DDPM = SamplingConfig(sampler="ddpm")


def process(timesteps=100):
    return GaussianDiffusion(make_betas("linear", timesteps, 1e-3, 0.1))


def test_interpolation_is_the_papers(curved):
    diffusion = process()
    network, indices = curved(diffusion), torch.tensor([3, 4])
    a, b = torch.rand(2, 2, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = interpolate(network, diffusion, DDPM, a, b, t=50, shares=(0.0, 0.3, 1.0), seed=1, indices=indices)
    assert found.shape == (3, 2, *SHAPE)
    t = torch.tensor([50, 50])
    ends = [
        diffusion.q_sample(x, t, rng.normal(1, Purpose.RENOISE, indices, SHAPE, step=s)) for s, x in enumerate((a, b))
    ]
    for share, images in zip((0.0, 0.3, 1.0), found, strict=True):
        x_t = (1 - share) * ends[0] + share * ends[1]
        expected = sample(network, diffusion, DDPM, seed=1, indices=indices, shape=SHAPE, x_T=x_t, t_start=50)
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_interpolation_from_a_small_t_keeps_the_image(curved):
    """At t = 0 nearly nothing is diffused, so x_start's estimate is near the image; at t = T - 1 it is not."""
    diffusion = process()

    def honest(x, t, labels):
        """The best linear estimate for images of deviation 1."""
        return diffusion.at("sqrt_one_minus_alphas_cumprod", t, x) * x

    a, b = torch.rand(2, 1, *SHAPE, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    near, far = (
        interpolate(honest, diffusion, DDPM, a, b, t=t, shares=[0.5], seed=0, indices=torch.tensor([0]))[0]
        for t in (0, 99)
    )
    middle = (a + b) / 2
    assert (near - middle).abs().mean() < 0.06
    assert (far - middle).abs().mean() > 0.3


def test_variations_share_x_t_and_hold_the_original(curved):
    diffusion = process()
    network = curved(diffusion)
    arguments = {"seed": 2, "shape": SHAPE}
    original = sample(network, diffusion, DDPM, indices=torch.tensor([7]), **arguments)[0]
    spread = []
    for t in (99, 60, 2):
        found = variations(network, diffusion, DDPM, t=t, shared_index=7, indices=torch.arange(5, 9), **arguments)
        torch.testing.assert_close(found[2], original, rtol=0, atol=1e-5)
        assert not torch.equal(found[0], found[1])
        spread.append(found.std(dim=0).mean())
    assert spread[0] > spread[1] > spread[2]


def test_variations_begin_at_the_first_visited_time_not_above_t(curved):
    diffusion = process()
    network, settings = curved(diffusion), SamplingConfig(sampler="ddim", eta=0.5, steps=10)
    arguments = {"seed": 2, "shape": SHAPE, "indices": torch.arange(5, 9)}
    original = sample(network, diffusion, settings, **arguments)[2]
    found = {t: variations(network, diffusion, settings, t=t, shared_index=7, **arguments) for t in (54, 55, 60, 66)}
    for images in found.values():
        torch.testing.assert_close(images[2], original, rtol=0, atol=1e-5)
    assert torch.equal(found[60], found[55])  # visited are 99, 88, …, 66, 55, 44, …
    assert not torch.equal(found[60], found[66])
    assert not torch.equal(found[60], found[54])


def test_labels_reach_the_network_in_every_evaluation():
    diffusion, seen = process(20), []

    def network(x, t, labels):
        seen.append(labels.tolist())
        return torch.zeros_like(x)

    x, labels, indices = torch.zeros(2, *SHAPE), torch.tensor([2, 0]), torch.tensor([4, 7])
    arguments = {"seed": 0, "indices": indices, "null_label": 3}
    interpolate(network, diffusion, DDPM, x, x, t=10, shares=[0.2, 0.7], labels=labels, **arguments)
    inpaint(network, diffusion, DDPM, x, x, jump_length=5, jump_n_sample=2, labels=labels, **arguments)
    assert all(given == [2, 0] for given in seen)
    assert len(seen) > 2 * 11 + 20
    seen.clear()
    variations(network, diffusion, DDPM, t=10, shared_index=1, shape=SHAPE, label=2, **arguments)
    assert seen == [[2]] * 9 + [[2, 2]] * 11


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m", "unipc"])
def test_variations_need_noise(curved, sampler):
    diffusion = process()
    with pytest.raises(ConfigError, match="all variations would be one image"):
        variations(
            curved(diffusion),
            diffusion,
            SamplingConfig(sampler=sampler, steps=10),
            t=50,
            seed=0,
            shared_index=0,
            indices=torch.arange(3),
            shape=SHAPE,
        )


@pytest.mark.parametrize(("steps", "length", "repeats"), [(250, 10, 10), (100, 7, 3), (20, 5, 1), (10, 20, 4)])
def test_repaint_visits_the_times_of_diffusers(steps, length, repeats):
    scheduler = RePaintScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(steps, jump_length=length, jump_n_sample=repeats)
    theirs = (scheduler.timesteps // (1000 // steps)).tolist()
    moves = list(_repaint_plan(steps, length, repeats))
    ours = []
    for k, k_next in moves:  # theirs go forward again one by one, ours in one move
        ours += [steps - 1 - between for between in (range(k, k_next, -1) if k_next < k else [k])]
    assert ours == theirs
    assert all(b[0] == a[1] for a, b in itertools.pairwise(moves))
    assert moves[-1] == (steps - 1, steps)


def test_inpainting_is_repaints_algorithm_1(curved):
    """Written out, with a fresh draw in each move; for a network that sees the known half from the other."""
    diffusion, indices = process(12), torch.tensor([3, 8])
    inner, a = curved(diffusion), diffusion.alphas_cumprod

    def network(x, t, labels=None):
        return inner((x + x.flip(-1)) / 2, t)

    known = 1.6 * torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0)) - 0.8
    mask = torch.arange(6) < 3
    x = rng.normal(4, Purpose.X_T, indices, SHAPE)
    for number, (k, k_next) in enumerate(_repaint_plan(12, 4, 3)):
        eps, t, t_next = rng.normal(4, Purpose.RENOISE, indices, SHAPE, step=number), 11 - k, 11 - k_next
        if t_next > t:
            x = (a[t_next] / a[t]) ** 0.5 * x + (1 - a[t_next] / a[t]) ** 0.5 * eps
            continue
        times = torch.full((2,), t)
        reverse = diffusion.p_mean_variance(network(x, times), x, times, lambda image: image.clamp(-1, 1))
        x = reverse.mean
        if t > 0:
            x = x + reverse.variance.sqrt() * rng.normal(4, Purpose.REVERSE, indices, SHAPE, step=number)
        noisy = known if t == 0 else a[t_next] ** 0.5 * known + (1 - a[t_next]) ** 0.5 * eps
        x = torch.where(mask, noisy, x).float()
    found = inpaint(network, diffusion, DDPM, known, mask, seed=4, indices=indices, jump_length=4, jump_n_sample=3)
    torch.testing.assert_close(found, x.clamp(-1, 1), rtol=0, atol=1e-5)


def test_inpainting_keeps_what_is_known_and_draws_the_rest_from_its_conditional():
    """Pixels in pairs with correlation 0.9; the left ones are known. Exact eps, so the right ones must follow."""
    diffusion = process()
    covariance = torch.tensor([[0.25, 0.225], [0.225, 0.25]], dtype=torch.float64)
    eigenvalues, vectors = torch.linalg.eigh(covariance)

    def network(x, t, labels):
        signal = diffusion.at("sqrt_alphas_cumprod", t, x).double()
        variance = signal**2 * eigenvalues + 1 - signal**2
        turned = x.double() @ vectors
        return ((1 - signal**2).sqrt() * turned / variance @ vectors.T).float()

    count = 2000
    known = torch.tensor([0.5, 0.0]).expand(count, 1, 1, 2)
    mask = torch.tensor([1.0, 0.0])
    settings = SamplingConfig(sampler="ddpm", clip="none")
    found = inpaint(
        network,
        diffusion,
        settings,
        known,
        mask,
        seed=0,
        indices=torch.arange(count),
        jump_length=5,
        jump_n_sample=5,
    )
    assert (found[..., 0] == 0.5).all()
    assert found.max() == 1  # a few of 2,000 were beyond
    right = found[..., 1]
    assert right.mean().item() == pytest.approx(0.45, abs=0.04)
    assert right.std().item() == pytest.approx(np.sqrt(0.25 * (1 - 0.81)), abs=0.04)
    without = inpaint(
        network, diffusion, settings, known, mask, seed=0, indices=torch.arange(count), jump_length=5, jump_n_sample=1
    )
    assert abs(without[..., 1].mean().item() - 0.45) > abs(right.mean().item() - 0.45)


def test_bad_input(curved):
    diffusion = process()
    network, x = curved(diffusion), torch.zeros(1, *SHAPE)
    common = {"seed": 0, "indices": torch.tensor([0])}
    with pytest.raises(ConfigError, match="use ddpm"):
        inpaint(network, diffusion, SamplingConfig(sampler="ddim"), x, x, **common)
    with pytest.raises(SamplingError, match="jump_length is 0"):
        inpaint(network, diffusion, DDPM, x, x, jump_length=0, **common)
    with pytest.raises(SamplingError, match="t is 100; the times of this process are 0 to 99"):
        interpolate(network, diffusion, DDPM, x, x, t=100, shares=[0.5], **common)
    trailing = SamplingConfig(sampler="ddpm", steps=10, spacing="trailing")
    with pytest.raises(SamplingError, match="t is 5; the sampler visits times from 99 down to 9"):
        variations(network, diffusion, trailing, t=5, seed=0, shared_index=0, indices=torch.arange(2), shape=SHAPE)
    with pytest.raises(SamplingError, match="t is 100; the sampler visits times from 99 down to 0"):
        variations(network, diffusion, DDPM, t=100, seed=0, shared_index=0, indices=torch.arange(2), shape=SHAPE)
    with pytest.raises(SamplingError, match="mask holds values between"):
        inpaint(network, diffusion, DDPM, x, 0.3 * torch.ones(1), **common)
    with pytest.raises(SamplingError, match=r"known has shape \(1, .* and mask \(5,"):
        inpaint(network, diffusion, DDPM, x, torch.ones(5, *SHAPE), **common)
    with pytest.raises(SamplingError, match="x_a has shape"):
        interpolate(network, diffusion, DDPM, x, x[:0], t=50, shares=[0.5], **common)
