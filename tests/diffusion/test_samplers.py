"""What a sampler promises beside its mathematics: noise by index, guidance, precision, respacing, messages."""

from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from hypothesis import given, settings as hypothesis_settings, strategies as st

from ddpm_dist import rng
from ddpm_dist.config import DiffusionConfig, SamplingConfig
from ddpm_dist.diffusion.continuous import ContinuousDiffusion
from ddpm_dist.diffusion.denoiser import Guide, dynamic_threshold
from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.diffusion.grids import SPACINGS, respace
from ddpm_dist.diffusion.samplers import SAMPLERS, sample, trajectory
from ddpm_dist.diffusion.schedules import make_betas
from ddpm_dist.errors import ConfigError, SamplingError

SHAPE = (3, 8, 8)


def process(prediction="eps", timesteps=100, **kwargs):
    return GaussianDiffusion(make_betas("linear", timesteps, 1e-3, 0.1), prediction, **kwargs)


def draw(network, diffusion, indices=(0, 1, 2), **kwargs):
    names = SamplingConfig.model_fields
    chosen = {key: kwargs.pop(key) for key in list(kwargs) if key in names}
    chosen = {"steps": 10, **chosen}
    if "guide_network" in kwargs:
        kwargs["guide"] = kwargs.pop("guide_network")
    return sample(
        network, diffusion, SamplingConfig(**chosen), seed=3, indices=torch.tensor(indices), shape=SHAPE, **kwargs
    )


def test_names_are_the_configurations():
    def names(field):
        return set(get_args(get_args(SamplingConfig.model_fields[field].annotation)[0] or ())) or set(
            get_args(SamplingConfig.model_fields[field].annotation)
        )

    assert names("sampler") == set(SAMPLERS)
    assert names("spacing") == set(SPACINGS)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_does_not_depend_on_its_batch(curved, sampler):
    """The noise is the same bytes; of the image, elementwise arithmetic leaves at most rounding."""
    diffusion = process()
    network = curved(diffusion)
    seven = draw(network, diffusion, (4, 9, 2, 7, 0, 1, 30), sampler=sampler)
    one = draw(network, diffusion, (7,), sampler=sampler)
    assert (seven[3] - one[0]).abs().max() <= 1e-6
    assert seven.dtype == torch.float32
    assert seven.abs().max() <= 1
    assert not torch.equal(seven[0], seven[1])


