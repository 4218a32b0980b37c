"""tools/bench/samplers.py: what it counts, compares and draws."""

from pathlib import Path

import pytest
import torch
from PIL import ImageColor

from ddpm_dist.config import DiffusionConfig
from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.diffusion.samplers import SAMPLERS, sample
from ddpm_dist.errors import ConfigError
from ddpm_dist.snapshot import save_snapshot
from tests.models.networks import random_unet, tiny_config
from tools.bench.samplers import Bench
from tools.bench.samplers_picture import COLOURS, picture
from tools.bench.samplers_rows import METRICS, NEAR, STOCHASTIC, Draw, Row, curves, first_within, steps_for


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("budget", [2, 7, 10])
def test_a_budget_is_kept_and_used(sampler: str, budget: int) -> None:
    calls = 0

    def network(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros_like(x)

    draw = Draw(sampler, "uniform", steps_for(sampler, budget))
    diffusion = GaussianDiffusion.from_config(DiffusionConfig())
    sample(network, diffusion, draw.settings, seed=0, indices=torch.arange(2), shape=(1, 4, 4))
    assert budget - 1 <= calls <= budget


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_with_noise_are_the_ones_that_are_held_to_ancestral_sampling(sampler: str) -> None:
    diffusion = GaussianDiffusion.from_config(DiffusionConfig())
    draw = Draw(sampler, "uniform", 5, seed=3)
    x_T = torch.zeros(1, 1, 4, 4)
    a, b = (
        sample(
            lambda x, t, labels: 0.1 * x, diffusion, draw.settings, seed=seed, indices=torch.arange(1),
            shape=(1, 4, 4), x_T=x_T,
        )
        for seed in (0, 1)
    )  # fmt: skip
    assert (sampler in STOCHASTIC) == bool((a != b).any())
    assert draw.limit.sampler == ("ddpm" if sampler in STOCHASTIC else "heun")
    assert draw.limit.seed == 3


@pytest.mark.parametrize("null_label", [2, None], ids=["with a null class", "without"])
def test_a_network_with_classes_is_refused(null_label: int | None, tmp_path: Path) -> None:
    url, config = f"file://{tmp_path}", tiny_config(num_classes=2)
    diffusion = GaussianDiffusion.from_config(DiffusionConfig())
    save_snapshot(url, random_unet(config), config, diffusion, {"null_label": null_label})
    with pytest.raises(ConfigError, match="is conditional on classes"):
        Bench(url, "memory://nothing", tmp_path, None)


def row(evaluations: int, *ratios: float, sampler: str = "unipc") -> Row:
    ratio = dict(zip(METRICS, ratios, strict=True))
    return Row(Draw(sampler, "log_snr", steps_for(sampler, evaluations)), evaluations, ratio, ratio)


def test_near_means_near_in_all_distances_from_there_on() -> None:
    rows = [row(20, 1.0, NEAR), row(5, 1.0, 1.0), row(10, 1.0, 2.0), row(15, 1.04, 0.9), row(8, 9, 9, sampler="ddim")]
    assert [r.evaluations for r in curves(rows)["unipc/log_snr"]] == [5, 10, 15, 20]
    assert first_within(rows) == {"unipc/log_snr": 15, "ddim/log_snr": None}


def test_the_picture_has_a_curve_for_each_sampler() -> None:
    rows = [row(n, ratio, ratio, sampler=s) for s, ratio in (("unipc", 1.3), ("ddim", 99.0)) for n in (5, 25)]
    colours = {colour for _, colour in picture(rows).getcolors(2**24) or []}
    shown = {name: ImageColor.getrgb(colour) for name, colour in COLOURS.items()}
    assert len(set(shown.values())) == len(shown)
    found = {name for name, colour in shown.items() if colour in colours}
    assert found - {"ddpm"} == {"unipc", "ddim"}, "also at their edge; ddpm's grey is that of words"
