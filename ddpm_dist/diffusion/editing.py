"""What else a trained process can do with images: interpolation, shared latents, inpainting."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ddpm_dist import rng
from ddpm_dist.config import SamplingConfig
from ddpm_dist.diffusion.denoiser import Network
from ddpm_dist.diffusion.grids import respace
from ddpm_dist.diffusion.path import Level
from ddpm_dist.diffusion.process import Process
from ddpm_dist.diffusion.samplers import check_time, first_noise, make_chain, sample, trajectory
from ddpm_dist.diffusion.solvers import ancestral_step
from ddpm_dist.errors import ConfigError, SamplingError
from ddpm_dist.rng import Purpose


@torch.no_grad()
def interpolate(
    network: Network,
    diffusion: Process,
    settings: SamplingConfig,
    x_a: Tensor,
    x_b: Tensor,
    *,
    t: float,
    shares: Sequence[float],
    seed: int,
    indices: Tensor,
    labels: Tensor | None = None,
    null_label: int | None = None,
) -> Tensor:
    """Images between two (Ho et al. 2020, section 4.4): [len(shares), B, C, H, W] float32 in [-1, 1].

    x_a, x_b: [B,C,H,W] in [-1, 1]. Both are diffused to time t (the paper: 500) independently, mixed as
    (1 - share) x_a + share x_b, and denoised from t on. All noise is the same for every share, as in the paper.
    """
    if x_a.shape != x_b.shape or len(x_a) != len(indices) or not len(shares):
        raise SamplingError(
            f"x_a has shape {tuple(x_a.shape)}, x_b {tuple(x_b.shape)}, for {len(indices)} indices and {len(shares)} "
            "shares; one image on either side for each index is needed, and at least one share"
        )
    shape = (x_a.shape[1], x_a.shape[2], x_a.shape[3])
    times = _time(t, diffusion).expand(len(x_a)).to(x_a.device)
    end_a, end_b = (
        diffusion.q_sample(x, times, rng.normal(seed, Purpose.RENOISE, indices, shape, step=end, device=x.device))
        for end, x in enumerate((x_a.float(), x_b.float()))
    )
    starts = [torch.lerp(end_a, end_b, share) for share in shares]
    return torch.stack(
        [
            sample(
                network, diffusion, settings, seed=seed, indices=indices, shape=shape, labels=labels,
                null_label=null_label, device=x_a.device, x_T=x_T, t_start=t,
            )
            for x_T in starts
        ]
    )  # fmt: skip


@torch.no_grad()
def variations(
    network: Network,
    diffusion: Process,
    settings: SamplingConfig,
    *,
    t: float,
    seed: int,
    shared_index: int,
    indices: Tensor,
    shape: tuple[int, int, int],
    label: int | None = None,
    null_label: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Images that share x_t and differ in the noise after it (Ho et al. 2020, figure 7): [B,C,H,W] in [-1, 1].

    x_t is that of image `shared_index` at the first visited time not above t; the rest of image i's chain has
    the noise of index i. So where shared_index is among the indices, its own image is among the results (but for
    dpmpp_2m_sde, whose second order begins anew at x_t).
    """
    if not (
        settings.sampler in ("ddpm", "dpmpp_2m_sde") or (settings.sampler == "ddim" and settings.eta) or settings.churn
    ):
        raise ConfigError(
            f"sampling.sampler: {settings.sampler} draws no noise after x_t, so all variations would be one image; "
            "use ddpm, dpmpp_2m_sde, or ddim with sampling.eta above 0"
        )
    visited = respace(diffusion, settings.steps, settings.spacing)
    if not visited[-1] <= t <= diffusion.path.last:
        raise SamplingError(f"t is {t}; the sampler visits times from {visited[0]} down to {visited[-1]}")
    t = visited[visited <= t][0].item()
    noise = rng.normal(seed, Purpose.X_T, torch.tensor([shared_index]), shape, device=device)
    x_t = first_noise(diffusion, float(visited[0]), noise)
    if t != visited[0]:
        chain = trajectory(
            network, diffusion, settings, seed=seed, indices=torch.tensor([shared_index]), shape=shape,
            labels=None if label is None else torch.tensor([label]), null_label=null_label, device=device,
        )  # fmt: skip
        x_t = next(step.x for step in chain if visited[step.k + 1] == t)
    labels = None if label is None else torch.full((len(indices),), label)
    return sample(
        network, diffusion, settings, seed=seed, indices=indices, shape=shape, labels=labels, null_label=null_label,
        device=device, x_T=x_t.expand(len(indices), *shape), t_start=t,
    )  # fmt: skip


