"""The draw of t: what a place's time depends on, how times lie on each process, and the history of losses."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch

from ddpm_dist import rng
from ddpm_dist.config import DiffusionConfig
from ddpm_dist.diffusion.continuous import make_process
from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.diffusion.schedules import make_betas
from ddpm_dist.diffusion.times import BINS, QUARTILES, LossHistory, bins_of, draw_t, quartile_means, share_of, time_at
from ddpm_dist.errors import ConfigError
from ddpm_dist.rng import Purpose

T = 1000
BETAS = make_betas("linear", T)
CONTINUOUS = [
    {"process": "edm"},
    {"process": "edm", "times": "uniform"},
    {"process": "flow"},
    {"process": "flow", "times": "log_normal", "time_mean": 0.0, "time_std": 1.0},
]


def drawn(cfg, *arguments):
    return draw_t(make_process(cfg), cfg, *arguments)


@pytest.mark.parametrize("kind", ["uniform", "stratified"])
def test_t_of_a_place_does_not_depend_on_the_ranks(kind):
    cfg = DiffusionConfig(t_sampling=kind)
    whole, weight = drawn(cfg, 5, 17, torch.arange(64), 64)
    parts = [drawn(cfg, 5, 17, torch.arange(r * 16, r * 16 + 16), 64)[0] for r in range(4)]
    assert torch.equal(whole, torch.cat(parts))
    assert (weight == 1).all()
    assert not torch.equal(whole, drawn(cfg, 5, 18, torch.arange(64), 64)[0])
    assert not torch.equal(whole, drawn(cfg, 6, 17, torch.arange(64), 64)[0])


def test_uniform_t_belongs_to_the_samples_number_in_the_run():
    t, _ = drawn(DiffusionConfig(), 5, 17, torch.arange(64), 64)
    assert torch.equal(t, rng.integers(5, Purpose.T, 17 * 64 + torch.arange(64), T))
    following, _ = drawn(DiffusionConfig(), 5, 18, torch.arange(64), 64)
    assert not torch.equal(t[1:], following[:-1])


@pytest.mark.parametrize("kind", ["uniform", "stratified"])
def test_t_of_each_place_is_uniform(kind):
    """Over 2,000 steps, for the first and the last place alone: chi-squared in 20 classes."""
    cfg = DiffusionConfig(t_sampling=kind, timesteps=T)
    t = torch.stack([drawn(cfg, 0, step, torch.tensor([0, 127]), 128)[0] for step in range(2000)])
    assert t.min() >= 0
    assert t.max() < T
    for place in range(2):
        counts = np.bincount(t[:, place] * 20 // T, minlength=20)
        assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_stratified_covers_every_stratum_of_the_global_batch():
    cfg = DiffusionConfig(t_sampling="stratified")
    for step in range(20):
        t, _ = drawn(cfg, 0, step, torch.arange(100), 100)
        gaps = torch.diff(torch.sort(t).values)
        assert ((gaps >= 9) & (gaps <= 11)).all()


def warmed_history(timesteps=8, per_t=4):
    history = LossHistory(timesteps, per_t)
    for repeat in range(per_t + 2):
        history.update(torch.arange(timesteps), torch.arange(1.0, timesteps + 1) * (1 + 0.1 * repeat))
    return history


def test_loss_second_moment_is_uniform_until_every_t_has_its_losses():
    history = LossHistory(8, per_t=2)
    history.update(torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7]), torch.arange(15.0))
    np.testing.assert_allclose(history.probabilities(), 1 / 8)
    history.update(torch.tensor([7, 7]), torch.tensor([math.nan, math.inf]))
    np.testing.assert_allclose(history.probabilities(), 1 / 8)
    history.update(torch.tensor([7]), torch.tensor([1.0]))
    assert history.probabilities().std() > 0.01


def test_loss_second_moment_follows_the_last_losses():
    """Of another spread at each t, and not as often at each, so that nothing cancels in the proportions."""
    history, generator = LossHistory(8, per_t=4), np.random.default_rng(0)
    losses = [generator.uniform(0, t + 1, size=4 + t) for t in range(8)]
    for t, values in enumerate(losses):
        history.update(torch.full((len(values),), t), torch.tensor(values))
    root = np.array([np.sqrt((values[-4:] ** 2).mean()) for values in losses])
    np.testing.assert_allclose(history.probabilities(), root / root.sum() * 0.999 + 0.001 / 8, rtol=1e-6)


def test_many_losses_at_once_are_those_one_after_another():
    generator = np.random.default_rng(1)
    history, losses, counts = LossHistory(8, per_t=4), np.zeros((8, 4)), np.zeros(8, int)
    for size in (0, 1, 5, 40, 200):
        t, values = generator.integers(0, 7, size), generator.uniform(size=size).astype(np.float32)
        values[generator.uniform(size=size) < 0.2] = np.nan
        history.update(torch.from_numpy(t), torch.from_numpy(values))
        for time, value in zip(t, values, strict=True):
            if np.isfinite(value):
                losses[time, counts[time] % 4] = value
                counts[time] += 1
        np.testing.assert_array_equal(history.losses, losses)
        np.testing.assert_array_equal(history.counts, counts)


def test_loss_second_moment_is_unbiased():
    history = warmed_history()
    cfg = DiffusionConfig(t_sampling="loss_second_moment", timesteps=8)
    t, weight = drawn(cfg, 0, 0, torch.arange(40000), 40000, history)
    values = torch.arange(1.0, 9) ** 2
    estimate = values[t] * weight
    assert estimate.mean().item() == pytest.approx(values.mean().item(), abs=4 * estimate.std().item() / 200)
    np.testing.assert_allclose(np.bincount(t, minlength=8) / 40000, history.probabilities(), atol=0.01)


def test_history_travels_in_the_training_state():
    history, other = warmed_history(), LossHistory(8, 4)
    state = history.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    more = torch.tensor([3, 3, 5]), torch.tensor([0.1, 0.2, 0.3])
    history.update(*more)
    assert all(torch.equal(value, before[name]) for name, value in state.items())  # it may be written meanwhile
    other.load_state_dict(state)
    other.update(*more)
    np.testing.assert_array_equal(history.probabilities(), other.probabilities())
    with pytest.raises(ConfigError, match="timesteps"):
        LossHistory(9, 4).load_state_dict(history.state_dict())


def test_loss_second_moment_without_history_is_refused():
    with pytest.raises(ConfigError, match="needs the history"):
        drawn(DiffusionConfig(t_sampling="loss_second_moment"), 0, 0, torch.arange(4), 4)


def test_quartiles():
    t = torch.tensor([0, 249, 250, 500, 749, 750, 999])
    loss = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, math.nan])
    sums, counts = quartile_means(bins_of(GaussianDiffusion(BETAS), DiffusionConfig(), t, QUARTILES), loss)
    assert counts.tolist() == [2, 1, 2, 2]
    assert sums[:3].tolist() == [3, 4, 24]
    assert sums[3].isnan()


def test_history_is_exact_after_json():
    """As a resumed run reads it: the probabilities are the same bits, not float32's."""
    history = warmed_history()
    state = json.loads(json.dumps({name: values.tolist() for name, values in history.state_dict().items()}))
    other = LossHistory(8, 4)
    other.load_state_dict({name: torch.tensor(values) for name, values in state.items()})
    assert history.losses.astype(np.float32).tolist() == other.losses.tolist()
    assert other.probabilities().dtype == np.float64
    assert other.losses.dtype == history.losses.dtype
    assert other.counts.dtype == history.counts.dtype