def test_convolution_leaves_a_stated_difference_between_batch_sizes():
    """Measured 3.3e-7 on an AVX-512 CPU; held to 1e-5."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(32, 3, 3, padding=1)
    )
    diffusion = process()
    seven = draw(lambda x, t, labels: layers(x), diffusion, (4, 9, 2, 7, 0, 1, 30))
    one = draw(lambda x, t, labels: layers(x), diffusion, (7,))
    assert (seven[3] - one[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_state_is_float32_and_times_are_whole(sampler, dtype, curved):
    diffusion = process()
    inner, seen = curved(diffusion), []

    def network(x, t, labels):
        seen.append((x.dtype, t.dtype, t.shape, labels))
        return inner(x, t).to(dtype)

    images = draw(network, diffusion, sampler=sampler)
    assert set(seen) == {(torch.float32, torch.int64, torch.Size([3]), None)}
    assert images.dtype == torch.float32
    assert len(seen) == (19 if sampler == "heun" else 10)
    reference = draw(inner, diffusion, sampler=sampler)
    assert (images - reference).abs().mean() < 0.02


@pytest.mark.parametrize("variance", ["fixedlarge", "learned_range"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_step_waits_for_the_device(curved, sampler, variance):
    """On the meta device, which holds no values, whatever asked for one would raise."""
    diffusion = process(variance=variance)
    labels = torch.zeros(3, dtype=torch.int64)
    images = draw(
        curved(diffusion),
        diffusion,
        sampler=sampler,
        clip="dynamic",
        guidance_scale=2.0,
        labels=labels,
        null_label=4,
        device="meta",
    )
    assert images.device.type == "meta"
    assert images.shape == (3, *SHAPE)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_x_start_of_a_step_is_the_estimate_where_it_began(curved, sampler):
    diffusion, x, steps = process("v"), torch.randn(3, *SHAPE), []
    draw(curved(diffusion), diffusion, sampler=sampler, clip="none", x_T=x, callback=steps.append)
    if sampler == "unipc":  # corrects x after the estimate
        del steps[1:]
    for step in steps:
        t = torch.full((3,), step.t)
        expected = diffusion.to_x_start(curved(diffusion)(x, t), x, t)
        torch.testing.assert_close(step.x_start, expected, rtol=0, atol=1e-5)
        x = step.x


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_float64_start_is_gone_on_with_in_float32(curved, sampler):
    diffusion, x_T = process(), torch.randn(3, *SHAPE)
    images = draw(curved(diffusion), diffusion, sampler=sampler, x_T=x_T.double())
    assert images.dtype == torch.float32
    assert torch.equal(images, draw(curved(diffusion), diffusion, sampler=sampler, x_T=x_T))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_progressive_x_start_and_callback(curved, sampler):
    diffusion = process()
    steps = []
    images = draw(curved(diffusion), diffusion, sampler=sampler, callback=steps.append)
    times = respace(process(), 10, "uniform")
    assert [step.k for step in steps] == list(range(10))
    assert [step.t for step in steps] == times.tolist()
    assert all(step.x_start.abs().max() <= 1 for step in steps)
    assert torch.equal(steps[-1].x.clamp(-1, 1), images)
    torch.testing.assert_close(steps[-1].x, steps[-1].x_start, rtol=1e-5, atol=1e-5)
    assert (steps[0].x_start - images).abs().mean() > (steps[-2].x_start - images).abs().mean()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun"])
def test_chain_goes_on_from_any_visited_time(curved, sampler):
    """One-step samplers: from its own x_t and t_start, with the noise of the unbroken chain."""
    diffusion = process()
    network, steps = curved(diffusion), []
    eta = {"eta": 0.7} if sampler == "ddim" else {}
    whole = draw(network, diffusion, sampler=sampler, callback=steps.append, **eta)
    t = steps[4].t
    rest = draw(network, diffusion, sampler=sampler, x_T=steps[3].x, t_start=t, **eta)
    torch.testing.assert_close(rest, whole, rtol=0, atol=1e-6)
    between = draw(network, diffusion, sampler=sampler, x_T=steps[3].x, t_start=t + 1, **eta)
    assert not torch.equal(between, whole)


@pytest.mark.parametrize(("t_start", "number"), [(99, 0), (88, 1), (22, 7), (0, 9)])
def test_steps_from_a_visited_time_keep_their_numbers_and_noise(curved, t_start, number):
    diffusion = process()
    network, x_T, steps = curved(diffusion), torch.randn(3, *SHAPE), []
    draw(network, diffusion, sampler="ddpm", x_T=x_T, t_start=t_start, callback=steps.append)
    times = [t_start, *(t for t in respace(diffusion, 10, "uniform").tolist() if t < t_start)]
    assert [step.t for step in steps] == times
    assert [step.k for step in steps] == list(range(number, number + len(times)))
    if len(times) > 1:
        a, b = diffusion.alphas_cumprod[times[:2]]
        beta = 1 - a / b
        mean = b**0.5 * beta / (1 - a) * steps[0].x_start + (1 - beta) ** 0.5 * (1 - b) / (1 - a) * x_T
        noise = rng.normal(3, rng.Purpose.REVERSE, torch.arange(3), SHAPE, step=number)
        torch.testing.assert_close(steps[0].x, (mean + beta**0.5 * noise).float(), rtol=0, atol=1e-5)


# Guidance


class Labelled:
    """x_start is the label's brightness; classes 0..3 and the null class 4."""

    VALUES = torch.tensor([-0.8, -0.2, 0.1, 0.4, 0.2])

    def __init__(self, diffusion):
        self.diffusion, self.calls = diffusion, []

    def __call__(self, x, t, labels):
        self.calls.append((len(x), int(t[0])))
        x_start = self.VALUES[labels].reshape(-1, 1, 1, 1).expand_as(x)
        value = self.diffusion.from_x_start(x_start, x, t, self.diffusion.prediction)
        if self.diffusion.learns_variance:
            value = torch.cat([value, labels.float().reshape(-1, 1, 1, 1).expand_as(x)], dim=1)
        return value


