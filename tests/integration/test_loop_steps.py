"""What a training step is given and what it leaves, at changing world sizes and with numbers that aren't numbers."""

import json
import math
from pathlib import Path

import pytest

from ddpm_dist import storage
from ddpm_dist.state import history
from tests.integration import loop_ranks as loop
from tests.integration.loop_ranks import Faults


def record(folder: Path, name: str) -> Faults:
    (folder / name).mkdir()
    return Faults(record=str(folder / name))


@pytest.mark.timeout(600)
def test_two_one_four_two_ranks_see_the_batches_and_losses_of_two(
    data_url: str, bucket_url: str, tmp_path: Path
) -> None:
    """Killed in steps 3, 6 and 9, and continued by another number of ranks each time."""
    plan = ("train.steps=12", "precision=fp32", "model.dropout=0")
    runs = {}
    for name, size, micro in (("unbroken", 2, 4), ("whole", 1, 16), ("halves", 1, 8)):
        cfg = loop.config(f"{bucket_url}/{name}", data_url, *plan, f"train.max_micro_batch={micro}")
        loop.finish(cfg, size, record(tmp_path, name))
        runs[name] = loop.steps_of(tmp_path / name)

    elastic = loop.config(f"{bucket_url}/elastic", data_url, *plan)
    recorded = record(tmp_path, "elastic")
    for size, step in ((2, 3), (1, 6), (4, 9)):
        faults = Faults(die=(size - 1, step, 0), die_after_state=step // 2 * 2, record=recorded.record)
        assert None in loop.attempt(elastic, size, faults)
    loop.finish(elastic, 2, recorded)
    runs["elastic"] = loop.steps_of(tmp_path / "elastic")

    assert [runs["elastic"][step]["world"] for step in range(12)] == [2] * 2 + [1] * 4 + [4] * 2 + [2] * 4
    for name, steps in runs.items():
        assert sorted(steps) == list(range(12)), name
        assert [steps[s]["keys"] for s in range(12)] == [runs["unbroken"][s]["keys"] for s in range(12)], name
    own = difference(runs["whole"], runs["halves"])
    assert 0 < own < 1e-4, "one batch and its two halves differ by the order of sums, and by no more"
    assert difference(runs["elastic"], runs["unbroken"]) <= 2 * own


def difference(a: dict[int, dict], b: dict[int, dict]) -> float:
    return max(abs(a[step]["loss"] - b[step]["loss"]) for step in a)


# Numbers that aren't numbers


@pytest.mark.parametrize(
    ("stage", "precision"), [(1, "bf16"), pytest.param(0, "fp32", marks=pytest.mark.full), (3, "fp32")]
)
def test_a_nan_is_never_applied_and_what_led_to_it_is_kept(
    stage: int, precision: str, data_url: str, bucket_url: str, tmp_path: Path
) -> None:
    cfg = loop.config(
        f"{bucket_url}/run", data_url, "train.steps=6", f"zero.stage={stage}", f"precision={precision}",
        "train.max_nonfinite_steps=2",
    )  # fmt: skip
    loop.finish(cfg, 2, Faults(nan_at=(1, 4), record=str(tmp_path)))
    steps = loop.steps_of(tmp_path)
    assert sorted(storage.list_names(f"{bucket_url}/run/failures")) == [
        f"step-{step:09d}-rank-{rank:05d}.json" for step in (1, 4) for rank in (0, 1)
    ]
    for step in (1, 4):
        kept = [
            json.loads(storage.read(f"{bucket_url}/run/failures/step-{step:09d}-rank-{r:05d}.json")) for r in (0, 1)
        ]
        samples = [sample for rank in kept for sample in rank["samples"]]
        assert [sample["key"] for sample in samples] == steps[step]["keys"]
        assert all(0 <= sample["t"] < 1000 and math.isfinite(float(sample["loss"])) for sample in samples)
        assert all(rank["images"]["min"] == 0 < rank["images"]["mean"] < rank["images"]["max"] for rank in kept)
        assert not math.isfinite(float(kept[0]["grad_norm"]))
    manifest, tensors = loop.newest_state(f"{bucket_url}/run")
    assert manifest.scalars["optimizer_steps"] == 4, "6 steps, of which 2 were left out"
    assert manifest.meta["skipped_steps"] == 2
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert json.loads(storage.read(f"{bucket_url}/run/summary.json"))["skipped_steps"] == 2


def test_so_many_in_a_row_stop_the_run_and_the_last_state_goes_on(data_url: str, bucket_url: str) -> None:
    plan = ("train.steps=8", "train.max_nonfinite_steps=3")
    cfg = loop.config(f"{bucket_url}/run", data_url, *plan)
    results = loop.attempt(cfg, 2, Faults(nan_at=(0, 3, 4, 5)))
    said = [result for result in results if isinstance(result, str)]
    assert said
    assert all("NonFiniteError: 3 steps in a row up to step 5" in text for text in said), said
    folder = f"{bucket_url}/run/checkpoints"
    # On a busy machine the first state is still on its way when the run ends.
    assert all(state.step <= 4 for state in history.read(folder)[1]), "no state is taken where the run stops"
    loop.finish(cfg, 2)
    assert history.read(folder)[1][0].step == 8