# On a path in continuous time


@pytest.mark.parametrize("kind", ["uniform", "stratified"])
@pytest.mark.parametrize("keys", CONTINUOUS)
def test_a_continuous_time_is_its_places_own_number(keys, kind):
    """One uniform number a place, whatever the distribution; float64, and the same on any number of ranks."""
    cfg = DiffusionConfig(t_sampling=kind, **keys)
    whole, weight = drawn(cfg, 5, 17, torch.arange(64), 64)
    parts = [drawn(cfg, 5, 17, torch.arange(r * 16, r * 16 + 16), 64)[0] for r in range(4)]
    assert torch.equal(whole, torch.cat(parts))
    assert whole.dtype == torch.float64
    assert (weight == 1).all()
    if kind == "uniform":
        u = rng.uniform(5, Purpose.T, 17 * 64 + torch.arange(64))
        assert torch.equal(whole, time_at(make_process(cfg), cfg, u))
        assert torch.allclose(share_of(make_process(cfg), cfg, whole), u, atol=1e-9)
    else:
        shares = torch.sort(share_of(make_process(cfg), cfg, whole)).values
        assert torch.allclose(torch.diff(shares), torch.tensor(1 / 64, dtype=torch.float64), atol=1e-9)


def test_times_are_distributed_as_published():
    """EDM's log-normal sigma, SD3's logit-normal t, flow_matching's skewed t: each of a standard normal number."""
    u = (torch.arange(1, 20000, dtype=torch.float64)) / 20000
    z = torch.special.ndtri(u)
    edm, sd3, skewed = (
        DiffusionConfig(process="edm"),
        DiffusionConfig(process="flow", times="log_normal", time_mean=0.0, time_std=1.0),
        DiffusionConfig(process="flow", times="log_normal"),
    )
    assert torch.allclose(time_at(make_process(edm), edm, u), torch.exp(1.2 * z - 1.2))
    assert torch.allclose(time_at(make_process(sd3), sd3, u), torch.sigmoid(z))
    sigma = torch.exp(1.2 * z - 1.2)
    assert torch.allclose(time_at(make_process(skewed), skewed, u), 1 - 1 / (1 + sigma))
    uniform = DiffusionConfig(process="flow")
    assert torch.equal(time_at(make_process(uniform), uniform, u), u)


