"""Whole training jobs that die anywhere, and go on: the bytes of an unbroken run, on real ranks and a real store."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from ddpm_dist import storage
from ddpm_dist.state import history
from tests.integration import loop_ranks as loop
from tests.integration.loop_ranks import Faults

STEPS = 7
MODES = [
    (stage, precision, accumulation)
    for stage, precision in [(0, "fp32"), *((s, p) for s in (1, 2, 3) for p in ("fp32", "bf16"))]
    for accumulation in (1, 2)
]
QUICK = [(1, "bf16", 2), (3, "fp32", 1)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "mode", [mode if mode in QUICK else pytest.param(mode, marks=pytest.mark.full) for mode in MODES], ids=str
)
def test_killed_at_random_steps_it_ends_with_the_bytes_of_an_unbroken_run(
    mode: tuple[int, str, int], data_url: str, bucket_url: str
) -> None:
    stage, precision, accumulation = mode
    plan = [
        f"train.steps={STEPS}", f"zero.stage={stage}", f"precision={precision}",
        f"train.max_micro_batch={8 // accumulation}",
    ]  # fmt: skip
    unbroken = loop.finish(loop.config(f"{bucket_url}/unbroken", data_url, *plan), 2)
    killed = loop.config(f"{bucket_url}/killed", data_url, *plan)
    deaths = [
        (random.randrange(2), step, random.randrange(accumulation)) for step in sorted(random.sample(range(7), 2))
    ]
    for die in deaths:
        assert None in loop.attempt(killed, 2, Faults(die=die)), f"{die}: one rank was killed"
    assert loop.finish(killed, 2) == unbroken, f"killed at (rank, step, backward pass) {deaths}"


def test_a_history_of_losses_goes_on_bit_for_bit(data_url: str, bucket_url: str) -> None:
    """Killed when every t has its losses, so that t and its weights come from what the state holds of them."""
    plan = (
        "train.steps=16", "checkpoint.every_steps=2", "precision=fp32", "diffusion.timesteps=2", "sampling.steps=2",
        "diffusion.t_sampling=loss_second_moment",
    )  # fmt: skip
    unbroken = loop.finish(loop.config(f"{bucket_url}/unbroken", data_url, *plan), 2)
    killed = loop.config(f"{bucket_url}/killed", data_url, *plan)
    assert None in loop.attempt(killed, 2, Faults(die=(1, 9, 0), die_after_state=8)), "one rank was killed"
    assert loop.finish(killed, 2) == unbroken


# Any point of a save

SAVES = ("train.steps=6", "model.channels=32", "model.norm_groups=32", "model.num_res_blocks=2")
"""A million parameters, so that a state has uploads in parts; three saves, and the removal of the first state."""
CHANGES = {0: 22, 1: 18}
"""What a rank changes below `checkpoints/` in an attempt: rank 0 the claim and its probe, three states of two files,
one of these in two parts, three manifests, and a removal of two steps; rank 1 the same files, and a table of them for
each state."""
POINTS = [
    (rank, number, after) for rank, count in CHANGES.items() for number in range(count) for after in (False, True)
]
QUICK_POINTS = [(0, 1, False), (0, 5, True), (0, 13, False), (0, 21, False), (1, 9, True)]


@pytest.fixture(scope="session")
def saved_unbroken(data_url: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("unbroken")
    return loop.finish(loop.config((folder / "run").as_uri(), data_url, *SAVES), 2, Faults(small_parts=True))


def test_the_points_at_which_a_process_can_die_are_all_known(data_url: str, bucket_url: str, tmp_path: Path) -> None:
    """The list of what an attempt changes in the store, so that none of it is left out below."""
    loop.finish(loop.config(f"{bucket_url}/run", data_url, *SAVES), 2, Faults(record=str(tmp_path), small_parts=True))
    seen = {rank: (tmp_path / f"changes-{rank}").read_text().splitlines() for rank in CHANGES}
    assert {rank: len(lines) for rank, lines in seen.items()} == CHANGES, seen
    assert seen[0][:2] == 2 * ["pipe_file owner/000001"], "the claim, and the probe that it can't be made twice"
    for rank, lines in seen.items():
        for step in (2, 4, 6):
            mine = [line.replace(f"{step:09d}-0001/{rank:05d}-", "") for line in lines if f"{step:09d}-" in line]
            assert mine.count("upload_part 000.f32") == 2, mine
            assert mine.index("complete_multipart_upload 000.f32") > mine.index("create_multipart_upload 000.f32")
            assert f"{step:09d}-0001/{'manifest' if rank == 0 else 'part-00001'}.json" in mine[5], "after all files"
    assert [line.split()[0] for line in seen[0][-2:]] == ["rm_file", "delete_objects"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "point", [p if p in QUICK_POINTS else pytest.param(p, marks=pytest.mark.full) for p in POINTS], ids=str
)
def test_killed_at_any_change_of_the_store_a_whole_state_is_found(
    point: tuple[int, int, bool], data_url: str, bucket_url: str, saved_unbroken: str
) -> None:
    """SIGKILL to the rank in the middle of the call, before or after it took effect there."""
    cfg = loop.config(f"{bucket_url}/run", data_url, *SAVES)
    results = loop.attempt(cfg, 2, Faults(die_at_change=point, small_parts=True))
    assert results[point[0]] is None, "the rank was killed"
    _, states = history.read(f"{bucket_url}/run/checkpoints")
    assert loop.finish(cfg, 2, Faults(small_parts=True)) == saved_unbroken, f"after a death with states {states}"


# Damage

DAMAGES: dict[str, Callable[[str], None]] = {
    "a flipped byte": lambda url: _change(f"{url}/00001-000.f32", lambda data: bytes([data[0] ^ 1]) + data[1:]),
    "a missing file": lambda url: storage.delete(f"{url}/00001-000.f32"),
    "a truncated manifest": lambda url: _change(f"{url}/manifest.json", lambda data: data[:-40]),
    "a foreign format": lambda url: storage.publish(f"{url}/manifest.json", b'{"state_dict_metadata": {}}'),
}


def _change(url: str, edit: Callable[[bytes], bytes]) -> None:
    storage.publish(url, edit(storage.read(url)))


@pytest.fixture(scope="session")
def grown_unbroken(data_url: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("grown")
    return loop.finish(loop.config((folder / "run").as_uri(), data_url, "train.steps=8"), 2)


@pytest.mark.parametrize(
    "damage", [d if d == "a flipped byte" else pytest.param(d, marks=pytest.mark.full) for d in DAMAGES]
)
def test_a_damaged_state_is_refused_by_name_and_the_one_before_leads_to_the_same_end(
    damage: str, data_url: str, bucket_url: str, tmp_path: Path, grown_unbroken: str
) -> None:
    run_url = f"{bucket_url}/run"
    loop.finish(loop.config(run_url, data_url, "train.steps=6"), 2)
    DAMAGES[damage](f"{run_url}/checkpoints/000000006-0001")
    end = loop.finish(loop.config(run_url, data_url, "train.steps=8"), 2, Faults(record=str(tmp_path)))
    said = (tmp_path / "log-0").read_text()
    assert "state 000000006-0001 is refused, the one before it is used" in said
    assert "continuing at step 4" in said
    assert end == grown_unbroken
