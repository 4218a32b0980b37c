"""The probability-flow ODE (Song et al. 2021): an adaptive solver, and the likelihood that it gives."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_dist import rng
from ddpm_dist.diffusion.denoiser import Network
from ddpm_dist.diffusion.path import ode_weights
from ddpm_dist.diffusion.process import Process
from ddpm_dist.errors import SamplingError
from ddpm_dist.rng import Purpose

# Dormand & Prince 1980, RK5(4)7M, "dopri5": row i makes stage i + 1; the last is the solution of fifth order
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
FOURTH = (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)
MAX_STEPS = 10_000

Field = Callable[[float, Tensor], Tensor]


def integrate(
    field: Field, y: Tensor, start: float, stop: float, rtol: float = 1e-5, atol: float = 1e-5
) -> tuple[Tensor, int]:
    """y at `stop` of dy/dt = field(t, y), y float64 of any shape, and the evaluations that it took.

    Fifth order, six evaluations a step, whose length follows from the error's root mean square over all of y: flow
    matching's dopri5. A reference, and for likelihoods: for images, a fixed grid gives more for an evaluation.
    Raises SamplingError after MAX_STEPS steps, or where they vanish.
    """
    t, h = start, (stop - start) / 100
    first, evaluations = field(t, y), 1
    for _ in range(MAX_STEPS):
        if (stop - t) * (stop - start) <= 0:
            return y, evaluations
        if abs(h) < 1e-14 * abs(stop - start):
            break
        h = math.copysign(min(abs(h), abs(stop - t)), stop - start)
        slopes = [first]
        for node, row in zip(NODES, STAGES, strict=True):
            stage = y + h * sum((a * slope for a, slope in zip(row, slopes, strict=True)), torch.zeros_like(y))
            slopes.append(field(t + node * h, stage))
        evaluations += len(NODES)
        fourth = y + h * sum((b * slope for b, slope in zip(FOURTH, slopes, strict=True)), torch.zeros_like(y))
        scale = atol + rtol * torch.maximum(y.abs(), stage.abs())
        error = float(((stage - fourth) / scale).square().mean().sqrt())
        if error <= 1:
            t, y, first = (stop if abs(stop - t) <= abs(h) else t + h), stage, slopes[-1]
        h *= min(5.0, max(0.2, 0.9 * max(error, 1e-10) ** -0.2)) if math.isfinite(error) else 0.2
    raise SamplingError(f"the ODE can't be solved beyond t = {t:g}; is the network's output finite?")


def velocity(network: Network, diffusion: Process, labels: Tensor | None = None) -> Field:
    """dx/dt [B,C,H,W] float64 of the probability-flow ODE at any time of a continuous process."""

    def field(t: float, x: Tensor) -> Tensor:
        times = torch.full((len(x),), t, dtype=torch.float64, device=x.device)
        value, _ = diffusion.split(diffusion.call(network, x, times, labels), x.shape[1])
        of_x, of_x_start = ode_weights(diffusion.path.level(t))
        return of_x * x + of_x_start * diffusion.to_x_start(value.double(), x, times)

    return field


def log_likelihood(
    network: Network,
    diffusion: Process,
    x_start: Tensor,
    *,
    seed: int,
    indices: Tensor,
    labels: Tensor | None = None,
    probes: int = 1,
    tolerance: float = 1e-5,
) -> Tensor:
    """log p(x) in nats by the instantaneous change of variables (Song et al. 2021, section 4.3): [B] float64.

    x_start: [B,C,H,W]; the path begins at its first time, with alpha x_start. probes: Rademacher vectors of (seed,
    indices) for the divergence's unbiased estimate (Hutchinson), exact where pixels are independent. The images of a
    call share the solver's steps. The network must let itself be differentiated.
    """
    assert not diffusion.discrete, "a table's bound is bits_per_dim's"
    field, shape, size = velocity(network, diffusion, labels), x_start.shape[1:], x_start[0].numel()
    drawn = [rng.uniform(seed, Purpose.LIKELIHOOD, indices, shape, k, x_start.device) for k in range(probes)]
    vectors = torch.where(torch.stack(drawn) < 0.5, 1.0, -1.0).double()

    def with_divergence(t: float, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x = y[:, :size].reshape(x_start.shape).requires_grad_()
            v = field(t, x)
            pulled = [torch.autograd.grad(v, x, e, retain_graph=True)[0] * e for e in vectors]
        divergence = torch.stack(pulled).flatten(2).sum(dim=2).mean(dim=0)
        return torch.cat([v.detach().flatten(1), divergence[:, None]], dim=1)

    path = diffusion.path
    signal = float(path.level(path.first).alpha)
    begin = signal * x_start.double().flatten(1)
    y, _ = integrate(
        with_divergence, torch.nn.functional.pad(begin, (0, 1)), path.first, path.last, tolerance, tolerance
    )
    deviation = path.prior_std(path.last)
    prior = -0.5 * (y[:, :size] / deviation).square().sum(dim=1) - size * math.log(deviation * math.sqrt(2 * math.pi))
    return prior + y[:, size] + size * math.log(signal)
