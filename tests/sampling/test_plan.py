"""Units, labels and manifests are pure data: every index once, the same for any number of workers."""

import pytest
import torch
from hypothesis import given, strategies as st

from ddpm_dist.config import SamplingConfig
from ddpm_dist.errors import SamplingError
from ddpm_dist.sampling.plan import Fingerprint, Labels, Manifest, Unit, cut, settle

COUNTS = st.integers(1, 5000)


def manifest(**changes: object) -> Manifest:
    values: dict[str, object] = {
        "snapshot": "file:///a",
        "snapshot_id": "f" * 64,
        "step": 10,
        "images_seen": 320,
        "kind": "ema",
        "image_size": 8,
        "channels": 1,
        "num_classes": None,
        "seed": 0,
        "num_samples": 64,
        "labels": "none",
        "sampling": SamplingConfig(unit_size=16, batch_size=4),
        "fingerprint": Fingerprint(device="cpu AVX2", threads=1, torch="2.13.0"),
        "versions": {"ray": "2.60.0"},
    }
    return Manifest.model_validate({**values, **changes})


@given(COUNTS, st.integers(1, 600))
def test_units_hold_every_index_once(num_samples: int, unit_size: int) -> None:
    units = cut(num_samples, unit_size)
    assert [i for unit in units for i in range(unit.start, unit.stop)] == list(range(num_samples))
    assert len({unit.shard for unit in units} | {unit.receipt for unit in units}) == 2 * len(units)
    assert all(unit.stop - unit.start == unit_size for unit in units[:-1])


@given(st.integers(0, 10**8), st.integers(1, 300), st.integers(1, 130))
def test_batches_are_of_one_size_and_begin_with_the_unit(start: int, count: int, batch_size: int) -> None:
    batches = Unit(start, start + count).batches(batch_size)
    assert {len(batch) for batch in batches} == {batch_size}
    assert torch.cat(batches)[:count].tolist() == list(range(start, start + count))
    assert len(batches) == -(-count // batch_size)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=6), st.integers(1, 64))
def test_a_job_that_grows_keeps_its_full_units(steps: list[int], unit_size: int) -> None:
    small, large = cut(steps[0] * unit_size, unit_size), cut(sum(steps) * unit_size, unit_size)
    assert large[: len(small)] == small


def test_random_labels_depend_on_the_index_alone() -> None:
    rule = Labels.parse(None, 10)
    together, alone = rule(torch.arange(1000), 3), rule(torch.tensor([637]), 3)
    assert together is not None
    assert alone is not None
    assert together[637] == alone[0]
    assert sorted(set(together.tolist())) == list(range(10))
    other = rule(torch.arange(1000), 4)
    assert other is not None
    assert (other != together).any()


def test_listed_labels_repeat() -> None:
    rule, everything, null = Labels.parse("2,0,1", 3), Labels.parse("all", 3), Labels.parse("none", 3)
    indices = torch.arange(5)
    assert [list(r(indices, 0)) for r in (rule, everything, null)] == [  # type: ignore[arg-type]
        [2, 0, 1, 2, 0],
        [0, 1, 2, 0, 1],
        [3] * 5,
    ]
    assert Labels.parse(None, None)(indices, 0) is None


def test_a_network_without_a_null_class() -> None:
    assert Labels.parse(None, 3, has_null=False).spec == "random"
    assert Labels.parse("all", 3, has_null=False).spec == "0,1,2"
    with pytest.raises(SamplingError, match="--labels none: this snapshot's network has no null class"):
        Labels.parse("none", 3, has_null=False)


@pytest.mark.parametrize(
    ("spec", "num_classes", "message"),
    [
        ("3", None, "--labels 3: this snapshot's network is unconditional"),
        ("random", None, "unconditional"),
        ("3,10", 10, "10 is not among the classes 0..9"),
        ("cat", 10, "expected random, none, all, or classes such as 3"),
    ],
)
def test_labels_that_cannot_be(spec: str, num_classes: int | None, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        Labels.parse(spec, num_classes)


def test_a_manifest_comes_back_from_its_bytes() -> None:
    assert Manifest.model_validate_json(manifest().dump()) == manifest()


def test_another_jobs_folder_is_refused_with_the_list() -> None:
    other = manifest(seed=1, sampling=SamplingConfig(unit_size=16, batch_size=8))
    with pytest.raises(SamplingError) as error:
        settle(manifest(), other, "s3://b/out")
    assert "seed: 0 -> 1" in str(error.value)
    assert "sampling.batch_size: 4 -> 8" in str(error.value)


def test_what_does_not_change_images_may_differ() -> None:
    moved = manifest(snapshot="file:///elsewhere", versions={"ray": "3"})
    assert settle(manifest(), moved, "out") == manifest()


def test_a_job_may_grow_where_its_units_allow_it() -> None:
    assert settle(manifest(), manifest(num_samples=100), "out").num_samples == 100
    with pytest.raises(SamplingError, match=r"whose last unit is shorter than sampling\.unit_size: 16"):
        settle(manifest(num_samples=50), manifest(num_samples=100), "out")
    with pytest.raises(SamplingError, match="ask for at least as many"):
        settle(manifest(), manifest(num_samples=10), "out")
