"""The shortened ways of `engine/flat.py` beside DeepSpeed's own, bit for bit."""

from typing import Any

import pytest

from ddpm_dist.engine import flat, zero_layout
from ddpm_dist.engine.world import World
from tests.engine import worker_group as group

ALL, FEW, NO_CLIP = 1 << 25, 300, 1e9
"""Elements of a bucket: every parameter at once, or one to three, some of them larger than it."""


def train(world: World, stage: int, precision: str) -> list[tuple[list[Any], dict[Any, Any]]]:
    """(reports, weights and moments) of four steps of two micro-batches, the second of which isn't finite: DeepSpeed's
    way, ours twice, and both without clipping."""
    ours, found = (flat.shorten_bf16, flat.shorten_zero), []
    for theirs, bucket, clip in ((1, 0, 0.05), (0, ALL, 0.05), (0, FEW, 0.05), (1, 0, NO_CLIP), (0, FEW, NO_CLIP)):
        zero_layout.MAX_BUCKET_ELEMENTS = bucket  # of this process, which ends with the test
        flat.shorten_bf16, flat.shorten_zero = (lambda *_: None,) * 2 if theirs else ours
        engine = group.build(world, group.config(stage=stage, precision=precision, train={"grad_clip": clip}), 2)
        reports = []
        for step in range(4):
            group.backward(engine, step, float("nan") if step == 1 else 1.0)
            reports.append(engine.step(1e-3))
        found.append((reports, group.tensors_of(engine)))
    return found


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.full), 2])
@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "bf16"), (1, "fp32"), (2, "fp32")])
def test_few_operations_give_the_bits_of_many(stage: int, precision: str, size: int) -> None:
    for theirs, at_once, by_few, unclipped, unclipped_by_few in group.run_ranks(train, size, stage, precision):
        assert [report.applied for report in theirs[0]] == [True, False, True, True]
        assert theirs[0][0].grad_norm > 0.05, "nothing was clipped"
        for (expected, wanted), (reports, found) in (
            (theirs, at_once), (theirs, by_few), (unclipped, unclipped_by_few)
        ):  # fmt: skip
            assert reports == expected
            assert all(found[key].equal(wanted[key]) for key in wanted)
