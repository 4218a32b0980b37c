"""Which skipped steps are failures, when they end a run, and that ranks agree on it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_dist.data import Batch
from ddpm_dist.engine.engine import LOWEST_LOSS_SCALE, StepReport
from ddpm_dist.engine.world import World
from ddpm_dist.errors import NonFiniteError
from ddpm_dist.recipe import parse_config
from ddpm_dist.training.failures import SkippedSteps
from ddpm_dist.training.step import StepResult


def ranks(folder: Path, precision: str) -> list[SkippedSteps]:
    cfg = parse_config(
        f"""
        run: {{url: "file://{folder}/run"}}
        data: {{url: "memory://none", image_size: 32}}
        train: {{steps: 10, global_batch: 4, max_nonfinite_steps: 3}}
        """,
        [f"precision={precision}", f"cluster.gpus_per_worker={int(precision == 'fp16')}"],
    )
    return [SkippedSteps(cfg, World(rank, 2, rank, torch.device("cpu"), "gloo"), lambda: None) for rank in range(2)]


def skipped(loss_scale: float, losses: list[float]) -> Any:
    return StepResult(torch.tensor([1, 2]), torch.tensor(losses), StepReport(False, float("inf"), loss_scale))


BATCH: Any = Batch(0, 0, torch.zeros(2, 1, 2, 2, dtype=torch.uint8), None, ["a", "b"], {})


def records(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run/failures").glob("*"))


def test_fp16_s_scale_is_halved_as_long_as_there_is_something_to_halve(tmp_path: Path) -> None:
    both = ranks(tmp_path, "fp16")
    for step in range(10):
        for rank in both:
            rank.see(step, BATCH, skipped(2.0**16 / 2**step, [1.0, 1.0]))
    assert [rank.total for rank in both] == [0, 0]
    assert records(tmp_path) == []
    for step in range(10, 12):
        for rank in both:
            rank.see(step, BATCH, skipped(LOWEST_LOSS_SCALE, [1.0, 1.0]))
    for rank in both:
        with pytest.raises(NonFiniteError, match="3 steps in a row up to step 12"):
            rank.see(12, BATCH, skipped(LOWEST_LOSS_SCALE, [1.0, 1.0]))


def test_ranks_agree_where_one_of_them_alone_has_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    first, second = ranks(tmp_path, "fp16")
    for step in range(5):
        first.see(step, BATCH, skipped(1024.0, [float("nan"), 1.0]))
        second.see(step, BATCH, skipped(1024.0, [1.0, 1.0]))
    assert first.total == second.total == 0
    assert first.in_a_row == second.in_a_row == 0
    assert records(tmp_path) == [f"step-00000000{step}-rank-00000.json" for step in range(5)]
    record = json.loads((tmp_path / "run/failures/step-000000000-rank-00000.json").read_text())
    assert record["samples"][0] == {"key": "a", "t": 1, "loss": "nan"}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_any_other_precision_has_nothing_to_halve(tmp_path: Path, precision: str) -> None:
    both = ranks(tmp_path, precision)
    for rank in both:
        rank.see(0, BATCH, skipped(1.0, [1.0, 1.0]))
        rank.see(1, BATCH, StepResult(torch.tensor([1]), torch.ones(1), StepReport(True, 1.0, 1.0)))
        assert (rank.total, rank.in_a_row) == (1, 0)
    assert len(records(tmp_path)) == 2
