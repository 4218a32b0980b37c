"""The step: contract 1's cut of the batch, contract 2's t and eps, and the gradient against plain autograd."""

import pytest
import torch
from hypothesis import given, strategies as st

from ddpm_dist.config import Config
from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.engine.engine import StepReport
from ddpm_dist.engine.world import World
from ddpm_dist.recipe import parse_config
from ddpm_dist.training.metrics import PhaseClock
from ddpm_dist.training.step import BatchPlan, to_model_range, training_step

RECIPE = """
run: {url: memory://run, seed: 7}
data: {url: memory://data, image_size: 4, channels: 1}
model: {channels: 32, channel_mult: [1], attention_resolutions: []}
train: {steps: 10, global_batch: 12, max_micro_batch: 4}
"""


class RecordingEngine:
    """Stands where the engine stands; keeps what the network was asked, and real gradients of one parameter."""

    def __init__(self, offset: float = 0.0) -> None:
        self.scale, self.offset = torch.nn.Parameter(torch.tensor(0.5)), offset
        self.asked: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        self.rates: list[float] = []

    def __call__(self, x, t, labels=None):
        self.asked.append((x.clone(), t.clone(), labels))
        return self.scale * x + self.offset

    def backward(self, loss):
        loss.backward()

    def step(self, lr):
        self.rates.append(lr)
        return StepReport(True, 1.0, 1.0)

    def inputs(self):
        return torch.cat([x for x, _, _ in self.asked]), torch.cat([t for _, t, _ in self.asked])


def run(cfg: Config, images, size: int, step: int = 3, labels=None, offset: float = 0.0) -> list[RecordingEngine]:
    """One step in an imaginary world of `size` ranks."""
    engines = []
    plan = BatchPlan.of(cfg.train.global_batch, size, cfg.train.max_micro_batch)
    for rank in range(size):
        engine, world = RecordingEngine(offset), World(rank, size, rank, torch.device("cpu"), "gloo")
        share = slice(rank * plan.share, (rank + 1) * plan.share)
        diffusion = GaussianDiffusion.from_config(cfg.diffusion)
        mine = None if labels is None else labels[share]
        training_step(engine, diffusion, images[share], mine, step, cfg, world, plan, PhaseClock())
        engines.append(engine)
    return engines


@pytest.fixture
def images():
    return torch.randint(0, 256, (12, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@given(st.integers(1, 512), st.integers(1, 512), st.integers(1, 200))
def test_plan_uses_the_largest_divisor(share: int, size: int, limit: int) -> None:
    plan = BatchPlan.of(share * size, size, limit)
    assert plan.share == share
    assert plan.micro_batch * plan.accumulation == share
    assert plan.micro_batch <= limit
    assert not [m for m in range(plan.micro_batch + 1, min(limit, share) + 1) if share % m == 0]


@pytest.mark.parametrize("size", [2, 3, 4, 6, 12])
def test_noise_and_times_are_the_same_bytes_at_any_world_size(size: int, images) -> None:
    cfg = parse_config(RECIPE)
    (alone,) = run(cfg, images, 1)
    x, t = alone.inputs()
    parts = [engine.inputs() for engine in run(cfg, images, size)]
    assert torch.equal(torch.cat([p[0] for p in parts]), x)
    assert torch.equal(torch.cat([p[1] for p in parts]), t)


def test_each_step_and_each_seed_draws_anew(images) -> None:
    cfg = parse_config(RECIPE)
    (first,), (second,) = run(cfg, images, 1, step=3), run(cfg, images, 1, step=4)
    (other,) = run(parse_config(RECIPE, ["run.seed=8"]), images, 1, step=3)
    assert not torch.equal(first.inputs()[0], second.inputs()[0])
    assert not torch.equal(first.inputs()[0], other.inputs()[0])


def test_gradient_is_that_of_the_mean_over_the_batch(images) -> None:
    """Micro-batches add up: DeepSpeed divides by their number, the recording engine doesn't."""
    cfg = parse_config(RECIPE)
    (engine,) = run(cfg, images, 1)
    x_t, t = engine.inputs()
    diffusion = GaussianDiffusion.from_config(cfg.diffusion)
    alpha_bar = torch.tensor(diffusion.alphas_cumprod)[t].view(-1, 1, 1, 1)
    eps = (x_t - alpha_bar.sqrt() * to_model_range(images)) / (1 - alpha_bar).sqrt()
    expected = (2 * (0.5 * x_t - eps) * x_t).mean()
    assert engine.scale.grad is not None
    torch.testing.assert_close(engine.scale.grad.double() / 3, expected.double(), rtol=1e-4, atol=0)


def test_a_loss_that_is_not_finite_has_no_finite_gradient(images) -> None:
    """The square of 1e20 is none in float32, and its derivative is; the engine judges by the gradient."""
    cfg = parse_config(RECIPE)
    (engine,) = run(cfg, images, 1, offset=1e20)
    assert engine.scale.grad is not None
    assert not engine.scale.grad.isfinite()
    (engine,) = run(cfg, images, 1, offset=1e15)
    assert engine.scale.grad is not None
    assert engine.scale.grad.isfinite()


def test_labels_are_dropped_by_place_and_only_for_conditional_networks(images) -> None:
    labels = torch.arange(12) % 3
    conditional = ["model.num_classes=3", "diffusion.label_dropout=0.5"]
    (alone,) = run(parse_config(RECIPE, conditional), images, 1, labels=labels)
    halves = run(parse_config(RECIPE, conditional), images, 2, labels=labels)
    seen = torch.cat([y for _, _, y in alone.asked])
    assert torch.equal(seen, torch.cat([y for engine in halves for _, _, y in engine.asked]))
    dropped = seen == 3
    assert 0 < dropped.sum() < 12
    assert torch.equal(seen[~dropped], labels[~dropped])
    (plain,) = run(parse_config(RECIPE), images, 1, labels=labels)
    assert all(y is None for _, _, y in plain.asked)


def test_model_range_spans_minus_one_to_one() -> None:
    values = to_model_range(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1))
    assert values.flatten().tolist() == [-1.0, 1.0]