@pytest.mark.parametrize("prediction", ["eps", "x_start", "v", "x_prev"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_extrapolates_from_the_null_class(sampler, prediction):
    diffusion = process(prediction)
    network = Labelled(diffusion)
    labels = torch.tensor([1, 2, 3])
    images = draw(network, diffusion, sampler=sampler, guidance_scale=1.5, labels=labels, null_label=4)
    expected = 0.2 + 1.5 * (Labelled.VALUES[labels] - 0.2)
    # ddim's steps are exact for a single image; euler's, in the table's own time, are of first order.
    torch.testing.assert_close(images.mean(dim=(1, 2, 3)), expected, rtol=0, atol=5e-4 if sampler == "euler" else 1e-4)
    assert {size for size, _ in network.calls} == {6}


def test_scales_0_and_1_are_no_class_and_no_guidance():
    diffusion = process()
    labels = torch.tensor([1, 2, 3])
    plain = Labelled(diffusion)
    images = draw(plain, diffusion, labels=labels, null_label=4)
    torch.testing.assert_close(images.mean(dim=(1, 2, 3)), Labelled.VALUES[labels], rtol=0, atol=1e-5)
    assert {size for size, _ in plain.calls} == {3}
    images = draw(Labelled(diffusion), diffusion, guidance_scale=0.0, labels=labels, null_label=4)
    torch.testing.assert_close(images.mean(dim=(1, 2, 3)), torch.full((3,), 0.2), rtol=0, atol=1e-5)


def test_the_null_class_is_a_label():
    diffusion, labels = process(), torch.tensor([4, 2, 4])
    images = draw(Labelled(diffusion), diffusion, labels=labels, null_label=4)
    torch.testing.assert_close(images.mean(dim=(1, 2, 3)), Labelled.VALUES[labels], rtol=0, atol=1e-5)


def test_guidance_interval():
    diffusion = process()
    network = Labelled(diffusion)
    draw(
        network,
        diffusion,
        guidance_scale=2.0,
        guidance_interval=(33, 66),
        labels=torch.tensor([1, 2, 3]),
        null_label=4,
    )
    assert {t for size, t in network.calls if size == 6} == {33, 44, 55, 66}  # both ends belong to it
    assert len(network.calls) == 10


def test_guidance_of_a_bf16_network_is_computed_in_float32():
    diffusion = process()
    labels = torch.tensor([1, 2, 3])
    low, wide = (
        draw(
            lambda x, t, labels, widen=widen: widen(Labelled(diffusion)(x, t, labels).bfloat16()),
            diffusion,
            guidance_scale=1.5,
            labels=labels,
            null_label=4,
        )
        for widen in (lambda value: value, torch.Tensor.float)
    )
    assert torch.equal(low, wide)


def test_guided_variance_is_the_conditional_ones():
    diffusion = process(variance="learned_range")
    seen = []
    original = diffusion.split
    diffusion.split = lambda output, channels: seen.append(output) or original(output, channels)
    labels = torch.tensor([1, 2, 3])
    draw(Labelled(diffusion), diffusion, steps=None, guidance_scale=2.0, labels=labels, null_label=4)
    assert all(torch.equal(output[:, 3:].mean(dim=(1, 2, 3)), labels.float()) for output in seen)


# Clipping


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 0.995, 1.0])
def test_dynamic_threshold_equals_torch_quantile(quantile):
    x = 2 * torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    s = torch.quantile(x.abs().flatten(1), quantile, dim=1).clamp(min=1).reshape(5, 1, 1, 1)
    torch.testing.assert_close(dynamic_threshold(x, quantile), torch.minimum(torch.maximum(x, -s), s) / s)
    small = x / 100
    torch.testing.assert_close(dynamic_threshold(small, quantile), small)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_lie_in_their_range_whatever_the_clipping(sampler):
    steps = []
    network = lambda x, t, labels: torch.full_like(x, 5.0)  # noqa: E731
    images = draw(network, process("x_start"), sampler=sampler, clip="none", callback=steps.append)
    assert (images == 1).all()
    torch.testing.assert_close(steps[-1].x, torch.full_like(images, 5.0))


# Respacing


@hypothesis_settings(deadline=None)
@given(
    st.sampled_from(sorted(SPACINGS)),
    st.sampled_from(["linear", "cosine"]),
    st.integers(2, 1200),
    st.booleans(),
    st.data(),
)
def test_respaced_times_fall_and_are_as_many_as_asked(spacing, schedule, timesteps, zero, data):
    steps = data.draw(st.integers(1, timesteps))
    diffusion = GaussianDiffusion(make_betas(schedule, timesteps, zero_terminal_snr=zero), "v")
    times = respace(diffusion, steps, spacing)
    assert times.dtype == np.int64
    assert len(times) == steps
    assert (np.diff(times) < 0).all()
    assert times[-1] >= 0
    assert times[0] < timesteps
    if spacing != "quadratic" or steps == timesteps:
        assert times[0] == timesteps - 1