@pytest.mark.parametrize("share", [0.0, 1 - 2.0**-32])
def test_the_ends_of_a_log_normal_are_finite(share):
    for keys in CONTINUOUS:
        cfg = DiffusionConfig(**keys)
        t = time_at(make_process(cfg), cfg, torch.tensor([share], dtype=torch.float64))
        assert t.isfinite().all()
        assert (t > 0).all() or keys == {"process": "flow"}
        assert 0 <= share_of(make_process(cfg), cfg, t).item() < 1


def test_log_normal_on_a_table_takes_the_nearest_whole_times():
    cfg = DiffusionConfig(times="log_normal")
    d = make_process(cfg)
    t, _ = drawn(cfg, 0, 0, torch.arange(20000), 20000)
    assert t.dtype == torch.int64
    log_ratio = -0.5 * np.log(d.snr[t.numpy()])
    assert log_ratio.mean() == pytest.approx(-1.2, abs=0.05)
    assert log_ratio.std() == pytest.approx(1.2, abs=0.05)


@pytest.mark.parametrize("keys", CONTINUOUS)
def test_importance_is_unbiased_and_follows_the_losses_on_a_continuous_path(keys):
    cfg = DiffusionConfig(t_sampling="loss_second_moment", **keys)
    d = make_process(cfg)
    history = LossHistory.of(d)
    weigh = torch.linspace(1, 3, BINS, dtype=torch.float64)
    for _ in range(10):
        history.update(torch.arange(BINS), weigh)
    t, weight = drawn(cfg, 0, 0, torch.arange(40000), 40000, history)
    share = share_of(d, cfg, t)
    bins = bins_of(d, cfg, t, BINS)
    np.testing.assert_allclose(np.bincount(bins, minlength=BINS) / 40000, history.probabilities(), atol=0.004)
    estimate = share**2 * weight
    assert estimate.mean().item() == pytest.approx(1 / 3, abs=4 * estimate.std().item() / 200)
