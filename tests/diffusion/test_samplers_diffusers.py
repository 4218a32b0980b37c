"""Each sampler against diffusers' scheduler of the same name: every step, same network, same noise."""

import functools

import diffusers.schedulers.scheduling_ddpm as scheduling_ddpm
import diffusers.schedulers.scheduling_dpmsolver_multistep as scheduling_dpmsolver
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ddpm_dist import rng
from ddpm_dist.config import SamplingConfig
from ddpm_dist.diffusion import solvers
from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.diffusion.samplers import SAMPLERS, trajectory
from ddpm_dist.diffusion.schedules import make_betas
from ddpm_dist.rng import Purpose

SHAPE, SEED, INDICES = (3, 8, 8), 7, torch.tensor([5, 2])
TOLERANCE = 1e-5
PREDICTION = {"eps": "epsilon", "x_start": "sample", "v": "v_prediction"}


def ours(network, diffusion, **settings):
    """x after each step, [steps, B, C, H, W]."""
    settings = SamplingConfig(**settings)
    steps = trajectory(network, diffusion, settings, seed=SEED, indices=INDICES, shape=SHAPE)
    return torch.stack([step.x for step in steps])


def noise(k):
    return rng.normal(SEED, Purpose.REVERSE, INDICES, SHAPE, step=k)


def theirs(scheduler, network, diffusion, steps, **step_kwargs):
    """As `ours`, in float64 but for the network's input."""
    exact(scheduler, diffusion)
    scheduler.set_timesteps(steps)
    x = rng.normal(SEED, Purpose.X_T, INDICES, SHAPE).double()
    found = []
    for k, t in enumerate(scheduler.timesteps):
        output = network(x.float(), torch.full((2,), int(t)), None).double()
        extra = {name: value(k) for name, value in step_kwargs.items()}
        x = scheduler.step(output, t, x, **extra).prev_sample
        found.append(x.float())
    return torch.stack(found)


def exact(scheduler, diffusion):
    """Replaces the float32 product of 1 - beta, which is off by 1e-5 at T = 1000, by the float64 one."""
    np.testing.assert_allclose(scheduler.alphas_cumprod, diffusion.alphas_cumprod, rtol=3e-5)
    scheduler.betas = torch.tensor(diffusion.betas)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.tensor(diffusion.alphas_cumprod)
    if hasattr(scheduler, "alpha_t"):
        scheduler.alpha_t, scheduler.sigma_t = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
        scheduler.lambda_t = scheduler.alpha_t.log() - scheduler.sigma_t.log()


def process(prediction="eps", variance="fixedlarge", timesteps=1000):
    return GaussianDiffusion(make_betas("linear", timesteps), prediction, variance)


def close(a, b):
    assert a.shape == b.shape
    assert 0.3 < b.abs().max() < 10
    assert (a - b).abs().max() <= TOLERANCE, [f"{e:.1e}" for e in (a - b).abs().amax(dim=(1, 2, 3, 4)).tolist()]


def step_noise(monkeypatch, module):
    """Makes a diffusers module draw our noise, in the order of the steps that draw."""
    counter = iter(range(10**6))
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: noise(next(counter)).double())


@pytest.mark.parametrize("steps", [None, 50, 37])
@pytest.mark.parametrize("clip", ["none", "static"])
@pytest.mark.parametrize(
    ("variance", "name"),
    [("fixedsmall", "fixed_small"), ("fixedlarge", "fixed_large"), ("learned_range", "learned_range")],
)
def test_ddpm(curved, monkeypatch, variance, name, clip, steps):
    diffusion = process(variance=variance, timesteps=1000 if steps else 100)
    network = curved(diffusion)
    scheduler = DDPMScheduler(
        num_train_timesteps=diffusion.timesteps,
        trained_betas=diffusion.betas,
        variance_type=name,
        clip_sample=clip == "static",
        timestep_spacing="linspace",
    )
    step_noise(monkeypatch, scheduling_ddpm)
    mine = ours(network, diffusion, sampler="ddpm", steps=steps, clip=clip, spacing="uniform")
    exact(scheduler, diffusion)
    if steps:
        scheduler.set_timesteps(timesteps=np.linspace(0, 999, steps).round()[::-1].astype(int).tolist())
        scheduler.set_timesteps = lambda _: None
    close(mine, theirs(scheduler, network, diffusion, diffusion.timesteps))