def test_respacing_by_hand():
    diffusion = process(timesteps=1000)
    assert respace(diffusion, 5, "trailing").tolist() == [999, 799, 599, 399, 199]
    assert respace(diffusion, 5, "uniform").tolist() == [999, 749, 500, 250, 0]
    assert respace(diffusion, 5, "quadratic").tolist() == [800, 450, 200, 50, 0]
    assert respace(process(timesteps=10), None, "quadratic").tolist() == list(range(9, -1, -1))


@pytest.mark.parametrize("steps", [7, 30, 150])
def test_trailing_is_diffusers(steps):
    scheduler = DPMSolverMultistepScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert respace(process(timesteps=1000), steps, "trailing").tolist() == scheduler.timesteps.tolist()


def test_quadratic_is_ddims():
    theirs = (np.linspace(0, np.sqrt(1000 * 0.8), 10) ** 2).astype(int)  # ermongroup/ddim, runners/diffusion.py
    assert respace(process(timesteps=1000), 10, "quadratic")[::-1].tolist() == theirs.tolist()


def test_log_snr_is_even():
    """On the paper's schedule; and as diffusers' DPM-Solver has it with use_lu_lambdas, up to its rounding."""
    diffusion = GaussianDiffusion(make_betas("linear", 1000))
    times = respace(diffusion, 15, "log_snr")
    steps = np.diff(0.5 * np.log(diffusion.snr[times]))
    assert steps == pytest.approx(steps.mean(), rel=0.35)
    assert steps[:10] == pytest.approx(steps.mean(), rel=0.02)  # the grid is coarse at small t alone
    theirs = DPMSolverMultistepScheduler(
        trained_betas=diffusion.betas, use_lu_lambdas=True, timestep_spacing="linspace", lambda_min_clipped=-5.1
    )
    theirs.set_timesteps(15)
    assert np.abs(theirs.timesteps.numpy() - times).max() <= 15


# Bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": 101}, "steps: 101 can't be taken out of the 100 times"),
        ({"sampler": "heun", "eta": 0.5}, "eta: 0.5 has no meaning for sampling.sampler: heun"),
        ({"sampler": "ddpm", "eta": 0.0}, "only ddim has eta"),
        ({"guidance_scale": 2.0}, "needs a class-conditional network with a null class"),
        ({"labels": torch.tensor([0, 1, 4]), "null_label": 3}, "label 4 is out of range; the classes are 0 to 2"),
        ({"labels": torch.tensor([0, -1, 1]), "null_label": 3}, "label -1 is out of range"),
        ({"labels": torch.tensor([0, 1]), "null_label": 3}, r"labels have shape \(2,\).* each of the 3 images"),
        ({"labels": torch.tensor([0.0, 1.0, 1.0]), "null_label": 3}, "dtype torch.float32; one int64"),
        ({"labels": torch.tensor([0, 1, 1])}, "no null_label: leave them out"),
        ({"null_label": 3}, "labels are missing"),
        ({"x_T": torch.zeros(3, 3, 8, 9)}, r"x_T has shape \(3, 3, 8, 9\); \(3, 3, 8, 8\) is needed"),
        ({"x_T": torch.zeros(1, 3, 8, 8)}, r"x_T has shape \(1, 3, 8, 8\); \(3, 3, 8, 8\) is needed"),
        ({"t_start": 5}, "no x_T was given"),
        ({"t_start": 100, "x_T": torch.zeros(3, 3, 8, 8)}, "t_start is 100; the times .* are 0 to 99"),
        (
            {"guidance_scale": 2.0, "guidance_interval": (9, 3), "labels": torch.tensor([0, 1, 1]), "null_label": 3},
            r"\[9, 3\] is empty",
        ),
    ],
)
def test_bad_input(curved, arguments, words):
    diffusion = process()
    with pytest.raises((ConfigError, SamplingError), match=words):
        draw(curved(diffusion), diffusion, **arguments)


