"""Learning rates against the formulas, at the places that matter."""

import pytest

from ddpm_dist.config import TrainConfig
from ddpm_dist.training.optim import lr_at


def config(**values: object) -> TrainConfig:
    return TrainConfig(**{"steps": 100, "global_batch": 8, "lr": 2e-4, "warmup_steps": 5000, **values})  # type: ignore[arg-type]


def test_the_papers_rate_rises_from_zero_and_stays() -> None:
    for step, expected in {0: 0.0, 1: 4e-8, 2500: 1e-4, 5000: 2e-4, 800_000: 2e-4}.items():
        assert lr_at(config(), step) == pytest.approx(expected, rel=1e-12)


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert lr_at(config(warmup_steps=0), 0) == 2e-4


def test_the_cosine_falls_to_zero_at_decay_steps() -> None:
    cfg = config(warmup_steps=100, lr_schedule="cosine", decay_steps=1100)
    for step, share in {50: 0.5, 100: 1.0, 350: 0.8535533905932737, 600: 0.5, 1100: 0.0, 5000: 0.0}.items():
        assert lr_at(cfg, step) == pytest.approx(share * 2e-4, abs=1e-18)


def test_the_inverse_square_root_falls_after_the_warm_up() -> None:
    cfg = config(warmup_steps=100, lr_schedule="inverse_sqrt")
    for step, share in {50: 0.5, 100: 1.0, 400: 0.5, 10_000: 0.1}.items():
        assert lr_at(cfg, step) == pytest.approx(share * 2e-4, rel=1e-12)
