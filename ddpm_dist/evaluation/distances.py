"""Distances between sets of images, from sums (`moments`) or from kept features: functions of tensors alone."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ddpm_dist.errors import EvaluationError
from ddpm_dist.evaluation.moments import Moments, ScoreSums

KID_SUBSETS, KID_SUBSET = 100, 1000
PR_K, DC_K = 3, 5
"""Neighbours that make the radius: 3 for precision and recall, 5 for density and coverage, as their papers have it."""
_BLOCK = 2048


class Gaussian(Protocol):
    """What a Fréchet distance is computed of: `Moments`, or the mean and covariance of somebody else's file."""

    @property
    def count(self) -> int: ...

    @property
    def mean(self) -> Tensor: ...

    @property
    def covariance(self) -> Tensor: ...


def frechet(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance of two Gaussians (Dowson & Landau 1982; FID is this in Inception features).

    |m_a − m_b|² + tr(C_a + C_b − 2 (C_a C_b)^½). The trace of the root is the sum of the roots of the
    eigenvalues of the symmetric C_a^½ C_b C_a^½, which stays exact where the covariances are singular
    (fewer images than dimensions).
    """
    for gaussian in (a, b):
        if gaussian.count < 2:
            raise EvaluationError(f"Fréchet distance: {gaussian.count} images in a set; a covariance needs 2")
    cov_a, cov_b = a.covariance, b.covariance
    if not all(x.isfinite().all() for x in (a.mean, b.mean, cov_a, cov_b)):  # else max(0, NaN) would call it 0
        raise EvaluationError("Fréchet distance: a mean or covariance is not finite (NaN, or infinite)")
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root_a @ cov_b @ root_a
    trace_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = float((a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_root)
    return max(0.0, distance)  # rounding of vanishing eigenvalues may leave about -1e-8 of the traces


def frechet_of_features(a: Tensor, b: Tensor) -> float:
    """As `frechet`, of two sets of feature vectors [N, D] and [M, D]."""
    return frechet(Moments.of(a), Moments.of(b))


def kid(
    a: Tensor, b: Tensor, subsets: int = KID_SUBSETS, subset_size: int = KID_SUBSET, seed: int = 0
) -> tuple[float, float]:
    """Kernel Inception Distance (Bińkowski et al. 2018, arXiv 1801.01401): mean and deviation over random subsets.

    Unbiased MMD² with the kernel (x·y / D + 1)³. a: [N, D], b: [M, D]. Subsets are drawn without
    replacement and are at most as large as the smaller set.
    """
    size = min(subset_size, len(a), len(b))
    if size < 2:
        raise EvaluationError(f"KID: {size} images in a set; the unbiased estimate needs 2")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(1 if size == len(a) == len(b) else subsets):
        x = a[torch.randperm(len(a), generator=generator)[:size]].double()
        y = b[torch.randperm(len(b), generator=generator)[:size]].double()
        values.append(_mmd2(x, y))
    stack = torch.stack(values)
    return float(stack.mean()), float(stack.std(correction=0))


def _mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased MMD² of two sets of one size m (equation 4 of the paper)."""
    m, dim = x.shape
    k_xx, k_yy, k_xy = ((u @ v.T / dim + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
    within = (k_xx.sum() - k_xx.trace() + k_yy.sum() - k_yy.trace()) / (m * (m - 1))
    return within - 2 * k_xy.sum() / m**2


def inception_score(sums: ScoreSums) -> tuple[float, float]:
    """Inception Score (Salimans et al. 2016, arXiv 1606.03498): mean and deviation over the splits that hold images.

    exp of the mean KL(p(y|x) ‖ p(y)) = mean Σ p(y|x) log p(y|x) − Σ p(y) log p(y).
    """
    filled = sums.counts > 0
    if not filled.any():
        raise EvaluationError("Inception Score: no images")
    marginal = sums.probabilities[filled] / sums.counts[filled, None]
    neg_entropy = sums.neg_entropies[filled] / sums.counts[filled]
    scores = (neg_entropy - torch.xlogy(marginal, marginal).sum(1)).exp()
    return float(scores.mean()), float(scores.std(correction=0))


def prdc(real: Tensor, fake: Tensor, k: int = PR_K, k_density: int = DC_K) -> dict[str, float]:
    """Precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991), density and coverage (Naeem et al. 2020,
    arXiv 2002.09797), with the distance to the k-th nearest neighbour as radius: the papers' k are 3 and 5.

    real: [N, D], fake: [M, D]. Works in blocks: memory is O(block · max(N, M)).
    """
    most = max(k, k_density)
    if min(len(real), len(fake)) <= most:
        raise EvaluationError(f"precision and recall: {min(len(real), len(fake))} images in a set, k is {most}")
    real, fake = real.double(), fake.double()
    real_radii, dense_radii = _radii(real, (k, k_density))
    (fake_radii,) = _radii(fake, (k,))
    precise, density = torch.zeros(len(fake), dtype=torch.bool), torch.zeros(len(fake))
    recalled, covered = 0, 0
    for start in range(0, len(real), _BLOCK):
        block = slice(start, start + _BLOCK)
        distances = torch.cdist(real[block], fake)
        precise |= (distances < real_radii[block, None]).any(0)
        density += (distances < dense_radii[block, None]).sum(0)
        recalled += int((distances < fake_radii).any(1).sum())
        covered += int((distances.min(1).values < dense_radii[block]).sum())
    return {
        "precision": float(precise.double().mean()),
        "recall": recalled / len(real),
        "density": float(density.double().mean()) / k_density,
        "coverage": covered / len(real),
    }


def _radii(points: Tensor, ks: Sequence[int]) -> list[Tensor]:
    """Distances [N] of each point to its k-th nearest other one, for each k."""
    found = []
    for block in points.split(_BLOCK):
        distances = torch.cdist(block, points)
        found.append([distances.kthvalue(k + 1, dim=1).values for k in ks])
    return [torch.cat(radii) for radii in zip(*found, strict=True)]


def nearest(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances [Q, k] and rows [Q, k] of the k points [N, D] nearest to each query [Q, D], nearest first."""
    distances, rows = torch.cdist(queries.double(), points.double()).topk(min(k, len(points)), largest=False)
    return distances, rows
