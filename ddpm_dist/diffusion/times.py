"""The draw of t in training, and what is recorded of it: every place of a batch costs one uniform number."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_dist import rng
from ddpm_dist.config import DiffusionConfig
from ddpm_dist.diffusion.process import Process
from ddpm_dist.errors import ConfigError
from ddpm_dist.rng import Purpose

QUARTILES = 4
BINS = 100
"""Of the shares of a continuous process, in its history of losses."""
HALF_STEP = 2.0**-33
"""Half the distance of two uniform numbers: so far shares keep from 0 and 1, whose quantiles are infinite."""


def draw_t(
    diffusion: Process,
    cfg: DiffusionConfig,
    seed: int,
    step: int,
    places: Tensor,
    global_batch: int,
    history: "LossHistory | None" = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Diffusion times of some places of global batch `step`: t [b], int64 or float64, and weights [b] float32.

    places: [b] int64 in 0..global_batch-1. The weighted mean of the losses is an unbiased estimate of their mean over
    the times that cfg.times says, whichever way t is drawn. Depends on nothing else than the arguments.
    """
    indices = (places + step * global_batch).to(device)
    if cfg.t_sampling == "loss_second_moment":
        if history is None:
            raise ConfigError("diffusion.t_sampling: loss_second_moment needs the history of losses of the run")
        share, weight = history.draw(rng.uniform(seed, Purpose.T, indices))
        return time_at(diffusion, cfg, share), weight
    share = rng.uniform(seed, Purpose.T, indices)
    if cfg.t_sampling == "stratified":
        # One uniform offset a step, shared by all ranks, and evenly spaced places (Kingma et al. 2021, appendix I.1):
        # every place's t stays uniform, so no stream of the data is tied to a range of t.
        offset = rng.uniform(seed, Purpose.T, torch.tensor([step * global_batch], device=device))
        share = (offset + places.to(device).double() / global_batch) % 1
    t = time_at(diffusion, cfg, share)
    return t, torch.ones(t.shape, device=t.device)


# Distributions: from a share in [0, 1) of all that is drawn to the time there, and back


def time_at(diffusion: Process, cfg: DiffusionConfig, share: Tensor) -> Tensor:
    """The quantile of cfg.times at shares [b] float64: [b] int64, or float64 of a continuous process."""
    if cfg.times == "uniform":
        if diffusion.discrete:
            return (share * cfg.timesteps).long().clamp(max=cfg.timesteps - 1)
        first, last = _uniform_ends(diffusion)
        return first + (last - first) * share
    normal = torch.special.ndtri(share.clamp(HALF_STEP, 1 - HALF_STEP))
    log_ratio = cfg.time_mean + cfg.time_std * normal
    if diffusion.discrete:
        return torch.from_numpy(diffusion.times_of(-log_ratio.cpu().numpy())).to(share.device)
    return torch.as_tensor(diffusion.path.time_of(log_ratio.exp()))


def share_of(diffusion: Process, cfg: DiffusionConfig, t: Tensor) -> Tensor:
    """The share of all draws below t [b]: [b] float64 in [0, 1); of whole times, that of a uniform draw."""
    if diffusion.discrete:
        return t.double() / cfg.timesteps
    if cfg.times == "uniform":
        first, last = _uniform_ends(diffusion)
        return ((t - first) / (last - first)).clamp(0, 1 - HALF_STEP)
    level = diffusion.path.level(t)
    normal = ((level.sigma / level.alpha).log() - cfg.time_mean) / cfg.time_std
    return torch.special.ndtr(normal).clamp(0, 1 - HALF_STEP)


def _uniform_ends(diffusion: Process) -> tuple[float, float]:
    """A flow is trained down to the image itself, where its velocity is finite as anywhere; EDM's inputs end before."""
    path = diffusion.path
    return (path.origin if path.last == 1 else path.first), path.last


