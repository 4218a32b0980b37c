"""Samplers: from noise to an image, each one function with one signature.

A sampler is a generator sampler(chain, x) over the chain's visited times, x [B, C, H, W] float32 at the first of them.
After its k-th step it yields (x, x_start), both [B, C, H, W]: the image at the next visited time, and the estimate of
x_0 that the step used. All that it
multiplies by is computed before the first step, in float64, and lies on the device: a step never waits for one.

Notation: x_t = alpha x_0 + sigma eps, lambda = log(alpha / sigma); "next" is the time that a step goes to.
All handle a first time without signal (lambda = -inf) and end at x_0 (lambda = inf).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ddpm_dist.diffusion.denoiser import Denoiser
from ddpm_dist.diffusion.path import ode_weights
from ddpm_dist.diffusion.process import Process, Times
from ddpm_dist.diffusion.schedules import Float64s


@dataclass(frozen=True)
class Churn:
    """EDM's noise, added before each step of Heun's (Karras et al. 2022, algorithm 2)."""

    amount: float = 0.0
    """S_churn: over the whole chain; 0 is the deterministic algorithm 1."""
    interval: tuple[float, float] = (0.0, math.inf)
    """[S_tmin, S_tmax] of sigma / alpha."""
    scale: float = 1.0
    """S_noise: the added noise's deviation."""


@dataclass(frozen=True)
class Chain:
    """What a sampler is given beside x."""

    denoise: Denoiser
    """denoise(x, k) -> x_start and variance values at the k-th visited time."""
    diffusion: Process
    times: Times
    """[S], falling."""
    noise: Callable[[int], Tensor]
    """Standard normal [B,C,H,W] of step k."""
    eta: float = 0.0
    churn: Churn = Churn()
    starts: Times | None = None
    """[S]: where each step begins after its churn, the times of denoise's k = S … 2S - 1; None: nothing is churned."""

    @property
    def signal(self) -> Float64s:
        """[S + 1]: alpha at the visited times, then 1, of x_0 itself."""
        return np.append(self.diffusion.level(self.times).alpha, 1.0)

    @property
    def sigma(self) -> Float64s:
        """[S + 1]: sigma at the visited times, then 0."""
        return np.append(self.diffusion.level(self.times).sigma, 0.0)

    @property
    def lambdas(self) -> Float64s:
        """[S + 1]: half the log-SNR; infinite at x_0, and where there is no signal."""
        with np.errstate(divide="ignore"):
            return np.log(self.signal) - np.log(self.sigma)

    def rows(self, *columns: ArrayLike) -> list[tuple[Tensor, ...]]:
        """The k-th numbers of all columns [S], for each step: float32 scalars on the device of the images."""
        table = torch.tensor(np.stack(np.broadcast_arrays(*columns), axis=1), dtype=torch.float32)
        return [row.unbind() for row in table.to(self.denoise.times.device).unbind()]


Sampled = Iterator[tuple[Tensor, Tensor]]


def ddpm(chain: Chain, x: Tensor) -> Sampled:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), with the process's reverse variance.

    Between times that are not neighbours the process is respaced (Nichol & Dhariwal 2021, section 4).
    """
    step = ancestral_step(chain)
    for k in range(len(chain.times)):
        x, x_start = step(x, k, k)
        yield x, x_start


def ancestral_step(chain: Chain) -> Callable[[Tensor, int, int], tuple[Tensor, Tensor]]:
    """step(x, k, draw) -> (x, x_start): from the k-th visited time to the next, with noise number `draw`."""
    reverse = chain.diffusion.reverse_rows(chain.times)
    rows = chain.rows(reverse.of_x_start, reverse.of_x, reverse.deviation)
    rank = torch.arange(len(rows), device=chain.denoise.times.device).flip(0)

    def step(x: Tensor, k: int, draw: int) -> tuple[Tensor, Tensor]:
        of_x_start, of_x, deviation = rows[k]
        x_start, variance_values = chain.denoise(x, k)
        x = of_x_start * x_start + of_x * x
        if k == len(rows) - 1:  # no noise in the step to x_0
            return x, x_start
        if variance_values is not None and reverse.learned is not None:
            deviation = reverse.learned(variance_values, x, rank[k : k + 1])
        return x + deviation * chain.noise(draw), x_start

    return step


def ddim(chain: Chain, x: Tensor) -> Sampled:
    """Song, Meng & Ermon 2020, equation 12: deterministic at eta 0, with the posterior's variance at eta 1.

    eps is that of the clipped x_start, so that x stays on the sphere its time expects.
    """
    alpha, sigma, alpha_next, sigma_next = chain.signal[:-1], chain.sigma[:-1], chain.signal[1:], chain.sigma[1:]
    ratio = alpha / alpha_next  # q(x_t | x_next) adds 1 - ratio² of variance, if alpha² + sigma² is 1
    added = 1 - ratio**2 if chain.diffusion.discrete else sigma**2 - (ratio * sigma_next) ** 2
    deviation = chain.eta * (sigma_next / sigma) * np.sqrt(added)
    of_eps = np.sqrt(np.maximum(sigma_next**2 - deviation**2, 0))
    rows = chain.rows(of_eps / sigma, alpha_next - of_eps / sigma * alpha, deviation)
    for k, (of_x, of_x_start, noise_scale) in enumerate(rows):
        x_start, _ = chain.denoise(x, k)
        x = of_x * x + of_x_start * x_start
        if deviation[k] > 0:
            x = x + noise_scale * chain.noise(k)
        yield x, x_start


def dpmpp_2m(chain: Chain, x: Tensor) -> Sampled:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): second order, one evaluation a step.

    The first and the last step are of first order.
    """
    lambdas = chain.lambdas
    h = np.diff(lambdas)
    of_x = chain.sigma[1:] / chain.sigma[:-1]
    share = _share_of_previous(h)
    of_x_start = -chain.signal[1:] * np.expm1(-h)
    rows = chain.rows(of_x, of_x_start * (1 + share), -of_x_start * share)
    previous = torch.zeros_like(x)
    for k, (a, b, c) in enumerate(rows):
        x_start, _ = chain.denoise(x, k)
        x = a * x + b * x_start + c * previous
        previous = x_start
        yield x, x_start


