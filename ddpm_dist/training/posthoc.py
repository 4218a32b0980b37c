"""Averages of any width after the run, out of those that were kept: section 3.2 and appendix C of EDM2.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (arXiv 2312.02696).
An average taken with the power profile of exponent γ up to time t weighs the weights of time τ by
p(τ) = (γ+1) τ^γ / t^(γ+1), 0 ≤ τ ≤ t. The wanted profile is written as the combination of the stored ones
that is nearest to it in the least-squares sense; the same combination of the averages is nearest to the
average that would have been taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ddpm_dist.training.ema import power_exponent


@dataclass(frozen=True)
class Profile:
    """A power-function average: taken up to `time` (steps or images, > 0) with relative width `std`."""

    time: float
    std: float


def coefficients(stored: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """[len(stored)] float64, of sum 1: the combination of the stored averages that is nearest to the wanted one.

    Algorithm 3 of Karras et al. 2024. Near-duplicates among the stored profiles are tolerated.
    """
    gram = np.array([[inner_product(a, b) for b in stored] for a in stored])
    target = np.array([inner_product(a, wanted) for a in stored])
    scale = 1.0 / np.sqrt(np.diag(gram))  # unit profiles, so that the least singular values can be told from noise
    solution = scale * np.linalg.lstsq(gram * scale[:, None] * scale, target * scale, rcond=1e-12)[0]
    return np.asarray(solution / solution.sum())


def distance(stored: Sequence[Profile], wanted: Profile, found: np.ndarray) -> float:
    """How far the combined profile is from the wanted one, relative to the wanted one's norm; 0 is exact."""
    gram = np.array([[inner_product(a, b) for b in stored] for a in stored])
    target = np.array([inner_product(a, wanted) for a in stored])
    own = inner_product(wanted, wanted)
    return float(np.sqrt(max(found @ gram @ found - 2 * found @ target + own, 0.0) / own))


def inner_product(a: Profile, b: Profile) -> float:
    """∫ p_a(τ) p_b(τ) dτ over 0 ≤ τ ≤ min(t_a, t_b)."""
    gamma_a, gamma_b = power_exponent(a.std), power_exponent(b.std)
    end = min(a.time, b.time)
    tails = (end / a.time) ** (gamma_a + 1) * (end / b.time) ** (gamma_b + 1)
    return (gamma_a + 1) * (gamma_b + 1) * tails / ((gamma_a + gamma_b + 1) * end)