@torch.no_grad()
def inpaint(
    network: Network,
    diffusion: Process,
    settings: SamplingConfig,
    known: Tensor,
    mask: Tensor,
    *,
    seed: int,
    indices: Tensor,
    jump_length: int = 10,
    jump_n_sample: int = 10,
    labels: Tensor | None = None,
    null_label: int | None = None,
) -> Tensor:
    """RePaint (Lugmayr et al. 2022, algorithm 1): fills what isn't known. [B,C,H,W] float32 in [-1, 1].

    known: [B,C,H,W] in [-1, 1]. mask: broadcasts against it, 1 where known. settings.sampler must be ddpm; RePaint's
    own are 250 steps, jump_length 10, jump_n_sample 10: every 10 steps the chain jumps back 10 steps, 9 times.
    """
    if settings.sampler != "ddpm":
        raise ConfigError(f"sampling.sampler: {settings.sampler}; inpainting resamples the ancestral chain, use ddpm")
    if jump_length < 1 or jump_n_sample < 1:
        raise SamplingError(f"jump_length is {jump_length} and jump_n_sample {jump_n_sample}; both must be at least 1")
    if len(known) != len(indices) or np.broadcast_shapes(tuple(mask.shape), tuple(known.shape)) != tuple(known.shape):
        raise SamplingError(
            f"known has shape {tuple(known.shape)} and mask {tuple(mask.shape)} for {len(indices)} indices; one image "
            "for each index is needed, and a mask that broadcasts against them"
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise SamplingError("mask holds values between 0 and 1; a pixel is known (1) or not (0)")
    device, shape = known.device, (known.shape[1], known.shape[2], known.shape[3])
    chain, _ = make_chain(network, diffusion, settings, seed, indices, shape, labels, null_label, device)
    step = ancestral_step(chain)
    paste = chain.rows(chain.signal[1:], chain.sigma[1:])
    known, indices = known.float(), indices.to(device)

    def noise(number: int) -> Tensor:
        return rng.normal(seed, Purpose.RENOISE, indices, shape, step=number)

    levels = [Level(*numbers) for numbers in zip(*diffusion.level(chain.times), strict=True)]
    x = first_noise(diffusion, float(chain.times[0]), rng.normal(seed, Purpose.X_T, indices, shape))
    for draw, (k, k_next) in enumerate(_repaint_plan(len(chain.times), jump_length, jump_n_sample)):
        if k_next > k:
            x, _ = step(x, k, draw)
            signal, sigma = paste[k]
            x = torch.where(mask.bool(), signal * known + sigma * noise(draw), x)
        else:  # forward again: the product of the single steps q(x_t | x_{t-1}) in one
            ratio, deviation = diffusion.forward_scales(levels[k], levels[k_next])
            x = ratio * x + deviation * noise(draw)
    return x.clamp(-1, 1)


def _repaint_plan(steps: int, jump_length: int, jump_n_sample: int) -> Iterator[tuple[int, int]]:
    """(k, next k) of all moves between the visited times, x_0 being number `steps`.

    As in RePaint's appendix: whenever the number of times left is a multiple of jump_length, first the chain
    jumps back jump_length times, jump_n_sample - 1 times over.
    """
    jumps = dict.fromkeys(range(0, steps - jump_length, jump_length), jump_n_sample - 1)
    left = steps - 1  # visited times still to come after the present one
    while left >= 0:
        k = steps - 1 - left
        if jumps.get(left, 0):
            jumps[left] -= 1
            left += jump_length
            yield k, steps - 1 - left
        else:
            left -= 1
            yield k, k + 1


def _time(t: float, diffusion: Process) -> Tensor:
    check_time(diffusion, t)
    return torch.tensor([int(t)]) if diffusion.discrete else torch.tensor([t], dtype=torch.float64)