def dpmpp_2m_sde(chain: Chain, x: Tensor) -> Sampled:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022): as dpmpp_2m, of the SDE, with fresh noise in each step."""
    h = np.diff(chain.lambdas)
    of_x = chain.sigma[1:] / chain.sigma[:-1] * np.exp(-h)
    share = _share_of_previous(h)
    of_x_start = -chain.signal[1:] * np.expm1(-2 * h)
    rows = chain.rows(of_x, of_x_start * (1 + share), -of_x_start * share, chain.sigma[1:] * np.sqrt(-np.expm1(-2 * h)))
    previous = torch.zeros_like(x)
    for k, (a, b, c, deviation) in enumerate(rows):
        x_start, _ = chain.denoise(x, k)
        x = a * x + b * x_start + c * previous
        if k < len(rows) - 1:
            x = x + deviation * chain.noise(k)
        previous = x_start
        yield x, x_start


def euler(chain: Chain, x: Tensor) -> Sampled:
    """Euler's method on the probability-flow ODE in the path's own time: first order, one evaluation a step.

    Flow matching's standard sampler (Lipman et al. 2022). There and on EDM's path it is ddim's step; on a table of
    betas ddim, which is exact for a single image, serves better.
    """
    here = chain.diffusion.level(chain.times)
    h = np.diff(np.append(chain.times.astype(np.float64), chain.diffusion.path.origin))
    of_x, of_x_start = (h * weights for weights in ode_weights(here))
    of_x[-1], of_x_start[-1] = -1, 1  # to x_0, as both other paths lead by themselves
    for k, (a, b) in enumerate(chain.rows(1 + of_x, of_x_start)):
        x_start, _ = chain.denoise(x, k)
        x = a * x + b * x_start
        yield x, x_start


def heun(chain: Chain, x: Tensor) -> Sampled:
    """Heun's method as in EDM (Karras et al. 2022, algorithms 1 and, with churn, 2), on the network's own times.

    The ODE is d(x/alpha) = eps d(sigma/alpha). Second order, two evaluations a step but one in the last, and in a
    first without signal: those are Euler's, since sigma/alpha is 0 or infinite at one end. With rho spacing and 18
    steps the paper's own for CIFAR-10. Churn mends what a network gets wrong over hundreds of steps, not with few.
    """
    start = chain.diffusion.level(chain.times if chain.starts is None else chain.starts)
    alpha, sigma, alpha_next, sigma_next = start.alpha, start.sigma, chain.signal[1:], chain.sigma[1:]
    euler = chain.rows(sigma_next / sigma, alpha_next - sigma_next / sigma * alpha)
    with np.errstate(divide="ignore", invalid="ignore"):
        s, s_next = sigma / alpha, sigma_next / alpha_next
        half = (s_next - s) / 2
        correction = chain.rows(
            alpha_next / alpha * (1 + half / s), -alpha_next * half / s, half / s_next, -alpha_next * half / s_next
        )
        added = alpha * np.sqrt(np.maximum(s**2 - (chain.sigma[:-1] / chain.signal[:-1]) ** 2, 0)) * chain.churn.scale
        churn = chain.rows(alpha / chain.signal[:-1], added)
    first = 0 if chain.starts is None else len(chain.times)
    for k, (a, b) in enumerate(euler):
        if first and added[k] > 0:
            of_x, deviation = churn[k]
            x = of_x * x + deviation * chain.noise(k)
        x_start, _ = chain.denoise(x, first + k)
        x_next = a * x + b * x_start
        if k < len(euler) - 1 and alpha[k] > 0:
            of_x, of_x_start, of_next, of_x_start_next = correction[k]
            x_start_next, _ = chain.denoise(x_next, k + 1)
            x_next = of_x * x + of_x_start * x_start + of_next * x_next + of_x_start_next * x_start_next
        x = x_next
        yield x, x_start


def churned(diffusion: Process, times: Times, churn: Churn) -> Times | None:
    """[S]: the times from which the steps go once noise is added, sigma / alpha being 1 + gamma times what it was."""
    if not churn.amount:
        return None
    level = diffusion.level(times)
    with np.errstate(divide="ignore"):
        ratio = level.sigma / level.alpha
    low, high = churn.interval
    gamma = min(churn.amount / len(times), math.sqrt(2) - 1)
    more = diffusion.times_of(-np.log(np.where(level.alpha > 0, ratio, 1.0) * (1 + gamma)))
    return np.where((low <= ratio) & (ratio <= high) & (level.alpha > 0), np.maximum(more, times), times)


def unipc(chain: Chain, x: Tensor, order: int = 3) -> Sampled:
    """UniPC with B_2(h) and data prediction (Zhao et al. 2023, arXiv 2302.04867), multistep: one evaluation a step.

    Each evaluation serves twice: it corrects the x it was made at, then predicts the next, which makes the whole
    of order `order` + 1. The order rises over the first steps, and falls over the last to the first order's x_start.
    """
    predict, correct = (_unipc_rows(chain, order, corrected) for corrected in (False, True))
    past: list[Tensor] = []  # x_start of the latest steps, newest first
    before = x
    for k in range(len(chain.times)):
        x_start, _ = chain.denoise(x, k)
        if k > 0:
            x = _combine(correct[k - 1], before, [x_start, *past])
        past = [x_start, *past][:order]
        before, x = x, _combine(predict[k], x, past)
        yield x, x_start


def _combine(row: tuple[Tensor, ...], x: Tensor, terms: list[Tensor]) -> Tensor:
    x = row[0] * x
    for weight, term in zip(row[1:], terms, strict=False):
        x = x + weight * term
    return x


def _unipc_rows(chain: Chain, order: int, corrected: bool) -> list[tuple[Tensor, ...]]:
    """For each step: the weight of x, then those of x_start at the next time (if corrected), here, and before."""
    lambdas, alpha_next = chain.lambdas, chain.signal[1:]
    steps = len(chain.times)
    table = np.zeros((steps, 1 + order + corrected))
    for k in range(steps):
        h = lambdas[k + 1] - lambdas[k]
        # Only points with signal serve for extrapolation; the last step, to lambda = inf, is of first order.
        p = min(order, steps - k, 1 + int(np.isfinite(lambdas[:k]).sum()))
        ratios = (lambdas[k - p + 1 : k][::-1] - lambdas[k]) / h
        nodes = np.append(ratios, 1.0) if corrected else ratios
        # Differences D_i / r_i of the nodes to the point here, weighted by a solution of theorem 3.1's equations.
        rho = _unipc_weights(nodes, h)
        of_nodes = -alpha_next[k] * np.expm1(-h) * rho / nodes
        row = np.array([-alpha_next[k] * np.expm1(-h) - of_nodes.sum(), *of_nodes[: p - 1]])
        if corrected:
            row = np.append(of_nodes[-1], row)
        table[k, : 1 + len(row)] = [chain.sigma[k + 1] / chain.sigma[k], *row]
    return chain.rows(*table.T)


def _unipc_weights(nodes: Float64s, h: float) -> Float64s:
    """rho of Zhao et al.'s theorem 3.1: sum_i rho_i r_i^(n-1) = n! phi_{n+1}(-h) / B(h), for n = 1 … number of nodes.

    With one node any value keeps the order; the paper takes 1/2.
    """
    if len(nodes) <= 1:
        return np.full(len(nodes), 0.5)
    phi = np.expm1(-h) / -h - 1
    right = []
    for n in range(1, len(nodes) + 1):
        right.append(phi * math.factorial(n) / np.expm1(-h))
        phi = phi / -h - 1 / math.factorial(n + 1)
    return np.linalg.solve(np.vander(nodes, increasing=True).T, np.array(right))


def _share_of_previous(h: Float64s) -> Float64s:
    """1 / (2 r), r = h_{k-1} / h_k, of the extrapolation from the previous x_start; 0 in the first and last step."""
    share = np.zeros_like(h)
    share[1:-1] = h[1:-1] / h[:-2] / 2
    return share
