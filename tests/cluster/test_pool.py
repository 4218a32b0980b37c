"""The actor pool: every task once, whatever happens to the workers; what fails is named."""

from functools import partial
from pathlib import Path

import pytest

from ddpm_dist.cluster.pool import ActorPool, Done, Failed
from ddpm_dist.config import ClusterConfig
from ddpm_dist.errors import ClusterError, SnapshotError
from tests.cluster.pool_workers import Dying, Picky, Sometimes, Together, broken, square
from tests.ray_local import RayCluster

pytestmark = pytest.mark.usefixtures("ray_cluster")
CLUSTER = ClusterConfig(wait_seconds=30)


def test_every_task_once_over_all_workers(tmp_path: Path) -> None:
    with ActorPool(partial(Together, str(tmp_path), 3), (1, 3), CLUSTER) as pool:
        outcomes = list(pool.map(range(60)))
        again = list(pool.map([7]))
    assert sorted(outcome.task for outcome in outcomes) == list(range(60))
    values = {outcome.task: outcome.value for outcome in outcomes if isinstance(outcome, Done)}
    assert all(value[0] == task * task for task, value in values.items())
    assert len({pid for _, pid in values.values()}) == 3
    assert isinstance(again[0], Done)
    assert again[0].value[0] == 49


@pytest.mark.parametrize(("error", "tries_needed"), [("may pass", 3), ("foreign", 3), ("own", 1)])
def test_what_fails_is_named_and_the_rest_goes_on(tmp_path: Path, error: str, tries_needed: int) -> None:
    with ActorPool(partial(Sometimes, str(tmp_path), 99, error), (1, 2), CLUSTER) as pool:
        outcomes = list(pool.map([0, 2, 4, 1, 6, 3]))
    failed = {outcome.task: str(outcome.error) for outcome in outcomes if isinstance(outcome, Failed)}
    assert failed.keys() == {1, 3}
    assert "no 1" in failed[1]
    assert sorted(outcome.task for outcome in outcomes if isinstance(outcome, Done)) == [0, 2, 4, 6]
    assert len((tmp_path / "1").read_text()) == tries_needed


def test_what_may_pass_is_tried_again(tmp_path: Path) -> None:
    with ActorPool(partial(Sometimes, str(tmp_path), 2, "may pass"), (1, 2), CLUSTER) as pool:
        outcomes = list(pool.map(range(4)))
    assert all(isinstance(outcome, Done) for outcome in outcomes)
    assert len(outcomes) == 4


def test_stops_where_nothing_works(tmp_path: Path) -> None:
    pool = ActorPool(partial(Sometimes, str(tmp_path), 99, "own"), (1, 2), CLUSTER)
    with pool, pytest.raises(ClusterError, match="the first 3 tasks all failed; the last one: no "):
        list(pool.map([1, 3, 5, 7, 9, 11, 13]))


def test_tasks_of_lost_workers_go_to_others(tmp_path: Path) -> None:
    with ActorPool(partial(Dying, str(tmp_path)), (1, 2), CLUSTER) as pool:
        outcomes = list(pool.map(range(8)))
        assert pool.losses >= 1
    assert sorted(outcome.task for outcome in outcomes) == list(range(8))
    assert all(isinstance(outcome, Done) for outcome in outcomes)


def test_a_worker_that_refuses_is_let_go_and_its_task_is_done(tmp_path: Path) -> None:
    with ActorPool(partial(Picky, str(tmp_path), all_refuse=False), (1, 2), CLUSTER) as pool:
        outcomes = list(pool.map(range(12)))
    assert sorted(outcome.task for outcome in outcomes if isinstance(outcome, Done)) == list(range(12))


def test_ends_when_every_worker_refuses(tmp_path: Path) -> None:
    pool = ActorPool(partial(Picky, str(tmp_path), all_refuse=True), (1, 1), CLUSTER)
    with pool, pytest.raises(ClusterError, match="every worker was refused; the last one: it has another device"):
        list(pool.map(range(3)))


def test_an_error_of_the_factory_ends_it_at_once_and_its_actors(ray_cluster: RayCluster) -> None:
    pool = ActorPool(broken, (1, 2), CLUSTER)
    with pool, pytest.raises(SnapshotError) as error:
        list(pool.map(range(3)))
    for process in ray_cluster.workers():  # while `error` holds the pool's frames
        process.wait(20)
    assert "there is no snapshot" in str(error.value)


def test_says_what_it_waits_for() -> None:
    greedy = ClusterConfig(wait_seconds=2, cpus_per_worker=64)
    with ActorPool(square, (1, 2), greedy) as pool, pytest.raises(ClusterError) as error:
        list(pool.map(range(3)))
    assert "0 of at least 1 workers have started; each needs 64 CPU (" in str(error.value)
    assert "of 4)" in str(error.value)


def test_works_with_fewer_than_the_maximum_and_below_the_minimum_not() -> None:
    two_fit = ClusterConfig(wait_seconds=60, cpus_per_worker=2)
    with ActorPool(square, (1, 5), two_fit) as pool:
        assert len(list(pool.map(range(20)))) == 20
        assert 1 <= pool.alive <= 2
    impatient = ClusterConfig(wait_seconds=3, cpus_per_worker=2)
    with ActorPool(square, (3, 5), impatient) as pool, pytest.raises(ClusterError, match="of at least 3 workers have"):
        list(pool.map(range(1000)))


def test_a_fraction_of_a_cpu_is_enough(tmp_path: Path) -> None:
    cluster = ClusterConfig(wait_seconds=60, cpus_per_worker=0.25)
    with ActorPool(partial(Together, str(tmp_path), 5), (5, 6), cluster) as pool:
        values = [outcome.value for outcome in pool.map(range(300)) if isinstance(outcome, Done)]
    assert len(values) == 300
    assert len({pid for _, pid in values}) >= 5


def test_no_actor_is_left(ray_cluster: RayCluster) -> None:
    with ActorPool(square, (1, 2), CLUSTER) as pool:
        next(iter(pool.map(range(30))))
        assert ray_cluster.workers()
    for process in ray_cluster.workers():
        process.wait(20)