@pytest.mark.parametrize(
    ("field", "value"), [("sampler", "dpm"), ("spacing", "leading"), ("clip", "hard"), ("eta", 1.5)]
)
def test_settings_that_went_round_the_configuration_are_named(curved, field, value):
    settings = SamplingConfig(sampler="ddim", steps=5).model_copy(update={field: value})
    diffusion = process()
    with pytest.raises(ConfigError, match=f"sampling.{field}: '?{value}"):
        sample(curved(diffusion), diffusion, settings, seed=0, indices=torch.arange(2), shape=SHAPE)


def test_learned_variance_of_single_steps_cannot_be_respaced(curved):
    diffusion = process(variance="learned")
    with pytest.raises(ConfigError, match="variance of single steps"):
        draw(curved(diffusion), diffusion)
    whole = draw(curved(diffusion), diffusion, steps=None)
    assert whole.isfinite().all()


def test_zero_terminal_snr_needs_the_last_time(curved):
    diffusion = GaussianDiffusion(make_betas("linear", 100, zero_terminal_snr=True), "v")
    with pytest.raises(ConfigError, match="quadratic starts at t = 80"):
        draw(curved(diffusion), diffusion, spacing="quadratic")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"eta": 1.5}, "eta"),
        ({"sampler": "dpm"}, "sampler"),
    ],
)
def test_configuration_refuses(keys, words):
    with pytest.raises(ValueError, match=words):
        SamplingConfig(**keys)


def test_paper_is_the_default(curved):
    """All T steps of the ancestral chain, with the noise of step k at counter k."""
    diffusion = GaussianDiffusion.from_config(DiffusionConfig(timesteps=40))
    network = curved(diffusion)
    settings = SamplingConfig()
    indices = torch.tensor([0, 5])
    *_, last = trajectory(network, diffusion, settings, seed=1, indices=indices, shape=SHAPE)
    x = rng.normal(1, rng.Purpose.X_T, indices, SHAPE)
    for k, time in enumerate(range(39, -1, -1)):
        t = torch.full((2,), time)
        reverse = diffusion.p_mean_variance(network(x, t), x, t, lambda x_start: x_start.clamp(-1, 1))
        noise = rng.normal(1, rng.Purpose.REVERSE, indices, SHAPE, step=k)
        x = reverse.mean + (0 if time == 0 else (0.5 * reverse.log_variance).exp() * noise)
    torch.testing.assert_close(last.x, x, rtol=0, atol=1e-5)


def test_autoguidance_leads_away_from_the_worse_network(curved):
    """Karras et al. 2024, equation 3, on x_start; of networks that predict different things; in its interval alone."""
    diffusion, other = process("eps"), process("v")
    network, worse = curved(diffusion), curved(other, bend=0.2)
    settings = {"sampler": "ddim", "guidance_scale": 1.7, "guide": "file:///worse", "clip": "none"}

    def mixed(x, t, labels):
        a = diffusion.to_x_start(network(x, t), x, t)
        b = other.to_x_start(worse(x, t), x, t)
        return diffusion.from_x_start(b + 1.7 * (a - b), x, t, "eps")

    guided = draw(network, diffusion, guide_network=Guide(worse, other, None), **settings)
    reference = draw(mixed, diffusion, sampler="ddim", clip="none")
    assert (guided - reference).abs().max() < 1e-4
    free = draw(network, diffusion, sampler="ddim", clip="none")
    settings |= {"guidance_interval": (98, 98)}
    nowhere = draw(network, diffusion, guide_network=Guide(worse, other, None), **settings)
    assert torch.equal(free, nowhere)


def test_a_guide_of_another_process_or_of_other_classes_is_refused(curved):
    diffusion = process()
    network = curved(diffusion)
    settings = {"guidance_scale": 2.0, "guide": "file:///worse"}
    with pytest.raises(SamplingError, match="its network was not given"):
        draw(network, diffusion, **settings)
    for other in (process(timesteps=50), GaussianDiffusion(make_betas("cosine", 100)), ContinuousDiffusion("edm")):
        with pytest.raises(SamplingError, match="other noise levels"):
            draw(network, diffusion, guide_network=Guide(network, other, None), **settings)
    with pytest.raises(SamplingError, match="knows 3 classes, the snapshot's none"):
        draw(network, diffusion, guide_network=Guide(network, diffusion, 3), **settings)