class LossHistory:
    """The last losses of each t, for drawing t in proportion to sqrt(E[L_t²]) (Nichol & Dhariwal, equation 18).

    A continuous process's shares go into BINS bins. Until every one has `per_t` losses, the share is uniform. All ranks
    must update it with the same gathered losses.
    """

    @classmethod
    def of(cls, diffusion: Process) -> "LossHistory":
        """An empty one for the times of a process."""
        return cls(int(diffusion.path.last) + 1 if diffusion.discrete else BINS)

    def __init__(self, timesteps: int, per_t: int = 10, uniform_share: float = 1e-3) -> None:
        self.uniform_share = uniform_share
        self.losses = np.zeros((timesteps, per_t))
        self.counts = np.zeros(timesteps, np.int64)

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Records the losses [n] of the times t [n] int64, in this order; those that are not finite are left out."""
        times, values = t.cpu().numpy(), loss.detach().cpu().numpy().astype(np.float64)
        finite = np.isfinite(values)
        order = np.argsort(times[finite], kind="stable")
        times, values = times[finite][order], values[finite][order]
        news = np.bincount(times, minlength=len(self.counts))
        number = np.arange(len(times)) - (np.cumsum(news) - news)[times]  # of each loss among those of its time
        last = number >= news[times] - self.losses.shape[1]
        times, values, number = times[last], values[last], number[last]
        self.losses[times, (self.counts[times] + number) % self.losses.shape[1]] = values
        self.counts += news

    def probabilities(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Of each t: [T] float64."""
        timesteps, per_t = self.losses.shape
        root = np.sqrt((self.losses**2).mean(axis=1))
        if (self.counts < per_t).any() or not root.sum() > 0:
            return np.full(timesteps, 1 / timesteps)
        return root / root.sum() * (1 - self.uniform_share) + self.uniform_share / timesteps

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Shares [b] by the inverse distribution function at u [b] in [0, 1), and weights 1 / (T p_t) [b]."""
        p = torch.from_numpy(self.probabilities()).to(u.device)
        below = p.cumsum(0)
        t = torch.searchsorted(below, u, right=True).clamp(max=len(p) - 1)
        # Rounding must leave no share in another bin.
        within = ((u - (below[t] - p[t])) / p[t]).clamp(1e-6, 1 - 1e-6)
        return (t + within) / len(p), (1 / (len(p) * p[t])).float()

    def state_dict(self) -> dict[str, Tensor]:
        """`losses` [T, per_t] float64 and `counts` [T] int64, as tensors of their own."""
        return {"losses": torch.from_numpy(self.losses.copy()), "counts": torch.from_numpy(self.counts.copy())}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes what `state_dict` gave; ConfigError where the shape is that of another number of timesteps."""
        # A state is JSON, of which a reader may make float32: with that the probabilities would differ after a resume.
        losses, counts = state["losses"].double().numpy().copy(), state["counts"].long().numpy().copy()
        if losses.shape != self.losses.shape:
            raise ConfigError(
                f"diffusion.timesteps: the history of losses has shape {losses.shape}, this run needs "
                f"{self.losses.shape}; use the timesteps that it was trained with"
            )
        self.losses, self.counts = losses, counts


def bins_of(diffusion: Process, cfg: DiffusionConfig, t: Tensor, bins: int) -> Tensor:
    """In which of so many equal shares of all draws t [b] lies: [b] int64 (of whole times, of uniform draws)."""
    if diffusion.discrete:
        return t * bins // cfg.timesteps
    return (share_of(diffusion, cfg, t) * bins).long()


def quartile_means(quarter: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Sums [4] and counts [4], both float64, of the losses [B] by the quarter 0..3 of t [B]; add over ranks, divide."""
    member = quarter[:, None] == torch.arange(QUARTILES, device=quarter.device)
    # where, not a product: a loss that isn't finite stays in its own quartile.
    sums = torch.where(member, loss.detach().double()[:, None], 0.0).sum(dim=0)
    return sums, member.double().sum(dim=0)