@pytest.mark.parametrize("prediction", ["eps", "x_start", "v"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("clip", ["none", "static"])
def test_ddim(curved, prediction, eta, clip):
    diffusion = process(prediction)
    network = curved(diffusion)
    scheduler = DDIMScheduler(
        trained_betas=diffusion.betas,
        prediction_type=PREDICTION[prediction],
        clip_sample=clip == "static",
        timestep_spacing="trailing",
    )
    mine = ours(network, diffusion, sampler="ddim", steps=50, eta=eta, clip=clip, spacing="trailing")
    keywords = {
        "eta": lambda k: eta,
        "use_clipped_model_output": lambda k: True,
        "variance_noise": noise,
    }
    close(mine, theirs(scheduler, network, diffusion, 50, **keywords))


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("steps", [5, 20, 50])
def test_dynamic_thresholding(curved, prediction, steps):
    diffusion = process(prediction)
    network = curved(diffusion, bend=0.3)
    scheduler = DPMSolverMultistepScheduler(
        trained_betas=diffusion.betas,
        prediction_type=PREDICTION[prediction],
        thresholding=True,
        sample_max_value=1e9,
        dynamic_thresholding_ratio=0.9,
        timestep_spacing="trailing",
    )
    settings = {"clip": "dynamic", "dynamic_quantile": 0.9, "spacing": "trailing"}
    mine = ours(network, diffusion, sampler="dpmpp_2m", steps=steps, **settings)
    close(mine, theirs(scheduler, network, diffusion, steps))


@pytest.mark.parametrize("prediction", ["eps", "x_start", "v"])
@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("algorithm", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_dpm_solver(curved, monkeypatch, prediction, steps, algorithm):
    diffusion = process(prediction)
    network = curved(diffusion)
    scheduler = DPMSolverMultistepScheduler(
        trained_betas=diffusion.betas,
        prediction_type=PREDICTION[prediction],
        algorithm_type="dpmsolver++" if algorithm == "dpmpp_2m" else "sde-dpmsolver++",
        timestep_spacing="trailing",
    )
    step_noise(monkeypatch, scheduling_dpmsolver)
    mine = ours(network, diffusion, sampler=algorithm, steps=steps, clip="none", spacing="trailing")
    close(mine, theirs(scheduler, network, diffusion, steps))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [5, 20])
def test_unipc(curved, monkeypatch, order, steps):
    diffusion = process()
    network = curved(diffusion)
    scheduler = UniPCMultistepScheduler(
        trained_betas=diffusion.betas, solver_order=order, timestep_spacing="trailing", final_sigmas_type="zero"
    )
    monkeypatch.setitem(SAMPLERS, "unipc", functools.partial(solvers.unipc, order=order))
    mine = ours(network, diffusion, sampler="unipc", steps=steps, clip="none", spacing="trailing")
    close(mine, theirs(scheduler, network, diffusion, steps))


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("steps", [5, 20])
def test_heun(curved, prediction, steps):
    diffusion = process(prediction)
    network = curved(diffusion)
    scheduler = HeunDiscreteScheduler(
        trained_betas=diffusion.betas, prediction_type=PREDICTION[prediction], timestep_spacing="trailing"
    )
    exact(scheduler, diffusion)
    scheduler.set_timesteps(steps)
    ratio = np.append(diffusion.snr[scheduler.timesteps[::2].long()] ** -0.5, 0)  # sigma / alpha
    x = rng.normal(SEED, Purpose.X_T, INDICES, SHAPE).double() * np.sqrt(1 + ratio[0] ** 2)
    found = []
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(scaled.float(), torch.full((2,), int(t))).double(), t, x).prev_sample
        if i % 2 == 1 or i == 2 * steps - 2:  # corrected, or the last; their x is x_t / alpha
            found.append((x / np.sqrt(1 + ratio[len(found) + 1] ** 2)).float())
    mine = ours(network, diffusion, sampler="heun", steps=steps, clip="none", spacing="trailing")
    close(mine, torch.stack(found))
