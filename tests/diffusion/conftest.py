"""What the tests of diffusion/ share: a network that is known in closed form but not linear."""

import math

import pytest
import torch

from ddpm_dist.diffusion.gaussian import GaussianDiffusion


class Curved:
    """Predicts what a Gaussian data set of mean 0.3 and deviation 0.4 would give, bent by a sine of x.

    So trajectories stay of order one at all times, as with a trained network, and nothing is linear.
    """

    def __init__(self, diffusion: GaussianDiffusion, bend: float = 0.05) -> None:
        self.diffusion, self.bend = diffusion, bend

    def __call__(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        d = self.diffusion
        signal = d.at("sqrt_alphas_cumprod", t, x)
        variance = signal**2 * 0.4**2 + 1 - signal**2
        x_start = 0.3 + signal * 0.4**2 / variance * (x - 0.3 * signal) + self.bend * torch.sin(3 * x + t[0])
        if labels is not None:
            x_start = x_start + 0.02 * labels.reshape(-1, 1, 1, 1)
        value = d.from_x_start(x_start, x, t, d.prediction)
        if d.learns_variance:
            value = torch.cat([value, torch.cos(2 * x + math.pi * t[0] / 50)], dim=1)
        return value


@pytest.fixture(scope="session")
def curved() -> type[Curved]:
    return Curved
