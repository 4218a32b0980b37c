"""Distances against independent code: scipy and torchmetrics in float64, prdc, closed forms."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings, strategies as st
from prdc import compute_prdc
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from ddpm_dist.errors import EvaluationError
from ddpm_dist.evaluation import distances
from ddpm_dist.evaluation.moments import Kept, Moments, ScoreSums, Summary, from_arrays, in_first_half, to_arrays


def features(count: int, dim: int, seed: int) -> Tensor:
    """Correlated, shifted, not Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator)
    return (torch.randn(count, dim, generator=generator) @ mix).relu() + 0.1 * seed


def frechet_by_scipy(a: Tensor, b: Tensor) -> float:
    x, y = a.double().numpy(), b.double().numpy()
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * root))


class Identity(nn.Module):
    """Stands for Inception in torchmetrics: its images are the features already."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_frechet_is_scipys() -> None:
    a, b = features(400, 24, 1), features(300, 24, 2)
    assert distances.frechet_of_features(a, b) == pytest.approx(frechet_by_scipy(a, b), rel=1e-9)


def test_frechet_of_gaussians_in_closed_form() -> None:
    """Diagonal covariances commute: |m|² + Σ (σ_a − σ_b)²."""
    a = torch.randn(3000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale, shift = torch.tensor([1.0, 2, 3, 0.5, 0, 1]).double(), torch.arange(6.0).double()
    centred = a - a.mean(0)
    white = centred @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(centred.T))).T
    expected = shift.square().sum() + (1 - scale).square().sum()
    assert distances.frechet_of_features(white, white * scale + shift) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_with_fewer_images_than_dimensions() -> None:
    a, b = features(20, 64, 1), features(30, 64, 2)
    x, y = ((f.double() - f.double().mean(0)) / (len(f) - 1) ** 0.5 for f in (a, b))
    roots = torch.linalg.svdvals(x @ y.T).sum()
    expected = (a.double().mean(0) - b.double().mean(0)).square().sum()
    expected += x.square().sum() + y.square().sum() - 2 * roots
    assert distances.frechet_of_features(a, b) == pytest.approx(float(expected), rel=1e-7)
    assert 0 <= distances.frechet_of_features(a, a) < 1e-7 * float(x.square().sum()) * 100


def test_frechet_is_torchmetrics_fid() -> None:
    a, b = features(500, 32, 1), features(400, 32, 2)
    metric = FrechetInceptionDistance(feature=Identity(32)).set_dtype(torch.float64)
    for batch, real in ((a, True), (b, False)):
        for part in batch.split(77):
            metric.update(part.double(), real=real)
    assert distances.frechet_of_features(a, b) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_kid_is_torchmetrics() -> None:
    a, b = features(200, 16, 1), features(200, 16, 2)
    metric = KernelInceptionDistance(feature=Identity(16), subsets=1, subset_size=200)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert distances.kid(a, b)[0] == pytest.approx(float(metric.compute()[0]), rel=1e-4)


def test_kid_of_subsets_averages_to_that_of_all() -> None:
    a, b = features(300, 16, 1), features(300, 16, 2)
    whole, _ = distances.kid(a, b)
    mean, deviation = distances.kid(a, b, subsets=300, subset_size=60)
    assert abs(mean - whole) < 4 * deviation / 300**0.5
    assert deviation > 0
    same, spread = distances.kid(a[:150], a[150:], subsets=100, subset_size=50)
    assert abs(same) < spread


def test_inception_score_is_torchmetrics() -> None:
    logits = 3 * torch.randn(300, 10, generator=torch.Generator().manual_seed(0))
    sums = ScoreSums.empty(1, 10)
    for first, part in zip(range(0, 300, 64), logits.split(64), strict=True):
        sums.add(part, torch.arange(first, first + len(part)))
    metric = InceptionScore(feature=Identity(10), splits=1)
    metric.update(logits)
    assert distances.inception_score(sums)[0] == pytest.approx(float(metric.compute()[0]), rel=1e-5)


def test_inception_score_of_splits_is_the_mean_of_parts() -> None:
    logits = 3 * torch.randn(90, 10, generator=torch.Generator().manual_seed(0)).double()
    sums = ScoreSums.empty(3, 10)
    sums.add(logits, torch.arange(90))
    p = logits.softmax(1)
    scores = [
        float((part * (part.log() - part.mean(0).log())).sum(1).mean().exp()) for part in (p[0::3], p[1::3], p[2::3])
    ]
    value, deviation = distances.inception_score(sums)
    assert value == pytest.approx(np.mean(scores), rel=1e-9)
    assert deviation == pytest.approx(np.std(scores), rel=1e-9)


@pytest.mark.parametrize("k", [3, 5])
def test_precision_and_recall_are_prdcs(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "_BLOCK", 37)  # so that several blocks are put together
    real, fake = features(230, 6, 1), features(170, 6, 1)[:, torch.randperm(6)] + 0.3
    theirs = compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=k)
    assert distances.prdc(real, fake, k, k) == pytest.approx(theirs, abs=1e-12)
    assert 0.01 < theirs["precision"] < 0.99
    assert 0.01 < theirs["recall"] < 0.99


def test_precision_and_recall_have_3_neighbours_density_and_coverage_5() -> None:
    """As published: Kynkäänniemi et al. 2019, appendix, and Naeem et al. 2020, section 3."""
    real, fake = features(150, 6, 1), features(120, 6, 1)[:, torch.randperm(6)] + 0.3
    three, five = (compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=k) for k in (3, 5))
    expected = {name: (three if name in ("precision", "recall") else five)[name] for name in five}
    assert distances.prdc(real, fake) == pytest.approx(expected, abs=1e-12)
    assert three["precision"] != five["precision"]


def test_nearest() -> None:
    points = features(100, 8, 1)
    distance, rows = distances.nearest(points[[42, 7]], points, 2)
    assert rows[:, 0].tolist() == [42, 7]
    assert distance[:, 0].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert (distance[:, 1] > 0.1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: distances.frechet_of_features(x[:1], x), "1 images in a set; a covariance needs 2"),
        (lambda x: distances.kid(x[:1], x), "the unbiased estimate needs 2"),
        (lambda x: distances.prdc(x, x[:5]), "5 images in a set, k is 5"),
        (lambda x: distances.inception_score(ScoreSums.empty(10, 4)), "no images"),
        (lambda x: distances.frechet_of_features(x * torch.nan, x), "a mean or covariance is not finite"),
        (lambda x: distances.frechet_of_features(x, x / 0), "a mean or covariance is not finite"),
    ],
)
def test_too_few_images(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(EvaluationError, match=message):
        call(features(20, 4, 1))


def summary_of(x: Tensor, indices: range) -> Summary:
    summary = Summary.empty(x.shape[1], parts=2, keep=40, classes=5, splits=3, spatial_dim=x.shape[1])
    for start in range(indices.start, indices.stop, 16):
        stop = min(start + 16, indices.stop)
        summary.add(x[start:stop], start, logits=x[start:stop, :5], spatial=x[start:stop])
    return summary


def assert_equal(a: Summary, b: Summary, tolerance: float) -> None:
    assert [part.count for part in a.parts] == [part.count for part in b.parts]
    assert torch.equal(a.kept.features, b.kept.features)
    for mine, theirs in zip([*a.parts, a.spatial], [*b.parts, b.spatial], strict=True):
        assert isinstance(mine, Moments)
        assert isinstance(theirs, Moments)
        torch.testing.assert_close(mine.covariance, theirs.covariance, rtol=tolerance, atol=tolerance)
    assert a.score is not None
    assert b.score is not None
    torch.testing.assert_close(a.score.probabilities, b.score.probabilities, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a.score.neg_entropies, b.score.neg_entropies, rtol=tolerance, atol=tolerance)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_sums_merge_over_uneven_parts_in_any_order(cuts: list[int], shuffler) -> None:  # type: ignore[no-untyped-def]
    x = features(200, 8, 3)
    edges = [0, *sorted(cuts), 200]
    parts = [summary_of(x, range(low, high)) for low, high in itertools.pairwise(edges)]
    shuffler.shuffle(parts)
    merged = parts[0]
    for part in parts[1:]:
        merged.merge(part)
    assert_equal(merged, summary_of(x, range(200)), 1e-9)


def test_summaries_come_back_from_their_arrays() -> None:
    summary = summary_of(features(50, 8, 1), range(50))
    assert_equal(from_arrays(to_arrays(summary)), summary, 0)


@pytest.mark.parametrize("count", [1797, 60_000])
def test_halves_are_disjoint_equal_and_blind_to_order(count: int) -> None:
    first = in_first_half(torch.arange(count))
    assert abs(2 * int(first.sum()) - count) <= 1
    assert not (first[0::2] == first[0]).all()
    thirds = first[: count // 3].double().mean()
    assert abs(thirds - 0.5) < 0.01
    assert torch.equal(in_first_half(torch.arange(10, 20)), first[10:20])


def test_kept_features_are_a_fair_sample() -> None:
    kept = Kept.empty(500, 1)
    kept.add(torch.arange(5000.0)[:, None], torch.arange(5000))
    values = kept.features[:, 0]
    assert len(set(values.tolist())) == 500
    assert abs(float(values.mean()) - 2500) < 4 * 1443 / 500**0.5
