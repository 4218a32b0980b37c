"""Two GPUs: NCCL's collectives, ZeRO over two ranks, states of two ranks for one and back.

Where there is one, each is left out with a line.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_dist.engine import broadcast_object, gather_objects
from ddpm_dist.engine.world import World
from tests.cuda.ranks import Ranks
from tests.cuda.small import Steps
from tests.engine import worker_group as group


def agree(world: World) -> tuple[Any, list[Any], float, str]:
    values = torch.full((3,), float(world.rank + 1), device=world.device)
    torch.distributed.all_reduce(values)
    device = str(world.device)
    return broadcast_object(world, f"of {world.rank}"), gather_objects(world, world.rank), float(values[0]), device


def test_ranks_have_a_device_each_and_agree(pair: Ranks, device: str) -> None:
    found = pair(agree)
    assert [answer[:3] for answer in found] == [("of 0", [0, 1], 3.0)] * 2
    assert [answer[3] for answer in found] == (["cuda:0", "cuda:1"] if device == "cuda" else ["cpu", "cpu"])


def trained(world: World, stage: int, precision: str) -> tuple[list[float], dict[str, Tensor], str]:
    steps = Steps(world, f"zero.stage={stage}", f"precision={precision}", "model.dropout=0.0")
    norms = [steps.one(step).report.grad_norm for step in range(4)]
    return norms, group.whole(world, steps.engine), steps.digest()


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_two_ranks_train_as_one(pair: Ranks, alone: Ranks, stage: int, precision: str) -> None:
    first, second = pair(trained, stage, precision)
    (single,) = alone(trained, stage, precision)
    assert first[0] == second[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    assert first[0] == pytest.approx(single[0], rel=1e-4 if precision == "fp32" else 3e-2)
    again = pair(trained, stage, precision)
    assert [rank[2] for rank in again] == [first[2], second[2]], "the same bits each time"


def save_or_load(world: World, url: str, stage: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights as they were read, weights after two steps more, which are saved)."""
    steps = Steps(world, f"run.url={url}", f"zero.stage={stage}", "precision=bf16", "model.dropout=0.0")
    store = steps.store()
    state = store.claim()
    first = store.load(state, steps.engine, steps.ema)["step"] if state is not None else 0
    read = group.whole(world, steps.engine)
    for step in range(first, first + 2):
        steps.one(step)
    store.save(first + 2, steps.engine, steps.ema, {"step": first + 2})
    store.finish()
    return read, group.whole(world, steps.engine)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_states_go_from_two_ranks_to_one_and_back(pair: Ranks, alone: Ranks, tmp_path: Path, stage: int) -> None:
    url = f"file://{tmp_path}/run"
    before = pair(save_or_load, url, stage)[0]
    (middle,) = alone(save_or_load, url, stage)
    after = pair(save_or_load, url, stage)[0]
    for written, read in ((before[1], middle[0]), (middle[1], after[0])):
        assert all(torch.equal(written[name], read[name]) for name in written)
